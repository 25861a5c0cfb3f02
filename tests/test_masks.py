"Learned masks where circuits are known; paths by enumeration; gradients by autograd."
import copy
import hashlib
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

from superpos import sparsify as training
from superpos.circuit import Circuit, ablate, auroc, effective_mask
from superpos.field import pathway
from superpos.mask import (
    Layout,
    active_probability,
    deviate,
    hard_concrete,
    hard_mask,
    mean_replacement,
    random_like,
    replacement,
    respond,
    soft_mask,
    top_like,
    undecided_fraction,
)
from superpos.model import SmallAlexNet, fingerprint, layer_outputs
from superpos.score import keep_top, relevant_weights
from superpos.sparsify import Recipe, frontier, sparsify, sparsify_free, sparsify_many


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
    path, (red, blue, dark) = pathway(net, "4", (7, 7)), images(seed + 10)
    layout = Layout.of(path, 0)
    truth, before = layout.flatten(whose) == own, fingerprint(net)
    cluster, other = (red, blue) if own == 1 else (blue, red)
    found = sparsify(path, 0, cluster, other, dark, keep=truth.float().mean().item(), steps=200,
                     batch=(16, 16, 16), seed=seed).check()
    assert found.mask.sum() == truth.sum() and found.undecided < .01
    assert iou(found.mask, truth) >= .9
    assert iou(random_like(found.mask, layout, seed), truth) < .6
    assert fingerprint(net) == before
    assert not any(m._forward_hooks for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    fresh = images(seed + 20)
    own_response, other_response = (respond(path, 0, x, found.mask, layout)
                                    for x in (fresh[own - 1], fresh[2 - own]))
    assert auroc(own_response, other_response) > .99
    torch.testing.assert_close(own_response, respond(path, 0, fresh[own - 1]), rtol=.15, atol=0)

@pytest.mark.parametrize("objective", ["preserve", "separate"])
@pytest.mark.parametrize("per", ["weight", "kernel", "filter", "channel"])
def test_both_objectives_tell_the_clusters_apart(objective, per):
    net, _ = two_in_one(0)
    path, (red, blue, dark) = pathway(net, "4", (7, 7)), images(0)
    found = sparsify(path, 0, red, blue*2, dark, keep=.4, objective=objective, per=per, steps=150,
                     patience=0)
    assert found.mask.sum() == round(.4*len(found.layout))
    assert found.loss.shape == found.kept.shape and len(found.loss) >= 150
    assert found.undecided < .01
    # the last layer has one filter, so nothing can be told apart without cutting it
    if per == "filter": return
    red, blue, _ = images(1)
    assert auroc(respond(path, 0, red), respond(path, 0, blue*2)) < .2
    assert auroc(respond(path, 0, red, found.mask, found.layout),
                 respond(path, 0, blue*2, found.mask, found.layout)) > .9

def test_bad_input_is_refused_before_any_work(monkeypatch):
    net, _ = two_in_one(0)
    path, (red, blue, dark) = pathway(net, "4", (7, 7)), images(0)
    monkeypatch.setattr(type(path), "__call__", lambda *_: pytest.fail("the network was run"))
    for change in (dict(own=red[:0]), dict(other=blue[:1]), dict(objective="win"), dict(keep=0),
                   dict(keep=-.1), dict(keep=1.01), dict(keep=1e-9), dict(steps=1),
                   dict(per="pixel"),
                   dict(own=torch.where(red == red[3, 0, 2, 2], torch.nan, red)),
                   dict(background=dark/0), dict(rate=0), dict(beta=.5), dict(epochs=1),
                   dict(optimiser="lion"),
                   dict(penalty=1e-3), dict(gate="concrete"), dict(keep=None, gate="stone"),
                   dict(keep=None, penalty=-1), dict(batch=(0, 1, 1)), dict(reach=0),
                   dict(ablation="coin")):
        with pytest.raises(ValueError):
            sparsify(path, 0, **dict(own=red, other=blue, background=dark) | change)

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
        layout, weights = Layout.of(path, 1, per), relevant_weights(path, 1)
        logits = torch.randn(len(layout),
                             generator=torch.Generator().manual_seed(1)).requires_grad_()
        fast, = torch.autograd.grad(path(path.crop(x), layout.apply(soft_mask(logits, 3.), weights),
                                         1).square().sum(), logits)
        plain = {}
        for name, part in layout.views(torch.sigmoid(3*logits)).items():
            masked, w = masked_by_hand(weights[name], part, per), net.get_parameter(name)
            plain[name] = masked if len(masked) == len(w) else torch.cat([w[:1], masked, w[2:]])
        y = torch.func.functional_call(net, plain, (x,))[:, 1, position[0], position[1]]
        slow, = torch.autograd.grad(y.square().sum(), logits)
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)

def test_gradient_by_finite_differences():
    net, _ = two_in_one(1, width=2)
    net.double()
    path = pathway(net, "4", (7, 7))
    layout = Layout.of(path, 0)
    weights = relevant_weights(path, 0)
    x = torch.rand(3, 3, 7, 7, dtype=torch.double)
    for gate in (lambda s: soft_mask(s, 5.), hard_concrete,
                 lambda s: hard_concrete(s, torch.full_like(s, .4))):
        logits = torch.linspace(-.4, .4, len(layout), dtype=torch.double, requires_grad=True)
        response = lambda s, gate=gate: path(x, layout.apply(gate(s), weights), 0)
        assert torch.autograd.gradcheck(response, logits)

def test_the_network_stays_usable_while_a_mask_is_trained():
    net, _ = two_in_one(0)
    before, state = fingerprint(net), {k: v.clone() for k, v in net.state_dict().items()}
    path, groups = pathway(net, "4", (7, 7)), images(0)
    seen = []
    class Watch(training._Exact):
        def during(self, logits, step):
            if step == 3:
                copies = net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))
                seen.extend(map(fingerprint, copies))
                net.load_state_dict(state)
            return super().during(logits, step)
    reference = training._reference(path, 0, groups, [respond(path, 0, x) for x in groups])
    training._train(path, 0, reference, Recipe(keep=.4, steps=6), Watch)
    assert seen == [before]*3 and set(net.state_dict()) == set(state)
    assert not any(p.requires_grad for p in net.parameters())

def test_masks_under_autocast():
    net, _ = two_in_one(0)
    path, (x, _, _) = pathway(net, "4", (7, 7)), images(0)
    layout, weights = Layout.of(path, 0), relevant_weights(path, 0)
    def gradient():
        logits = torch.linspace(-1, 1, len(layout)).requires_grad_()
        y = path(x, layout.apply(soft_mask(logits, 2.), weights), 0)
        y.float().sum().backward()
        return y, logits.grad
    exact, wanted = gradient()
    with torch.autocast("cpu", torch.bfloat16): rough, found = gradient()
    assert rough.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(rough.float(), exact, rtol=.03, atol=0)
    torch.testing.assert_close(found, wanted, rtol=.1, atol=.02*wanted.abs().max().item())

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_training_step_is_captured_in_a_cuda_graph():
    net, _ = two_in_one(0)
    path, x = pathway(net.cuda(), "4", (7, 7)), torch.cat(images(0)).cuda()
    layout = Layout.of(path, 0)
    weights = relevant_weights(path, 0)
    beta = torch.ones((), device="cuda")
    def start():
        logits = torch.linspace(-.5, .5, len(layout), device="cuda").requires_grad_()
        return logits, torch.optim.Adam([logits], lr=.05, capturable=True)
    def step(logits, adam):
        adam.zero_grad(set_to_none=False)
        mask = soft_mask(logits, beta)
        (F.softplus(-path(x, layout.apply(mask, weights), 0)).mean() + 1e-3*mask.sum()).backward()
        adam.step()
    plain, captured = start(), start()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): step(*captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): step(*captured)
    for i in range(10): beta.fill_(1 + i); graph.replay()
    beta.fill_(1)
    for _ in range(3): step(*plain)
    for i in range(10): beta.fill_(1 + i); step(*plain)
    torch.testing.assert_close(captured[0], plain[0], rtol=1e-4, atol=1e-4)

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
    net, _ = two_in_one(3)
    path, (x, _, _) = pathway(net, "4", (7, 7)), images(3)
    layout = Layout.of(path, 0)
    for keep in (.05, .3, .8):
        mask = keep_top(torch.rand(len(layout), generator=torch.Generator().manual_seed(5)), keep)
        cut = copy.deepcopy(net)
        for name, part in layout.views(mask).items(): cut.get_parameter(name)[~part] = 0
        torch.testing.assert_close(respond(path, 0, x, mask, layout, batch=5),
                                   layer_outputs(cut, ["4"], x)["4"][:, 0, 0, 0])

# what stands in for the rest

def padded(seed=0):
    "A chain with padding, pooling, a stride and a normalisation, in double precision."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
                        nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 5, 3, 1, 1, bias=False), nn.GELU(),
                        nn.Conv2d(5, 3, 3, 1, 1)).double().eval().requires_grad_(False)
    net[1].running_mean.normal_()
    return net, pathway(net, "6", (22, 18))

def by_hand(net, layers, x, z, masks):
    "The last layer's map: each kernel reads the image where it is kept, and the other where not."
    for m, mask in zip(net, masks):
        if mask is None: x, z = m(x.clone()), m(z.clone()); continue
        both = [sum(F.conv2d(side[:, [i]], m.weight[:, [i]]*part[:, [i], None, None], None,
                             m.stride, m.padding) for i in range(m.in_channels))
                for side, part in ((x, mask), (z, 1 - mask))]
        x, z = sum(both) + (0 if m.bias is None else m.bias[:, None, None]), m(z)
    return x

def parts_of(net, layout, mask):
    "For each layer, the kernels' entries of a mask, (out, in); of the last layer the unit's alone."
    parts = [part.double() for part in layout.views(mask).values()]
    parts[-1] = parts[-1].expand(3, -1)
    each = iter(parts)
    return [next(each) if isinstance(m, nn.Conv2d) else None for m in net]

@pytest.mark.parametrize("keep", [0., .3, .7, 1.])
def test_each_kernel_reads_the_image_or_what_stands_in_for_it(keep):
    net, path = padded()
    g = torch.Generator().manual_seed(1)
    layout = Layout.of(path, 1)
    x, others = (torch.randn(5, 3, 22, 18, generator=g, dtype=torch.double) for _ in range(2))
    mask = torch.rand(len(layout), generator=g) < keep
    row, column = path.position
    slow = by_hand(net, layout, x, others, parts_of(net, layout, mask))[:, 1, row, column]
    fast = respond(path, 1, path.crop(x), mask, layout, batch=2, instead=path.crop(others))
    torch.testing.assert_close(fast, slow)
    drawn = torch.randint(5, (5,), generator=torch.Generator().manual_seed(3))
    found = ablate(path, 1, path.crop(x), mask, layout, "resample", path.crop(others), seed=3)
    torch.testing.assert_close(found, respond(path, 1, path.crop(x), mask, layout,
                                              instead=path.crop(others[drawn])))

def test_the_mean_is_of_what_goes_into_each_layer():
    _, path = padded()
    x = path.crop(torch.randn(7, 3, 22, 18, dtype=torch.double))
    mean, every = mean_replacement(path, 1, x, batch=3), replacement(path, 1, x)
    for name, (into, out) in every.items():
        torch.testing.assert_close(mean[name][0], into.mean(0, keepdim=True))
        torch.testing.assert_close(mean[name][1], out.mean(0, keepdim=True))
    torch.testing.assert_close(every["6.weight"][1].flatten(), path(x, unit=1))
    assert tuple(every) == Layout.of(path, 1).names

@pytest.mark.parametrize("per", pers)
def test_gradient_of_the_mask_under_replacement(per):
    net, path = padded()
    g = torch.Generator().manual_seed(2)
    x, others = (torch.randn(3, 3, 22, 18, generator=g, dtype=torch.double) for _ in range(2))
    layout, weights = Layout.of(path, 1, per), relevant_weights(path, 1)
    logits = torch.randn(len(layout), generator=g, dtype=torch.double).requires_grad_()
    for instead in (replacement(path, 1, path.crop(others)),
                    mean_replacement(path, 1, path.crop(others))):
        response = lambda s, instead=instead: deviate(
            path, 1, path.crop(x), layout.apply(torch.sigmoid(s), weights), instead)
        assert torch.autograd.gradcheck(response, logits)
    if per != "kernel": return
    fast, = torch.autograd.grad(respond_soft(path, x, others, logits, layout).sum(), logits)
    plain = by_hand(net, layout, x, others, parts_of(net, layout, torch.sigmoid(logits)))
    slow, = torch.autograd.grad(plain[:, 1, path.position[0], path.position[1]].sum(), logits)
    torch.testing.assert_close(fast, slow)

def respond_soft(path, x, others, logits, layout):
    masked = layout.apply(torch.sigmoid(logits), relevant_weights(path, 1))
    return deviate(path, 1, path.crop(x), masked, replacement(path, 1, path.crop(others)))

def test_nothing_that_stands_in_is_zero_ablation():
    net, path = padded()
    layout, x = Layout.of(path, 1), path.crop(torch.randn(4, 3, 22, 18, dtype=torch.double))
    mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(0))
    biases = [torch.zeros(1, dtype=torch.double) if net[i].bias is None else net[i].bias
              for i in (0, 4)] + [net[6].bias[1:2]]
    nothing = {name: (torch.zeros((), dtype=torch.double), bias[:, None, None])
               for name, bias in zip(layout.names, biases)}
    torch.testing.assert_close(respond(path, 1, x, mask, layout, instead=nothing),
                               respond(path, 1, x, mask, layout))

@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_a_step_sees_what_the_judge_sees(ablation):
    "The loss of a hard mask is the objective on `ablate`'s responses."
    path, unit, *groups = tiny()
    recipe, layout = Recipe(keep=.3, ablation=ablation, batch=(4, 4, 4)), Layout.of(path, 0)
    reference = training._reference(path, 0, groups, [respond(path, 0, x) for x in groups])
    mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)) < .5
    batches = training._batches(reference, recipe, 3)
    plain = training._batches(reference, Recipe(keep=.3, batch=(4, 4, 4)), 3)
    assert all(torch.equal(a, b) for a, b in zip(plain, batches)), "the same images are seen"
    assert len(batches) == 3 + (ablation == "resample")
    mean = mean_replacement(path, 0, groups[2]) if ablation == "mean" else None
    loss = training._loss(path, 0, reference, [b[2] for b in batches],
                          layout.apply(mask, relevant_weights(path, 0)), "preserve", mean)
    index = [b[2] for b in batches]
    if ablation == "resample":
        parts = zip(groups, index, index[3].split(4))
        y = [respond(path, 0, x[i], mask, layout, instead=groups[2][j]) for x, i, j in parts]
    else:
        y = [ablate(path, 0, x[i], mask, layout, ablation, groups[2])
             for x, i in zip(groups, index)]
    wanted = training.preserve(y, [w[i] for w, i in zip(reference.whole, index)], reference.level)
    torch.testing.assert_close(loss, wanted)

def test_a_mask_is_best_under_the_ablation_it_was_learned_under():
    torch.manual_seed(0)
    path = pathway(SmallAlexNet(width=6).eval().requires_grad_(False), "features.6", (64, 64))
    g = torch.Generator().manual_seed(1)
    own, other, dark = (path.crop(torch.rand(24, 3, 64, 64, generator=g)*bright)
                        for bright in (1., .7, .9))
    whole, kinds = respond(path, 3, own), ("zero", "mean", "resample")
    miss = {}
    for kind in kinds:
        found = sparsify(path, 3, own, other, dark, keep=.3, steps=80, rate=.1, ablation=kind)
        assert found.check(largest_gap=1.).recipe.ablation == kind
        assert found.mask.sum() == round(.3*len(found.layout))
        for judge in kinds:
            y = ablate(path, 3, own, found.mask, found.layout, judge, dark)
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
    plan = training._plan(how, 2)
    names = [training._state_name(tiny()[0], 0, (*plan[:2], Recipe(**how, ablation=kind)))
             for kind in training.ablations]
    before = repr(("4", 0, plan)).replace(", ablation='zero'", "")
    assert names[0] == f"{hashlib.sha256(before.encode()).hexdigest()[:12]}.pt"
    assert len({*names}) == 3

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
    return pathway(net, "4", (7, 7)), 0, *images(seed)

def same(a, b):
    return (torch.equal(a.mask, b.mask)
            and all((getattr(a, n) == getattr(b, n)).all() for n in ("loss", "kept", "unsure"))
            and (a.undecided, a.gap) == (b.undecided, b.gap))

def test_two_steps_of_the_source_by_hand(tmp_path):
    "SGD with momentum on cross-entropy and price, β from 1 to 200, on a plain masked network."
    path, unit, own, other, background = tiny()
    net, layout, batch = path.model, Layout.of(path, 0), (4, 5, 6)
    sparsify_free(path, unit, own, other, background, .01, epochs=2, steps=2, batch=batch, seed=7,
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
    path, nowhere = pathway(net, "4", (7, 7)), slice(12, 20)
    found = sparsify(path, 0, *images(0), keep=22/32, steps=40)
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
    path, unit, red, blue, dark = tiny()
    twice = r"1 images are in 'own' and in 'other' \(the first is image 2 of 'own'\)"
    with pytest.raises(ValueError, match=twice):
        sparsify(path, unit, red, torch.cat([blue, red[2:3]]), dark)
    with pytest.raises(ValueError, match="image 1 of 'other' has values that are not finite"):
        sparsify(path, unit, red, torch.stack([blue[0], blue[1]*torch.nan]), dark)
    with pytest.raises(ValueError, match="same value for all images"):
        sparsify(path, unit, red*0, blue*0, dark*0)
    with pytest.raises(ValueError, match="'other' needs at least two images, got 0"):
        sparsify(path, unit, red, blue[:0], dark)

forms = [dict(keep=.25), dict(keep=None, penalty=1e-3, optimiser="sgd", rate=.1, epochs=5,
                              start=.05), dict(keep=None, penalty=1e-3, gate="concrete"),
         dict(keep=.25, ablation="mean"), dict(keep=.25, ablation="resample")]

@pytest.mark.parametrize("form", forms, ids=["exact", "free", "concrete", "mean", "resample"])
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
    path, unit, red, blue, dark = tiny()
    file, how = tmp_path/"state", dict(keep=.25, steps=20)
    sparsify(path, unit, red, blue, dark, **how, resume=file)
    with pytest.raises(ValueError, match="recipe.seed = 0, asked for is 1"):
        sparsify(path, unit, red, blue, dark, **how, seed=1, resume=file)
    with pytest.raises(ValueError, match="holds a training with images"):
        sparsify(path, unit, red, blue + .01, dark, **how, resume=file)
    with pytest.raises(ValueError, match="holds a training with weights"):
        sparsify(*tiny(1)[:2], red, blue, dark, **how, resume=file)
    for damaged in (b"", file.read_bytes()[:-40], b"{}"*99):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not the state of a training"):
            sparsify(path, unit, red, blue, dark, **how, resume=file)

# many

def test_masks_of_one_job_equal_masks_alone():
    path, unit, red, blue, dark = tiny()
    green = (torch.rand(20, 3, 7, 7, generator=torch.Generator().manual_seed(5))*torch.tensor(
        [0, 1., 0])[:, None, None])
    clusters, how = [red, blue, green], dict(steps=30, batch=(8, 8, 8))
    runs = [dict(own=0, other=[1], keep=.2, **how), dict(own=1, keep=.4, seed=3, **how),
            dict(own=2, other=[1, 0], objective="separate", **how),
            dict(own=0, keep=None, penalty=1e-3, optimiser="sgd", epochs=3, **how),
            dict(own=0, other=[1], keep=.2, ablation="resample", **how)]
    alone = [sparsify(path, unit, red, blue, dark, keep=.2, **how),
             sparsify(path, unit, blue, torch.cat([red, green]), dark, keep=.4, seed=3, **how),
             sparsify(path, unit, green, torch.cat([blue, red]), dark, objective="separate", **how),
             sparsify(path, unit, red, torch.cat([blue, green]), dark, keep=None, penalty=1e-3,
                      optimiser="sgd", epochs=3, **how),
             sparsify(path, unit, red, blue, dark, keep=.2, ablation="resample", **how)]
    for n_jobs in (1, 2):
        with joblib.parallel_config("threading", n_jobs=n_jobs):
            together = sparsify_many(path, unit, clusters, dark, runs)
        assert all(map(same, together, alone))
    for bad, message in ((dict(own=3), "clusters 0..2, got 3"), (dict(other=[-1]), "got -1"),
                         (dict(other=[]), "another cluster"), (dict(keep=2.), "got 2.0"),
                         (dict(other=[0]), "must not overlap")):
        with pytest.raises(ValueError, match=message):
            sparsify_many(path, unit, clusters, dark, [runs[0], bad])

@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

def small():
    "Convolutions large enough that torch would divide them among threads."
    torch.manual_seed(0)
    path = pathway(SmallAlexNet(width=8).eval().requires_grad_(False), "features.10", (64, 64))
    x = path.crop(torch.randn(56, 3, 64, 64)).contiguous(memory_format=torch.channels_last)
    return (path, 3, [x[:14], x[14:28]], x[28:], [dict(keep=.2, steps=12, seed=seed)
                                                  for seed in range(3)])

def test_masks_side_by_side_equal_masks_alone_on_one_thread(two_threads, monkeypatch):
    path, unit, (own, other), dark, runs = small()
    used, loss = set(), training._loss
    monkeypatch.setattr(training, "_loss",
                        lambda *args: (used.add((threading.get_ident(), torch.get_num_threads())),
                                       loss(*args))[1])
    together = sparsify_many(path, unit, [own, other], dark, runs)
    assert len(used) == 2 and {n for _, n in used} == {1}
    assert threading.get_ident() not in dict(used) and torch.get_num_threads() == 2
    used.clear()
    for config in (dict(n_jobs=1), dict(backend="threading")):
        with joblib.parallel_config(**config):
            in_turn = sparsify_many(path, unit, [own, other], dark, runs)
        assert used == {(threading.get_ident(), 2)}
    assert torch.equal(in_turn[0].mask, together[0].mask)
    assert abs(in_turn[0].loss - together[0].loss).max() < 1e-3*together[0].loss.max()
    torch.set_num_threads(1)
    assert all(map(same, together, [sparsify(path, unit, own, other, dark, **run) for run in runs]))

def test_one_failure_ends_the_trainings_beside_it_and_the_rest_goes_on_later(
    two_threads, monkeypatch, tmp_path):
    path, unit, clusters, dark, runs = small()
    runs = [dict(run, steps=200, patience=0) for run in runs]
    steps, loss = [], training._loss
    def fail(*args):
        steps.append(1)
        if len(steps) == 9: raise MemoryError("no room")
        return loss(*args)
    monkeypatch.setattr(training, "_loss", fail)
    with pytest.raises(MemoryError, match="no room"):
        sparsify_many(path, unit, clusters, dark, runs, tmp_path)
    assert len(steps) <= 11 and torch.get_num_threads() == 2
    monkeypatch.setattr(training, "_loss", loss)
    runs = [dict(run, steps=12) for run in runs]
    first = sparsify_many(path, unit, clusters, dark, runs[:1], tmp_path)
    monkeypatch.setattr(training, "_loss", lambda *args: pytest.fail("trained again"))
    assert same(sparsify_many(path, unit, clusters, dark, runs[:1]*2, tmp_path)[1], first[0])

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
    assert torch.equal(effective_mask(mask, layout), torch.cat([e.reshape(-1) for e in expected]))
    assert torch.equal(mask, before)
    assert torch.equal(effective_mask(effective_mask(mask, layout), layout),
                       effective_mask(mask, layout))

def test_what_is_not_effective_can_be_dropped_without_a_trace():
    net, _ = two_in_one(4)
    path, (x, _, _) = pathway(net, "4", (7, 7)), images(4)
    layout = Layout.of(path, 0)
    mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(0)) < .2
    useful = effective_mask(mask, layout)
    assert useful.sum() < mask.sum()
    torch.testing.assert_close(respond(path, 0, x, useful, layout),
                               respond(path, 0, x, mask, layout))

# files

def test_a_circuit_file_is_exact_and_bound_to_its_weights(tmp_path):
    net, _ = two_in_one(0)
    path, file = pathway(net, "4", (7, 7)), tmp_path/"c.safetensors"
    for per in ("weight", "kernel", "filter"):
        layout = Layout.of(path, 0, per)
        mask = torch.rand(len(layout), generator=torch.Generator().manual_seed(1)) < .3
        circuit = Circuit.of(net, "4:0", mask, layout, "röd", "chance", seed=1,
                             nested={"a": [1, None]})
        circuit.save(file)
        again = Circuit.load(file, copy.deepcopy(net))
        assert torch.equal(again.mask, mask) and again.mask.dtype == torch.bool
        assert ((again.unit, again.layout, again.weights, again.cluster, again.method,
                 again.settings) == (circuit.unit, layout, circuit.weights, "röd", "chance",
                                     circuit.settings))
        touched = copy.deepcopy(net)
        touched[2].weight.view(torch.int32)[0, 0, 0, 0] ^= 1
        with pytest.raises(ValueError, match="belongs to other weights"):
            Circuit.load(file, touched)
    with pytest.raises(TypeError):
        Circuit.of(net, "4:0", mask, layout, "", "", bad={1j}).save(tmp_path/"bad.safetensors")
    assert not (tmp_path/"bad.safetensors").exists()
