"Learned masks where circuits are known; paths by enumeration; gradients by autograd."
import copy
import itertools
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from superpos import sparsify as training
from superpos.circuit import Circuit, auroc, effective_mask
from superpos.field import pathway
from superpos.mask import (
    active_probability,
    hard_concrete,
    hard_mask,
    random_like,
    soft_mask,
    top_like,
    undecided_fraction,
)
from superpos.model import CifarResNet, SmallAlexNet, fingerprint, layer_outputs
from superpos.score import keep_top
from superpos.sparsify import (
    Method,
    Recipe,
    as_mask,
    frontier,
    methods,
    sparsify,
    sparsify_free,
    sparsify_many,
)
from superpos.target import Layout, Target, ablations


def two_in_one(seed, width=6):
    "Two networks that do not touch, for red and for blue, added up; and which kernels are whose."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 2*width, 3), nn.ReLU(), nn.Conv2d(2*width, 2*width, 3),
                        nn.ReLU(), nn.Conv2d(2*width, 1, 3))
    half, colour = torch.arange(2*width)//width, torch.tensor([0, -1, 1])
    whose = {"0.weight": (half[:, None] == colour)*(1 + half[:, None]),
             "2.weight": (half[:, None] == half)*(1 + half[:, None]), "4.weight": (1 + half)[None]}
    with torch.no_grad():
        for name, of in whose.items():
            net.get_parameter(name).abs_().mul_((of > 0)[:, :, None, None])
        for i in (0, 2, 4): net[i].bias.zero_()
    return net.eval().requires_grad_(False), whose

def images(seed, n=32):
    noise = torch.rand(3*n, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    tint = torch.eye(3)[:, :, None, None]
    return noise[:n]*tint[0], noise[n:2*n]*tint[2], noise[2*n:]*.02

def iou(a, b): return ((a & b).sum()/(a | b).sum()).item()

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("own", [1, 2], ids=["red", "blue"])
def test_the_planted_circuit_is_found(seed, own):
    net, whose = two_in_one(seed)
    target, (red, blue, dark) = Target.of(net, "4:0", (7, 7)), images(seed + 10)
    truth, before = target.layout.flatten(whose) == own, fingerprint(net)
    cluster, other = (red, blue) if own == 1 else (blue, red)
    found = sparsify(target, cluster, other, dark, keep=truth.float().mean().item(), steps=200,
                     batch=(16, 16, 16), seed=seed).check()
    assert found.mask.sum() == truth.sum() and found.undecided < .01
    assert iou(found.mask, truth) >= .9
    assert iou(random_like(found.mask, target.layout, seed), truth) < .6
    assert fingerprint(net) == before
    assert not any(m._forward_hooks for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    fresh = images(seed + 20)
    own_response, other_response = (target.respond(x, found.mask)
                                    for x in (fresh[own - 1], fresh[2 - own]))
    assert auroc(own_response, other_response) > .99
    torch.testing.assert_close(own_response, target.respond(fresh[own - 1]), rtol=.15, atol=0)

@pytest.mark.parametrize("objective", ["preserve", "separate"])
@pytest.mark.parametrize("per", ["weight", "kernel", "filter", "channel"])
def test_both_objectives_tell_the_clusters_apart(objective, per):
    target, (red, blue, dark) = Target.of(two_in_one(0)[0], "4:0", (7, 7), per), images(0)
    found = sparsify(target, red, blue*2, dark, keep=.4, objective=objective, steps=150, patience=0)
    assert found.mask.sum() == round(.4*len(found.layout))
    assert found.loss.shape == found.kept.shape and len(found.loss) >= 150
    assert found.undecided < .01
    # the last layer has one filter, so nothing can be told apart without cutting it
    if per == "filter": return
    red, blue, _ = images(1)
    assert auroc(target.respond(red), target.respond(blue*2)) < .2
    assert auroc(target.respond(red, found.mask), target.respond(blue*2, found.mask)) > .9

def test_bad_input_is_refused_before_any_work(monkeypatch):
    target, red, blue, dark = tiny()
    monkeypatch.setattr(type(target.path), "__call__", lambda *_: pytest.fail("it was run"))
    for change in (dict(own=red[:0]), dict(other=blue[:1]), dict(objective="win"), dict(keep=0),
                   dict(keep=-.1), dict(keep=1.01), dict(keep=1e-9), dict(steps=1),
                   dict(own=torch.where(red == red[3, 0, 2, 2], torch.nan, red)),
                   dict(background=dark/0), dict(rate=0), dict(beta=.5), dict(epochs=1),
                   dict(optimiser="lion"),
                   dict(penalty=1e-3), dict(gate="concrete"), dict(keep=None, gate="stone"),
                   dict(keep=None, penalty=-1), dict(batch=(0, 1, 1)), dict(reach=0),
                   dict(ablation="coin")):
        with pytest.raises(ValueError):
            sparsify(target, **dict(own=red, other=blue, background=dark) | change)
    with pytest.raises(ValueError, match="got 'pixel'"): Target(target.path, 0, "pixel")

# gradients, in double precision, against a network that is really cut

pers = ["weight", "kernel", "filter", "channel"]

def masked_by_hand(w, part, per):
    "A weight times its mask, entry by entry."
    out = torch.empty_like(w)
    for at in itertools.product(*map(range, w.shape)):
        out[at] = w[at]*part[{"weight": at, "kernel": at[:2], "filter": at[:1],
                              "channel": at[1:2]}[per]]
    return out

@pytest.mark.parametrize("per", pers)
def test_masks_are_applied_entry_by_entry_and_several_at_once(per):
    g = torch.Generator().manual_seed(0)
    weights = {"convolution": torch.randn(4, 3, 2, 5, generator=g),
               "linear": torch.randn(3, 4, generator=g), "row": torch.randn(1, 3, generator=g)}
    shape = lambda w: {"weight": w.shape, "kernel": w.shape[:2], "filter": w.shape[:1],
                       "channel": w.shape[1:2]}[per]
    layout = Layout(tuple(weights), tuple(tuple(shape(w)) for w in weights.values()), per)
    masks = torch.rand(2, 3, len(layout), generator=g)
    together = layout.apply(masks, weights)
    for i, j in itertools.product(range(2), range(3)):
        alone = layout.apply(masks[i, j], weights)
        for name, part in layout.views(masks[i, j]).items():
            expected = masked_by_hand(weights[name], part, per)
            assert torch.equal(alone[name], expected)
            assert torch.equal(together[name][i, j], expected)
    assert torch.equal(layout.flatten(layout.views(masks)), masks)

@pytest.mark.parametrize("per", pers)
def test_gradient_of_the_mask_against_a_masked_copy(per):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
                        nn.Conv2d(4, 5, 3, 1, 1), nn.ReLU(),
                        nn.Conv2d(5, 3, 3, 1, 1)).eval().requires_grad_(False)
    for position in ((4, 5), (0, 0), (7, 8)):
        path, x = pathway(net, "5", (16, 18), position), torch.randn(3, 3, 16, 18)
        target = Target(path, 1, per)
        weights = target.weights
        logits = torch.randn(len(target),
                             generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = target(path.crop(x), soft_mask(logits, 3.))
        fast, = torch.autograd.grad(y.square().sum(), logits)
        plain = {}
        for name, part in target.layout.views(torch.sigmoid(3*logits)).items():
            masked, w = masked_by_hand(weights[name], part, per), net.get_parameter(name)
            plain[name] = masked if len(masked) == len(w) else torch.cat([w[:1], masked, w[2:]])
        y = torch.func.functional_call(net, plain, (x,))[:, 1, position[0], position[1]]
        slow, = torch.autograd.grad(y.square().sum(), logits)
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)

def test_gradient_by_finite_differences():
    net, _ = two_in_one(1, width=2)
    net.double()
    target, x = Target.of(net, "4:0", (7, 7)), torch.rand(3, 3, 7, 7, dtype=torch.double)
    for gate in (lambda s: soft_mask(s, 5.), hard_concrete,
                 lambda s: hard_concrete(s, torch.full_like(s, .4))):
        logits = torch.linspace(-.4, .4, len(target), dtype=torch.double, requires_grad=True)
        response = lambda s, gate=gate: target(x, gate(s))
        assert torch.autograd.gradcheck(response, logits)

def test_the_network_stays_usable_while_a_mask_is_trained():
    net, _ = two_in_one(0)
    before, state = fingerprint(net), {k: v.clone() for k, v in net.state_dict().items()}
    target, groups = Target.of(net, "4:0", (7, 7)), images(0)
    seen = []
    class Watch(training._Exact):
        def during(self, logits, step):
            if step == 3:
                copies = net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))
                seen.extend(map(fingerprint, copies))
                net.load_state_dict(state)
            return super().during(logits, step)
    reference = training._reference(target, groups, [target.respond(x) for x in groups])
    training._in_step([training._train(target, reference, Recipe(keep=.4, steps=6), Watch)])
    assert seen == [before]*3 and set(net.state_dict()) == set(state)
    assert not any(p.requires_grad for p in net.parameters())

def test_masks_under_autocast():
    target, x, _, _ = tiny()
    def gradient():
        logits = torch.linspace(-1, 1, len(target)).requires_grad_()
        y = target(x, soft_mask(logits, 2.))
        y.float().sum().backward()
        return y, logits.grad
    exact, wanted = gradient()
    with torch.autocast("cpu", torch.bfloat16): rough, found = gradient()
    assert rough.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(rough.float(), exact, rtol=.03, atol=0)
    torch.testing.assert_close(found, wanted, rtol=.1, atol=.02*wanted.abs().max().item())

def a_step(recipe, device="cpu", told=False):
    "The shipped step of a training, its logits and its trace; `told` its number by tensors."
    net, _ = two_in_one(0)
    target, groups = Target.of(net.to(device), "4:0", (7, 7)), [x.to(device) for x in images(0)]
    reference = training._reference(target, groups, [target.respond(x) for x in groups])
    form = training._Exact(recipe, len(target), device)
    if told: form.counts = torch.as_tensor(form.counts)
    logits = torch.zeros(len(target), device=device, requires_grad=True)
    trace = torch.zeros(form.most, 3, device=device)
    mean = target.replacement(groups[2], mean=True) if recipe.ablation == "mean" else None
    adam = torch.optim.Adam([logits], .05, (.9, .95), 1e-12, capturable=device == "cuda")
    return training._step(target, reference, recipe, form, logits, adam, trace, mean,
                          training._doubts(target)[0], training._Last()), logits, trace

class Reads(TorchDispatchMode):
    "Notes what brings a value from the device to the host."
    def __init__(self): super().__init__(); self.found = []

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")
        if fn.overloadpacket.__name__ in waits: self.found.append(str(fn))
        return fn(*args, **(kwargs or {}))

@pytest.mark.parametrize("ablation", ablations)
def test_nothing_in_a_step_waits_for_a_value(ablation):
    step, logits, trace = a_step(Recipe(keep=.3, steps=20, ablation=ablation), told=True)
    with Reads() as reads: torch.ones(1).item()
    assert reads.found
    at = torch.arange(2)
    step(at[0])
    with Reads() as reads: step(at[1])
    # Adam counts its own steps where it is not made for capture, which needs a GPU
    assert reads.found == ["aten._local_scalar_dense.default"]
    assert logits.abs().sum() > 0 and (trace[:2].abs().sum(1) > 0).all() and not trace[2:].any()

@pytest.mark.parametrize("ablation", ablations)
def test_a_step_by_a_number_and_by_a_tensor_are_the_same(ablation):
    recipe = Recipe(keep=.3, steps=20, ablation=ablation, reach=.2)
    (plain, a, seen), (told, b, also) = a_step(recipe), a_step(recipe, told=True)
    for i in range(8): plain(i); told(torch.tensor(i))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    torch.testing.assert_close(seen, also, rtol=1e-5, atol=1e-6)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("ablation", ablations)
def test_the_step_is_captured_in_a_cuda_graph(ablation):
    recipe = Recipe(keep=.3, steps=20, ablation=ablation, reach=.2)
    (plain, a, seen), (captured, b, also) = (a_step(recipe, device="cuda") for _ in range(2))
    at, side = torch.zeros((), dtype=torch.long, device="cuda"), torch.cuda.Stream()
    def run(): captured(at); at.add_(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): run()
    for _ in range(9): graph.replay()
    for i in range(12): plain(i)
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(also, seen, rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize("kept", [1, 2, 9, 25, 26, 49, 50])
def test_the_threshold_lies_between_the_last_kept_and_the_first_dropped(kept):
    for logits in (torch.randn(50, generator=torch.Generator().manual_seed(1)), torch.zeros(50)):
        high = logits.sort(descending=True).values
        wanted = (high[kept - 1] + high[kept])/2 if kept < 50 else high[-1] - 1
        for told in (kept, torch.tensor(kept)):
            assert training._threshold(logits, told) == wanted

def test_a_step_runs_where_there_are_no_values():
    "Every tensor of a step is placed with the network; nothing is made on the host."
    net, _ = two_in_one(0)
    target, groups = Target.of(net.to("meta"), "4:0", (7, 7)), [x.to("meta") for x in images(0)]
    whole = [target(x) for x in groups]
    level = training.ResponseScale(whole[2].mean(), whole[2].var())
    reference, recipe = training._Reference(groups, whole, level), Recipe(keep=.3, steps=4)
    form = training._Exact(recipe, len(target), "meta")
    logits = torch.zeros(len(target), device="meta", requires_grad=True)
    trace = torch.zeros(form.most, 3, device="meta")
    adam = torch.optim.Adam([logits])
    step = training._step(target, reference, recipe, form, logits, adam, trace, None,
                          training._doubts(target)[0], training._Last())
    step(torch.zeros((), dtype=torch.long, device="meta"))
    assert logits.grad.device.type == "meta"

def test_hard_concrete_by_integration():
    logits, noise = torch.tensor([-3., -1, 0, .5, 2]), torch.linspace(0, 1, 200_003)[1:-1, None]
    for temperature, stretch in ((2/3, .1), (.3, .2)):
        gates = hard_concrete(logits, noise, temperature, stretch)
        torch.testing.assert_close((gates > 0).float().mean(0),
                                   active_probability(logits, temperature, stretch), rtol=0,
                                   atol=2e-4)
    assert torch.equal(hard_concrete(logits) > .5, hard_mask(logits))
    assert hard_concrete(torch.tensor([-9., 9])).tolist() == [0, 1]
    assert hard_concrete(torch.zeros(1), torch.zeros(1)).item() == 0
    assert (undecided_fraction(torch.tensor([[0, .5, 1], [.005, .995, .9]])).tolist()
            == pytest.approx([1/3, 1/3]))

def test_a_hard_mask_equals_a_network_with_zeros_in_it():
    target, x, _, _ = tiny(3)
    net, layout = target.path.model, target.layout
    for keep in (.05, .3, .8):
        mask = keep_top(torch.rand(len(layout), generator=torch.Generator().manual_seed(5)), keep)
        cut = copy.deepcopy(net)
        for name, part in layout.views(mask).items(): cut.get_parameter(name)[~part] = 0
        torch.testing.assert_close(target.respond(x, mask, batch=5),
                                   layer_outputs(cut, ["4"], x)["4"][:, 0, 0, 0])

# what stands in for the rest

def padded(seed=0, per="kernel"):
    "A chain with padding, pooling, a stride and a normalisation, in double precision."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
                        nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 5, 3, 1, 1, bias=False), nn.GELU(),
                        nn.Conv2d(5, 3, 3, 1, 1)).double().eval().requires_grad_(False)
    net[1].running_mean.normal_()
    return net, Target(pathway(net, "6", (22, 18)), 1, per)

def by_hand(net, x, z, masks):
    "The last layer's map: each kernel reads the image where it is kept, and the other where not."
    for m, mask in zip(net, masks):
        if mask is None: x, z = m(x.clone()), m(z.clone()); continue
        both = [sum(F.conv2d(side[:, [i]], m.weight[:, [i]]*part[:, [i], None, None], None,
                             m.stride, m.padding) for i in range(m.in_channels))
                for side, part in ((x, mask), (z, 1 - mask))]
        x, z = sum(both) + (0 if m.bias is None else m.bias[:, None, None]), m(z)
    return x

def parts_of(net, target, mask):
    "For each layer, the kernels' entries of a mask, (out, in); of the last layer the unit's alone."
    parts = [part.double() for part in target.layout.views(mask).values()]
    parts[-1] = parts[-1].expand(3, -1)
    each = iter(parts)
    return [next(each) if isinstance(m, nn.Conv2d) else None for m in net]

@pytest.mark.parametrize("keep", [0., .3, .7, 1.])
def test_each_kernel_reads_the_image_or_what_stands_in_for_it(keep):
    net, target = padded()
    path, g = target.path, torch.Generator().manual_seed(1)
    x, others = (torch.randn(5, 3, 22, 18, generator=g, dtype=torch.double) for _ in range(2))
    mask = torch.rand(len(target), generator=g) < keep
    row, column = path.position
    slow = by_hand(net, x, others, parts_of(net, target, mask))[:, 1, row, column]
    fast = target(path.crop(x), mask, target.replacement(path.crop(others)))
    torch.testing.assert_close(fast, slow)
    drawn = torch.randint(5, (5,), generator=torch.Generator().manual_seed(3))
    found = target.respond(path.crop(x), mask, "resample", path.crop(others), seed=3, batch=2)
    torch.testing.assert_close(found, target(path.crop(x), mask,
                                             target.replacement(path.crop(others[drawn]))))

def test_the_adversary_takes_what_hurts_most():
    _, target = padded()
    g = torch.Generator().manual_seed(1)
    x, others = (target.path.crop(torch.randn(5, 3, 22, 18, generator=g, dtype=torch.double))
                 for _ in range(2))
    mask = torch.rand(len(target), generator=g) < .5
    drawn = torch.randint(5, (6, 5), generator=torch.Generator().manual_seed(3))
    each = torch.stack([target(x, mask, target.replacement(others[i])) for i in drawn])
    for wanted, worst in ((True, each.amin(0)), (False, each.amax(0))):
        found = target.respond(x, mask, "adversarial", others, seed=3, wanted=wanted, draws=6)
        torch.testing.assert_close(found, worst)

def test_the_mean_is_of_what_goes_into_each_layer():
    _, target = padded()
    x = target.path.crop(torch.randn(7, 3, 22, 18, dtype=torch.double))
    mean, every = target.replacement(x, mean=True, batch=3), target.replacement(x)
    for (into, out), (each, result) in zip(mean, every, strict=True):
        torch.testing.assert_close(into, each.mean(0, keepdim=True))
        torch.testing.assert_close(out, result.mean(0, keepdim=True))
    torch.testing.assert_close(every[-1][1].flatten(), target(x))
    assert len(every) == len(target.layout.names)

@pytest.mark.parametrize("per", pers)
def test_gradient_of_the_mask_under_replacement(per):
    net, target = padded(per=per)
    path, g = target.path, torch.Generator().manual_seed(2)
    x, others = (torch.randn(3, 3, 22, 18, generator=g, dtype=torch.double) for _ in range(2))
    logits = torch.randn(len(target), generator=g, dtype=torch.double).requires_grad_()
    for mean in (False, True):
        instead = target.replacement(path.crop(others), mean)
        response = lambda s, instead=instead: target(path.crop(x), torch.sigmoid(s), instead)
        assert torch.autograd.gradcheck(response, logits)
    if per != "kernel": return
    y = target(path.crop(x), torch.sigmoid(logits), target.replacement(path.crop(others)))
    fast, = torch.autograd.grad(y.sum(), logits)
    plain = by_hand(net, x, others, parts_of(net, target, torch.sigmoid(logits)))
    slow, = torch.autograd.grad(plain[:, 1, path.position[0], path.position[1]].sum(), logits)
    torch.testing.assert_close(fast, slow)

def test_nothing_that_stands_in_is_zero_ablation():
    net, target = padded()
    x = target.path.crop(torch.randn(4, 3, 22, 18, dtype=torch.double))
    mask = torch.rand(len(target), generator=torch.Generator().manual_seed(0))
    biases = [torch.zeros(1, dtype=torch.double) if net[i].bias is None else net[i].bias
              for i in (0, 4)] + [net[6].bias[1:2]]
    nothing = tuple((torch.zeros((), dtype=torch.double), bias[:, None, None]) for bias in biases)
    torch.testing.assert_close(target(x, mask, nothing), target(x, mask))

# where layers branch

class TwoWays(nn.Module):
    "A way around a convolution, a weight that is used twice, a concatenation."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1),
                                  nn.Conv2d(8, 3, 3, 2, 1))
        self.norm = nn.BatchNorm2d(4)

    def run(self, x, conv):
        "The units, where `conv` is told the layer, which of its uses it is, and the input."
        x = conv("a", 0, x)
        once = F.relu(self.norm(conv("b", 0, x))) + x
        return conv("c", 0, torch.cat([F.relu(conv("b", 1, once)), x], 1))

    def forward(self, x): return self.run(x, lambda name, _, z: getattr(self, name)(z))

@pytest.mark.parametrize("keep", [0., .4, 1.])
def test_kernels_that_branch_read_the_image_or_what_stands_in_for_it(keep):
    torch.manual_seed(0)
    net = TwoWays().double().eval().requires_grad_(False)
    target, g = Target.of(net, "c:1", (9, 9)), torch.Generator().manual_seed(1)
    x, others = (torch.randn(4, 3, 9, 9, generator=g, dtype=torch.double) for _ in range(2))
    mask, seen = torch.rand(len(target), generator=g) < keep, {}
    parts = {name.partition(".")[0]: part.double()
             for name, part in target.layout.views(mask).items()}
    def note(name, use, z): seen[name, use] = z; return getattr(net, name)(z)
    net.run(others, note)
    def by_kernel(name, use, z):
        m, part = getattr(net, name), parts[name]
        sides = sum(F.conv2d(side[:, [i]], m.weight[:, [i]]*p[:, [i], None, None], None, m.stride,
                             m.padding) for i in range(m.in_channels)
                    for side, p in ((z, part), (seen[name, use], 1 - part)))
        return sides + m.bias[:, None, None]
    slow = net.run(x, by_kernel)[:, 1, 2, 2]
    x, others = target.path.crop(x), target.path.crop(others)
    torch.testing.assert_close(target(x, mask, target.replacement(others)), slow)
    soft = torch.rand(len(target), generator=g, dtype=torch.double).requires_grad_()
    instead = target.replacement(others, mean=True)
    assert torch.autograd.gradcheck(lambda m: target(x[:2], m, instead), soft)

@pytest.mark.parametrize("depth,unit", [(20, "layer2.1.conv2:3"), (56, "layer1.4.conv1:5")])
def test_residual_networks_under_every_ablation(depth, unit):
    torch.manual_seed(0)
    target = Target.of(CifarResNet(depth).eval().requires_grad_(False), unit, (32, 32))
    x, others = (target.path.crop(torch.randn(n, 3, 32, 32)) for n in (3, 4))
    before, mask = fingerprint(target.path.model), torch.ones(len(target), dtype=torch.bool)
    for ablation in ablations:
        torch.testing.assert_close(target.respond(x, mask, ablation, others), target(x), rtol=1e-3,
                                   atol=1e-4)
    none = target(x, ~mask, target.replacement(others[:3]))
    torch.testing.assert_close(none, target(others[:3]), rtol=1e-3, atol=1e-4)
    for ablation in ("mean", "resample", "adversarial"):
        found = sparsify(target, x[:2], x[1:] + 1, others, keep=.5, steps=2, batch=(2, 2, 2),
                         ablation=ablation)
        assert found.mask.sum() == round(.5*len(target))
    assert fingerprint(target.path.model) == before

def test_attention_under_replacement():
    from torchvision.models import VisionTransformer
    torch.manual_seed(0)
    vit = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12)
    target = Target.of(vit.eval().requires_grad_(False), "encoder.layers.encoder_layer_1.mlp.0:2",
                       (16, 16))
    x, others, linear = *(target.path.crop(torch.randn(3, 3, 16, 16)) for _ in range(2)), F.linear
    none = torch.zeros(len(target))
    instead = target.replacement(others)
    torch.testing.assert_close(target(x, none, instead), target(others), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target(x, none + 1, instead), target(x), rtol=1e-4, atol=1e-5)
    assert F.linear is linear

def test_several_masks_at_once_are_those_alone():
    for target, x in ((padded()[1], torch.randn(3, 3, 22, 18, dtype=torch.double)),
                      (Target.of(TwoWays().double().eval(), "c:1", (9, 9)),
                       torch.randn(3, 3, 9, 9, dtype=torch.double))):
        x, masks = target.path.crop(x), torch.rand(4, len(target), dtype=torch.double)
        for instead in (None, target.replacement(x.flip(0))):
            alone = torch.stack([target(x, mask, instead) for mask in masks])
            torch.testing.assert_close(target(x, masks, instead), alone)
            at_once = torch.vmap(lambda m, i=instead, t=target, x=x: t(x, m, i))(masks)
            torch.testing.assert_close(at_once, alone)

def test_what_cannot_stand_in_is_refused():
    target, x, *_ = tiny()
    mask = torch.ones(len(target), dtype=torch.bool)
    for wrong, message in (("coin", "got 'coin'"), ("mean", "needs reference images"),
                           ("resample", "give `instead`")):
        with pytest.raises(ValueError, match=message): target.respond(x, mask, wrong)

@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_a_step_sees_what_the_judge_sees(ablation):
    "The loss of a hard mask is the objective on the responses under that ablation."
    target, *groups = tiny()
    recipe = Recipe(keep=.3, ablation=ablation, batch=(4, 4, 4))
    reference = training._reference(target, groups, [target.respond(x) for x in groups])
    mask = torch.rand(len(target), generator=torch.Generator().manual_seed(0)) < .5
    batches = training._batches(reference, recipe, 3)
    plain = training._batches(reference, Recipe(keep=.3, batch=(4, 4, 4)), 3)
    assert all(torch.equal(a, b) for a, b in zip(plain, batches)), "the same images are seen"
    assert len(batches) == 3 + (ablation == "resample")
    index = [b[2] for b in batches]
    mean = target.replacement(groups[2], mean=True) if ablation == "mean" else None
    loss = training._loss(target, reference, index, mask, recipe, mean, lambda make: make())
    if ablation == "resample":
        parts = zip(groups, index, index[3].split(4))
        y = [target(x[i], mask, target.replacement(groups[2][j])) for x, i, j in parts]
    else: y = [target.respond(x[i], mask, ablation, groups[2]) for x, i in zip(groups, index)]
    wanted = training.preserve(y, [w[i] for w, i in zip(reference.whole, index)], reference.level)
    torch.testing.assert_close(loss, wanted)

@pytest.mark.parametrize("objective", ["preserve", "separate"])
def test_the_adversary_of_a_step_makes_the_loss_largest(objective):
    "Of four ways to hand the replacements around, each image gets the one that is worst for it."
    target, *groups = tiny()
    reference = training._reference(target, groups, [target.respond(x) for x in groups])
    mask = torch.rand(len(target), generator=torch.Generator().manual_seed(0)) < .5
    index, how = [torch.arange(4)]*3 + [torch.arange(12)], dict(keep=.3, objective=objective)
    def loss(order, ablation="resample"):
        instead = tuple((a[order], b[order])
                        for a, b in target.replacement(groups[2][index[3]]))
        return training._loss(target, reference, index, mask, Recipe(**how, ablation=ablation),
                              None, lambda make: instead)
    place = torch.arange(12)
    orders = torch.stack([(place - k) % 12 for k in range(4)])
    worst = loss(place, "adversarial")
    by_hand, best = place.clone(), loss(place)
    for _ in range(2):
        for i, k in itertools.product(range(12), range(4)):
            changed = by_hand.clone()
            changed[i] = orders[k, i]
            if loss(changed) > best: by_hand, best = changed, loss(changed)
    torch.testing.assert_close(worst, best)

def test_what_stands_in_passes_through_the_network_once_for_all_masks(monkeypatch):
    target, red, blue, dark = tiny()
    passes, plain = [], Target.replacement
    def counted(self, x, *how, **more): passes.append(len(x)); return plain(self, x, *how, **more)
    monkeypatch.setattr(Target, "replacement", counted)
    runs = [dict(own=0, keep=keep, objective=objective, steps=12, patience=0, ablation="resample")
            for keep in (.2, .4) for objective in ("preserve", "separate")]
    with joblib.parallel_config(n_jobs=1):
        together = sparsify_many(target, [red, blue], dark, runs)
    longest = max(len(found.loss) for found in together)
    assert passes.count(40) == longest < sum(len(found.loss) for found in together)/2
    for found, run in zip(together, runs):
        assert same(found, sparsify(target, red, blue, dark, **{k: v for k, v in run.items()
                                                                if k != "own"}))

def test_a_mask_is_best_under_the_ablation_it_was_learned_under():
    torch.manual_seed(0)
    target = Target.of(SmallAlexNet(width=6).eval().requires_grad_(False), "features.6:3", (64, 64))
    g = torch.Generator().manual_seed(1)
    own, other, dark = (target.path.crop(torch.rand(24, 3, 64, 64, generator=g)*bright)
                        for bright in (1., .7, .9))
    whole, kinds = target.respond(own), ("zero", "mean", "resample")
    miss = {}
    for kind in kinds:
        found = sparsify(target, own, other, dark, keep=.3, steps=80, rate=.1, ablation=kind)
        assert found.check(largest_gap=1.).recipe.ablation == kind
        assert found.mask.sum() == round(.3*len(found.layout))
        for judge in kinds:
            y = target.respond(own, found.mask, judge, dark)
            miss[kind, judge] = (y - whole).square().mean().item()
    assert all(miss[kind, "mean"] < miss["zero", "mean"] for kind in ("mean", "resample"))
    assert miss["resample", "resample"] < miss["zero", "resample"]
    assert miss["zero", "zero"] < min(miss["mean", "zero"], miss["resample", "zero"])

def test_states_from_before_there_were_ablations_go_on(tmp_path):
    file, how = tmp_path/"state", dict(keep=.25, steps=20)
    found = sparsify(*tiny(), **how, resume=file)
    state = torch.load(file)
    del state["asked"]["recipe.ablation"]
    torch.save(state, file)
    assert same(sparsify(*tiny(), **how, resume=file), found)
    with pytest.raises(ValueError, match="recipe.ablation = zero, asked for is mean"):
        sparsify(*tiny(), **how, ablation="mean", resume=file)
    plan, (target, *_) = training._plan(how, 2), tiny()
    names = {training._state_name(Target(target.path, 0, per),
                                  (*plan[:2], Recipe(**how, ablation=kind)))
             for kind in ablations for per in pers}
    assert len(names) == len(ablations)*len(pers)

def test_a_full_disk_is_named_with_the_training(tmp_path):
    resource = pytest.importorskip("resource")
    file, how = tmp_path/"state", dict(keep=.25, steps=20)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match=r"/state( could not be written|')"):
            sparsify(*tiny(), **how, resume=file)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())
    assert same(sparsify(*tiny(), **how, resume=file), sparsify(*tiny(), **how))

# training

def tiny(seed=0):
    net, _ = two_in_one(seed)
    return Target.of(net, "4:0", (7, 7)), *images(seed)

def same(a, b):
    return (torch.equal(a.mask, b.mask)
            and all((getattr(a, n) == getattr(b, n)).all() for n in ("loss", "kept", "unsure"))
            and (a.undecided, a.gap) == (b.undecided, b.gap))

def test_two_steps_of_the_source_by_hand(tmp_path):
    "SGD with momentum on cross-entropy and price, β from 1 to 200, on a plain masked network."
    target, own, other, background = tiny()
    net, layout, batch = target.path.model, target.layout, (4, 5, 6)
    sparsify_free(target, own, other, background, .01, epochs=2, steps=2, batch=batch, seed=7,
                  resume=tmp_path/"state")
    found = torch.load(tmp_path/"state")["logits"]
    logits = torch.full((len(layout),), .05, requires_grad=True)
    g = torch.Generator().manual_seed(7)
    momentum = torch.zeros(len(layout))
    for beta in (1, 200):
        x = [group[torch.randperm(len(group), generator=g)[:n]]
             for group, n in zip((own, other, background), batch)]
        mask = torch.sigmoid(beta*logits)
        plain = {name: masked_by_hand(net.get_parameter(name), part, "kernel")
                 for name, part in layout.views(mask).items()}
        y = [torch.func.functional_call(net, plain, (part,)).flatten() for part in x]
        entropy = F.binary_cross_entropy_with_logits
        loss = (entropy(y[0], torch.ones(4)) + (entropy(y[1], torch.zeros(5))
                                                + entropy(y[2], torch.zeros(6)))/2 + .01*mask.sum())
        gradient, = torch.autograd.grad(loss, logits)
        momentum = .9*momentum + gradient
        with torch.no_grad(): logits -= .1*momentum
    torch.testing.assert_close(found, logits.detach(), rtol=1e-5, atol=1e-6)

def test_the_free_form_settles_by_its_price():
    kept = [sparsify_free(*tiny(), penalty, optimiser="adam", steps=60).mask.float().mean().item()
            for penalty in (1e-4, 1e-2, .1)]
    assert kept[0] > kept[1] > kept[2]
    with pytest.raises(RuntimeError, match="keeps nothing"):
        sparsify_free(*tiny(), 100., optimiser="adam", steps=60).check()

def test_a_step_beside_the_price_leaves_the_size_as_it_is():
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(50, generator=g, dtype=torch.double)
    gradient = torch.randn(50, generator=g, dtype=torch.double)
    slope = mask*(1 - mask)
    assert (abs((slope*slope*training._less_price(gradient, mask)).sum()) < 1e-12*(
        slope*slope*gradient).abs().sum())
    assert torch.equal(training._less_price(gradient, torch.ones(50)), gradient)

@pytest.mark.parametrize("keep", [.02, .05, .1, .2, .4, .6])
def test_the_end_is_decided_at_every_size(keep):
    "Also where many kernels are worth the same, or nothing."
    for seed in range(3):
        found = sparsify(*tiny(seed), keep=keep, steps=150, batch=(16, 16, 16))
        assert found.mask.sum() == round(keep*len(found.layout)) and found.gap < .15
        assert found.undecided < .01

@pytest.mark.parametrize("steps", [10, 15, 40])
def test_few_steps_are_followed_by_as_many_as_a_decision_takes(steps, tmp_path):
    how = dict(keep=.4, steps=steps, patience=0, rate=.02)
    found = sparsify(*tiny(), **how, resume=tmp_path/"state").check()
    assert steps < len(found.loss) <= 2*steps and found.unsure[steps - 1] > .01 > found.undecided
    assert same(sparsify(*tiny(), **how, resume=tmp_path/"state"), found)
    easy = sparsify(*tiny(), **how | dict(keep=.25))
    # a mask that is decided after its steps gets no more
    assert len(easy.loss) == steps and easy.undecided < .01

def test_kernels_that_lead_nowhere_are_taken_in_their_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
                        nn.Conv2d(4, 1, 3)).eval().requires_grad_(False)
    for i in (0, 2, 4): net[i].weight.abs_(); net[i].bias.zero_()
    net[4].weight[:, :2] = 0
    # the kernels of the two filters that nothing reads
    nowhere = slice(12, 20)
    found = sparsify(Target.of(net, "4:0", (7, 7)), *images(0), keep=22/32, steps=40)
    assert 40 <= len(found.loss) <= 60 and 0 < found.mask[nowhere].sum() < 8
    assert found.undecided < .01 < found.unsure[-1] and found.gap < 1e-3

def test_a_training_that_is_done_stops_where_it_would_not_change():
    early, full = (sparsify(*tiny(), keep=.25, steps=300, patience=n) for n in (20, 0))
    assert len(early.loss) < 300 == len(full.loss)
    assert (early.loss == full.loss[:len(early.loss)]).all()
    assert early.undecided < .01
    assert early.kept[-1] == pytest.approx(.25, abs=.01) and torch.equal(early.mask, full.mask)

def test_divergence_is_noticed_on_the_way(monkeypatch):
    steps = []
    def explode(masked, whole, level):
        steps.append(1); return masked[0].sum()*(torch.inf if len(steps) == 13 else 1)
    monkeypatch.setitem(training.objectives, "preserve", explode)
    with pytest.raises(FloatingPointError, match="from step 12 on; try a smaller rate than 0.05"):
        sparsify(*tiny(), keep=.4, steps=1000)
    assert len(steps) == 20

def test_images_that_teach_nothing_are_refused():
    target, red, blue, dark = tiny()
    twice = r"1 images are in 'own' and in 'other' \(the first is image 2 of 'own'\)"
    with pytest.raises(ValueError, match=twice):
        sparsify(target, red, torch.cat([blue, red[2:3]]), dark)
    with pytest.raises(ValueError, match="image 1 of 'other' has values that are not finite"):
        sparsify(target, red, torch.stack([blue[0], blue[1]*torch.nan]), dark)
    with pytest.raises(ValueError, match="same value for all images"):
        sparsify(target, red*0, blue*0, dark*0)
    with pytest.raises(ValueError, match="'other' needs at least two images, got 0"):
        sparsify(target, red, blue[:0], dark)

forms = [dict(keep=.25), dict(keep=None, penalty=1e-3, optimiser="sgd", rate=.1, epochs=5,
                              start=.05), dict(keep=None, penalty=1e-3, gate="concrete"),
         *(dict(keep=.25, ablation=ablation) for ablation in ablations[1:])]

@pytest.mark.parametrize("form", forms, ids=["exact", "free", "concrete", *ablations[1:]])
def test_a_training_that_is_stopped_anywhere_goes_on_to_the_same_mask(form, tmp_path, monkeypatch):
    how = dict(form, steps=60, patience=0)
    whole, file = sparsify(*tiny(), **how), tmp_path/"state"
    saves, save = [], training._save
    def save_and_fall(*state):
        save(*state); saves.append(1)
        if len(saves) < 4: raise KeyboardInterrupt
    monkeypatch.setattr(training, "_save", save_and_fall)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt): sparsify(*tiny(), **how, resume=file, every=0)
    assert same(sparsify(*tiny(), **how, resume=file, every=0), whole) and len(saves) == 6
    assert same(sparsify(*tiny(), **how, resume=file), whole) and len(saves) == 6

def test_a_killed_training_goes_on_to_the_same_mask(tmp_path):
    file, how = tmp_path/"state", dict(keep=.25, steps=400, patience=0)
    script = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
              "from test_masks import *; "
              f"torch.set_num_threads({torch.get_num_threads()}); "
              f"sparsify(*tiny(), **{how}, resume={str(file)!r}, every=0)")
    process = subprocess.Popen([sys.executable, "-c", script])
    while not file.exists() and process.poll() is None: time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 0 < torch.load(file)["done"] < how["steps"]
    assert same(sparsify(*tiny(), **how, resume=file), sparsify(*tiny(), **how))

def test_a_state_is_bound_to_its_training(tmp_path):
    target, red, blue, dark = tiny()
    file, how = tmp_path/"state", dict(keep=.25, steps=20)
    sparsify(target, red, blue, dark, **how, resume=file)
    with pytest.raises(ValueError, match="recipe.seed = 0, asked for is 1"):
        sparsify(target, red, blue, dark, **how, seed=1, resume=file)
    with pytest.raises(ValueError, match="holds a training with images"):
        sparsify(target, red, blue + .01, dark, **how, resume=file)
    with pytest.raises(ValueError, match="holds a training with weights"):
        sparsify(tiny(1)[0], red, blue, dark, **how, resume=file)
    for damaged in (b"", file.read_bytes()[:-40], b"{}"*99):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not the state of a training"):
            sparsify(target, red, blue, dark, **how, resume=file)

# many

def test_masks_of_one_job_equal_masks_alone():
    target, red, blue, dark = tiny()
    green = (torch.rand(20, 3, 7, 7, generator=torch.Generator().manual_seed(5))*torch.tensor(
        [0, 1., 0])[:, None, None])
    clusters, how = [red, blue, green], dict(steps=30, batch=(8, 8, 8))
    runs = [dict(own=0, other=[1], keep=.2, **how), dict(own=1, keep=.4, seed=3, **how),
            dict(own=2, other=[1, 0], objective="separate", **how),
            dict(own=0, keep=None, penalty=1e-3, optimiser="sgd", epochs=3, **how),
            dict(own=0, other=[1], keep=.2, ablation="resample", **how)]
    alone = [sparsify(target, red, blue, dark, keep=.2, **how),
             sparsify(target, blue, torch.cat([red, green]), dark, keep=.4, seed=3, **how),
             sparsify(target, green, torch.cat([blue, red]), dark, objective="separate", **how),
             sparsify(target, red, torch.cat([blue, green]), dark, keep=None, penalty=1e-3,
                      optimiser="sgd", epochs=3, **how),
             sparsify(target, red, blue, dark, keep=.2, ablation="resample", **how)]
    for n_jobs in (1, 2):
        with joblib.parallel_config("threading", n_jobs=n_jobs):
            together = sparsify_many(target, clusters, dark, runs)
        assert all(map(same, together, alone))
    for bad, message in ((dict(own=3), "clusters 0..2, got 3"), (dict(other=[-1]), "got -1"),
                         (dict(other=[]), "another cluster"), (dict(keep=2.), "got 2.0"),
                         (dict(other=[0]), "must not overlap")):
        with pytest.raises(ValueError, match=message):
            sparsify_many(target, clusters, dark, [runs[0], bad])

@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

def small():
    "Convolutions large enough that torch would divide them among threads."
    torch.manual_seed(0)
    target = Target.of(SmallAlexNet(width=8).eval().requires_grad_(False), "features.10:3",
                       (64, 64))
    x = target.path.crop(torch.randn(56, 3, 64, 64)).contiguous(memory_format=torch.channels_last)
    return (target, [x[:14], x[14:28]], x[28:], [dict(keep=.2, steps=12, seed=seed)
                                                  for seed in range(3)])

def test_masks_side_by_side_equal_masks_alone_on_one_thread(two_threads, monkeypatch):
    target, (own, other), dark, runs = small()
    used, loss = set(), training._loss
    monkeypatch.setattr(training, "_loss",
                        lambda *args: (used.add((threading.get_ident(), torch.get_num_threads())),
                                       loss(*args))[1])
    together = sparsify_many(target, [own, other], dark, runs)
    assert len(used) == 2 and {n for _, n in used} == {1}
    assert threading.get_ident() not in dict(used) and torch.get_num_threads() == 2
    used.clear()
    for config in (dict(n_jobs=1), dict(backend="threading")):
        with joblib.parallel_config(**config):
            in_turn = sparsify_many(target, [own, other], dark, runs)
        assert used == {(threading.get_ident(), 2)}
    assert torch.equal(in_turn[0].mask, together[0].mask)
    assert abs(in_turn[0].loss - together[0].loss).max() < 1e-3*together[0].loss.max()
    torch.set_num_threads(1)
    assert all(map(same, together, [sparsify(target, own, other, dark, **run) for run in runs]))

def test_one_failure_ends_the_trainings_beside_it_and_the_rest_goes_on_later(
    two_threads, monkeypatch, tmp_path):
    target, clusters, dark, runs = small()
    runs = [dict(run, steps=200, patience=0) for run in runs]
    steps, loss = [], training._loss
    def fail(*args):
        steps.append(1)
        if len(steps) == 9: raise MemoryError("no room")
        return loss(*args)
    monkeypatch.setattr(training, "_loss", fail)
    with pytest.raises(MemoryError, match="no room"):
        sparsify_many(target, clusters, dark, runs, tmp_path)
    assert len(steps) <= 11 and torch.get_num_threads() == 2
    monkeypatch.setattr(training, "_loss", loss)
    runs = [dict(run, steps=12) for run in runs]
    first = sparsify_many(target, clusters, dark, runs[:1], tmp_path)
    monkeypatch.setattr(training, "_loss", lambda *args: pytest.fail("trained again"))
    assert same(sparsify_many(target, clusters, dark, runs[:1]*2, tmp_path)[1], first[0])

def test_the_frontier_goes_on_where_it_stopped(tmp_path, monkeypatch):
    ask = lambda: frontier(*tiny(), keeps=(.1, .3), seeds=(0, 1), folder=tmp_path,
                           measure=lambda learned: dict(count=int(learned.mask.sum())), steps=20)
    steps, loss, limit = [], training._loss, [50]
    def counted(*args):
        if len(steps) == limit[0]: raise KeyboardInterrupt
        steps.append(1)
        return loss(*args)
    monkeypatch.setattr(training, "_loss", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one after the other
    with pytest.raises(KeyboardInterrupt): ask()
    limit[0] = None
    table = ask()
    assert len(steps) == 50 + table.steps[table.steps.cumsum() > 50].sum()
    assert len(list(tmp_path.iterdir())) == 4
    assert (table[["keep", "seed", "count"]].values.tolist()
            == [[.1, 0, 19], [.1, 1, 19], [.3, 0, 58], [.3, 1, 58]])
    total = len(steps)
    assert ask().drop(columns="learned").equals(table.drop(columns="learned"))
    assert len(steps) == total
    assert same(table.learned[3], sparsify(*tiny(), keep=.3, seed=1, steps=20))

# counts

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
       st.integers(0, 10**6), st.sampled_from([.001, .01, .05, .1, .25, .5]))
def test_counts_are_exact_and_kept_in_each_layer(shapes, seed, keep):
    layout = Layout(tuple(f"l{i}" for i in range(len(shapes))), tuple(shapes), "kernel")
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (len(layout),), generator=g).float()
    if not round(keep*len(layout)):
        with pytest.raises(ValueError, match="keeps nothing"): keep_top(scores, keep)
        return
    mask, count = keep_top(scores, keep), lambda m: [int(p.sum()) for p in m.split(layout.sizes)]
    assert mask.sum() == round(keep*len(layout))
    assert (mask.all() or scores[mask].min() >= scores[~mask].max())
    other = torch.rand(len(layout), generator=g)
    for like in (random_like(mask, layout, seed), top_like(mask, layout, other)):
        assert count(like) == count(mask)
    assert torch.equal(random_like(mask, layout, seed), random_like(mask, layout, seed))
    for part, chosen in zip(other.split(layout.sizes),
                            top_like(mask, layout, other).split(layout.sizes)):
        if chosen.any() and not chosen.all(): assert part[chosen].min() >= part[~chosen].max()

# paths

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.sampled_from(["weight", "kernel"]),
       st.integers(0, 10**6), st.sampled_from([.15, .4, .8]))
def test_effective_entries_lie_on_a_path(widths, per, seed, keep):
    widths = [*widths, 1]
    kernel = (2, 1) if per == "weight" else ()
    layout = Layout(tuple(f"l{i}" for i in range(len(widths) - 1)),
                    tuple((o, i, *kernel) for i, o in zip(widths, widths[1:])), per)
    mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(seed)) < keep
    parts = list(layout.views(mask).values())
    used = [torch.zeros(p.shape[:2], dtype=torch.bool) for p in parts]
    for way in itertools.product(*map(range, widths)):
        if all(p[o, i].any() for p, i, o in zip(parts, way, way[1:])):
            for u, i, o in zip(used, way, way[1:]): u[o, i] = True
    expected = [p & (u if per == "kernel" else u[:, :, None, None]) for p, u in zip(parts, used)]
    before = mask.clone()
    layers = [nn.Conv2d(i, o, (2, 1) if per == "weight" else 1)
              for i, o in zip(widths, widths[1:])]
    size = widths[0], 8, 1
    target = Target.of(nn.Sequential(*layers).eval(), f"{len(layers) - 1}:0", size, per)
    assert target.layout.shapes == layout.shapes
    found = effective_mask(target, mask)
    assert torch.equal(found, torch.cat([e.reshape(-1) for e in expected]))
    assert torch.equal(mask, before) and torch.equal(effective_mask(target, found), found)

def test_what_is_not_effective_can_be_dropped_without_a_trace():
    target, x, _, _ = tiny(4)
    mask = torch.rand(len(target), generator=torch.Generator().manual_seed(0)) < .2
    useful = effective_mask(target, mask)
    assert useful.sum() < mask.sum()
    torch.testing.assert_close(target.respond(x, useful), target.respond(x, mask))

# files

def test_a_circuit_file_is_exact_and_bound_to_its_weights(tmp_path):
    net, _ = two_in_one(0)
    file = tmp_path/"c.safetensors"
    for per in ("weight", "kernel", "filter"):
        target = Target.of(net, "4:0", (7, 7), per)
        mask = torch.rand(len(target), generator=torch.Generator().manual_seed(1)) < .3
        circuit = Circuit.of(target, mask, "röd", "chance", seed=1,
                             nested={"a": [1, None]})
        circuit.save(file)
        again = Circuit.load(file, copy.deepcopy(net))
        assert torch.equal(again.mask, mask) and again.mask.dtype == torch.bool
        assert ((again.unit, again.layout, again.weights, again.cluster, again.method,
                 again.settings) == (circuit.unit, target.layout, circuit.weights, "röd", "chance",
                                     circuit.settings))
        touched = copy.deepcopy(net)
        touched[2].weight.view(torch.int32)[0, 0, 0, 0] ^= 1
        with pytest.raises(ValueError, match="belongs to other weights"):
            Circuit.load(file, touched)
    with pytest.raises(TypeError):
        Circuit.of(target, mask, "", "", bad={1j}).save(tmp_path/"bad.safetensors")
    assert not (tmp_path/"bad.safetensors").exists()

# methods

def test_every_method_finds_something_by_its_name():
    target, red, blue, dark = tiny()
    short = dict(steps=20, rounds=2)
    for name, method in methods.items():
        found = method(target, red, blue, dark, .25,
                       **{k: v for k, v in short.items() if k in method.takes})
        mask = as_mask(found, .25)
        assert mask.dtype == torch.bool and mask.shape == (len(target),), name
        if name not in ("free", "concrete"): assert mask.sum() == round(.25*len(target)), name
    assert len({m.title for m in methods.values()}) == len(methods)
    with pytest.raises(TypeError): methods["snip"](target, red, blue, dark, .25, steps=3)

def test_a_new_method_gets_what_it_needs():
    target, red, blue, dark = tiny()
    asked = Method("odd", lambda *given, twice=1: given, ("keep", "other"), ("twice",))
    assert asked(target, red, blue, dark, .3, twice=2)[1:] == (.3, blue)
