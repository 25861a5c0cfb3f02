"Recording, masks and circuits against brute force, simulation and scipy, and what they refuse."
import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import stats
from torch import nn
from torchvision.models import VisionTransformer

from superpos import circuit
from superpos.activation import record, strongest_patches
from superpos.circuit import (
    Circuit,
    against_controls,
    auroc,
    cross_ablation,
    effective_mask,
    extract,
    faithfulness,
    is_faithful,
    kept_fractions,
    matched_mask,
    overlap,
    overlaps,
    scorecard,
    skeleton,
)
from superpos.field import pathway, receptive_field
from superpos.mask import random_like, soft_mask, undecided
from superpos.model import CifarResNet, ResNet8, SmallAlexNet, Unit, fingerprint, layer_outputs
from superpos.score import keep_top, magnitude
from superpos.sparsify import sparsify
from superpos.target import Layout, Target, ablations


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return SmallAlexNet(width=4).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def path(net): return pathway(net, "features.6", (64, 64))


@pytest.fixture(scope="module")
def target(path): return Target(path, 3)


def crops(path, n, seed=0):
    return path.crop(torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))


# ---- recording

def test_recording_does_not_depend_on_the_batch(net):
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(7)]
    a, b = (record(net, "features.6", images, batch=n).values for n in (2, 64))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert record(net, "features.6", images).top(3, 7).tolist() == np.argsort(-a[:, 3]).tolist()


def test_values_that_are_not_finite_are_named(net):
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8)]*3
    def prepare(x):
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 1, torch.nan, x/255)
    with pytest.raises(FloatingPointError,
                       match="'features.6' is not finite for image 1 and 0 more"):
        record(net, "features.6", images, prepare)
    with pytest.raises(ValueError, match="no images"): record(net, "features.6", [])


def test_strongest_patch_is_the_best_of_all_positions(net):
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
              for h, w in ((64, 64), (70, 90), (101, 67))]
    prepare = lambda x: x/255
    found = strongest_patches(net, "features.6:2", images, prepare)
    field = receptive_field(net, "features.6")
    for image, response, corner in zip(images, found.response, found.corner):
        values = layer_outputs(net, ["features.6"], prepare(image[None]))["features.6"][0, 2]
        inside = {(i, j): values[i, j].item() for i, j in np.ndindex(*values.shape)
                  if all(a >= 0 and b <= n
                         for (a, b), n in zip(field.window((i, j)), image.shape[1:]))}
        best = max(inside, key=inside.get)
        assert inside[best] == response.item()
        assert [w[0] for w in field.window(best)] == corner.tolist()


# ---- masks

@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
def test_views_share_memory_and_flatten_is_their_inverse(shapes):
    layout = Layout(tuple(map(str, range(len(shapes)))), tuple(shapes), "kernel")
    flat = torch.arange(float(len(layout)))
    assert torch.equal(layout.flatten(layout.views(flat)), flat)
    layout.views(flat)["0"][:] = -1
    assert (flat[:layout.sizes[0]] == -1).all()


def test_soft_masks_hold_no_denormal_numbers():
    values = soft_mask(torch.linspace(-5, 5, 1001), 200)
    assert ((values == 0) | (values >= 1e-6)).all() and undecided(torch.tensor([-1., 1.]), 200) == 0


# ---- learning

def groups(path):
    return crops(path, 12, 1), crops(path, 12, 2).flip(1) * .5, crops(path, 16, 3) * .2


@pytest.mark.parametrize("objective", ["preserve", "separate"])
def test_learning_is_exact_in_size_and_repeatable(net, path, objective):
    before = fingerprint(net)
    how = dict(keep=.2, objective=objective, steps=12)
    a, b, c = (sparsify(Target(path, 3), *groups(path), **how, seed=s) for s in (0, 0, 1))
    assert a.mask.sum() == round(.2*len(a.layout)) and torch.equal(a.mask, b.mask)
    assert (a.loss == b.loss).all() and (a.loss != c.loss).any()
    assert fingerprint(net) == before


def test_an_undecided_mask_is_refused(path):
    with pytest.raises(RuntimeError, match="undecided"):
        sparsify(Target(path, 3), *groups(path), keep=.2, steps=3, beta=2).check()


@pytest.mark.parametrize("change,message", [
    (dict(own=torch.zeros(1, 3, 35, 35)), "'own' needs at least two images, got 1"),
    (dict(keep=0), "got 0"), (dict(keep=1.5), "got 1.5"),
    (dict(keep=1e-9), "keeps nothing"), (dict(objective="win"), "got 'win'"),
    (dict(steps=1), "got 1")])
def test_bad_input_is_refused(path, change, message):
    given = dict(zip(("own", "other", "background"), groups(path)), steps=2)
    with pytest.raises(ValueError, match=message): sparsify(Target(path, 3), **given | change)


def test_a_constant_unit_is_refused(path):
    same = torch.zeros(4, *crops(path, 1).shape[1:])
    with pytest.raises(ValueError, match="same value for all images"):
        sparsify(Target(path, 3), same, same, same, steps=2)


def test_a_diverging_loss_is_explained(path):
    with pytest.raises(FloatingPointError, match="smaller rate"):
        sparsify(Target(path, 3), *groups(path), optimiser="sgd", rate=1e38, steps=12)


# ---- circuits

def test_card_against_scipy():
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(n, generator=g) + m for n, m in ((20, 3), (30, 1), (50, 0))]
    masked = [w*.5 + torch.randn(len(w), generator=g)*.3 for w in whole]
    found, line = scorecard(*zip(masked, whole)), stats.linregress(whole[0], masked[0])
    assert found["slope"] == pytest.approx(line.slope, rel=1e-5)
    assert found["correlation"] == pytest.approx(line.rvalue, rel=1e-5)
    assert (found["auroc_other"]
            == pytest.approx(stats.mannwhitneyu(masked[0], masked[1]).statistic/600))
    assert auroc(torch.tensor([1.]), torch.tensor([1.])) == .5


def test_circuit_files(net, path, target, tmp_path):
    file, x = tmp_path/"c.safetensors", crops(path, 3)
    circuit = Circuit.of(target, keep_top(magnitude(target), .13), "dogs", "magnitude", seed=1)
    circuit.save(file)
    again = Circuit.load(file, net)
    assert torch.equal(again.mask, circuit.mask) and again.layout == target.layout
    assert str(again.target(path)) == "features.6:3"
    for how in (dict(), dict(ablation="mean", instead=crops(path, 5, 1))):
        torch.testing.assert_close(again.response(path, x, **how),
                                   target.respond(x, circuit.mask, **how))
    whole = file.read_bytes()
    for damaged in (whole[:-5], whole[:20], b"", b"{}"*50):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="not the file of a circuit"): Circuit.load(file, net)
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="belongs to other weights"):
        Circuit.load(file, SmallAlexNet(width=4))
    with pytest.raises(ValueError, match="booleans"):
        Circuit.of(target, torch.ones(3).bool(), "", "")


def test_a_circuit_is_bound_to_biases_too(net, target, tmp_path):
    file = tmp_path/"c.safetensors"
    Circuit.of(target, torch.ones(len(target)).bool(), "", "").save(file)
    shifted = SmallAlexNet(width=4).eval()
    shifted.load_state_dict(net.state_dict())
    Circuit.load(file, shifted)
    with torch.no_grad(): shifted.features[3].bias[0] += 1
    with pytest.raises(ValueError, match="belongs to other weights"): Circuit.load(file, shifted)


def test_images_that_cannot_be_recorded_are_refused(net):
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(3, 70, 64, dtype=torch.uint8)]
    with pytest.raises(ValueError, match=r"image 1 is \(3, 70, 64\)"):
        record(net, "features.6", images)
    with pytest.raises(ValueError, match="no images"): strongest_patches(net, "features.6:0", [])
    with pytest.raises(FloatingPointError, match="features.6:0 is not finite for image 0"):
        strongest_patches(net, "features.6:0", images, lambda x: x*torch.nan)


# ---- circuits: paths, extraction, ablation, overlap

def random_net(seed, bias=True):
    "Strides, paddings, dilation, poolings, a normalisation, biases, at random."
    g = torch.Generator().manual_seed(seed)
    pick = lambda *options: options[torch.randint(len(options), (1,), generator=g).item()]
    torch.manual_seed(seed)
    parts, channels = [], 3
    for k in range(3):
        width = pick(2, 4, 6)
        parts += [nn.Conv2d(channels, width, pick(1, 3), pick(1, 2) if k == 0 else 1, pick(1, 2),
                            pick(1, 2), bias=bias), *([nn.BatchNorm2d(width)] if pick(0, 1)
                                                      else []), pick(nn.ReLU, nn.GELU)()]
        if k < 2:
            parts.append(pick(nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2),
                              nn.Identity()))
        channels = width
    net = nn.Sequential(*parts, nn.Conv2d(channels, 2, 3, padding=1)).eval().requires_grad_(False)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(.5, 2)
            for values in (m.running_mean, m.weight, m.bias): values.normal_()
        elif isinstance(m, nn.Conv2d) and bias: m.bias.normal_()
    return net, str(len(net) - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["weight", "kernel", "filter", "channel"]),
       st.sampled_from([.2, .5, .9]), st.booleans(), st.booleans())
def test_extracted_networks_equal_masked_ones(seed, per, keep, corner, bias):
    net, layer = random_net(seed, bias)
    way = pathway(net, layer, (36, 36), (0, 0) if corner else None)
    assume(way.exact_crop)
    target, g = Target(way, 1, per), torch.Generator().manual_seed(seed)
    mask = torch.rand(len(target), generator=g) < keep
    x = way.crop(torch.randn(3, 3, 36, 36, generator=g))
    small = extract(target, mask)
    torch.testing.assert_close(small(x), target.respond(x, mask), atol=1e-5, rtol=1e-5)
    fewer = sum(m.weight.numel() for m in small if isinstance(m, nn.Conv2d))
    assert fewer <= sum(w.numel() for w in target.weights.values())


@pytest.mark.parametrize("per", ["filter", "channel"])
def test_half_the_channels_make_a_network_of_half_the_width(path, per):
    target = Target(path, 3, per)
    layout = target.layout
    halves = {name: torch.arange(len(p)) % 2 == 0 if len(p) > 3
              else torch.ones(len(p), dtype=torch.bool)
              for name, p in layout.views(torch.ones(len(layout))).items()}
    mask, x = layout.flatten(halves), crops(path, 2)
    small = extract(target, mask)
    assert ([(m.in_channels, m.out_channels) for m in small if isinstance(m, nn.Conv2d)]
            == [(3, 2), (2, 6), (6, 1)])
    torch.testing.assert_close(small(x), target.respond(x, mask), atol=1e-5, rtol=1e-5)


def test_dead_channels_speak_through_their_biases():
    net = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(),
                        nn.Conv2d(2, 1, 3, padding=1)).eval().requires_grad_(False)
    net[0].bias.fill_(1.)
    way = pathway(net, "2", (5, 5), (0, 0))
    target = Target(way, 0, "filter")
    mask, x = torch.tensor([True, False, True]), way.crop(torch.randn(4, 3, 5, 5))
    small = extract(target, mask)
    assert [m.out_channels for m in small if isinstance(m, nn.Conv2d)] == [1, 1]
    torch.testing.assert_close(small(x), target.respond(x, mask))
    net[0].bias.zero_()
    assert not torch.allclose(small(x), target.respond(x, mask))


def test_a_circuit_that_nothing_reaches_is_a_constant(path, target):
    empty, x = torch.zeros(len(target), dtype=torch.bool), crops(path, 3)
    torch.testing.assert_close(extract(target, empty)(x), target.respond(x, empty))


@pytest.mark.parametrize("per", ["weight", "kernel", "filter", "channel"])
@pytest.mark.parametrize("seed", range(4))
def test_effective_entries_are_those_whose_removal_shows(per, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.Conv2d(4, 4, 1), nn.Identity(),
                        nn.Conv2d(4, 1, 1)).eval().double().requires_grad_(False)
    target = Target.of(net, "4:0", (1, 1), per)
    x, mask = torch.randn(3, 3, 1, 1, dtype=torch.double), torch.rand(len(target)) < .5
    # what depends on the image
    slope = lambda m: (lambda y: y - y.mean())(target.respond(x, m))
    without = [mask.clone().index_fill(0, torch.tensor(i), False) for i in range(len(mask))]
    shows = torch.tensor([bool(mask[i])
                          and not torch.allclose(slope(mask), slope(without[i]), atol=1e-12)
                          for i in range(len(mask))])
    assert torch.equal(effective_mask(target, mask), shows)


class Branches(nn.Module):
    "A way around, a concatenation, a linear layer at the end; nothing hides an effect by chance."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1),
                                          nn.Conv2d(3, 2, 1), nn.Conv2d(5, 3, 1))
        self.norm, self.unused, self.e = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

    def forward(self, x):
        a = self.a(x)
        self.unused(a)
        return self.e(self.d(torch.cat([a + self.norm(self.b(a)), self.c(x)], 1)).mean((2, 3)))


@pytest.mark.parametrize("per", ["weight", "kernel", "filter", "channel"])
@pytest.mark.parametrize("seed", range(4))
def test_effective_entries_of_branches_are_those_whose_removal_shows(per, seed):
    torch.manual_seed(seed)
    target = Target.of(Branches().eval().double().requires_grad_(False), "e:1", (2, 2), per)
    x, mask = torch.randn(3, 3, 2, 2, dtype=torch.double), torch.rand(len(target)) < .5
    slope = lambda m: (lambda y: y - y.mean())(target.respond(x, m))
    without = [mask.clone().index_fill(0, torch.tensor(i), False) for i in range(len(mask))]
    shows = torch.tensor([bool(mask[i])
                          and not torch.allclose(slope(mask), slope(without[i]), atol=1e-12)
                          for i in range(len(mask))])
    before = fingerprint(target.path.model)
    assert torch.equal(effective_mask(target, mask), shows)
    assert kept_fractions(target, mask)["effective"] == shows.sum().item()/len(shows)
    assert fingerprint(target.path.model) == before
    assert not effective_mask(target, mask & False).any()


@pytest.mark.parametrize("per", ["weight", "kernel", "filter", "channel"])
def test_a_chain_that_is_run_whole_has_the_same_paths(net, path, per):
    # through a linear layer, so that whole images are run
    whole, part = Target.of(net, "classifier:3", (64, 64), per), Target(path, 3, per)
    layout = whole.layout
    mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(1)) < .6
    mask[-1] = True  # the unit's filter
    found = layout.views(effective_mask(whole, mask))
    assert all(found[name].any() for name in layout.names)
    chain = circuit._alive_in_branches(part, keep := mask[:len(part)])
    assert all((a == b).all() for a, b in zip(chain, circuit._alive(keep, part.layout)))


def test_what_needs_a_chain_says_so():
    way = Target.of(ResNet8(width=4).eval().requires_grad_(False), "stages.1.conv2:0", (32, 32))
    mask, x = torch.ones(len(way), dtype=torch.bool), way.path.crop(torch.rand(2, 3, 32, 32))
    why = "the window is all that is run, though 'relu_3' is not a module"
    with pytest.raises(NotImplementedError, match="a circuit is extracted from a chain of layers "
                       f"only; {why}"):
        extract(way, mask)
    with pytest.raises(NotImplementedError, match="another way of convolving needs a chain of "
                       f"layers; {why}"):
        way.path(x, convolve=lambda *_: x)
    vit = Target.of(VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=8,
                                      mlp_dim=16).eval(),
                    "encoder.layers.encoder_layer_0.mlp.0:0", (16, 16))
    with pytest.raises(NotImplementedError, match="normalisation; '.*' belongs to a "
                       "MultiheadAttention"):
        effective_mask(vit, torch.ones(len(vit)).bool())


def test_a_pathway_convolves_as_it_is_told(path):
    x, seen = crops(path, 2), []
    def plain(name, m, z):
        seen.append(name); return nn.functional.conv2d(z, m.weight, m.bias, m.stride, 0, m.dilation)
    assert torch.equal(path(x, convolve=plain), path(x))
    assert seen == [n for n in path.parameters() if n.endswith("weight")]
    assert torch.equal(path(x, convolve=lambda *a: 2*plain(*a))[:, 3],
                       path(x, unit=3, convolve=lambda name, m, z: 2*plain(name, m, z)[:, 3:4]
                            if name == "features.6.weight" else 2*plain(name, m, z)))


def test_three_counts_of_what_is_kept(path, target):
    found = kept_fractions(target, torch.ones(len(target), dtype=torch.bool))
    every = sum(p.shape[0]*p.shape[1] for n, p in path.parameters().items() if p.ndim == 4)
    assert found == dict(all=len(target)/every, relevant=1., effective=1.)
    with pytest.raises(NotImplementedError, match="'b' does not read"):
        circuit._alive(torch.ones(5).bool(), Layout(("a", "b"), ((2, 1), (1, 3)), "kernel"))


def test_ablation_by_mean_and_resampling_against_hooks(path, target):
    x, ref, sizes = crops(path, 3, 1), crops(path, 5, 2), target.layout.sizes
    mask = torch.rand(len(target), generator=torch.Generator().manual_seed(0)) < .5
    torch.testing.assert_close(target.respond(x, mask | True, "mean", ref), target.respond(x))
    whole = target.respond(ref)
    drawn = torch.randint(5, (3,), generator=torch.Generator().manual_seed(7))
    # nothing kept: the other image's response
    torch.testing.assert_close(target.respond(x, mask & False, "resample", ref, seed=7),
                               whole[drawn])
    # all of the last layer replaced
    last = torch.cat([torch.ones(sum(sizes[:-1])), torch.zeros(sizes[-1])]).bool()
    torch.testing.assert_close(target.respond(x, last, "mean", ref), whole.mean().expand(3))
    torch.testing.assert_close(target.respond(x, mask, "resample", ref, seed=7, batch=1),
                               target.respond(x, mask, "resample", ref, seed=7))


def test_faithfulness_of_everything_and_of_its_complement(path, target):
    found = faithfulness(target, torch.ones(len(target), dtype=torch.bool), *groups(path))
    assert [*found] == ["circuit", *(f"circuit, {a}" for a in ablations[1:]), "complement",
                        "random"]
    for name in (*(name for name in found if name.startswith("circuit")), "random"):
        assert found[name]["correlation"] == pytest.approx(1, abs=1e-4)
    assert found["complement"]["correlation"] == found["complement"]["slope"] == 0
    assert found["complement"]["auroc_other"] == .5


def test_the_adversary_is_the_hardest_judge(path, target):
    mask = torch.rand(len(target), generator=torch.Generator().manual_seed(2)) < .6
    found = faithfulness(target, mask, *groups(path))
    drawn, worst = found["circuit, resample"], found["circuit, adversarial"]
    assert worst["mean_own"] < drawn["mean_own"] and worst["mean_other"] > drawn["mean_other"]
    assert worst["auroc_other"] <= drawn["auroc_other"]


def test_faithful_is_what_holds_under_every_ablation():
    good = dict(auroc_other=.9, auroc_background=.8, correlation=.7)
    cards = {"circuit": good, "circuit, mean": good, "circuit, resample": good,
             "complement": dict.fromkeys(good, 0.)}
    assert is_faithful(cards) and not is_faithful(cards, correlation=.71)
    for measure in good:
        assert not is_faithful(cards | {"circuit, mean": good | {measure: .3}})


def test_a_residual_network_has_a_card_for_each_ablation():
    torch.manual_seed(0)
    deep = Target.of(CifarResNet(20).eval().requires_grad_(False), "layer1.2.conv1:3", (32, 32))
    x = [deep.path.crop(torch.rand(4, 3, 32, 32)*bright) for bright in (1., .6, .2)]
    found = faithfulness(deep, torch.ones(len(deep), dtype=torch.bool), *x)
    assert all(found[name]["correlation"] > .999 for name in found if name.startswith("circuit"))


def test_a_constant_response_has_no_correlation_and_no_slope():
    a, flat = torch.randn(9), torch.full((9,), .1)
    for own in ((a, flat), (flat, a), (flat, flat)):
        found = scorecard(own, (a, a), (a, a))
        assert found["correlation"] == found["slope"] == 0


def test_null_counts_the_control_units_that_do_as_well(target):
    recipe = lambda of: dict(score=float(of.unit))
    found = against_controls(recipe, target, controls=[0, 1, 5])["score"]
    assert found == dict(value=3., controls=[0., 1., 5.], excess=1., p=.5)
    assert 3. not in against_controls(recipe, target, controls=23)["score"]["controls"]
    with pytest.raises(ValueError, match="1..23 control units"):
        against_controls(lambda _: {}, target, controls=24)


def test_expected_overlap_by_simulation():
    layout, g = Layout(("a", "b"), ((4, 5), (1, 12)), "kernel"), torch.Generator().manual_seed(0)
    a, b = torch.rand(32, generator=g) < .4, torch.rand(32, generator=g) < .5
    drawn = [random_like(a, layout, i) for i in range(3000)]
    for row, part in zip(overlap(a, b, layout), (slice(0, 20), slice(20, 32), slice(0, 32))):
        simulated = np.array([(d & b)[part].sum().item()/(d | b)[part].sum().item() for d in drawn])
        assert row["expected"] == pytest.approx(simulated.mean(), abs=.006)
        assert row["p"] == pytest.approx((simulated >= row["jaccard"] - 1e-12).mean(), abs=.03)
        assert ((row["low"] <= simulated) & (simulated <= row["high"])).mean() >= .94
    assert overlap(a, a, layout)[-1]["jaccard"] == 1 and overlap(a, ~a, layout)[-1]["jaccard"] == 0
    assert all(np.isfinite(list(r.values())[1:]).all()
               for r in overlap(a & False, a & False, layout))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.sampled_from([0, .1, .5, .95, 1]),
       st.sampled_from([.05, .5, 1]), st.integers(0, 10**6))
def test_overlap_equals_its_definition(sizes, first, second, seed):
    layout = Layout(tuple(map(str, range(len(sizes)))), tuple((1, n) for n in sizes), "kernel")
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(len(layout), generator=g) < keep for keep in (first, second))
    every, found = np.ones(1), overlap(a, b, layout)
    for i, (x, y) in enumerate([*zip(a.split(sizes), b.split(sizes)), (a, b)]):
        pmf = (stats.hypergeom(len(x), int(x.sum()), int(y.sum())).pmf(np.arange(int(x.sum()) + 1))
               if i < len(sizes) else every)
        if i < len(sizes): every = np.convolve(every, pmf)
        shared, both = np.arange(len(pmf)), int((x & y).sum())
        jaccard = shared/np.maximum(1, int(x.sum() + y.sum()) - shared)
        assert found[i]["jaccard"] == both/max(1, int((x | y).sum()))
        assert found[i]["expected"] == pytest.approx(jaccard @ pmf, rel=1e-9)
        assert found[i]["p"] == pytest.approx(pmf[both:].sum(), rel=1e-9)
        for end, q in (("low", .025), ("high", .975)):
            near = [jaccard[min(np.searchsorted(pmf.cumsum(), q + e), len(pmf) - 1)]
                    for e in (-1e-9, 1e-9)]
            assert near[0] <= found[i][end] <= near[1]


def test_matched_masks_keep_layers_and_scores():
    layout, g = Layout(("a", "b"), ((10, 10), (1, 50)), "kernel"), torch.Generator().manual_seed(0)
    scores, mask = torch.rand(150, generator=g), torch.rand(150, generator=g) < .3
    new = matched_mask(mask, layout, scores, 1)
    assert not torch.equal(new, mask)
    assert ([int(p.sum()) for p in new.split(layout.sizes)]
            == [int(p.sum()) for p in mask.split(layout.sizes)])
    assert torch.equal(matched_mask(mask, layout, scores, bins=150), mask)
    assert abs(scores[new].mean() - scores[mask].mean()) < .03
    with pytest.raises(ValueError, match="no pairs of the kind 'x'"): overlaps({"x": []}, layout)


def test_removing_shared_entries_or_sparing_them(path, target):
    own, other, background = groups(path)
    every = torch.ones(len(target), dtype=torch.bool)
    asked = target, dict(a=every, b=every), dict(a=own, b=other), background
    np.testing.assert_allclose(cross_ablation(*asked), 1, atol=1e-5)
    np.testing.assert_allclose(cross_ablation(*asked, alone=False), 0, atol=1e-5)
    with pytest.raises(ValueError, match="answers to 'a' as to the background"):
        cross_ablation(target, dict(a=every), dict(a=background), background)


def test_a_skeleton_needs_a_chain():
    for net, layer in ((ResNet8(width=4), "stages.1.conv2"), (SmallAlexNet(width=4), "classifier")):
        way = Target.of(net.eval().requires_grad_(False), f"{layer}:0", (32, 32))
        with pytest.raises(NotImplementedError, match="skeleton follows chains of convolutions"):
            skeleton(way, torch.ones(len(way), dtype=torch.bool), torch.rand(2, 3, 32, 32))


def test_the_skeleton_of_a_small_circuit_is_the_circuit(path, target):
    layout, x = target.layout, crops(path, 4)
    mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)) < .6
    bones = skeleton(target, mask, x, nodes=100, edges=100)
    alive = effective_mask(target, mask)
    assert len(bones.edges) <= alive.sum() and bones.share == pytest.approx(1, abs=1e-4)
    for layer, reader, read, _ in bones.edges:
        assert layout.views(mask)[layout.names[layer]][0 if layer == len(layout.names) - 1
                                                       else bones.nodes[layer + 1][reader],
                                                       bones.nodes[layer][read]]
    assert all(len(n) <= 2 for n in skeleton(target, mask, x, nodes=2).nodes)
    with pytest.raises(ValueError, match="nothing to draw"):
        skeleton(target, mask & False, x)


def written(file):
    "What a circuit's file holds: its description, digest and bits."
    with safe_open(file, "pt") as f: return f.metadata(), f.get_tensor("mask")


def write(file, about, bits):
    "A file with a digest that fits."
    digest = circuit._digest(about, bits.numpy())
    save_file({"mask": bits}, file, metadata={"circuit": about, "digest": digest})


def test_a_file_that_was_changed_is_refused(net, target, tmp_path):
    file, mask = tmp_path/"c.safetensors", keep_top(magnitude(target), .2)
    Circuit.of(target, mask, "dogs", "magnitude", keep=.2).save(file)
    saved, bits = written(file)
    write(file, saved["circuit"], bits)
    assert torch.equal(Circuit.load(file, net).mask, mask)
    flipped = bits.clone()
    flipped[5] ^= 4
    other = {**saved, "circuit": saved["circuit"].replace("features.6:3", "features.6:2")}
    kept = {**saved, "circuit": saved["circuit"].replace("0.2", "0.1")}
    assert len({saved["circuit"], other["circuit"], kept["circuit"]}) == 3
    for about, mask in ((saved, flipped), (other, bits), (kept, bits)):
        save_file({"mask": mask}, file, metadata=about)
        with pytest.raises(ValueError, match=r"c.safetensors is not .* changed after it was writ"):
            Circuit.load(file, net)
    for about in ({"circuit": saved["circuit"]}, None):
        save_file({"mask": bits}, file, metadata=about)
        with pytest.raises(ValueError, match="it has no digest of what it holds"):
            Circuit.load(file, net)


def test_a_full_disk_is_named_with_the_circuit(target, tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path/"c.safetensors"
    found = Circuit.of(target, torch.ones(len(target)).bool(), "", "")
    found.save(file)
    before, limit = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match=r"large: '.*c\.safetensors'"): found.save(file)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def elsewhere(device):
    "A network on another device, and a circuit of it."
    way = pathway(SmallAlexNet(width=4).eval().requires_grad_(False), "features.6", (64, 64))
    way.model.to(device)
    target = Target(way, 3)
    mask = torch.arange(len(target)) % 3 > 0
    return target, Circuit(Unit("features.6", 3), mask, target.layout, "", "", "")


def test_masks_go_to_the_device_of_the_weights():
    target, found = elsewhere("meta")
    assert found.mask.device.type == "cpu"
    x = target.path.crop(torch.rand(2, 3, 64, 64, device="meta"))
    assert found.response(target.path, x).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_circuits_on_a_gpu(tmp_path):
    target, found = elsewhere("cuda")
    way = target.path
    x, other, dark = (way.crop(torch.rand(6, 3, 64, 64, device="cuda")) for _ in range(3))
    cpu = Target.of(copy.deepcopy(way.model).cpu(), "features.6:3", (64, 64))
    torch.testing.assert_close(found.response(way, x).cpu(), found.response(cpu.path, x.cpu()))
    assert kept_fractions(target, found.mask)["relevant"] == pytest.approx(found.keep)
    assert skeleton(target, found.mask, x).share > 0
    masks = torch.rand(3, len(target), device="cuda")
    torch.testing.assert_close(target(x, masks), torch.stack([target(x, m) for m in masks]))
    cards = faithfulness(target, found.mask, x, other, dark)
    plain = faithfulness(cpu, found.mask, x.cpu(), other.cpu(), dark.cpu())
    for name in ("circuit, mean", "circuit, resample", "circuit, adversarial"):
        assert cards[name] == pytest.approx(plain[name], abs=1e-3)
    for ablation in ablations:
        learned = sparsify(target, x, other, dark, keep=.3, steps=4, ablation=ablation)
        again = Circuit.of(target, learned.mask, "", "")
        again.save(file := tmp_path/"c.safetensors")
        assert Circuit.load(file, way.model).response(way, x).device.type == "cuda"


@pytest.mark.parametrize("change", [dict(per="pixel"), dict(unit=7), dict(names=5),
                                    dict(shapes=[[-1, 2]]*3), dict(settings="rm"),
                                    dict(unit="features.6:999"), dict(unit="features.3:0"),
                                    dict(shapes=[[10**9, 10**9]]*3)])
def test_hostile_files_are_refused(net, target, tmp_path, change):
    file = tmp_path/"c.safetensors"
    Circuit.of(target, torch.ones(len(target)).bool(), "", "").save(file)
    saved, bits = written(file)
    write(file, json.dumps(json.loads(saved["circuit"]) | change), bits)
    with pytest.raises(ValueError) as refused: Circuit.load(file, net)
    assert "digest" not in str(refused.value) and "changed" not in str(refused.value)
    for wrong in (bits[:-1], bits.float()):
        write(file, saved["circuit"], wrong)
        with pytest.raises(ValueError, match="not the file of a circuit: .* are not 72 bits"):
            Circuit.load(file, net)
    write(file, "["*100_000, bits)
    with pytest.raises(ValueError, match="not the file of a circuit"): Circuit.load(file, net)
