"How much faster an extracted circuit, and the overlap of two, are than by their definitions."
import numpy as np
import pytest
import torch
from scipy import stats
from turns import interleaved

from superpos.circuit import extract, overlap
from superpos.model import load_model
from superpos.score import keep_top
from superpos.target import Target


@pytest.mark.parametrize("per,keep,most",
                         [("filter", .5, .6), ("filter", .25, .35), ("filter", .1, .25),
                          ("channel", .5, .6), ("channel", .25, .35), ("channel", .1, .25),
                          ("kernel", .05, 1.15)])
def test_extracted_circuits_are_faster(benchmark, per, keep, most):
    torch.manual_seed(0)
    target = Target.of(load_model("alexnet"), "features.10:9", per=per)
    parts = list(torch.rand(len(target)).split(target.layout.sizes))
    # the image's colours, or the unit itself
    if per != "kernel": parts[0 if per == "channel" else -1][:] = 1
    mask = torch.cat([keep_top(p, keep) if len(p) > 3 else p > 0 for p in parts])
    x = target.path.crop(torch.randn(8, 3, 224, 224))
    small = extract(target, mask)
    torch.testing.assert_close(small(x), target.respond(x, mask), atol=1e-5, rtol=1e-4)
    plain, fast = interleaved({"masked": lambda: target.respond(x, mask),
                               "extracted": lambda: small(x)}).values()
    benchmark.extra_info.update(keep=keep, per=per, ratio=round(fast/plain, 3))
    print(f" {per}s, {keep:.1%} of each layer kept: {fast/plain:.2f} of the masked network's time",
          end="")
    benchmark.pedantic(small, (x,), rounds=3)
    assert fast/plain <= most, f"{fast/plain:.2f} of the masked network's time"


def test_overlap_of_two_circuits(benchmark):
    "Probabilities from the ratios of neighbours, without zeros, against all of scipy's."
    layout = Target.of(load_model("alexnet"), "features.10:9").layout
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(len(layout), generator=g) < .05 for _ in range(2))
    def plain():
        every = np.ones(1)
        for x, y in zip(a.split(layout.sizes), b.split(layout.sizes)):
            shared = stats.hypergeom(len(x), int(x.sum()), int(y.sum()))
            every = np.convolve(every, shared.pmf(np.arange(int(min(x.sum(), y.sum())) + 1)))
        shared = np.arange(len(every))
        return shared/np.maximum(1, int(a.sum() + b.sum()) - shared) @ every
    def fast(): return overlap(a, b, layout)[-1]["expected"]
    assert fast() == pytest.approx(plain(), rel=1e-9)
    seconds = interleaved(dict(plain=plain, fast=fast), 2)
    benchmark.extra_info.update(ratio=seconds["plain"]/seconds["fast"], ms=1e3*seconds["fast"])
    print(f"\n  overlap of two circuits of {len(layout)} kernels: {1e3*seconds['fast']:.1f} ms, "
          f"{seconds['plain']/seconds['fast']:.0f} times faster than by scipy's probabilities",
          end="")
    benchmark.pedantic(fast, rounds=3)
    assert seconds["plain"]/seconds["fast"] >= 100
