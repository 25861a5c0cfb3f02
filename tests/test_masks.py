"Masks that are learned, on networks whose circuits are known; effective paths by enumeration; gradients by autograd."
import copy, itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from superpos.circuit import Circuit, auroc, effective, respond
from superpos.field import pathway
from superpos.mask import Layout, keep_top, random_like, top_like
from superpos.model import fingerprint, outputs
from superpos.score import relevant_weights, snip
from superpos.sparsify import sparsify

def two_in_one(seed, width=6):
    "Two networks that do not touch, one for red and one for blue, whose last channels are added up; and which kernels are whose."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 2*width, 3), nn.ReLU(), nn.Conv2d(2*width, 2*width, 3), nn.ReLU(), nn.Conv2d(2*width, 1, 3))
    half, colour = torch.arange(2*width)//width, torch.tensor([0, -1, 1])
    whose = {"0.weight": (half[:, None] == colour)*(1 + half[:, None]), "2.weight": (half[:, None] == half)*(1 + half[:, None]), "4.weight": (1 + half)[None]}
    with torch.no_grad():
        for name, of in whose.items(): net.get_parameter(name).abs_().mul_((of > 0)[:, :, None, None])
        for i in (0, 2, 4): net[i].bias.zero_()
    return net.eval().requires_grad_(False), whose

def images(seed, n=32):
    noise, tint = torch.rand(3*n, 3, 7, 7, generator=torch.Generator().manual_seed(seed)), torch.eye(3)[:, :, None, None]
    return noise[:n]*tint[0], noise[n:2*n]*tint[2], noise[2*n:]*.02

def iou(a, b): return ((a & b).sum()/(a | b).sum()).item()

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("own", [1, 2], ids=["red", "blue"])
def test_the_planted_circuit_is_found(seed, own):
    net, whose = two_in_one(seed)
    path, (red, blue, dark) = pathway(net, "4", (7, 7)), images(seed + 10)
    layout = Layout.of(path, 0)
    truth, before = layout.flatten(whose) == own, fingerprint(net)
    cluster, other = (red, blue) if own == 1 else (blue, red)
    found = sparsify(path, 0, cluster, other, dark, keep=truth.float().mean().item(), steps=200, batch=(16, 16, 16), seed=seed).check()
    assert found.mask.sum() == truth.sum() and found.undecided < .01 and iou(found.mask, truth) >= .9
    assert iou(random_like(found.mask, layout, seed), truth) < .6
    assert fingerprint(net) == before and not any(m._forward_hooks for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
    fresh = images(seed + 20)
    own_response, other_response = (respond(path, 0, x, found.mask, layout) for x in (fresh[own - 1], fresh[2 - own]))
    assert auroc(own_response, other_response) > .99
    torch.testing.assert_close(own_response, respond(path, 0, fresh[own - 1]), rtol=.15, atol=0)

@pytest.mark.parametrize("objective", ["preserve", "separate"])
@pytest.mark.parametrize("per", ["weight", "kernel", "filter"])
def test_both_objectives_tell_the_clusters_apart(objective, per):
    net, _ = two_in_one(0)
    path, (red, blue, dark) = pathway(net, "4", (7, 7)), images(0)
    found = sparsify(path, 0, red, blue*2, dark, keep=.4, objective=objective, per=per, steps=150)
    assert found.mask.sum() == round(.4*len(found.layout)) and found.loss.shape == found.kept.shape == (150,)
    if per == "filter": return  # the last layer has one filter, so nothing can be told apart without cutting it
    red, blue, _ = images(1)
    assert auroc(respond(path, 0, red), respond(path, 0, blue*2)) < .2
    assert auroc(respond(path, 0, red, found.mask, found.layout), respond(path, 0, blue*2, found.mask, found.layout)) > .9

def test_bad_input_is_refused_before_any_work(monkeypatch):
    net, _ = two_in_one(0)
    path, (red, blue, dark) = pathway(net, "4", (7, 7)), images(0)
    monkeypatch.setattr(type(path), "__call__", lambda *_: pytest.fail("the network was run"))
    for change in (dict(own=red[:0]), dict(other=blue[:1]), dict(objective="win"), dict(keep=0), dict(keep=-.1), dict(keep=1.01), dict(keep=1e-9), dict(steps=1), dict(per="pixel")):
        with pytest.raises(ValueError): sparsify(path, 0, **dict(own=red, other=blue, background=dark) | change)

# gradients, in double precision, against a network that is really cut

@pytest.mark.parametrize("per", ["weight", "kernel", "filter"])
def test_gradient_of_the_mask_against_a_masked_copy(per):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 5, 3, 1, 1), nn.ReLU(), nn.Conv2d(5, 3, 3, 1, 1)).eval().requires_grad_(False)
    for position in ((4, 5), (0, 0), (7, 8)):
        path, x = pathway(net, "5", (16, 18), position), torch.randn(3, 3, 16, 18)
        layout, weights = Layout.of(path, 1, per), relevant_weights(path, 1)
        mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(1)).requires_grad_()
        fast, = torch.autograd.grad(path(path.crop(x), layout.apply(mask, weights), 1).square().sum(), mask)
        plain = {}
        for name, part in layout.views(mask).items():
            w = net.get_parameter(name)
            expanded = part[(...,) + (None,)*(4 - part.ndim)].expand(-1, *w.shape[1:])
            plain[name] = w*(expanded if len(expanded) == len(w) else torch.cat([torch.ones_like(w[:1]), expanded, torch.ones_like(w[2:])]))
        y = torch.func.functional_call(net, plain, (x,))[:, 1, position[0], position[1]]
        slow, = torch.autograd.grad(y.square().sum(), mask)
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)

def test_a_hard_mask_equals_a_network_with_zeros_in_it():
    net, _ = two_in_one(3)
    path, (x, _, _) = pathway(net, "4", (7, 7)), images(3)
    layout = Layout.of(path, 0)
    for keep in (.05, .3, .8):
        mask = keep_top(torch.rand(len(layout), generator=torch.Generator().manual_seed(5)), keep)
        cut = copy.deepcopy(net)
        for name, part in layout.views(mask).items(): cut.get_parameter(name)[~part] = 0
        torch.testing.assert_close(respond(path, 0, x, mask, layout, batch=5), outputs(cut, ["4"], x)["4"][:, 0, 0, 0])

# scores and counts

def test_images_of_opposite_effect_do_not_cancel_in_snip():
    net = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False)).eval().requires_grad_(False)
    path, x = pathway(net, "0", (1, 1)), torch.rand(1, 3, 1, 1)
    one, both = (snip(path, 0, images)["0.weight"] for images in (x, torch.cat([x, -x])))
    torch.testing.assert_close(both, 2*one)
    assert (one > 0).all()

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), st.integers(0, 10**6), st.sampled_from([.001, .01, .05, .1, .25, .5]))
def test_counts_are_exact_and_kept_in_each_layer(shapes, seed, keep):
    layout, g = Layout(tuple(f"l{i}" for i in range(len(shapes))), tuple(shapes), "kernel"), torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (len(layout),), generator=g).float()
    if not round(keep*len(layout)):
        with pytest.raises(ValueError, match="keeps nothing"): keep_top(scores, keep)
        return
    mask, count = keep_top(scores, keep), lambda m: [int(p.sum()) for p in m.split(layout.sizes)]
    assert mask.sum() == round(keep*len(layout)) and (mask.all() or scores[mask].min() >= scores[~mask].max())
    other = torch.rand(len(layout), generator=g)
    for like in (random_like(mask, layout, seed), top_like(mask, layout, other)): assert count(like) == count(mask)
    assert torch.equal(random_like(mask, layout, seed), random_like(mask, layout, seed))
    for part, chosen in zip(other.split(layout.sizes), top_like(mask, layout, other).split(layout.sizes)):
        if chosen.any() and not chosen.all(): assert part[chosen].min() >= part[~chosen].max()

# paths

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.sampled_from(["weight", "kernel"]), st.integers(0, 10**6), st.sampled_from([.15, .4, .8]))
def test_effective_entries_lie_on_a_path(widths, per, seed, keep):
    widths = [*widths, 1]
    kernel = (2, 1) if per == "weight" else ()
    layout = Layout(tuple(f"l{i}" for i in range(len(widths) - 1)), tuple((o, i, *kernel) for i, o in zip(widths, widths[1:])), per)
    mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(seed)) < keep
    parts = list(layout.views(mask).values())
    used = [torch.zeros(p.shape[:2], dtype=torch.bool) for p in parts]
    for way in itertools.product(*map(range, widths)):
        if all(p[o, i].any() for p, i, o in zip(parts, way, way[1:])):
            for u, i, o in zip(used, way, way[1:]): u[o, i] = True
    expected = [p & (u if per == "kernel" else u[:, :, None, None]) for p, u in zip(parts, used)]
    before = mask.clone()
    assert torch.equal(effective(mask, layout), torch.cat([e.reshape(-1) for e in expected])) and torch.equal(mask, before)
    assert torch.equal(effective(effective(mask, layout), layout), effective(mask, layout))

def test_what_is_not_effective_can_be_dropped_without_a_trace():
    net, _ = two_in_one(4)
    path, (x, _, _) = pathway(net, "4", (7, 7)), images(4)
    layout = Layout.of(path, 0)
    mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)) < .2
    useful = effective(mask, layout)
    assert useful.sum() < mask.sum()
    torch.testing.assert_close(respond(path, 0, x, useful, layout), respond(path, 0, x, mask, layout))

# files

def test_a_circuit_file_is_exact_and_bound_to_its_weights(tmp_path):
    net, _ = two_in_one(0)
    path, file = pathway(net, "4", (7, 7)), tmp_path/"c.safetensors"
    for per in ("weight", "kernel", "filter"):
        layout = Layout.of(path, 0, per)
        mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(1)) < .3
        circuit = Circuit.of(net, "4:0", mask, layout, "röd", "chance", seed=1, nested={"a": [1, None]})
        circuit.save(file)
        again = Circuit.load(file, copy.deepcopy(net))
        assert torch.equal(again.mask, mask) and again.mask.dtype == torch.bool
        assert (again.unit, again.layout, again.weights, again.cluster, again.method, again.settings) == (circuit.unit, layout, circuit.weights, "röd", "chance", circuit.settings)
        touched = copy.deepcopy(net)
        touched[2].weight.view(torch.int32)[0, 0, 0, 0] ^= 1
        with pytest.raises(ValueError, match="belongs to other weights"): Circuit.load(file, touched)
    with pytest.raises(TypeError): Circuit.of(net, "4:0", mask, layout, "", "", bad={1j}).save(tmp_path/"bad.safetensors")
    assert not (tmp_path/"bad.safetensors").exists()
