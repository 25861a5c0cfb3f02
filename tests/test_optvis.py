"Images a unit prefers: against Lucent and brute force, on filters of known taste; and refusals."
import math
import random
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from superpos.circuit import Circuit
from superpos.core import set_seed
from superpos.model import ResNet8, SmallAlexNet, Unit, imagenet_input, layer_outputs
from superpos.optvis import (
    Direction,
    _alike,
    _lucent,
    _Reader,
    contrast,
    fine_detail,
    preference,
    total_variation,
    visualise,
)
from superpos.target import Target

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lucent.optvis import objectives, param, render, transform

quick = dict(size=40, steps=6, transforms=())


def hooks(model): return sum(len(m._forward_hooks) for m in model.modules())


def network(kind=SmallAlexNet, **kwargs):
    set_seed(0)
    return kind(width=4, **kwargs).eval()


@pytest.fixture(scope="module")
def alexnet():
    torch.manual_seed(0)
    return torchvision.models.alexnet(weights=None).eval()


def gabor(angle, size=11, period=5):
    y, x = torch.meshgrid(*[torch.arange(size) - size//2]*2, indexing="ij")
    along = x*math.cos(math.radians(angle)) + y*math.sin(math.radians(angle))
    wave = torch.exp(-(x**2 + y**2)/(2*(size/5)**2))*torch.cos(2*math.pi*along/period)
    return ((wave - wave.mean())/wave.abs().sum()).expand(3, -1, -1)


def stripes():
    "Units 0..3 answer to one orientation each, unit 4 to upright and to lying stripes."
    net = nn.Sequential(nn.Conv2d(3, 8, 11), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1),
                        nn.ReLU(inplace=True), nn.Conv2d(4, 5, 1))
    one = torch.eye(4)
    net.eval().requires_grad_(False)
    for layer in net[::2]: layer.bias.zero_()
    filters = torch.stack([gabor(a) for a in (0, 45, 90, 135)])
    net[0].weight.copy_(torch.cat([filters, -filters]))
    net[2].weight.copy_((one - one[[2, 3, 0, 1]]).repeat(1, 2)[..., None, None])
    net[4].weight.copy_(torch.cat([one, one[:1] + one[2:3]])[..., None, None])
    return net


def energy_by_angle(picture, width=20):
    "Share of the spectrum within `width` degrees of 0, 45, 90 and 135."
    grey = torch.as_tensor(picture).mean(-1)
    power = torch.fft.fft2(grey - grey.mean()).abs()**2
    down, across = torch.meshgrid(*[torch.fft.fftfreq(n) for n in grey.shape], indexing="ij")
    angle = torch.rad2deg(torch.atan2(down, across))
    return [(power[((angle - a + 90) % 180 - 90).abs() < width].sum()/power.sum()).item()
            for a in (0, 45, 90, 135)]


# ---- what it leaves behind

def test_lucent_leaks_hooks_and_this_does_not(alexnet):
    leaked, settings = [], dict(size=64, steps=1)
    for _ in range(3):
        render.render_vis(alexnet, "features_10:9",
                          param_f=lambda: param.image(64), thresholds=(1,), show_image=False,
                          progress=False)
        leaked.append(hooks(alexnet))
    for m in alexnet.modules(): m._forward_hooks.clear()
    assert leaked == [23, 46, 69]
    for p in alexnet.parameters(): p.grad = None
    for targets in ("features.10:9", ["features.3:1", "features.10:9"], "classifier.6:3"):
        visualise(alexnet, targets, **settings)
    assert hooks(alexnet) == 0
    assert all(p.grad is None and p.requires_grad for p in alexnet.parameters())


def test_nothing_is_left_behind_when_a_step_fails():
    net = network()
    state = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    def broken(x): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        visualise(net, "features.3:1", size=40, transforms=[broken])
    assert hooks(net) == 0 and random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(torch.get_rng_state(), state[2])


def test_gradients_reach_pixels_and_no_weight():
    net = network()
    for p in net.parameters(): p.register_hook(lambda g: pytest.fail("a weight has a gradient"))
    pixels = torch.rand(1, 3, 40, 40, requires_grad=True)
    for at in ("mean", "centre", "maximum"):
        reader = _Reader(net, ["features.6:3"], 1, (40, 40), at, "pre", None, imagenet_input, None)
        gradient, = torch.autograd.grad(reader.value(reader.read(pixels)).sum(), pixels)
        assert gradient.abs().max() > 0
        assert not any(p.requires_grad for p in reader.parameters.values())


def test_layers_behind_the_target_are_not_run():
    net = network()
    net.features[8].register_forward_hook(
        lambda *_: pytest.fail("a layer behind the target was run"))
    visualise(net, "features.6:3", **quick)


def test_importing_lucent_says_nothing(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] in ("lucent", "kornia")]:
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _lucent()
    assert "lucent" in sys.modules and not said


# ---- values

targets = ["features.6:3", "classifier:2", Direction("features.6", torch.linspace(-1, 1, 24)),
           Direction("classifier", torch.arange(10.))]


@pytest.mark.parametrize("target", targets, ids=str)
@pytest.mark.parametrize("at", ["mean", "centre", "maximum"])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_preference_is_what_the_whole_network_gives(target, at, when):
    net, pictures = network(), np.random.default_rng(0).random((3, 41, 44, 3), dtype=np.float32)
    unit = Unit.parse(target) if isinstance(target, str) else target
    x = (torch.tensor(pictures).permute(0, 3, 1, 2)
         - torch.tensor([.485, .456, .406]).view(3, 1, 1))/torch.tensor([.229, .224, .225]).view(
             3, 1, 1)
    values = layer_outputs(net, [unit.layer], x, when)[unit.layer]
    one = (values[:, unit.index] if isinstance(unit, Unit)
           else (values*unit.vector.view(-1, *[1]*(values.ndim - 2))).sum(1))
    if one.ndim > 1:
        one = dict(mean=one.mean((1, 2)), centre=one[:, one.shape[1]//2, one.shape[2]//2],
                   maximum=one.flatten(1).max(1).values)[at]
    np.testing.assert_allclose(preference(net, target, pictures, at=at, when=when), one.detach(),
                               rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(self.a(x))


def weight_normed():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(),
                         nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)))


@pytest.mark.parametrize("make,target",
                         [(lambda: nn.Sequential(nn.Conv2d(3, 6, 3),
                                                 nn.Conv2d(6, 6, 3, groups=2)), "1:4"),
                          (Tied, "b:1"), (weight_normed, "2:5"),
                                         (lambda: nn.Sequential(
                                             nn.Conv2d(3, 6, 3, bias=False)), "0:4")],
                         ids=["groups", "tied weights", "weight norm", "no bias"])
def test_odd_layers_are_read_as_they_are(make, target):
    torch.manual_seed(0)
    net = make().eval()
    pictures = np.random.default_rng(0).random((2, 12, 12, 3), dtype=np.float32)
    unit = Unit.parse(target)
    as_bytes_would_be = lambda x: x/255
    value = layer_outputs(net, [unit.layer], torch.tensor(pictures).permute(0, 3, 1, 2))[
        unit.layer][:, unit.index].mean((1, 2))
    np.testing.assert_allclose(preference(net, target, pictures, prepare=as_bytes_would_be),
                               value.detach(), rtol=1e-4, atol=1e-6)
    visualise(net, target, size=12, steps=1, transforms=())


@pytest.mark.parametrize("target", ["features.10:9", ["features.3:1", "features.6:3"],
                                    "classifier:2"])
def test_the_value_rises_and_beats_random_images(target):
    net, units = network(), [target] if isinstance(target, str) else target
    first, last = (visualise(net, target, size=48, steps=n, transforms=()) for n in (1, 32))
    noise = np.random.default_rng(0).random((16, 48, 48, 3))
    for unit, a, b in zip(units, first, last):
        before, after = (preference(net, unit, p[None])[0] for p in (a, b))
        assert after > before
        assert after > preference(net, unit, noise).max() + .5*preference(net, unit, noise).std()


def test_with_lucents_transforms_as_lucent_does():
    "The same start, transforms and objective: the same picture as Lucent's own loop."
    net = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 5)).eval()
    ours = visualise(net, "1:2", size=224, steps=4, seed=3)
    def start():
        torch.manual_seed(3)
        np.random.seed(0)
        return param.image(224)
    theirs = render.render_vis(net, "1:2", start, thresholds=(4,), show_image=False,
                               progress=False)[0]
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_a_unit_that_starts_at_zero_is_driven_before_its_relu():
    net = nn.Sequential(*stripes()[:3], nn.ReLU(inplace=True)).eval()
    net[2].bias.data.fill_(-.05)
    settings = dict(size=48, steps=24, transforms=())
    plain = render.render_vis(net, objectives.channel("2", 1),
                              lambda: param.image(48), thresholds=(24,), transforms=[],
                              fixed_image_size=48, show_image=False, progress=False)[0]
    after = visualise(net, "2:1", when="post", **settings)
    np.testing.assert_array_equal(after, visualise(net, "2:1", when="post",
                                                   **{**settings, "steps": 1}))
    ours, dead, lucents = (preference(net, "2:1", p, when="post")[0]
                           for p in (visualise(net, "2:1", **settings), after, plain))
    assert dead == lucents == 0 and ours > .2


# ---- seeds and batches

def test_the_same_seed_gives_the_same_picture_and_leaves_the_random_state_alone():
    net = network()
    pictures = []
    for other in (1, 2):
        set_seed(other)
        state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        pictures.append(visualise(net, "features.6:3", size=40, steps=4, seed=5))
        assert random.getstate() == state[0]
        assert (np.random.get_state()[1] == state[1]).all()
        assert torch.equal(torch.get_rng_state(), state[2])
    assert np.array_equal(*pictures) and pictures[0].shape == (1, 40, 40, 3)
    assert 0 <= pictures[0].min() <= pictures[0].max() <= 1
    assert np.abs(pictures[0] - visualise(net, "features.6:3", size=40, steps=4,
                                          seed=6)).max() > .01


@pytest.mark.parametrize("transforms", [(), None])
def test_a_batch_is_its_pictures_side_by_side(transforms):
    net, settings = network(), dict(size=40, steps=6, transforms=transforms)
    both = visualise(net, ["features.6:3", "features.3:1"], seed=[4, 7], **settings)
    single = [visualise(net, unit, seed=seed, **settings)[0]
              for unit in ("features.6:3", "features.3:1") for seed in (4, 7)]
    np.testing.assert_allclose(both, single, atol=2e-3)


def test_diversity_is_lucents_and_sets_pictures_apart():
    layer = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_alike(layer),
                               -objectives.diversity("a")(lambda name: F.relu(layer)))
    torch.testing.assert_close(_alike(layer[..., 0, 0]),
                               -objectives.diversity("a")(lambda name: F.relu(layer[..., :1, :1])))
    net = stripes()
    apart = lambda rows: np.mean([np.abs(a - b).sum() for i, a in enumerate(rows)
                                  for b in rows[:i]])
    alike, different = (visualise(net, "4:4", size=48, steps=40, transforms=(), seed=range(3),
                                  diversity=d) for d in (0, .06))
    layers = [layer_outputs(net, ["2"],
                            imagenet_input((torch.tensor(p)*255).byte().permute(0, 3, 1, 2)))["2"]
              for p in (alike, different)]
    shares = [np.array([energy_by_angle(p) for p in pictures]) for pictures in (alike, different)]
    assert _alike(layers[1]) < .5*_alike(layers[0])
    assert apart(shares[1]) > 2*apart(shares[0])
    assert {0, 2} <= set(shares[1].argmax(1))


# ---- filters whose taste is known

def test_a_planted_edge_comes_back_as_its_orientation():
    pictures = visualise(stripes(), [f"4:{i}" for i in range(4)], size=48, steps=40, transforms=())
    shares = np.array([energy_by_angle(p) for p in pictures])
    assert (shares.argmax(1) == range(4)).all()
    assert shares.max(1).min() > 2*np.sort(shares)[:, -2].max()


def test_at_the_centre_the_picture_is_the_filter():
    net = stripes()
    picture = visualise(net, "0:1", size=31, steps=40, transforms=(), at="centre", fft=False,
                        decorrelate=False)[0].mean(-1)
    filter_ = net[0].weight[1, 0].numpy()
    assert np.corrcoef(picture[10:21, 10:21].ravel(), np.sign(filter_).ravel())[0, 1] > .9
    assert np.abs(picture[:9] - .5).max() < .05


def test_a_contrast_picks_one_meaning_and_still_drives_the_unit():
    net = stripes()
    own, other = np.diag([2., 1, 1, 1, 2])[[0, 0]], np.diag([1., 1, 2, 1, 2])[[2, 2]]
    direction = contrast("4", own, other, "4:4")
    picture = visualise(net, direction, size=48, steps=40, transforms=())
    assert np.argmax(energy_by_angle(picture[0])) == 0 and preference(net, "4:4", picture)[0] > .5
    plain = contrast("4", own, other)
    np.testing.assert_allclose(plain.vector, np.array([1, 0, -1, 0, 0])/math.sqrt(2), atol=1e-6)
    np.testing.assert_allclose([plain.vector.norm(), direction.vector.norm()], 1, rtol=1e-6)


def test_a_circuit_is_drawn_and_not_its_network():
    net = stripes()
    target = Target.of(net, "4:4", (48, 48))
    path, layout = target.path, target.layout
    for dropped, left in ((2, 0), (0, 2)):
        mask = torch.ones(len(layout), dtype=torch.bool)
        layout.views(mask)["4.weight"][0, dropped] = False
        circuit = Circuit.of(target, mask, "stripes", "by hand")
        weights = circuit.layout.apply(circuit.mask, target.weights)
        picture = visualise(net, circuit.unit, size=48, steps=40, transforms=(), weights=weights)
        crop = path.crop(imagenet_input((torch.tensor(picture)*255).round().byte().permute(
            0, 3, 1, 2)))
        assert np.argmax(energy_by_angle(picture[0])) == left
        np.testing.assert_allclose(preference(net, "4:4", picture, weights=weights, at="centre"),
                                   circuit.response(path, crop), rtol=.1, atol=.05)
    assert (net[4].weight[4, :, 0, 0] == torch.tensor([1., 0, 1, 0])).all()


def test_whole_weights_replace_the_models():
    net = network()
    doubled = {"features.6.weight": 2*net.features[6].weight,
               "features.6.bias": 2*net.features[6].bias}
    pictures = np.random.default_rng(0).random((2, 40, 40, 3))
    np.testing.assert_allclose(preference(net, "features.6:3", pictures, weights=doubled),
                               2*preference(net, "features.6:3", pictures), rtol=1e-4)


# ---- Lucent's objectives

@pytest.mark.parametrize("name", ["features.6", "features_6"])
def test_an_objective_of_lucents_is_a_target(name):
    net = network()
    ours = visualise(net, "features.6:3", **quick)
    np.testing.assert_allclose(visualise(net, objectives.channel(name, 3), **quick), ours,
                               atol=2e-3)
    two = (objectives.channel("features_6", 3) + objectives.neuron("features_3", 2)
           - .1*objectives.blur_input_each_step())
    assert visualise(net, two, seed=(0, 1), **quick).shape == (2, 40, 40, 3) and hooks(net) == 0


# ---- other networks and sizes

@pytest.mark.parametrize("make,target,size", [
    (lambda: ResNet8(width=4), "stages.2.conv2:3", 32),
    (lambda: ResNet8(width=4), "stages.1.shortcut.0:3", 32),
    (lambda: ResNet8(width=4), "head:2", 32),
    (lambda: torchvision.models.resnet18(weights=None), "layer2.1.conv2:5", 64),
    (lambda: torchvision.models.squeezenet1_0(weights=None), "features.5.expand3x3:7", 64)])
def test_branches_nested_names_and_linear_layers(make, target, size):
    torch.manual_seed(0)
    net = make().eval()
    pictures = visualise(net, target, size=size, steps=3)
    assert pictures.shape == (1, size, size, 3) and np.isfinite(pictures).all()
    assert pictures.std() > 0


def fixed(size=20):
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2*(size - 2)**2, 4)).eval()


def test_a_network_of_one_size_is_told_it():
    assert visualise(fixed(), "2:1", size=24, steps=2, resize=20).shape == (1, 24, 24, 3)
    assert visualise(fixed(), "2:1", size=20, steps=2, transforms=()).shape == (1, 20, 20, 3)
    with pytest.raises(ValueError, match="44 × 44 .* make of 20 × 20.*`resize`"):
        visualise(fixed(), "2:1", size=20, steps=2, transforms=[transform.pad(12)])
    with pytest.raises(ValueError, match="cannot be computed for images of 24 × 24 .*`resize`"):
        visualise(fixed(), "2:1", size=24, steps=2)


def test_the_least_size_is_the_least(alexnet):
    for net, target, size in ((alexnet, "features.10:9", 8), (network(), "features.6:3", 1)):
        with pytest.raises(ValueError, match="too small for .*; the least size is") as problem:
            visualise(net, target, size=size)
        least = int(str(problem.value).rpartition(" ")[2])
        visualise(net, target, size=least, steps=1, transforms=())
        with pytest.raises(ValueError, match="too small"):
            visualise(net, target, size=least - 1, steps=1, transforms=())


# ---- what is refused

class Nan(nn.Module):
    "Not a number after a few passes."
    def __init__(self): super().__init__(); self.conv, self.passes = nn.Conv2d(3, 2, 3), 0
    def forward(self, x):
        self.passes += 1
        return self.conv(x*(math.nan if self.passes > 4 else 1))


def test_not_a_number_is_named_with_its_step():
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        visualise(Nan().eval(), "conv:1", size=12, transforms=())
    with pytest.raises(FloatingPointError,
                       match="picture is not finite after step 0; lower the rate"):
        visualise(network(), "features.3:1", **{**quick, "steps": 1}, rate=math.inf)


@pytest.mark.parametrize("target,settings,message", [
    ("features.66:3", {}, "no layer 'features.66'; the nearest names are features.6"),
    ("features.6:24", {}, "has units 0..23, got 24"),
    ("features.6", {}, "names no unit"),
    ("features.7:3", {}, "not a convolution or linear layer"),
    (["features.6:3", "nowhere:0"], {}, "no layer 'nowhere'"),
    (Direction("features.6", torch.ones(5)), {}, "'features.6' has 24 units, a direction in "
     "features.6 has 5 weights"),
    (objectives.channel("features_66", 3), {}, "no layer 'features_66'"),
    (objectives.channel("features_6", 3), dict(diversity=1, seed=(0, 1)),
     "brings its own diversity"),
    ([], {}, "list of targets is empty"),
    ("features.6:3", dict(steps=0), "at least one step"),
    ("features.6:3", dict(size=0), "at least one pixel"),
    ("features.6:3", dict(seed=(1, 1)), "different integers"),
    ("features.6:3", dict(rate=0), "above 0"),
    ("features.6:3", dict(seed=()), "one or more"),
    ("features.6:3", dict(at="middle"), "'mean', 'centre' or 'maximum', got 'middle'"),
    ("features.6:3", dict(when="during"), "'pre' or 'post', got 'during'"),
    ("features.6:3", dict(diversity=1), "give several seeds"),
    ("features.6:3", dict(diversity=-1, seed=(0, 1)), "0 or more"),
    ("features.6:3", dict(weights={"features.9.weight": torch.ones(1)}),
     "no parameter 'features.9.weight'"),
    ("features.6:3", dict(weights={"features.3.weight": torch.ones(2, 2)}), "has shape"),
    ("features.6:3", dict(prepare=lambda x: x.float()**2), "shift and scale"),
    ("features.6:3", dict(prepare=lambda x: F.interpolate(x.float(), 16)), "shift and scale")])
def test_bad_input_is_named_before_the_first_step(target, settings, message):
    never = lambda x: pytest.fail("a step was made")
    with pytest.raises(ValueError, match=message):
        visualise(network(), target, **{"size": 40, "transforms": [never], **settings})


def test_training_mode_is_refused():
    net = network(ResNet8)
    net.stages[1].bn1.train()
    for call in (lambda: visualise(net, "head:1", size=32), lambda: preference(
        net, "head:1", np.zeros((1, 32, 32, 3)))):
        with pytest.raises(ValueError, match="training mode"): call()


@pytest.mark.parametrize("pictures,message", [(np.zeros((3, 40, 40)), r"\(N, H, W, 3\)"),
                                              (np.zeros((0, 40, 40, 3)), r"\(N, H, W, 3\)"),
                                              (np.full((1, 40, 40, 3), 255), "lie in 0..1"),
                                              (np.full((1, 40, 40, 3), np.nan), "lie in 0..1")])
def test_pictures_that_are_none(pictures, message):
    with pytest.raises(ValueError, match=message): preference(network(), "features.6:3", pictures)


@pytest.mark.parametrize("own,other,unit,message",
                         [(np.ones((2, 4)), np.ones((2, 5)), None, "same layer"),
                          (np.ones((0, 4)), np.ones((2, 4)), None, "same layer"),
                                                    (np.ones((2, 4)), np.ones((3, 4)), None,
                                                     "do not differ"),
                          (np.ones((2, 4)), np.zeros((3, 4)), "a:4", "none of the 4 units"),
                                                    (np.ones((2, 4)), np.zeros((3, 4)), "b:1",
                                                     "none of the 4 units of 'a'"),
                          (np.full((2, 4), np.nan), np.zeros((3, 4)), None, "do not differ")])
def test_groups_without_a_contrast(own, other, unit, message):
    with pytest.raises(ValueError, match=message): contrast("a", own, other, unit)


# ---- quantities

def test_variation_and_fine_detail_of_known_pictures():
    ramp = np.broadcast_to(np.linspace(0, 1, 11)[:, None, None], (2, 11, 7, 3))
    np.testing.assert_allclose(total_variation(ramp), .05)
    wave = lambda period, n=120: np.broadcast_to(.5 + .5*np.cos(2*np.pi*np.arange(n)/period)[
        :, None], (1, n, n))[..., None].repeat(3, -1)
    np.testing.assert_allclose([fine_detail(wave(p), above=.15)[0] for p in (10, 8, 6, 5)],
                               [0, 0, 1, 1], atol=1e-9)
    mixed = .5*(wave(10) + wave(5))
    np.testing.assert_allclose(fine_detail(mixed, above=.15), .5)
    noise = np.random.default_rng(0).random((1, 64, 64, 3))
    # the frequencies outside a circle of radius 1/4 in a square of side 1
    assert abs(fine_detail(noise)[0] - (1 - math.pi/16)) < .02
