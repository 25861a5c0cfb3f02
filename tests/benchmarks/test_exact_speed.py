"A phase diagram of 21 × 21 cells: the exact optimum against the plain loop, one thread."
import statistics
import time

import torch
from plain_toy import plain_loop

from superpos.exact import optimum
from superpos.toy import Features

cells, seeds, training_steps = 21*21, 10, 10_000


def diagram():
    p, r = (t.flatten() for t in torch.meshgrid(torch.logspace(-2, 0, 21),
                                                torch.logspace(-1, 1, 21), indexing="ij"))
    return Features(2, p[:, None], torch.stack([torch.ones_like(r), r], 1))


def seconds_of(way):
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def test_phase_diagram(benchmark):
    threads, features = torch.get_num_threads(), diagram()
    torch.set_num_threads(1)
    ten = f"training, best of {seeds} seeds"
    one = "training, one seed"
    exact = "exact optimum, 16 starts"
    ways = {ten: (lambda: plain_loop(2, 1, cells*seeds, 2, .1), 2),
            one: (lambda: plain_loop(2, 1, cells, 10, .1), 10),
            exact: (lambda: optimum(features, 1), 1)}
    try:
        taken = {name: [] for name in ways}
        for _ in range(4):
            for name, (way, steps) in ways.items(): taken[name].append(seconds_of(way)/steps)
        benchmark.pedantic(ways[exact][0], rounds=1)
    finally: torch.set_num_threads(threads)
    taken = {name: statistics.median(s[1:])*(1 if name == exact else training_steps)
             for name, s in taken.items()}
    for name, s in taken.items():
        how = ("measured" if name == exact else f"{s/training_steps*1e3:.1f} ms per step, times "
               f"{training_steps:,} steps")
        if name != exact: how += f"; the exact optimum is {s/taken[exact]:.0f} times as fast"
        benchmark.extra_info[name] = f"{s:.1f} s ({how})"
        print(f"\n  {name}: {benchmark.extra_info[name]}", end="")
