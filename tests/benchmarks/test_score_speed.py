"ActGrad of AlexNet's `features.10` by kernel, against holding the map of every kernel."
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.profiler import ProfilerActivity, profile
from turns import interleaved

from superpos.score import actgrad
from superpos.target import Target

unit, layers = 9, [0, 3, 6, 8, 10]


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model = torchvision.models.alexnet(weights=None).eval().requires_grad_(False)
    return model, Target.of(model, f"features.10:{unit}"), torch.randn(4, 3, 224, 224)


def hold_all(model, x):
    "The maps of all kernels in the whole image, each with its gradient."
    maps = {}
    for i, module in enumerate(model.features[:11]):
        if i not in layers:
            x = F.relu(x) if isinstance(module, torch.nn.ReLU) else module(x)
            continue
        w = module.weight
        one_by_one = F.conv2d(x, w.transpose(0, 1).reshape(-1, 1, *w.shape[2:]), None,
                              module.stride, module.padding, groups=w.shape[1])
        held = one_by_one.unflatten(1, (w.shape[1], w.shape[0])).requires_grad_()
        maps[f"features.{i}.weight"] = held
        x = held.sum(1) + module.bias.view(-1, 1, 1)
    slopes = torch.autograd.grad(x[:, unit, 6, 6].sum(), list(maps.values()))
    scores = {name: (a*g).detach().abs().mean((3, 4)).sum(0).T
              for (name, a), g in zip(maps.items(), slopes)}
    return scores | {"features.10.weight": scores["features.10.weight"][unit:unit + 1]}


def peak(way):
    "The most bytes of tensors that were alive at once during a call, beyond those before it."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found: way()
    changes = [(e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events()
               if e.name() == "[memory]"]
    alive = most = 0
    for _, size in sorted(changes): most = max(most, alive := alive + size)
    return most


def test_actgrad_by_kernel(benchmark, setting):
    model, target, x = setting
    ways = {"all kernel maps held": lambda: hold_all(model, x),
            "a few channels at a time": lambda: actgrad(target, target.path.crop(x))}
    plain, ours = (way() for way in ways.values())
    for name, scores in target.layout.views(ours).items():
        torch.testing.assert_close(scores, plain[name], rtol=1e-3, atol=1e-9)
    seconds = interleaved(ways, 3)
    faster = seconds["all kernel maps held"]/seconds["a few channels at a time"]
    memory = {name: peak(way) for name, way in ways.items()}
    less = memory["all kernel maps held"]/memory["a few channels at a time"]
    benchmark.extra_info.update(faster=f"{faster:.1f} times",
                                memory=f"{memory['a few channels at a time']/2**20:.0f} MiB, "
                                f"{less:.1f} times less")
    print(f"\n  ActGrad by kernel: {faster:.1f} times faster, {benchmark.extra_info['memory']}",
          end="")
    assert faster >= 10 and less >= 5
    benchmark(ways["a few channels at a time"])
