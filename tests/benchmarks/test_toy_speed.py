"Training toy models: the fused step against the plain loop, turn by turn, one thread; losses."
import statistics
import time

import pytest
import torch
from plain_toy import plain_loop
from scipy import stats

from superpos.toy import Features, Toy, expected_loss, train

density = .1


def per_step(way, steps):
    start = time.perf_counter()
    way(steps)
    return (time.perf_counter() - start)/steps


@pytest.mark.parametrize("n,m,models,plain_steps",
                         [(5, 2, 10, 60), (20, 5, 10, 30), (200, 20, 10, 4), (2, 1, 400, 8)],
                         ids=lambda v: str(v))
def test_training(benchmark, n, m, models, plain_steps):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    features = Features(n, density=density)
    ways = {"plain loop": (lambda steps: plain_loop(n, m, models, steps, density), plain_steps),
            "torch backend": (lambda steps: train(features, m, seeds=range(models), steps=steps,
                                                  backend="torch", quiet=True), plain_steps),
            "fused": (lambda steps: train(features, m, seeds=range(models), steps=steps,
                                          quiet=True), 40*plain_steps)}
    try:
        seconds = {name: [] for name in ways}
        for _ in range(6):
            for name, (way, steps) in ways.items(): seconds[name].append(per_step(way, steps))
        benchmark.pedantic(lambda: ways["fused"][0](ways["fused"][1]), rounds=1)
    finally: torch.set_num_threads(threads)
    seconds = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    for name, s in seconds.items():
        text = (f"{s*1e3:.3f} ms per step of {models} models, {seconds['plain loop']/s:.1f} times "
                "'plain loop'")
        benchmark.extra_info[name] = text
        print(f"\n  n={n} m={m}, {name}: {text}", end="")


def test_equal_final_losses(benchmark):
    seeds, steps = 32, 3000
    features = Features(5, density=density)
    W, b = plain_loop(5, 2, seeds, steps, density)
    plain = expected_loss(Toy(W.mT[None].contiguous(), b[None]), features)[0]
    ours = expected_loss(benchmark.pedantic(lambda: train(features, 2, seeds=range(seeds),
                                                          steps=steps, quiet=True), rounds=1).toy,
                         features)[0]
    found = stats.ks_2samp(plain, ours)
    print(f"\n  final losses of {seeds} seeds: plain {plain.mean():.5f} ± {plain.std():.5f}, fused "
          f"{ours.mean():.5f} ± {ours.std():.5f}, KS p = {found.pvalue:.2f}", end="")
    assert found.pvalue > .01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_training_on_cuda(benchmark):
    features = Features(200, density=torch.full((64, 1), density))
    run = lambda: train(features, 20, steps=500, backend="torch", device="cuda", quiet=True)
    run()
    benchmark.pedantic(run, rounds=3)
    print(f"\n  64 models n=200 m=20 on {torch.cuda.get_device_name()}: "
          f"{benchmark.stats['mean']/500*1e3:.3f} ms per step", end="")
