"Grafts against what they are made of, computed by hand."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from superpos.dissect import dissect
from superpos.field import pathway
from superpos.graft import (
    Mixture,
    choose_pairs,
    graft,
    layer_maps,
    part_difference,
    strongest_places,
    two_groups,
)
from superpos.model import CifarResNet, layer_outputs
from superpos.target import Target


def network(bias=True, stride=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(),
                         nn.Conv2d(6, 8, 3, stride, 1, bias=bias), nn.ReLU(),
                         nn.Conv2d(8, 4, 3)).eval().requires_grad_(False)


def inputs(n=40, size=12): return torch.randn(n, 3, size, size,
                                              generator=torch.Generator().manual_seed(1))


def values(net, x, layer="2"): return layer_outputs(net, [layer], x)[layer]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("level", [None, .99])
@pytest.mark.parametrize("kind,parts,weights", [
    ("sum", (1, 5), (1, .3)), ("sum", (7, 0, 2), None), ("max", (3, 2), (1, .5)),
    ("max", (2, 3), (2, 1)), ("and", (0, 7), (1, 1)), ("scaled", (4,), (3,))])
def test_a_graft_says_what_its_parts_make(kind, parts, weights, level, bias):
    net, x = network(bias, stride=2), inputs()
    before = values(net, x)
    mixture = Mixture.of(before, parts, kind, weights, level)
    scale = [before[:, p].std().item() if level is None
             else before[:, p].flatten().sort().values[round(level*before[:, p].numel()) - 1].item()
             - before[:, p].mean().item() for p in parts]
    said = [w*(before[:, p] - before[:, p].mean())/s
            for p, s, w in zip(parts, scale, weights or (1,)*len(parts))]
    mixed = dict(sum=sum, scaled=sum, max=lambda v: torch.maximum(*v),
                 **{"and": lambda v: torch.minimum(*v)})[kind](said)
    wanted = mixed*scale[0] + before[:, parts[0]].mean()

    made, unit = graft(net, "2", mixture)
    after = values(made, x, unit.layer)
    torch.testing.assert_close(mixture.value(before), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[:, unit.index], wanted, rtol=1e-4, atol=1e-4)
    for p in parts[1:]:
        torch.testing.assert_close(after[:, p], torch.full_like(after[:, p], before[:, p].mean()),
                                   rtol=1e-4, atol=1e-4)
    rest = [u for u in range(8) if u not in parts]
    torch.testing.assert_close(after[:, rest], before[:, rest], rtol=1e-4, atol=1e-5)


def test_the_network_before_the_layer_and_the_given_one_stay_as_they_were():
    net, x = network(bias=False), inputs()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    for kind in ("sum", "max"):
        made, _ = graft(net, "2", Mixture.of(values(net, x), (0, 1), kind))
        assert torch.equal(made[0].weight, net[0].weight) and made[4](torch.ones(1, 8, 3, 3)).shape
        assert made(x).shape == net(x).shape and not any(p.requires_grad for p in made.parameters())
    assert set(net.state_dict()) == set(state) and net[2].bias is None
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_the_gradient_of_a_maximum_is_that_of_the_part_that_drives_it():
    net, x = network(), inputs(8).requires_grad_()
    mixture = Mixture.of(values(net, x.detach()), (2, 6), "max")
    made, unit = graft(net, "2", mixture)
    got, = torch.autograd.grad(values(made, x, unit.layer)[:, unit.index, 5, 5].sum(), x)
    before = values(net, x)
    drives = mixture.responses(before.detach())[:, :, 5, 5].argmax(1)
    factor = torch.tensor([mixture.scale[0]/s for s in mixture.scale])[drives]
    chosen = before[range(8), torch.tensor(mixture.parts)[drives], 5, 5]
    wanted, = torch.autograd.grad((factor*chosen).sum(), x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_grafts_are_cropped_masked_and_dissected_as_units_are(kind):
    net, x = network(), inputs()
    made, unit = graft(net, "2", Mixture.of(values(net, x), (1, 4), kind))
    way = pathway(made, unit.layer, (12, 12))
    assert way.exact_crop
    whole = values(made, x, unit.layer)[:, unit.index, 6, 6]
    torch.testing.assert_close(way(way.crop(x), unit=unit.index), whole)
    target = Target(way, unit.index)
    every = torch.ones(len(target), dtype=torch.bool)
    torch.testing.assert_close(target.respond(way.crop(x), every), whole)
    pictures = list((x*40 + 128).clamp(0, 255).byte())
    table = dissect(made, unit.layer, pictures, units=[unit.index], k=40, nulls=19,
                    prepare=lambda b: (b.float() - 128)/40).table
    assert table.images.iloc[0] is not None and len(table) == 1


def test_grafts_go_into_residual_networks():
    torch.manual_seed(0)
    net, x = CifarResNet(8).eval().requires_grad_(False), inputs(6, 32)
    layer = "layer3.0.conv1"
    before = values(net, x, layer)
    for kind in ("sum", "and"):
        mixture = Mixture.of(before, (3, 9), kind)
        made, unit = graft(net, layer, mixture)
        torch.testing.assert_close(values(made, x, unit.layer)[:, 3], mixture.value(before),
                                   rtol=1e-4, atol=1e-4)
        assert made(x).isfinite().all()


@given(st.integers(0, 10**6), st.floats(.1, 8))
@settings(max_examples=25, deadline=None)
def test_scaling_a_unit_keeps_the_order_of_its_images(seed, weight):
    maps = torch.randn(20, 5, 3, 3, generator=torch.Generator().manual_seed(seed))
    made = Mixture.of(maps, (2,), "scaled", (weight,)).value(maps)
    for a, b in zip(strongest_places(made, 7), strongest_places(maps[:, 2], 7)):
        assert torch.equal(a, b)


def test_strongest_places_against_a_loop():
    maps = torch.randn(30, 4, 5, generator=torch.Generator().manual_seed(3))
    images, rows, columns = strongest_places(maps, 30)
    assert sorted(images.tolist()) == list(range(30))
    heights = [maps[i].max().item() for i in images]
    assert heights == sorted(heights, reverse=True)
    assert [maps[i, r, c].item() for i, r, c in zip(images, rows, columns)] == heights


def test_pairs_are_correlated_as_asked():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(50, 3, 7, 7, generator=g)
    maps = torch.cat([base, base + .3*torch.randn(50, 3, 7, 7, generator=g)], 1)
    found = np.corrcoef(maps.transpose(0, 1).flatten(1).numpy())
    same = choose_pairs(maps, 3, (.6, 1))
    assert sorted(sorted(p) for p in same) == [[0, 3], [1, 4], [2, 5]]
    assert choose_pairs(maps, None, (.6, 1)) == same and not choose_pairs(maps, None, (.999, 1))
    with pytest.raises(ValueError, match="3 pairs are correlated"): choose_pairs(maps, 4, (.6, 1))
    assert all(abs(found[a, b]) < .3 for a, b in choose_pairs(maps, 8, (-.3, .3)))
    assert choose_pairs(maps, 8, seed=1) == choose_pairs(maps, 8, seed=1) != choose_pairs(maps, 8)


def test_the_oracle_wants_both_parts_and_two_groups():
    rng = np.random.default_rng(0)
    two = np.r_[rng.normal(-5, 1, 50), rng.normal(5, 1, 50)]
    assert two_groups(two) and not two_groups(two + 20) and not two_groups(rng.normal(size=100))
    assert not two_groups(np.r_[rng.normal(-5, 1, 5), rng.normal(5, 1, 95)])


def test_the_difference_tells_who_drives():
    maps = torch.zeros(4, 3, 2, 2)
    maps[0, 0, 0, 0] = maps[1, 1, 1, 1] = 9.
    maps[2:] = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))*.1
    gap = part_difference(Mixture.of(maps, (0, 1), "max"), maps, 2)
    images, _, _ = strongest_places(Mixture.of(maps, (0, 1), "max").value(maps), 2)
    assert [(g > 0) for g in gap] == [int(i) == 0 for i in images]


@pytest.mark.parametrize("message,call", [
    ("kind is", dict(kind="mean")), ("takes two parts, got 3", dict(parts=(0, 1, 2), kind="and")),
    ("takes one part, got 2", dict(kind="scaled")), ("two parts or more", dict(parts=(1,))),
    ("different units of 0..7", dict(parts=(0, 8))), ("numbers above 0", dict(weights=(1, 0))),
    ("between .5 and 1", dict(level=1.)), ("is the same everywhere", dict(parts=(0, 3)))])
def test_mistakes_are_named(message, call):
    maps = torch.randn(5, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    maps[:, 3] = 2.
    with pytest.raises(ValueError, match=message): Mixture.of(maps, **dict(parts=(0, 1)) | call)


def test_wrong_places_are_named():
    net, maps = network(), torch.randn(5, 8, 3, 3)
    with pytest.raises(ValueError, match="have shape"): Mixture.of(maps[0], (0, 1))
    with pytest.raises(ValueError, match="'1' is none"): graft(net, "1", Mixture.of(maps, (0, 1)))
    with pytest.raises(ValueError, match="no layer '9'"): graft(net, "9", Mixture.of(maps, (0, 1)))
    with pytest.raises(ValueError, match="training mode"):
        graft(network().train(), "2", Mixture.of(maps, (0, 1)))
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)).eval()
    with pytest.raises(ValueError, match="one with groups"):
        graft(grouped, "0", Mixture.of(maps, (0, 1)))
    with pytest.raises(ValueError, match="no images"): layer_maps(net, "2", [])
