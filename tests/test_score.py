"Scores against removal, autograd and maps held by hand; what is relevant; counts; FORCE."
import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from superpos.field import pathway
from superpos.model import ResNet8, SmallAlexNet, fingerprint, load_model
from superpos.score import (
    actgrad,
    force,
    force_schedule,
    iter_snip,
    keep_top,
    magnitude,
    random_scores,
    snip,
    taylor,
)
from superpos.target import Target, broadcast_parts, part_means, relevant_weights

granularities = ("weight", "kernel", "filter", "channel")
with_images = dict(snip=snip, taylor=taylor, actgrad=actgrad, force=force, iter_snip=iter_snip)


def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 2))


class Fire(nn.Module):
    "Branches that join, one that joins too late, and a fork from which one way leads nowhere."
    def __init__(self):
        super().__init__()
        self.squeeze, self.left, self.right = (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1),
                                               nn.Conv2d(4, 3, (2, 3), padding="same", dilation=2))
        self.unused, self.target, self.late = (nn.Conv2d(4, 3, 1), nn.Conv2d(6, 4, 3),
                                               nn.Conv2d(6, 4, 3))

    def forward(self, x):
        x = F.relu(self.squeeze(x), inplace=True)
        self.unused(x)
        x = F.relu(torch.cat([self.left(x), self.right(x)], 1))
        return self.late(x) + self.target(x)


class Grey(nn.Sequential):
    def forward(self, x): return super().forward(x.mean(1).flatten(1))


def network(name):
    "A network's pathway to a layer, and images."
    torch.manual_seed(0)
    vit = lambda: torchvision.models.VisionTransformer(16, 8, num_layers=2, num_heads=2,
                                                       hidden_dim=8, mlp_dim=12)
    make, layer, size = {
        "chain": (tiny, "5", (31, 29)), "fire": (Fire, "target", (9, 9)),
        "residual": (lambda: ResNet8(width=4), "stages.1.conv2", (16, 16)),
        "perceptron": (lambda: Grey(nn.Linear(36, 9), nn.GELU(), nn.Linear(9, 3)), "2", (6, 6)),
        "transformer": (vit, "encoder.layers.encoder_layer_1.mlp.0", (16, 16))}[name]
    path = pathway(make().eval().requires_grad_(False), layer, size)
    return path, path.crop(torch.randn(6, 3, *size))


def whole(path):
    return dataclasses.replace(path, chain=None, window=tuple((0, n) for n in path.size[1:]))


networks = ("chain", "fire", "residual", "perceptron", "transformer")


# ---- what is relevant

@pytest.mark.parametrize("name", networks)
def test_relevant_weights_are_those_the_value_depends_on(name):
    path, x = network(name)
    weights, images = relevant_weights(path, 1), 3*torch.randn(8, *path.size)
    assert list(weights)[-1] == f"{path.layer}.weight" and len(weights[f"{path.layer}.weight"]) == 1
    for parameter, p in path.model.named_parameters():
        if p.ndim not in (2, 4): continue
        changed = copy.deepcopy(path.model)
        changed.get_parameter(parameter).add_(.3*torch.randn(p.shape))
        same = torch.equal(dataclasses.replace(whole(path), model=changed)(images, unit=1),
                           whole(path)(images, unit=1))
        assert same != (parameter in weights), parameter
    torch.testing.assert_close(path(x, weights, 1), path(x, unit=1))


def test_names_come_in_the_order_of_the_layers():
    assert ([n.split(".")[0] for n in relevant_weights(network("fire")[0], 0)]
            == ["squeeze", "left", "right", "target"])


@pytest.mark.parametrize("name,layer,count,kernels",
                         [("alexnet", "features.10", 1_881_024, 184_768),
                          ("squeezenet1_1", "features.12.expand3x3", 556_288, None)])
def test_counts_of_known_networks(name, layer, count, kernels):
    weights = relevant_weights(pathway(load_model(name), layer), 9)
    assert sum(w.numel() for w in weights.values()) == count
    if kernels: assert sum(part_means(w, "kernel").numel() for w in weights.values()) == kernels
    if name == "squeezenet1_1":
        assert "features.12.squeeze.weight" in weights
        assert "features.12.expand1x1.weight" not in weights


def test_what_is_not_supported_is_named():
    grouped = pathway(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=2),
                                    nn.Conv2d(4, 1, 3)).eval(), "2", (9, 9))
    with pytest.raises(NotImplementedError, match="'1' has groups"): relevant_weights(grouped, 0)
    mobile = pathway(load_model("mobilenet_v2"), "features.4.conv.2", (64, 64))
    with pytest.raises(NotImplementedError, match="'features.1.conv.0.0' has groups"):
        relevant_weights(mobile, 0)
    for unit in (-1, 3):
        with pytest.raises(ValueError, match=f"units 0..2, got {unit}"):
            relevant_weights(network("chain")[0], unit)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda s: len(s) != 3),
       st.sampled_from(granularities))
def test_spread_is_the_inverse_of_gather(shape, per):
    weight = torch.rand(shape, dtype=torch.double)
    parts = torch.rand_like(part_means(weight, per))
    spread = broadcast_parts(parts, weight, per)*torch.ones_like(weight)
    torch.testing.assert_close(part_means(spread, per), parts)


def test_a_flat_vector_knows_its_weights():
    target = Target(network("chain")[0], 1)
    scores = magnitude(target)
    for name, part in target.layout.views(scores).items():
        torch.testing.assert_close(part, part_means(target.weights[name].abs(), "kernel"))
    assert torch.equal(random_scores(target, 3), random_scores(target, 3))
    assert len(random_scores(target)) == len(scores) == len(target)


def together(parts): return torch.cat([p.flatten() for p in parts.values()])


# ---- against what they mean

def removal(path, unit, x, per):
    "What taking out each part changes, summed over images: by doing it."
    before, weights, effect = path(x, unit=unit), relevant_weights(path, unit), []
    for name, w in weights.items():
        count = part_means(w, per).numel()
        for i in range(count):
            mask = torch.ones(count, dtype=w.dtype)
            mask[i] = 0
            without = {**weights, name: w*broadcast_parts(mask, w, per)}
            effect.append((path(x, without, unit) - before).abs().sum())
    return torch.stack(effect)


@pytest.mark.parametrize("per", granularities)
def test_taylor_is_removal_where_the_network_is_linear(per):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AvgPool2d(2),
                        nn.Conv2d(4, 3, 2),
                        nn.Conv2d(3, 2, 2)).eval().requires_grad_(False).double()
    path = pathway(net, "4", (8, 8))
    x = path.crop(torch.randn(5, 3, 8, 8, dtype=torch.double))
    torch.testing.assert_close(taylor(Target(path, 1, per), x), removal(path, 1, x, per))


@pytest.mark.parametrize("per", granularities)
def test_scores_rank_as_removal_does(per):
    path, x = network("chain")
    truth, rank = removal(path, 1, x, per), {}
    for name, score in dict(snip=snip, taylor=taylor, actgrad=actgrad).items():
        rank[name] = spearmanr(score(Target(path, 1, per), x), truth).statistic
    chance = spearmanr(magnitude(Target(path, 1, per)), truth).statistic
    assert (rank["taylor"] > .8 and rank["actgrad"] > .5 and rank["snip"] > .35
            and rank["taylor"] > chance + .1), (rank, chance)


@pytest.mark.parametrize("name", networks)
@pytest.mark.parametrize("per", ("weight", "kernel", "filter", "channel"))
def test_snip_and_taylor_against_the_gradient_of_each_image(name, per):
    path, x = network(name)
    plain = {n: w.clone().requires_grad_() for n, w in relevant_weights(path, 1).items()}
    sizes, wholes = (dict.fromkeys(plain, 0.0) for _ in range(2))
    for image in x.split(1):
        slopes = torch.autograd.grad(path(image, plain, 1).sum(), list(plain.values()))
        for (n, w), g in zip(plain.items(), slopes):
            effect = (w*g).detach()
            axes = {"weight": (), "kernel": (2, 3), "filter": (1, 2, 3), "channel": (0, 2, 3)}[per]
            axes = [a for a in axes if a < w.ndim]
            sizes[n] = sizes[n] + (effect.abs().mean(axes) if axes else effect.abs())
            wholes[n] = wholes[n] + (effect.sum(axes) if axes else effect).abs()
    for score, wanted in ((snip, sizes), (taylor, wholes)):
        torch.testing.assert_close(score(Target(path, 1, per), x), together(wanted), rtol=1e-4,
                                   atol=1e-6)


def test_one_image_at_a_time_and_a_batch_give_the_same(monkeypatch):
    path, x = network("fire")
    batched = snip(Target(path, 1), x)
    monkeypatch.setattr("superpos.score._batch", lambda weights: 1)
    torch.testing.assert_close(snip(Target(path, 1), x), batched)


def test_images_of_opposite_effect_do_not_cancel():
    net = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False)).eval().requires_grad_(False)
    path, x = pathway(net, "0", (1, 1)), torch.rand(1, 3, 1, 1)
    for score in (snip, taylor, actgrad):
        one, both = (score(Target(path, 0), images) for images in (x, torch.cat([x, -x])))
        torch.testing.assert_close(both, 2*one)
        assert (one > 0).all()


# ---- ActGrad

def held(path, unit, x, per):
    "ActGrad from the map of every part, in whole images."
    seen, handles = {}, []
    def note(name):
        def hook(module, inputs, value):
            seen[name] = inputs[0], value
            return value.clone()
        return hook
    names = [n.removesuffix(".weight") for n in relevant_weights(path, unit)]
    for n in names: handles.append(path.model.get_submodule(n).register_forward_hook(note(n)))
    y = path(x.clone().requires_grad_(), unit=unit).sum()
    for handle in handles: handle.remove()
    slopes = torch.autograd.grad(y, [seen[n][1] for n in names], retain_graph=True)
    rows = lambda n: [unit] if n == path.layer else range(len(path.model.get_submodule(n).weight))
    return {n: held_in_layer(path.model.get_submodule(n), *seen[n], slope, rows(n), per).detach()
            for n, slope in zip(names, slopes)}


def held_in_layer(module, into, out, slope, rows, per):
    "The scores of some rows of one layer, part by part."
    w, linear = module.weight, isinstance(module, nn.Linear)
    def run(w):
        if linear: return F.linear(into, w)
        return F.conv2d(into, w, None, module.stride, module.padding, module.dilation)
    size = lambda t, o: t[..., o] if linear else t[:, o]  # one output's map
    total = lambda product: product.abs().reshape(len(product), -1).mean(1).sum()
    def only(*index):
        return total(size(run(torch.zeros_like(w).index_put(
            tuple(torch.tensor(i) for i in index), w[index]))*slope, index[0]))
    if per == "channel":
        back, = torch.autograd.grad(out, into, slope, retain_graph=True)
        return torch.stack([total(size(into*back, i)) for i in range(w.shape[1])])
    if per == "filter": return torch.stack([total(size(run(w)*slope, o)) for o in rows])
    shape = w.shape[1:2] if per == "kernel" else w.shape[1:]
    inner = itertools.product(*map(range, shape))
    return torch.stack([only(o, *at) for o, at in itertools.product(rows, inner)]).view(
        len(rows), *shape)


@pytest.mark.parametrize("name", ("chain", "fire", "residual", "perceptron"))
@pytest.mark.parametrize("per", granularities)
def test_actgrad_against_maps_held_by_hand(name, per):
    path, _ = network(name)
    path, x = whole(path), torch.randn(3, *path.size)
    target = Target(path, 1, per)
    found, expected = actgrad(target, x, batch=2), held(path, 1, x, per)
    for n, scores in target.layout.views(found).items():
        torch.testing.assert_close(scores, expected[n.removesuffix(".weight")], rtol=1e-5,
                                   atol=1e-6)


@pytest.mark.parametrize("per", granularities)
def test_the_receptive_field_gives_the_scores_of_the_whole_image(per):
    path, _ = network("chain")
    x = torch.randn(3, *path.size)
    assert path.crop(x).numel() < x.numel()
    torch.testing.assert_close(actgrad(Target(path, 1, per), path.crop(x)),
                               actgrad(Target(whole(path), 1, per), x), rtol=1e-5, atol=1e-7)


def test_actgrad_bounds_taylor_in_attention():
    path, x = network("transformer")
    target, before, positions = Target(path, 1), F.linear, 5
    once = target.layout.views(actgrad(target, x))
    assert F.linear is before
    for name, effect in target.layout.views(taylor(target, x)).items():
        assert once[name].shape == effect.shape and (once[name] > 0).any()
        assert (effect <= once[name]*positions*1.0001 + 1e-7).all(), name


def test_few_channels_at_a_time_is_no_different(monkeypatch):
    from superpos import score
    path, x = network("chain")
    together, plain = actgrad(Target(path, 1), x), score._kernel_sums
    monkeypatch.setattr(score, "_kernel_sums", lambda *args: plain(*args, floats=1))
    torch.testing.assert_close(actgrad(Target(path, 1), x), together)


# ---- FORCE and Iter-SNIP

def gate():
    "Entry 'b' holds the ReLU shut on the only image on which 'a' counts: until it is gone."
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(),
                        nn.Conv2d(2, 1, 1)).eval().requires_grad_(False)
    net[0].weight.copy_(torch.tensor([[1., 0, 0], [0, -2, 1]]).view(2, 3, 1, 1))
    net[0].bias.copy_(torch.tensor([0., .5]))
    net[2].weight.copy_(torch.tensor([[3., 1]]).view(1, 2, 1, 1))
    return pathway(net, "2", (1, 1)), torch.tensor([[1., 10, 10], [1, -1, 0]]).view(2, 3, 1, 1)


def test_force_revives_what_iter_snip_does_not():
    path, x = gate()
    a = 5  # second filter, third channel
    target = Target(path, 0)
    first = keep_top(snip(target, x), force_schedule(8, 2, 6)[0]/8)
    revived, stayed = (keep_top(score(target, x, keep=.25, rounds=6), .25)
                       for score in (force, iter_snip))
    assert snip(target, x)[a] == 0 and not first[a]
    assert revived[a] and not stayed[a] and revived.sum() == stayed.sum() == 2


def test_the_mask_gradient_is_taken_where_the_mask_is_zero():
    path, x = gate()
    mask = torch.ones(8, requires_grad=True)
    closed = mask.detach().clone()
    closed[4:6] = 0
    weights = relevant_weights(path, 0)
    def masked(mask):
        return {n: w*m.view(w.shape) for (n, w), m in zip(weights.items(), mask.split([6, 2]))}
    slopes = torch.autograd.functional.jacobian(lambda m: path(x, masked(m), 0), closed)
    slopes = slopes.abs().sum(0)
    from superpos.score import _snip
    torch.testing.assert_close(_snip(Target(path, 0, "weight"), x, masked(closed)), slopes)
    assert slopes[4:6].min() > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**6), st.floats(1e-6, 1), st.integers(1, 30))
def test_schedules_end_exactly_and_never_grow(total, keep, rounds):
    kept = max(1, round(keep*total))
    sizes = force_schedule(total, kept, rounds)
    assert sizes[-1] == kept and len(sizes) == rounds
    assert all(total >= a >= b >= kept for a, b in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("keep", (.001, .01, .05, .2, .5))
@pytest.mark.parametrize("score", with_images)
def test_exact_counts(score, keep):
    torch.manual_seed(0)
    path = pathway(SmallAlexNet(width=16).eval(), "features.6", (32, 32))
    x = path.crop(torch.rand(2, 3, 32, 32))
    sized = dict(keep=keep) if score in ("force", "iter_snip") else {}
    scores = with_images[score](Target(path, 1, "weight"), x, **sized)
    mask = keep_top(scores, keep)
    assert mask.sum() == round(keep*len(scores)) and scores[mask].min() >= scores[~mask].max()


def test_iterated_snip_only_shrinks():
    path, x = network("residual")
    scores, count = iter_snip(Target(path, 1, "weight"), x, .2, 5), force_schedule(756, 151, 5)
    assert (scores >= 0).sum() == count[-2] and (scores == -1).sum() == 756 - count[-2]


# ---- every network, and what is refused

@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.parametrize("name,layer",
                         [("alexnet", "features.10"), ("squeezenet1_1", "features.12.expand3x3")])
def test_large_networks(name, layer):
    torch.manual_seed(0)
    path = pathway(load_model(name), layer)
    x, before = path.crop(torch.rand(2, 3, 224, 224)), fingerprint(path.model)
    target = Target(path, 9)
    for score in with_images.values():
        found = score(target, x, **(dict(rounds=2) if score in (force, iter_snip) else {}))
        assert found.shape == (len(target),) and found.isfinite().all()
        assert (found > 0).float().mean() > .03
    assert fingerprint(path.model) == before


@pytest.mark.parametrize("name", networks)
@pytest.mark.parametrize("score", with_images)
@pytest.mark.parametrize("per", granularities)
def test_small_networks_at_every_granularity(name, score, per):
    path, x = network(name)
    sized = dict(keep=.5) if score in ("force", "iter_snip") else {}
    found = with_images[score](target := Target(path, 1, per), x, **sized)
    shapes = {n: part_means(w, per).shape for n, w in relevant_weights(path, 1).items()}
    assert {n: s.shape for n, s in target.layout.views(found).items()} == shapes
    assert found.isfinite().all() and not found.requires_grad


@pytest.mark.parametrize("call,message", [
    (lambda target, x: snip(target, x[:0]), "at least one reference image"),
    (lambda target, x: actgrad(target, x[:0]), "at least one reference image"),
    (lambda target, x: taylor(Target(target.path, 1, "pixel"), x), "got 'pixel'"),
    (lambda target, x: magnitude(Target(target.path, 1, "pixel")), "got 'pixel'"),
    (lambda target, x: force(target, x, 0), "got 0"),
    (lambda target, x: force(target, x, 1.5), "got 1.5"),
    (lambda target, x: iter_snip(target, x, 1e-6), "keeps nothing"),
    (lambda target, x: force(target, x, rounds=0), "rounds must be at least 1, got 0"),
    (lambda target, x: force_schedule(5, 6), "kept must be in 1..5, got 6"),
    (lambda target, x: force(target, x*torch.nan), "scores are NaN"),
    (lambda target, x: keep_top(torch.tensor([1., torch.nan]), .5), "1 of 2 scores are NaN"),
    (lambda target, x: keep_top(torch.tensor([1., torch.inf]), .5), "1 of 2 .* NaN or infinite"),
    (lambda target, x: snip(target, x[..., :-1]), "takes crops of")])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        path, x = network("chain")
        call(Target(path, 1), x)


def test_a_collapse_is_named():
    path, x = network("residual")
    with pytest.raises(RuntimeError, match="nothing that is left reaches stages.1.conv2:1"):
        force(Target(path, 1, "filter"), x, .05)


def test_ties_keep_the_first():
    assert keep_top(torch.zeros(100), .07).nonzero().ravel().tolist() == list(range(7))
