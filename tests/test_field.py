"One unit from its pixels alone and in the whole network; receptive fields against gradients."
import dataclasses
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from superpos.data import MissingData, find_data
from superpos.field import Axis, Field, effective_field, pathway, receptive_field
from superpos.model import CifarResNet, ResNet8, find_layer, layer_outputs, load_model

alexnet_layers = ["features.0", "features.3", "features.6", "features.8", "features.10"]


def random_alexnet():
    torch.manual_seed(0)
    return torchvision.models.alexnet(weights=None).eval().requires_grad_(False)


def trained_alexnet():
    try: return load_model("alexnet", find_data("weights/alexnet_features.safetensors"))
    except MissingData: pytest.skip("needs weights/alexnet_features.safetensors in SUPERPOS_DATA")


@pytest.mark.filterwarnings("ignore:alexnet_features")
@pytest.mark.parametrize("network", [random_alexnet, trained_alexnet])
@pytest.mark.parametrize("layer", alexnet_layers)
def test_crop_equals_whole_alexnet(network, layer):
    model, x = network(), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    whole = layer_outputs(model, [layer], x)[layer]
    last, middle = whole.shape[-1] - 1, whole.shape[-1]//2
    for position in ((middle, middle), (0, 0), (0, last), (last, 0), (last, last), (1, middle),
                     (middle, last - 1)):
        path = pathway(model, layer, position=position)
        assert path.exact_crop
        torch.testing.assert_close(path(path.crop(x)), whole[:, :, position[0], position[1]],
                                   rtol=1e-5, atol=1e-5)


def test_interior_crop_is_the_receptive_field():
    model = random_alexnet()
    path = pathway(model, "features.10")
    assert (path.window == receptive_field(model, "features.10").window(path.position)
            == ((30, 193), (30, 193)))


def test_resnet_before_its_first_branch_is_cropped():
    model, x = torchvision.models.resnet18(weights=None).eval(), torch.randn(2, 3, 64, 64)
    path = pathway(model, "layer1.0.conv1", (64, 64))
    row, column = path.position
    assert path.exact_crop
    torch.testing.assert_close(path(path.crop(x)),
                               layer_outputs(model, ["layer1.0.conv1"],
                                             x)["layer1.0.conv1"][:, :, row, column], rtol=1e-4,
                               atol=1e-5)


convolution = st.builds(lambda k, s, p, d: lambda: nn.Conv2d(3, 3, k, s, min(p, k),
                                                             d), st.integers(1, 4), st.integers(
                                                                 1, 2), st.integers(
                                                                     0, 2), st.integers(1, 2))
pool = st.builds(lambda k, s, p, c: lambda: nn.MaxPool2d(k, s, min(p, k//2),
                                                         ceil_mode=c), st.integers(
                                                             2, 3), st.integers(1, 3), st.integers(
                                                                 0, 1), st.booleans())
mean = st.builds(lambda k, s: lambda: nn.AvgPool2d(k, s), st.integers(1, 3), st.integers(1, 2))


@settings(max_examples=examples(80), deadline=None)
@given(st.lists(st.one_of(convolution, pool, mean, st.just(nn.ReLU),
                          st.just(lambda: nn.BatchNorm2d(3))), max_size=4), st.data())
def test_any_chain(layers, data):
    torch.manual_seed(0)
    model = nn.Sequential(*(make() for make in layers), nn.Conv2d(3, 2, 2)).eval()
    x = torch.randn(1, 3, 23, 19)
    last = str(len(layers))
    try: whole = layer_outputs(model, [last], x)[last]
    except RuntimeError: return  # the image is too small for these layers
    position = tuple(data.draw(st.integers(0, n - 1)) for n in whole.shape[-2:])
    path = pathway(model, last, (23, 19), position)
    torch.testing.assert_close(path(path.crop(x)), whole[:, :, position[0], position[1]], rtol=1e-4,
                               atol=1e-5)


@pytest.mark.parametrize("name,layer,size", [
    ("vgg11", "features.13", 96), ("resnet18", "layer2.1.conv2", 128),
    ("squeezenet1_0", "features.5.expand3x3", 128),
    ("googlenet", "inception3a.branch3.1.conv", 128), ("mobilenet_v2", "features.4.conv.2", 96)])
def test_gradients_stay_inside_the_field(name, layer, size):
    torch.manual_seed(0)
    extra = dict(init_weights=False) if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **extra).eval()
    x = torch.rand(4, 3, size, size, requires_grad=True)
    values = layer_outputs(model, [layer], x)[layer]
    position = tuple(n//2 for n in values.shape[-2:])
    values[:, :, position[0], position[1]].abs().sum().backward()
    rows, columns = (x.grad.abs().amax((0, 1)).amax(d).nonzero().ravel() for d in (1, 0))
    (top, bottom), (left, right) = receptive_field(model, layer).window(position)
    assert top <= rows[0] and rows[-1] < bottom and left <= columns[0] and columns[-1] < right
    clipped = min(bottom, size) - max(top, 0)
    # max pooling may leave the outermost pixels unused
    assert rows[-1] + 1 - rows[0] >= .85*clipped


@pytest.mark.parametrize("call,message", [
    (lambda m: pathway(m, "features.11x"), "no layer 'features.11x'"),
    (lambda m: pathway(m, "features.1"), "not a convolution"),
    (lambda m: pathway(m, "features.10", position=(13, 0)), "positions up to"),
    (lambda m: pathway(m.train(), "features.10"), "training mode"),
    (lambda m: receptive_field(m, "avgpool"), "adaptive_avg_pool2d.*in 'avgpool'"),
    (lambda m: receptive_field(m.train(), "features.3"), "training mode"),
    (lambda m: effective_field(m, "features.3:0", torch.zeros(1, 3, 64, 64),
                               (40, 0)), "positions up to"),
    (lambda m: effective_field(m, "classifier.1:0",
                               torch.zeros(1, 3, 64, 64)), "no rows and columns"),
    (lambda m: pathway(m, "features.0")(torch.zeros(1, 3, 224, 224)), "takes crops of 11 × 11")])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message): call(random_alexnet())


def test_given_weights_replace_the_models_on_both_ways():
    torch.manual_seed(0)
    for model, layer in ((random_alexnet(), "features.3"), (ResNet8().eval(), "stages.0.conv2")):
        name = f"{layer}.weight"
        path = pathway(model, layer, (64, 64))
        x, weight = path.crop(torch.rand(2, 3, 64, 64)), model.state_dict()[name]
        before = weight.clone()
        one_row = path(x, {name: 2*weight[4:5]}, unit=4)
        all_rows = path(x, {name: 2*weight}, unit=4)
        torch.testing.assert_close(one_row, all_rows)
        assert not torch.allclose(one_row, path(x, unit=4)) and torch.equal(weight, before)


# ---- other networks, and fields against exact gradients

def random_trunk(name):
    torch.manual_seed(0)
    models = torchvision.models
    if name.startswith("vgg"):
        return models.vgg.make_layers(models.vgg.cfgs[{"vgg11": "A", "vgg16": "D"}[name]],
                                      False).eval()
    return models.get_model(name, weights=None, **(dict(init_weights=False) if name == "googlenet"
                                                   else {})).eval()


@pytest.mark.parametrize("name,layer,size",
                         [("vgg11", "13", 64), ("vgg16", "17", 64),
                          ("squeezenet1_0", "features.3.squeeze", 75),
                          ("mobilenet_v2", "features.2.conv.0.0", 40)])
@torch.no_grad()
def test_crop_equals_other_networks(name, layer, size):
    model, x = random_trunk(name), torch.randn(2, 3, size, size + 6)
    whole = layer_outputs(model, [layer], x)[layer]
    height, width = whole.shape[-2:]
    for position in ((height//2, width//2), (0, width - 1), (height - 1, 0),
                     (height - 1, width - 1)):
        path = pathway(model, layer, x.shape[-2:], position)
        assert path.exact_crop
        torch.testing.assert_close(path(path.crop(x)), whole[:, :, position[0], position[1]],
                                   rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(path(path.crop(x), unit=5),
                                   whole[:, 5, position[0], position[1]], rtol=1e-4, atol=1e-5)


def all_positive(model):
    "Averages for maxima, no ReLU6, positive weights: every pixel then has a positive gradient."
    for parent in list(model.modules()):
        for name, m in list(parent.named_children()):
            if isinstance(m, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(m.kernel_size, m.stride, m.padding, m.ceil_mode))
            if isinstance(m, nn.ReLU6): setattr(parent, name, nn.Identity())
            if isinstance(m, nn.Conv2d): m.weight.data.abs_(); m.bias is None or m.bias.data.abs_()
    return model.double()


@pytest.mark.parametrize("name,layer", [("alexnet", "features.8"), ("vgg11", "13"), ("vgg16", "14"),
                                        ("resnet18", "layer2.1.conv2"),
                                        ("squeezenet1_0", "features.7.expand3x3"),
                                        ("mobilenet_v2", "features.6.conv.1.0"),
                                        ("googlenet", "inception4a.branch3.1.conv")])
def test_fields_are_where_the_gradient_is_not_zero(name, layer):
    model = random_trunk(name)
    x = torch.rand(1, 3, 150, 170, dtype=torch.double, requires_grad=True)
    field = receptive_field(model, layer)
    values = layer_outputs(all_positive(model), [layer], x)[layer]
    for position in ((0, 0), (0, values.shape[3]//2), (values.shape[2]//2, values.shape[3]//2)):
        gradient, = torch.autograd.grad(values[:, :, position[0], position[1]].sum(), x,
                                        retain_graph=True)
        rows, columns = (gradient[0].amax((0, d)).nonzero().ravel().tolist() for d in (2, 1))
        for seen, (first, last), n in zip((rows, columns), field.window(position), x.shape[-2:]):
            assert seen == list(range(max(0, first), min(n, last)))


# ---- what is easily got wrong

class Own(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True),
                                  self.bias)


odd_chains = {
    "padding as wide as the kernel": [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, padding=1)],
    "padding wider than the kernel": [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, padding=2)],
    "a divisor of its own": [nn.AvgPool2d(2, divisor_override=1), nn.Conv2d(3, 4, 3)],
    "a convolution with its own forward": [nn.Conv2d(3, 4, 3), Own(4, 4, 3)],
    "the same before the last": [Own(3, 4, 3), nn.Conv2d(4, 4, 3)],
    "rectangles": [nn.Conv2d(3, 4, (1, 5), (1, 2), (0, 2)), nn.MaxPool2d((3, 2), (1, 2)),
                   nn.Conv2d(4, 4, (3, 1), dilation=(2, 1))],
    "padding by name": [nn.Conv2d(3, 4, 2, padding="same"), nn.Conv2d(4, 4, 3)],
    "reflection": [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3)],
    "groups at the end": [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=2)],
    "rounded up": [nn.MaxPool2d(2, 2, 1, ceil_mode=True), nn.Conv2d(3, 4, 3, padding=1)]}


@pytest.mark.parametrize("chain", odd_chains.values(), ids=odd_chains)
@torch.no_grad()
def test_odd_chains_are_exact_at_every_position(chain):
    model, x, last = nn.Sequential(*chain).eval(), torch.randn(2, 3, 11, 14), str(len(chain) - 1)
    whole = layer_outputs(model, [last], x)[last]
    for i in range(whole.shape[2]):
        for j in range(whole.shape[3]):
            path = pathway(model, last, (11, 14), (i, j))
            torch.testing.assert_close(path(path.crop(x)), whole[:, :, i, j], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(path(path.crop(x), unit=3), whole[:, 3, i, j], rtol=1e-4,
                                       atol=1e-5)


def test_a_part_in_training_mode_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()
    model[1].train()
    with pytest.raises(ValueError, match="training mode"): pathway(model, "2", (9, 9))


def test_images_are_not_written_to():
    model = nn.Sequential(nn.ReLU6(inplace=True), nn.Conv2d(3, 2, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    path, before = pathway(model, "1", (8, 8)), x.clone()
    path(path.crop(x))
    assert torch.equal(x, before)


# ---- the field of whatever the forward pass does

class Free(nn.Module):
    "Control flow, functional layers, padding by hand, a reused convolution: not for `torch.fx`."
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = F.pad(x, (2, 0, 1, 1))
        for _ in range(2 if x.sum() >= 0 else 3): x = torch.relu_(self.conv(x))
        return self.head(torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, (2, 2))], 0) + 1)


def test_networks_that_cannot_be_traced():
    model = Free().eval()
    assert receptive_field(model, "head", (20, 20)) == Field(Axis(6, 2, -3), Axis(6, 2, -4))
    x = torch.rand(1, 3, 20, 20, dtype=torch.double, requires_grad=True)
    gradient, = torch.autograd.grad(layer_outputs(all_positive(model), ["head"],
                                                  x)["head"][:, :, 3, 4].sum(), x)
    rows, columns = (gradient[0].amax((0, d)).nonzero().ravel().tolist() for d in (2, 1))
    assert (rows, columns) == tuple([*range(*span)]
                                    for span in receptive_field(model, "head", (20, 20)).clipped(
                                        (3, 4), (20, 20)))


def test_a_composite_layer_has_the_field_of_its_last():
    model = random_alexnet()
    assert receptive_field(model, "features") == receptive_field(model, "features.12")


class Calls(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.first, self.fn, self.last = nn.Conv2d(3, 3, 3), fn, nn.Conv2d(3, 2, 1)

    def forward(self, x): return self.last(self.fn(self.first(x)))


@pytest.mark.parametrize("fn,message", [
    (lambda x: x.flip(-1), "'flip' is not an operation"),
    (lambda x: F.interpolate(x, scale_factor=2), "'interpolate' is not"),
    (lambda x: F.pad(x, (1, 1, 1, 1), "circular"), "circular"),
    (lambda x: x + F.avg_pool2d(x, 1, 2).repeat(1, 1, 2, 2), "'repeat' is not"),
    (lambda x: x[..., ::2, ::2] + F.max_pool2d(x, 2), "'getitem' is not"),
    (lambda x: x*x.mean((2, 3), keepdim=True), "'mean' is not"),
    (lambda x: F.max_pool2d(x[:, :, :4, :4], 1) + F.max_pool2d(x, 2, 2)[:, :, :4,
                                                                        :4], "'getitem' is not"),
    (lambda x: torch.zeros_like(x), "'zeros_like' is not")])
def test_unknown_operations_are_refused_by_name(fn, message):
    with pytest.raises(ValueError, match=f"field of 'last' cannot be told.*{message}"):
        receptive_field(Calls(fn).eval(), "last", (18, 18))


def test_branches_at_different_scales_are_refused():
    model = Calls(lambda x: F.max_pool2d(x, 1, 2)
                  + F.max_pool2d(x, 3, 1, 1).narrow(2, 0, 8).narrow(3, 0, 8)).eval()
    with pytest.raises(ValueError, match="'narrow' is not"):
        receptive_field(model, "last", (18, 18))
    with pytest.raises(ValueError, match="jumps of 2 and 1 pixels"):
        receptive_field(Calls(lambda x: F.max_pool2d(x, 1, 2) + F.max_pool2d(x, 9, 1)).eval(),
                        "last", (18, 18))


def test_nothing_is_left_on_the_model():
    model = random_alexnet()
    receptive_field(model, "features.3")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_field_outside_the_image():
    with pytest.raises(ValueError, match="sees nothing"):
        Field(Axis(3, 1, -9), Axis(3, 1, 0)).clipped((2, 2), (10, 10))


def test_the_effective_field_is_the_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Conv2d(4, 2, 3)).eval()
    x = torch.rand(2, 3, 9, 9, dtype=torch.double)
    model.double()
    energy, step = torch.zeros(9, 9, dtype=torch.double), 1e-5
    with torch.no_grad():
        for n in range(2):
            for c in range(3):
                for i in range(9):
                    for j in range(9):
                        d = torch.zeros(1, 3, 9, 9, dtype=torch.double)
                        d[0, c, i, j] = step
                        energy[i, j] += ((model(x[n:n + 1] + d)
                                          - model(x[n:n + 1] - d))[0, 1, 2, 2]/(2*step))**2
    torch.testing.assert_close(effective_field(model, "2:1", x), energy/energy.sum(), rtol=1e-4,
                               atol=1e-7)


def test_a_unit_without_a_gradient_is_named():
    model = nn.Sequential(nn.Conv2d(3, 2, 3)).eval()
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match="0:1 has no gradient"):
        effective_field(model, "0:1", torch.rand(1, 3, 5, 5))


# ---- branches: only what the window needs, exactly

def small_convnext():
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(8, 16, 2), block(16, None, 2)])


graphs = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), "layer2.1.conv2", 96),
    "squeezenet": (lambda: torchvision.models.squeezenet1_0(weights=None),
                   "features.5.expand3x3", 80),
    "googlenet": (lambda: torchvision.models.googlenet(weights=None, init_weights=False,
                                                       transform_input=True),
                  "inception3b.branch3.1.conv", 96),
    "inception": (lambda: torchvision.models.inception_v3(weights=None, init_weights=False),
                  "Mixed_5b.branch3x3dbl_3.conv", 107),
    "densenet": (lambda: torchvision.models.DenseNet(8, (3, 3), 16), "features.denseblock2."
                 "denselayer2.conv2", 96),
    "mobilenet": (lambda: torchvision.models.mobilenet_v2(weights=None), "features.5.conv.0.0", 75),
    "convnext": (small_convnext, "features.1.1.block.0", 64),
    "convnext, linear": (small_convnext, "features.3.0.block.3", 96),
    "cifar": (lambda: CifarResNet(14), "layer2.1.conv2", 32),
    "own": (ResNet8, "stages.2.conv1", 33)}


def at(model, layer, values, position):
    "A layer's values at a position, whether its channels come second or last."
    if isinstance(find_layer(model, layer), nn.Linear): return values[:, position[0], position[1]]
    return values[:, :, position[0], position[1]]


def maps_of(model, layer, x):
    values = layer_outputs(model, [layer], x)[layer]
    return values, values.shape[1:3] if isinstance(find_layer(model, layer),
                                                   nn.Linear) else values.shape[2:]


@pytest.mark.parametrize("make,layer,size", graphs.values(), ids=graphs)
def test_windows_of_branching_networks_are_exact(make, layer, size):
    torch.manual_seed(0)
    model = make().eval().double().requires_grad_(False)
    x = torch.rand(2, 3, size, size + 7, dtype=torch.double, requires_grad=True)
    values, (rows, columns) = maps_of(model, layer, x)
    for position in ((rows//2, columns//2), (0, 0), (rows - 1, 1), (1, columns - 1)):
        path = pathway(model, layer, x.shape[2:], position)
        assert path.cropped and not path.exact_crop and path.share < .9
        wanted, found = at(model, layer, values, position), path(crop := path.crop(x))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        assert torch.equal(path(crop, unit=3), found[:, 3])
        slope, mine = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0]
                       for y in (wanted, found))
        torch.testing.assert_close(mine, slope, rtol=1e-6, atol=1e-9*slope.abs().max().item())
        (top, bottom), (left, right) = path.window
        slope[..., top:bottom, left:right] = 0
        assert not slope.any()  # nothing outside the window matters


@pytest.mark.parametrize("make,layer,size", [graphs[k] for k in ("resnet18", "densenet", "cifar")])
def test_the_share_of_the_work_is_what_pytorch_counts(make, layer, size):
    from torch.utils.flop_counter import FlopCounterMode
    model, x = make().eval().requires_grad_(False), torch.rand(1, 3, size, size)
    path, counts = pathway(model, layer, (size, size)), []
    for way in (lambda: path(path.crop(x)), lambda: layer_outputs(model, [layer], x)):
        with FlopCounterMode(display=False) as counter: way()
        counts.append(counter.get_total_flops())
    assert path.share == pytest.approx(counts[0]/counts[1], rel=1e-9)


class Random(nn.Module):
    "A graph of steps drawn at random; each reads maps of one size."
    def __init__(self, draw):
        super().__init__()
        self.plan, self.layers, sizes = [], nn.ModuleList(), [1]  # strides from the image
        for _ in range(draw(st.integers(2, 7))):
            first = draw(st.integers(0, len(sizes) - 1))
            kind = draw(st.sampled_from(["conv", "down", "pool", "mean", "add", "cat", "relu_"]))
            alike = [i for i, size in enumerate(sizes) if size == sizes[first]]
            second, k = draw(st.sampled_from(alike)), draw(st.sampled_from([1, 3, 5]))
            self.layers.append(dict(conv=nn.Conv2d(3, 3, k, padding=k//2),
                                    down=nn.Conv2d(3, 3, k, 2, k//2),
                                    cat=nn.Conv2d(6, 3, 1)).get(kind, nn.Identity()))
            self.plan.append((kind, first, second))
            sizes.append(sizes[first]*(1 + (kind == "down")))
        self.last = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        maps = [x]
        for (kind, first, second), layer in zip(self.plan, self.layers):
            a, b = maps[first], maps[second]
            maps.append(layer(a) if kind in ("conv", "down") else layer(torch.cat([a, b], 1))
                        if kind == "cat" else a + b if kind == "add"
                        else F.max_pool2d(a, 3, 1, 1) if kind == "pool"
                        else F.avg_pool2d(a, 3, 1, 1) if kind == "mean"
                        else torch.relu_(a) if first else F.relu(a))
        return self.last(maps[-1])


@settings(max_examples=examples(120), deadline=None)
@given(st.data())
def test_any_graph(data):
    torch.manual_seed(0)
    model = Random(data.draw).eval().double()
    x = torch.randn(2, 3, 26, 21, dtype=torch.double)
    whole = layer_outputs(model, ["last"], x)["last"]
    position = tuple(data.draw(st.integers(0, n - 1)) for n in whole.shape[2:])
    path = pathway(model, "last", (26, 21), position)
    assert path.cropped or "of the work" in path.why or "padding" in path.why
    torch.testing.assert_close(path(path.crop(x)), whole[:, :, position[0], position[1]],
                               rtol=1e-9, atol=1e-12)


def test_given_weights_reach_every_layer_of_a_graph():
    torch.manual_seed(0)
    model, x, layer = ResNet8(width=4).eval(), torch.rand(2, 3, 32, 32), "stages.1.conv2"
    path = pathway(model, layer, (32, 32))
    weights = {name: t + .1*torch.rand_like(t) for name, t in
               (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()}
    assert path.cropped
    whole = layer_outputs(model, [layer], x, weights=weights)[layer][:, :, 8, 8]
    torch.testing.assert_close(path(path.crop(x), weights), whole, rtol=1e-4, atol=1e-5)
    row = {**weights, f"{layer}.weight": weights[f"{layer}.weight"][2:3]}
    assert torch.allclose(path(path.crop(x), row, 2), whole[:, 2], rtol=1e-4, atol=1e-4)


def test_a_way_is_found_in_inference_mode():
    model, x = ResNet8(width=4).eval(), torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        path = pathway(model, "stages.1.conv2", (32, 32))
        assert path.cropped and path(path.crop(x)).shape == (2, 8)
        assert receptive_field(model, "stages.1.conv2", (32, 32)).rows.size == 13


def test_a_way_through_branches_is_copied_and_run_whole():
    model, x = ResNet8(width=4).eval(), torch.rand(2, 3, 32, 32)
    path = pathway(model, "stages.1.conv2", (32, 32))
    again = pickle.loads(pickle.dumps(path))
    assert again.cropped and torch.equal(again(path.crop(x)), path(path.crop(x)))
    whole = dataclasses.replace(path, window=((0, 32), (0, 32)))
    assert not whole.cropped
    torch.testing.assert_close(whole(x), path(path.crop(x)), rtol=1e-4, atol=1e-5)


class Around(Calls):
    def forward(self, x): return self.last(self.fn(self.first(x), self))


@pytest.mark.parametrize("fn,message", [
    (lambda y, net: y if y.sum() > 0 else -y, "decides by values"),
    (lambda y, net: F.conv2d(y, net.first.weight.abs()), "its weights are computed"),
    (lambda y, net: y + torch.linspace(0, 1, y.shape[3]), "a constant map is joined"),
    (lambda y, net: y + F.max_pool2d(y, y.shape[2:]), "jumps|different sizes"),
    (lambda y, net: torch.relu_(y[:, :2]).sum(1, keepdim=True) + y, "'sum' is not"),
    (lambda y, net: torch.cat([torch.relu_(y[:, :1]), y[:, 1:]], 1), "what others read"),
    (lambda y, net: F.avg_pool2d(y, 3, 2, 1, True), "pads with depends on the place"),
    (lambda y, net: F.batch_norm(y, None, None, training=True), "gives other values"),
    (lambda y, net: y*y.mean((2, 3), keepdim=True), "'mean' is not an operation"),
    (lambda y, net: F.dropout(y, .5, True), "gives other values")])
def test_what_cannot_be_cut_is_run_whole(fn, message):
    torch.manual_seed(0)
    model, x = Around(fn).eval(), torch.rand(1, 3, 18, 18)
    with torch.no_grad():
        torch.manual_seed(1)
        shape = model(x).shape[2:]
        path = pathway(model, "last", (18, 18), (shape[0] - 1, shape[1] - 1))
    assert not path.cropped and path.share == 1 and re.search(message, path.why), path.why


def test_what_is_written_in_place_is_read_by_all():
    "`relu_` changes the map that the sum reads as well."
    model = Around(lambda y, net: (F.relu(y, inplace=True), y + 1)[1]).eval()
    nn.init.constant_(model.first.bias, -.2)
    x = torch.randn(2, 3, 18, 18)
    path, whole = pathway(model, "last", (18, 18)), layer_outputs(model, ["last"], x)["last"]
    assert path.cropped
    torch.testing.assert_close(path(path.crop(x)), whole[:, :, 8, 8])
    written = Calls(lambda x: x).eval()
    written.first.register_forward_pre_hook(lambda m, given: given[0].mul_(2))
    before, path = x.clone(), pathway(written, "last", (18, 18))
    path(path.crop(x))
    assert torch.equal(x, before)


def test_fields_through_layers_that_move_the_channels():
    torch.manual_seed(0)
    model = small_convnext().eval().double()
    for layer in ("features.1.1.block.0", "features.2.1", "features.3.0.block.0"):
        x = torch.rand(1, 3, 150, 170, dtype=torch.double, requires_grad=True)
        values = layer_outputs(model, [layer], x)[layer]
        for position in ((0, 0), (values.shape[2]//2, values.shape[3]//2)):
            gradient, = torch.autograd.grad(values[:, :, position[0], position[1]].sum(), x,
                                            retain_graph=True)
            for seen, (first, last), n in zip(
                    (gradient[0].abs().amax((0, d)).nonzero().ravel().tolist() for d in (2, 1)),
                    receptive_field(model, layer, (150, 170)).window(position), x.shape[2:]):
                assert seen == list(range(max(0, first), min(n, last)))


@pytest.mark.parametrize("fn,message", [
    (lambda x: F.conv2d(x.permute(0, 2, 3, 1), torch.ones(3, 16, 1, 1)), "as rows or columns"),
    (lambda x: F.layer_norm(x, x.shape[1:]), "'layer_norm' is not"),
    (lambda x: F.softmax(x, 3), "'softmax' is not"),
    (lambda x: x.permute(1, 0, 2, 3).permute(1, 0, 2, 3), "'permute'"),
    (lambda x: torch.cat([x, x], 2), "maps beside each other"),
    (lambda x: x + x.permute(0, 1, 3, 2), "no rows")])
def test_what_mixes_places_has_no_field(fn, message):
    with pytest.raises(ValueError, match=message):
        receptive_field(Calls(fn).eval(), "last", (18, 18))


def test_over_channels_the_field_stays():
    fn = lambda x: F.local_response_norm(F.softmax(x, 1), 2)*x.mean(1, keepdim=True)
    assert receptive_field(Calls(fn).eval(), "last", (18, 18)) == Field(Axis(3), Axis(3))


def test_networks_of_one_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    assert receptive_field(model, "2").rows.size == receptive_field(model, "2", (1, 9, 9)).rows.size
    x = torch.rand(2, 1, 9, 9)
    path = pathway(model, "2", (9, 9))
    assert path.size == (1, 9, 9) == pathway(model, "2", (1, 9, 9)).size
    torch.testing.assert_close(path(path.crop(x)), model(x)[:, :, 3, 3])
