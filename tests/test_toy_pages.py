"What the pages on compressed computation and on scale compute, against other ways to compute it."
import ast
import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

nbs = Path(__file__).resolve().parent.parent/"nbs"


def defined(page):
    "The functions and classes of a page, without running its other cells."
    cells = json.loads((nbs/f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    nodes = [node for cell in cells if cell["cell_type"] == "code"
             for node in ast.parse("".join(cell["source"])).body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names = dict(torch=torch, np=np, math=math, itertools=itertools, dataclasses=dataclasses,
                 progress=lambda x, *_: x, grid=None,
                 unit=lambda t: torch.nn.functional.normalize(t, dim=-1))
    exec(compile(ast.Module(nodes, []), page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def compressed(): return defined("19_compressed")


@pytest.fixture(scope="module")
def scale(): return defined("19_scale")


@pytest.mark.parametrize("p", [.01, .3, 1.])
@pytest.mark.parametrize("size", [0., .05, .3])
def test_no_dedicated_neurons_beat_the_floor(compressed, p, size):
    M = size*torch.randn(5, 12, 12, generator=torch.Generator().manual_seed(0))
    for m in (1, 4, 9):
        floor, own = (compressed[name](M, p, m) for name in ("floor", "own_neurons"))
        assert (floor <= own + 1e-6).all()
        assert size == 0 or (floor < own).all()


def test_dedicated_neurons_are_the_best_of_all_allocations(compressed):
    p, n = .4, 3
    M = .1*torch.randn(1, n, n, generator=torch.Generator().manual_seed(1))
    u = (torch.arange(2001)/2000).double()
    x = torch.cat([u, -u])  # values of one feature when it is active
    moment = lambda f, g: p*(f(x)*g(x)).mean() - p*p*f(x).mean()*g(x).mean()
    sides = [lambda t: t.clamp(min=0), lambda t: (-t).clamp(min=0)]
    def left(i, chosen):
        labels = [lambda t, k=k: (t.clamp(min=0) if k == i else 0*t) + M[0, k, i].double()*t
                  for k in range(n)]
        total = sum(moment(f, f) for f in labels)
        if not chosen: return total
        C, B = (torch.tensor([[moment(f, g) for g in given] for f in chosen])
                for given in (chosen, labels))
        return total - (B*torch.linalg.solve(C, B)).sum()

    least = lambda i, k: min(left(i, list(c)) for c in itertools.combinations(sides, k))
    for m in (1, 2, 4):
        best = min(sum(least(i, k) for i, k in enumerate(ks))
                   for ks in itertools.product(range(3), repeat=n) if sum(ks) == m)
        assert compressed["own_neurons"](M, p, m).item() == pytest.approx(float(best), rel=2e-3)


def test_built_neurons_compute_one_feature_at_a_time(compressed):
    net = compressed["built"](compressed["spread"](60, 6, [0, 1]).double())
    x = torch.cat([torch.eye(60), -.3*torch.eye(60)]).double()
    assert net.W.shape == (2, 12, 60)
    torch.testing.assert_close(net(x), x.abs().expand(2, -1, -1), atol=1e-5, rtol=0)


def test_examples_are_drawn_by_how_many_features_are_active(compressed):
    n, p, generator = 30, .05, torch.Generator().manual_seed(0)
    none, one, more = compressed["chances"](n, p)
    assert none + one + more == pytest.approx(1)
    assert (compressed["active"](n, p, (2, 500), False, generator) != 0).sum(-1).eq(1).all()
    count = (compressed["active"](n, p, (40_000,), True, generator) != 0).sum(-1)
    assert count.min() == 2
    mean = (n*p - one)/more  # of those with at least two
    assert count.float().mean().item() == pytest.approx(mean, abs=4*count.float().std().item()/200)


def test_a_linear_read_out_is_the_best_one(compressed):
    net = compressed["Net"](torch.cat([torch.eye(4), -torch.eye(4)])[None], torch.zeros(1, 4, 8),
                            torch.zeros(1, 4))
    loss = compressed["best_linear"](net, .2, torch.abs, size=2000)
    assert loss.abs().max() < 1e-6  # two neurons for each of the features
    half = dataclasses.replace(net, W=net.W[:, :4], V=net.V[..., :4])
    sample = compressed["best_linear"](half, .2, torch.abs, size=100_000)
    p, v = .2, .2/6 - .2**2/16  # one side of each feature: the other one's variance, given this
    other = v - (p*p/16)**2/v
    torch.testing.assert_close(sample, torch.full((1, 4), other), rtol=.03, atol=0)


def test_pursuit_takes_what_is_there(scale):
    D = torch.eye(6)
    x = torch.tensor([[.9, 0, .5, 0, 0, .7]])
    sae = dict(D=D, centre=torch.zeros(6))
    torch.testing.assert_close(scale["pursuit"](sae, x, 3), x)
    two = scale["pursuit"](sae, x, 2)
    assert two[0, 2] == 0 and two.count_nonzero() == 2


def test_absorption_and_hedging_are_seen_where_they_were_planted(scale):
    generator, n, D = torch.Generator().manual_seed(0), 64, torch.eye(64)
    a, x = scale["draw"]("hierarchical", D, 4/64, 20_000, generator)
    child = (a.reshape(-1, 16, 4)[..., 1:] > 0).any(-1)
    act = (a > 0).float()
    clean = scale["absorbed"]("hierarchical", act, act, scale["f1"](act, act))
    assert max(clean.values()) == 0
    absorbing = act.clone()
    absorbing[:, ::4][child] = 0
    seen = scale["absorbed"]("hierarchical", act, absorbing, torch.eye(n))
    assert seen["silent_with_child"] == 1 and seen["silent_alone"] == seen["silent_matched"] == 0
    tilted = D.clone()
    tilted[0, 1] = .5
    for atoms, share in ((D, 0), (tilted, 1/n)):
        seen = scale["hedged"]("hierarchical", D @ atoms.T)
        assert seen["hedging"] == pytest.approx(share) and seen["hedging_chance"] == 0
