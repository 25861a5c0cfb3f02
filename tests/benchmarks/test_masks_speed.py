"Steps and trainings of masks of AlexNet's `features.10`: by ablation, and eight in one job."
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from turns import interleaved

from superpos import sparsify as training
from superpos.mask import soft_mask
from superpos.sparsify import Recipe, sparsify, sparsify_many
from superpos.target import Target, ablations


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model = torchvision.models.alexnet(weights=None).eval().requires_grad_(False)
    target = Target.of(model, "features.10:9")
    crops = target.path.crop(torch.randn(56, 3, 224, 224)).contiguous(
        memory_format=torch.channels_last)
    return target, crops[:14], crops[14:28], crops[28:]


@pytest.fixture(params=sorted({1, os.cpu_count()}), ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_a_step_under_each_ablation(benchmark, setting):
    "On one thread, with as many images as a step of the recipe has."
    target, *groups = setting
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reference = training._reference(target, groups, [target.respond(x) for x in groups])
    def train(ablation, steps=6):
        recipe = Recipe(keep=.05, steps=steps, ablation=ablation, patience=0)
        form, logits = training._Exact(recipe, len(target)), torch.zeros(len(target))
        logits.requires_grad_()
        mean = target.replacement(groups[2], mean=True) if ablation == "mean" else None
        step = training._step(target, reference, recipe, form, logits,
                              training.optimisers["adam"](logits, .05),
                              torch.zeros(form.most, 3), mean, training._doubts(target)[0],
                              training._Last())
        return lambda: [step(i) for i in range(steps)]
    try: seconds = interleaved({name: train(name) for name in ablations}, 5)
    finally: torch.set_num_threads(threads)
    for name, most in dict(mean=1.1, resample=1.7, adversarial=4.).items():
        ratio = seconds[name]/seconds["zero"]
        benchmark.extra_info[name] = f"{ratio:.2f} of a step under zero ablation"
        print(f"\n  a step under {name} ablation: {benchmark.extra_info[name]}", end="")
        assert ratio <= most
    benchmark.pedantic(train("zero", 2), rounds=1)


def test_eight_masks_in_one_job(benchmark, setting, threads):
    "560 images for a hundred steps, as in a study; on several threads masks train side by side."
    target, own, other, background = setting
    runs = [dict(keep=keep, seed=seed, steps=10) for keep in (.02, .05) for seed in range(4)]
    found = {}
    def eight(): found["eight"] = [sparsify(target, own, other, background, **run) for run in runs]
    def one(): found["one"] = sparsify_many(target, [own, other], background, runs)
    seconds = interleaved({"eight jobs": eight, "one job": one}, 3)
    for a, b in zip(found["eight"], found["one"]):
        assert (torch.equal(a.mask, b.mask) if threads == 1
                else (a.mask != b.mask).float().mean() < 1e-3)
        np.testing.assert_allclose(a.loss[:10], b.loss[:10], rtol=0 if threads == 1 else 1e-4)
    ratio = seconds["one job"]/seconds["eight jobs"]
    benchmark.extra_info["one job"] = f"{ratio:.2f} of the time of eight jobs"
    print(f"\n  eight masks in one job, {threads} threads: {benchmark.extra_info['one job']}",
          end="")
    benchmark.pedantic(one, rounds=1)
    assert seconds["one job"] < seconds["eight jobs"]*(1 if threads > 1 else 1.1)


def test_eight_masks_by_one_command(benchmark, tmp_path):
    "Eight sizes by `superpos sparsify`, with start, reading of images and cards, on every core."
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path/"alexnet.pth")
    rng = np.random.default_rng(0)
    for name, count in dict(own=140, other=140, background=280).items():
        (tmp_path/name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8)).save(
                tmp_path/name/f"{i:03}.png")
    groups = [word for name in ("own", "other", "background") for word in (f"--{name}", name)]
    def frontier(keeps, out):
        command = [sys.executable, "-m", "superpos.cli", "sparsify", "--model", "alexnet",
                   "--weights", "alexnet.pth", "--unit", "features.10:9", *groups,
                   "--size", "224", "--seeds", "1", "--keeps", ",".join(keeps), "--out", out]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        start = time.perf_counter()
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        return time.perf_counter() - start
    keeps = ".01 .015 .02 .03 .05 .1 .2 .5".split()
    eight = sum(frontier([keep], f"keep {keep}") for keep in keeps)
    one = benchmark.pedantic(frontier, args=(keeps, "all"), rounds=1)
    benchmark.extra_info["one command"] = f"{one/eight:.2f} of the time of eight commands"
    print(f"\n  eight masks by one command: {benchmark.extra_info['one command']} ({one:.0f} s "
          f"against {eight:.0f} s)", end="")
    assert one < eight

def test_masks_in_turn_against_grouped_convolutions(benchmark, setting):
    target, own, other, background = setting
    x = torch.cat([own, other, background])[:40]
    logits = torch.randn(8, len(target), requires_grad=True)
    response = lambda row: target(x, soft_mask(row, 1.))
    def in_turn():
        return torch.stack([torch.autograd.grad(response(row).sum(), logits)[0].sum(0)
                            for row in logits]).sum(0)
    def at_once(): return torch.autograd.grad(torch.vmap(response)(logits).sum(), logits)[0].sum(0)
    torch.testing.assert_close(in_turn(), at_once(), rtol=1e-3, atol=1e-4)
    seconds = interleaved(dict(in_turn=in_turn, at_once=at_once), 2)
    ratio = seconds["at_once"]/seconds["in_turn"]
    benchmark.extra_info["at once"] = f"{ratio:.2f} times the time of taking turns"
    print(f"\n  eight masks by grouped convolutions: {benchmark.extra_info['at once']}", end="")
    benchmark.pedantic(in_turn, rounds=1)
