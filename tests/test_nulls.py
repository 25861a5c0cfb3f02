"Nulls against what they promise: who is matched, what is cut, shuffled and grafted, what is left."
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from superpos.core import mean_interval
from superpos.graft import Mixture
from superpos.model import CifarResNet, SmallAlexNet, fingerprint
from superpos.nulls import (
    against_nulls,
    answers,
    cases,
    controls,
    cut_in_two,
    effects,
    judged,
    made_singles,
    permuted,
    shuffled,
)
from superpos.target import Target, ablations


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    net = SmallAlexNet(width=4).eval().requires_grad_(False)
    return Target.of(net, "features.6:3", (64, 64))


@pytest.fixture(scope="module")
def groups(target):
    g = torch.Generator().manual_seed(1)
    tint = [torch.tensor(t)[:, None, None] for t in ([1., .2, .2], [.2, .2, 1.], [.4, .4, .4])]
    return tuple(target.path.crop(torch.rand(n, 3, 64, 64, generator=g)*t)
                 for n, t in zip((10, 8, 14), tint))


def rng(seed=0): return np.random.default_rng(seed)


def same_images(a, b):
    return torch.equal(*(torch.cat(x)[:, 0, 0, 0].sort().values for x in (a, b)))


def test_answers_are_in_deviations_of_the_background(target, groups):
    found = answers(target, groups)
    own, other, background = (target.path(x, unit=5).double() for x in groups)
    assert found.shape == (24, 2)
    for k, x in enumerate((own, other)):
        wanted = (x.mean() - background.mean())/background.std()
        assert found[5, k] == pytest.approx(wanted.item(), rel=1e-4)


def test_controls_answer_most_nearly_as_much(target, groups):
    found, chosen = answers(target, groups), controls(target, groups, 5)
    far = np.linalg.norm(found - found[3], axis=1)
    assert [c.unit for c in chosen] == np.argsort(far)[1:6].tolist()
    assert all(c.path is target.path and c.per == target.per for c in chosen)


def test_a_constant_unit_is_no_control(target, groups):
    net = SmallAlexNet(width=4).eval().requires_grad_(False)
    net.load_state_dict(target.path.model.state_dict())
    net.features[6].weight[:20] = 0
    dead = Target.of(net, "features.6:22", (64, 64))
    assert {c.unit for c in controls(dead, groups, 10)} == {20, 21, 23}


@pytest.mark.parametrize("by,value", [("brightness", lambda x: x.mean((1, 2, 3))),
                                      ("hue", lambda x: (x[:, 0] - x[:, 2]).mean((1, 2)))])
def test_one_meaning_is_cut_where_halves_differ_most(groups, by, value):
    high, low = cut_in_two(groups[0], by, rng())
    assert len(high) == len(low) == 5 and value(high).min() >= value(low).max()
    assert same_images([high, low], [groups[0]])


def test_a_random_cut_and_groups_that_are_dealt_out_anew(groups):
    own, other, _ = groups
    first, second = cut_in_two(own, "random", rng(3))
    assert torch.equal(first, cut_in_two(own, "random", rng(3))[0]) and len(second) == 5
    a, b = permuted(own, other, rng())
    assert (len(a), len(b)) == (10, 8) and not torch.equal(a, own)
    assert same_images([a, b], [own, other])
    with pytest.raises(ValueError, match="brightness, hue or random, got 'smell'"):
        cut_in_two(own, "smell", rng())


@pytest.mark.parametrize("deep", [False, True], ids=["chain", "residual"])
def test_weights_before_the_unit_are_shuffled_within_layers(target, deep):
    if deep:
        target = Target.of(CifarResNet(20).eval().requires_grad_(False), "layer1.1.conv2:3",
                           (32, 32))
    before, made = fingerprint(target.path.model), shuffled(target, rng())
    assert fingerprint(target.path.model) == before and (made.unit, made.per) == (3, "kernel")
    *earlier, last = target.layout.names
    for name in earlier:
        a, b = (t.path.model.get_parameter(name).flatten() for t in (target, made))
        assert not torch.equal(a, b) and torch.equal(a.sort().values, b.sort().values)
    assert torch.equal(target.weights[last], made.weights[last])
    assert made.path.window == target.path.window


def test_made_singles_say_the_larger_of_two_that_are_alike(target, groups):
    found, x = made_singles(target, groups, 2), torch.cat(groups)
    maps = target.path(x)[:, :, None, None]
    alike = np.corrcoef(maps[:, :, 0, 0].T)
    parts = set()
    for case in found:
        assert case.null == "made single" and [len(g) for g in case.groups] == [9, 9, 14]
        values, a = case.target.path(x, unit=case.target.unit), case.target.unit
        b = next(u for u in range(24) if u != a and torch.allclose(
            Mixture.of(maps, (a, u), "max").value(maps).flatten(), values, atol=1e-4))
        assert alike[a, b] > np.median(alike[alike < .999]) and 3 not in (a, b)
        parts |= {a, b}
        strong = torch.cat(case.groups[:2])
        assert case.target.respond(strong).min() >= case.target.respond(case.groups[2]).max() - 1e-4
        said = Mixture.of(maps, (a, b), "max").responses(target.path(strong)[:, :, None, None])
        lead = (said[:, 0] - said[:, 1]).flatten()
        assert lead[:9].min() >= lead[9:].max()
    assert len(parts) == 4


def test_a_recipe_meets_every_null_and_never_its_own_test_images(target, groups):
    seen = []
    def recipe(of, learn, test):
        assert all(len(a) >= len(b) > 0 for a, b in zip(learn, test))
        for a, b in zip(learn, test):
            assert not (a.flatten(1)[:, None] == b.flatten(1)).all(-1).any()
        seen.append((of, [len(x) for x in learn]))
        return dict(score=float(of.unit))
    table = against_nulls(recipe, target, *groups, count=2)
    assert table.null.value_counts().to_dict() == {
        "unit": 1, "control": 2, "cut by brightness": 2, "cut by hue": 2, "cut by random": 2,
        "permuted": 2, "shuffled": 1, "made single": 1}
    assert table.null[0] == "unit" and seen[0][0] is target and seen[0][1] == [6, 5, 8]
    assert (table.unit == str(target)).all() and table.score[0] == 3
    np.testing.assert_allclose(table.loc[0, ["answers_own", "answers_other"]].astype(float),
                               answers(target, groups)[3])
    same = against_nulls(lambda of, *_: dict(score=float(of.unit)), target, *groups, count=2)
    pd.testing.assert_frame_equal(table, same)


def test_what_is_made_and_drawn_follows_the_seed(target, groups):
    a, b, c = ([case.groups[0].sum().item() for case in cases(target, groups, 2, seed)]
               for seed in (0, 0, 1))
    assert a == b != c


def test_the_effect_is_the_unit_less_its_nulls_over_units():
    rows = [dict(unit=u, null=n, score=s) for u, values in
            {"a": (.9, .5, .3, .1), "b": (.8, .2, .4, .2), "c": (.7, .6, .2, .3)}.items()
            for n, s in zip(("unit", "control", "control", "permuted"), values)]
    found = effects(pd.DataFrame(rows), "score")
    less = [.9 - .4, .8 - .3, .7 - .4]
    assert found.loc["control", ["effect", "low", "high"]].tolist() == pytest.approx(
        mean_interval(less))
    assert found.loc["permuted", "value"] == pytest.approx(.2) and (found.units == 3).all()
    half = stats.sem(less)*stats.t.ppf(.975, 2)
    assert found.loc["control", "high"] - found.loc["control", "effect"] == pytest.approx(half)
    one = effects(pd.DataFrame(rows[:4]), "score")
    assert one.loc["control", "effect"] == pytest.approx(.5) and np.isnan(one.loc["control", "low"])


def test_a_judged_recipe_tells_the_least_of_all_ablations(target, groups):
    recipe = judged("snip", .4)
    found = recipe(target, groups, groups)
    gains = {"gain", *(f"gain, {a}" for a in ablations[1:])}
    assert {*found} == gains | {"least", "correlation"}
    assert found["least"] == min(found[k] for k in gains)
    everything = judged("magnitude", 1.)(target, groups, groups)
    assert [everything[k] for k in gains] == pytest.approx([0]*4)
    assert everything["correlation"] > .999
    learned = judged("learned", .4, steps=4, ablation="mean")(target, groups, groups)
    assert {*learned} == {*found}
