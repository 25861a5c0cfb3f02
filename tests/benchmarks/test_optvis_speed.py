"A step of gradient ascent on AlexNet's `features.10:9`: Lucent's own loop and ours in turn."
import copy
import statistics
import time
import warnings

import pytest
import torch
import torchvision

from superpos.optvis import visualise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lucent.optvis import param, render


def lucents(model, size, steps, batch):
    "As anyone would call it; its hooks would slow its later calls down, so they are removed here."
    render.render_vis(model, "features_10:9",
                      lambda: param.image(size, batch=batch), thresholds=(steps,), show_image=False,
                      progress=False)
    for m in model.modules(): m._forward_hooks.clear()


def per_step(way, few=2, many=8):
    "Seconds of a step, without what a call takes before its first."
    seconds = []
    for steps in (few, many):
        start = time.perf_counter()
        way(steps)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0])/(many - few)


@pytest.mark.parametrize("size,batch", [(128, 1), (224, 1), (128, 4)])
def test_a_step(benchmark, size, batch, monkeypatch):
    monkeypatch.setenv("SUPERPOS_QUIET", "1")
    torch.manual_seed(0)
    model = torchvision.models.alexnet(weights=None).eval()
    resize = 224 if size < 224 else None  # as Lucent does
    frozen = copy.deepcopy(model).requires_grad_(False)
    ways = {"Lucent": lambda steps: lucents(model, size, steps,
                                            batch), "Lucent, weights frozen": lambda steps: lucents(
                                                frozen, size, steps, batch),
            "ours": lambda steps: visualise(model, "features.10:9", size=size, steps=steps,
                                            seed=range(batch), resize=resize)}
    seconds = {name: [] for name in ways}
    for _ in range(4):
        for name, way in ways.items(): seconds[name].append(per_step(way))
    medians = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    for name, s in medians.items():
        benchmark.extra_info[
            name] = f"{1000*s:.1f} ms a step, {s/medians['Lucent']:.2f} of Lucent's"
        print(f"\n  {size} pixels, {batch} at once, {name}: {benchmark.extra_info[name]}", end="")
    benchmark.pedantic(ways["ours"], (4,), rounds=1)
