"Recording AlexNet's `features.10` and training a mask: the receptive field alone, and usual ways."
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor
from turns import interleaved

from superpos.activation import _advance, _empty, _Read, _Reader
from superpos.field import pathway
from superpos.model import imagenet_input, layer_outputs, load_model
from superpos.target import Target


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model = torchvision.models.alexnet(weights=None).eval().requires_grad_(False)
    x = torch.randn(64, 3, 224, 224)
    path = pathway(model, "features.10")
    return model, x, path, path.crop(x).contiguous(memory_format=torch.channels_last)


def full_model_with_hook(model, x, layer="features.10", position=(6, 6)):
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, inputs, value: kept.append(value.clone()))
    model(x)
    handle.remove()
    return kept[0][:, :, position[0], position[1]]


def report(benchmark, seconds, baseline, count):
    ours = list(seconds)[-1]
    for name, s in seconds.items():
        said = f"{count/s:.1f} images/s, {seconds[baseline]/s:.2f} times '{baseline}'"
        benchmark.extra_info[name] = said
        print(f"\n  {name}: {said}", end="")
    return seconds[baseline]/seconds[ours]


@torch.no_grad()
def test_recording(benchmark, setting):
    model, x, path, crop = setting
    extractor = create_feature_extractor(model, ["features.10"])
    ways = {"full model with a hook": lambda: full_model_with_hook(model, x),
            "torchvision's extractor": lambda: extractor(x),
            "pass ended at the layer": lambda: layer_outputs(model, ["features.10"], x),
            "receptive field": lambda: path(path.crop(x)),
            "receptive field, channels_last": lambda: path(crop)}
    torch.testing.assert_close(path(crop), full_model_with_hook(model, x), rtol=1e-4, atol=1e-5)
    report(benchmark, interleaved(ways), "full model with a hook", len(x))
    benchmark(ways["receptive field, channels_last"])


@pytest.mark.parametrize("name,layer,size", [
    ("resnet18", "layer1.1.conv2", 224), ("resnet18", "layer2.1.conv2", 224),
    ("resnet18", "layer3.1.conv2", 224), ("mobilenet_v2", "features.4.conv.2", 224),
    ("squeezenet1_0", "features.7.expand3x3", 224), ("convnext_tiny", "features.3.1.block.0", 224),
    ("googlenet", "inception3b.branch3.1.conv", 224),
    ("densenet121", "features.denseblock2.denselayer12.conv2", 224),
    ("resnet20_cifar10", "layer2.1.conv1", 32), ("resnet20_cifar10", "layer3.1.conv1", 32)])
@torch.no_grad()
def test_recording_through_branches(benchmark, name, layer, size):
    torch.manual_seed(0)
    model, x = load_model(name), torch.randn(8, 3, size, size)
    x = x.contiguous(memory_format=torch.channels_last)
    path, extractor = pathway(model, layer, (size, size)), create_feature_extractor(model, [layer])
    ways = {"full model with a hook": lambda: full_model_with_hook(model, x, layer, path.position),
            "torchvision's extractor": lambda: extractor(x),
            "pass ended at the layer": lambda: layer_outputs(model, [layer], x),
            "window": lambda: path(path.crop(x))}
    torch.testing.assert_close(ways["window"](), ways["full model with a hook"](), rtol=1e-3,
                               atol=1e-4)
    print(f"\n  {name} {layer}, {path.share:.0%} of the work; {path.why}", end="")
    report(benchmark, interleaved(ways, 3), "full model with a hook", len(x))
    benchmark.pedantic(ways["window"], rounds=1)


@pytest.mark.parametrize("at,batches", [("strongest", (8, 64)), ("centre", (16, 64))])
def test_size_of_a_batch(benchmark, setting, at, batches):
    "Whole images, and windows, as many at a time as a survey takes, against 64."
    model = setting[0]
    images = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8)
    reader = _Reader(model, "features.10", images[0].shape, at, "pre", imagenet_input, False)
    crops = reader.crop(images)
    def run(batch):
        for x in crops.split(batch): list(reader(x))
    ways = {f"{batch} at a time": lambda batch=batch: run(batch) for batch in reversed(batches)}
    report(benchmark, interleaved(ways, 3), "64 at a time", len(images))
    benchmark.pedantic(ways[f"{batches[0]} at a time"], rounds=1)


def test_mask_training_step(benchmark, setting):
    model, x, path, crop = setting
    target = Target(path, 9)
    mask = torch.ones(len(target), requires_grad=True)

    def dense():
        masked = {n: w.clone() for n, w in target.layout.apply(mask, target.weights).items()}
        last = "features.10.weight"
        masked[last] = model.get_parameter(last).index_copy(0, torch.tensor([9]), masked[last])
        return torch.autograd.grad(layer_outputs(model, ["features.10"], x,
                                                 weights=masked)["features.10"][:, 9, 6, 6].sum(),
                                   mask)[0]

    def ours():
        return torch.autograd.grad(target(crop, mask).sum(), mask)[0]
    torch.testing.assert_close(ours(), dense(), rtol=1e-3, atol=1e-4)
    report(benchmark, interleaved({"whole image": dense, "receptive field, channels_last": ours},
                                  3), "whole image", len(x))
    benchmark(ours)


def test_survey(benchmark, setting):
    "What keeping the strongest 100 images of 256 units adds to recording them."
    torch.manual_seed(0)
    batches = [_Read(values) for values in torch.randn(50, 64, 256)]
    empty = lambda: _empty("features.10", SimpleNamespace(how=""),
                           dict(k=100, images=["random", 50_000], sample=2048, seed=0,
                                vectors=False), batches[0], range(50_000))
    def keep():
        found = empty()
        for read in batches: found = _advance(found, read)
    model, x, path, crop = setting
    seconds = interleaved({"recording": lambda: path(crop), "keeping": keep})
    share = seconds["keeping"]/len(batches)/seconds["recording"]
    said = (f"{share:.1%} of the recording's time, over the first {64*len(batches):,} images, when "
            "most is new")
    benchmark.extra_info["keeping"] = said
    print(f"\n  keeping the strongest: {said}", end="")
    benchmark.pedantic(keep, rounds=1)
