"The exact loss against examples, quadrature, closed forms and differences; the optimum, borders."
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize

from superpos import exact
from superpos.exact import (
    antipodal_boundary,
    closed_forms,
    expected_loss,
    gradient,
    optimum,
    patterns,
    phase,
    phase_boundary,
    relu_mean,
)
from superpos.toy import Features, Toy, untrained_toy

kinds = ["linear", "relu_output", "relu_hidden", "absolute"]


def models(features, m, kind, seeds=3, scale=.3):
    begin, draw = untrained_toy(features, m, kind, range(seeds)), torch.Generator().manual_seed(1)
    b = scale*torch.randn(begin.b.shape, generator=draw, dtype=torch.float64)
    return Toy(begin.W.double(), b, None if begin.V is None else begin.V.double(), kind)


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("m,features", [
    (1, Features(2, density=torch.tensor([[.1], [.9]]), importance=[1., .3])),
    (3, Features(2, density=.5, signed=True)),
    (2, Features(3, density=[.9, .5, .2], importance=[1., .8, .6])),
    (1, Features(3, density=.6, signed=True)),
    (2, Features(3, density=.4, correlated=[(0, 2)])),
    (2, Features(4, density=.3, anticorrelated=[(0, 1, 2)])),
    (2, Features(4, density=.4, correlated=[(0, 1)], anticorrelated=[(2, 3)], signed=True)),
    (2, Features(6, exactly=2)),
], ids=["n2m1", "n2m3-signed", "n3m2", "n3m1-signed", "correlated", "anticorrelated",
        "groups-signed", "exactly"])
def test_examples(kind, m, features):
    if kind in ("relu_hidden", "absolute") and abs(patterns(features)[0]).sum(1).max() > 3:
        with pytest.raises(ValueError, match="4 features can be active.*up to 3"):
            expected_loss(models(features, m, kind), features)
        features = Features(3, features.density[:, [0, 2, 3]], anticorrelated=[(0, 2)],
                            signed=features.signed)
    toy = models(features, m, kind)
    x = features.sample(60_000, range(3)).double()
    error = ((toy(x) - toy.target(x))**2*features.importance.double()[:, None, None]).sum(-1)
    z = (error.mean(-1) - expected_loss(toy, features))/(error.std(-1)/error.shape[-1]**.5)
    assert z.abs().max() < 4.5, z


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("seed", range(2))
def test_adaptive_quadrature(kind, seed):
    features = Features(2, density=.7, importance=[1., .5])
    toy = models(features, 2, kind)[:, seed:seed + 1]
    W, b, readout = toy.W[0, 0].numpy(), toy.b[0, 0].numpy(), toy.readout[0, 0].numpy()

    def error(*x):
        h = W@np.array(x)
        y = readout@(np.maximum(h, 0) if kind in ("relu_hidden", "absolute") else h) + b
        return ((np.array(x) - (y if kind == "linear" else np.maximum(y, 0)))**2)@np.array([1., .5])
    p, settings = float(features.density[0, 0]), dict(epsabs=1e-9, epsrel=1e-9, limit=200)
    one = [integrate.quad(line, 0, 1, **settings)[0]
           for line in (lambda u: error(u, 0.), lambda u: error(0., u))]
    two = integrate.dblquad(lambda v, u: error(u, v), 0, 1, 0, 1, epsabs=1e-7, epsrel=1e-7)[0]
    expected = (1 - p)**2*error(0., 0.) + p*(1 - p)*sum(one) + p*p*two
    assert expected_loss(toy, features).item() == pytest.approx(expected, rel=2e-6)


def test_relu_mean_by_hand():
    a, b = torch.tensor([.5, -1.], dtype=torch.float64), torch.tensor(.25, dtype=torch.float64)
    second, flat = torch.tensor([False, True]), torch.zeros(3, dtype=torch.float64)
    ramp = lambda v, u, power: max(.25 + .5*u - v, 0)**power
    settings = dict(epsabs=1e-10)
    for power in (1, 2):
        plain = integrate.dblquad(ramp, 0, 1, 0, 1, (power,), **settings)[0]
        times = integrate.dblquad(lambda v, u, k: v*ramp(v, u, k), 0, 1, 0, 1, (power,),
                                  **settings)[0]
        assert relu_mean(a, b, power).item() == pytest.approx(plain, rel=1e-6)
        assert relu_mean(a, b, power, second).item() == pytest.approx(times, rel=1e-6)
    assert relu_mean(flat, a.new_tensor(-.1), 2) == 0
    assert relu_mean(flat, a.new_tensor(.5), 2).item() == pytest.approx(.25)


@pytest.mark.parametrize("ratio", [.02, .0101, .0099, .001, 1e-6, 0.])
def test_no_step_where_corners_give_way_to_nodes(ratio):
    start = torch.tensor(-.3, dtype=torch.float64)
    value, reference = (relu_mean(torch.tensor([1., small], dtype=torch.float64), start, 2).item()
                        for small in (ratio, 0.))
    exactly = math.fsum(w*(max(.7 + ratio*u, 0)**3 - max(-.3 + ratio*u, 0)**3)/3
                        for u, w in zip(*half_gauss(40)))
    assert value == pytest.approx(exactly, rel=1e-9) and value >= reference


def half_gauss(count):
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return nodes/2 + .5, weights/2


@pytest.mark.parametrize("kind", ["relu_hidden", "absolute"])
@pytest.mark.parametrize("scale", [1., .1, .01])
def test_finer_quadrature(kind, scale, monkeypatch):
    features = Features(3, density=.9, importance=[1., .8, .6])
    toy, count = models(features, 2, kind, 6, scale), exact._unit_gauss
    coarse = expected_loss(toy, features), gradient(toy, features)
    monkeypatch.setattr(exact, "_unit_gauss", lambda n: count(4*n if n == 8 else n))
    fine = expected_loss(toy, features), gradient(toy, features)
    torch.testing.assert_close(coarse[0], fine[0], rtol=1e-6, atol=0)
    assert not torch.equal(coarse[0], fine[0])
    torch.testing.assert_close(coarse[1].W, fine[1].W, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", kinds)
@pytest.mark.parametrize("signed", [False, True])
def test_gradient(kind, signed):
    features = Features(2, density=torch.tensor([[.3], [.8]]), importance=[1., .5], signed=signed)
    toy, draw = models(features, 2, kind), torch.Generator().manual_seed(0)
    slope = gradient(toy, features)
    names = [name for name in "WbV" if getattr(toy, name) is not None]
    step = {name: 1e-6*torch.randn(getattr(toy, name).shape, generator=draw, dtype=torch.float64)
            for name in names}
    moved = ({n: getattr(toy, n) + sign*s for n, s in step.items()} for sign in (1, -1))
    up, down = (expected_loss(dataclasses.replace(toy, **changed), features) for changed in moved)
    predicted = sum((getattr(slope, n)*s).flatten(2).sum(-1) for n, s in step.items())
    torch.testing.assert_close((up - down)/2, predicted, rtol=1e-5, atol=1e-12)
    assert slope.kind == kind and slope.W.shape == toy.W.shape


def test_gradcheck():
    features = Features(3, density=.5)
    toy = models(features, 2, "relu_output", 1)
    given = toy.W.requires_grad_(), toy.b.requires_grad_()
    total = lambda W, b: expected_loss(Toy(W, b), features)
    assert torch.autograd.gradcheck(total, given, eps=1e-6, atol=1e-7)


def test_leading_axes_do_not_mix():
    features = Features(3, density=torch.tensor([[.1], [.5], [1.]]),
                        importance=torch.tensor([[1., .5, .2]]))
    toy = models(features, 2, "relu_output")
    together = expected_loss(toy, features)
    for i in range(3):
        for s in range(3):
            alone = expected_loss(Toy(toy.W[i, s][None, None], toy.b[i, s][None, None]),
                                  features[i])
            torch.testing.assert_close(alone[0, 0], together[i, s], rtol=1e-12, atol=0)


def test_closed_forms_and_boundary():
    p, r = torch.logspace(-3, 0, 30), torch.logspace(-1.5, 1.5, 31)[:, None]
    losses = closed_forms(p, r)
    assert losses.shape == (31, 30, 3)
    assert (phase_of := losses.argmin(-1)).unique().tolist() == [0, 1, 2]
    assert ((phase_of == 2) == (p < antipodal_boundary(r))).all()
    one = Features(2, density=p[:, None])
    for k, (w, b) in enumerate([((1, 0), (0, 1)), ((0, 1), (1, 0)), ((1, -1), (0, 0))]):
        toy = Toy(torch.tensor(w).double().expand(30, 1, 1, 2),
                  torch.tensor(b)*p.double()[:, None, None]/2)
        torch.testing.assert_close(expected_loss(toy, one)[:, 0], closed_forms(p, 1.)[:, k],
                                   rtol=1e-5, atol=0)
    without_bias = expected_loss(Toy(torch.tensor([[[[1., 0]]]]).expand(30, 1, 1, 2),
                                     torch.zeros(30, 1, 2)), one)[:, 0]
    torch.testing.assert_close(without_bias, p.double()/3, rtol=1e-6, atol=0)


def test_phase_diagram():
    p, r = (t.flatten() for t in torch.meshgrid(torch.logspace(-2, 0, 21),
                                                torch.logspace(-1, 1, 21), indexing="ij"))
    features = Features(2, p[:, None], torch.stack([torch.ones_like(r), r], 1))
    found, losses = optimum(features, 1), closed_forms(p, r)
    assert found.gradient_norm.max() < 1e-5
    assert (found.loss <= losses.min(-1).values*(1 + 1e-9)).all()
    assert (found.agreeing >= 2).all()
    torch.testing.assert_close(expected_loss(found.toy, features)[:, 0], found.loss, rtol=1e-9,
                               atol=0)
    slope = gradient(found.toy, features)
    norm = torch.cat([slope.W.flatten(1), slope.b.flatten(1)], 1).norm(dim=1)
    torch.testing.assert_close(norm, found.gradient_norm, rtol=1e-3, atol=1e-9)
    named, expected = phase(found.toy)[:, 0], losses.argmin(-1)
    assert .96 <= (named == expected).double().mean() <= .99
    margin = losses.sort(-1).values
    # the map is wrong only where two phases are nearly as good
    assert (named == expected)[margin[:, 1] > 1.5*margin[:, 0]].all()


midpoints = np.meshgrid(*2*[(np.arange(100) + .5)/100], indexing="ij")


def plain_loss(model, p, r):
    "The loss of (w1, w2, b1, b2) by the midpoint rule, pattern by pattern."
    (w1, w2, b1, b2), total = model, 0.
    for on1, on2 in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x1, x2 = midpoints[0]*on1, midpoints[1]*on2
        h, chance = w1*x1 + w2*x2, (p if on1 else 1 - p)*(p if on2 else 1 - p)
        error = (np.maximum(w1*h + b1, 0) - x1)**2 + r*(np.maximum(w2*h + b2, 0) - x2)**2
        total += chance*error.mean()
    return total


@pytest.mark.parametrize("r,ratio", [(.08, 1.1395), (.37, 1.0913), (1.3, 1.1138), (1.9, 1.0912)])
def test_the_true_border_is_where_two_minima_cost_the_same(r, ratio):
    border = phase_boundary(r).item()
    # twice the tolerance of the search, and the rounding of the number
    assert border/antipodal_boundary(r).item() == pytest.approx(ratio, abs=1e-4)
    best = []
    for p in (.997*border, 1.003*border):  # the midpoint rule is off by parts in 10⁵
        starts = [[1, -1, 0, 0], [.7, -1, .1, 0], [1, -.7, 0, .1]]
        starts += [[1, -.1, 0, p/2], [-.1, 1, p/2, 0], [.3, 1, p/2, 0], [1, .3, 0, p/2]]
        found = [optimize.minimize(lambda x, p=p: plain_loss(x, p, r)/p, start) for start in starts]
        best.append(abs(min(found, key=lambda f: f.fun).x[:2]).min())
    assert best[0] > .55 and best[1] < .45, best


def test_the_true_border_has_no_gaps():
    r = torch.tensor([[.05, .5, .97], [20., 2., 1.]])
    border = phase_boundary(r)
    assert border.shape == r.shape  # and exchanging the features changes nothing
    torch.testing.assert_close(border[0, :2], border[1, :2], rtol=3e-6, atol=0)
    assert (border > 1.08*antipodal_boundary(r)).all()
    assert (border < 1.25*antipodal_boundary(r)).all()


def test_curvature():
    # pairs: at a model that ignores a feature the loss has a kink, and no Hessian
    features = Features(2, density=torch.tensor([[.1], [.4]]), importance=[1., .7])
    found = optimum(features, 1, starts=8)
    for i in range(2):
        x = torch.cat([found.toy.W[i].flatten(), found.toy.b[i].flatten()])
        total = lambda x, i=i: expected_loss(Toy(x[None, None, None, :2], x[None, None, 2:]),
                                             features[i]).sum()
        hessian = torch.autograd.functional.hessian(total, x)
        smallest = torch.linalg.eigvalsh(hessian)[0].item()
        assert found.curvature[i].item() == pytest.approx(smallest, rel=1e-3)
    # a turn of the plane costs nothing
    turned = optimum(Features(3, density=.1), 2, starts=8)
    assert abs(turned.curvature.item()) < 1e-4 and turned.gradient_norm < 1e-6


@pytest.mark.parametrize("kind,n,m", [("linear", 2, 1), ("relu_hidden", 2, 2), ("absolute", 1, 2)])
def test_optimum_of_other_kinds(kind, n, m):
    features = Features(n, density=.3, importance=[1., .7][:n], signed=kind == "absolute")
    found = optimum(features, m, kind, starts=30 if n == 1 else 6)
    assert found.gradient_norm < 1e-5 and found.toy.kind == kind
    # the best linear model keeps the first principal component of the weighted covariance
    if kind == "linear":
        p = features.density[0].double()
        variance = p/3 - p*p/4
        assert found.loss.item() == pytest.approx((.7*variance[1]).item(), rel=1e-6)
    else: assert found.loss < 1e-8  # a neuron for each feature, or one for each sign


def test_more_starts_are_never_worse():
    features = Features(3, density=.2, importance=[1., .9, .8])
    few, many = optimum(features, 2, starts=2), optimum(features, 2, starts=6)
    assert many.loss <= few.loss*(1 + 1e-9) and many.agreeing >= 1 and many.gradient_norm < 1e-5
    again = optimum(features, 2, starts=2)
    assert torch.equal(again.loss, few.loss) and torch.equal(again.toy.W, few.toy.W)


@pytest.mark.parametrize("wrong,message", [
    (lambda: expected_loss(models(Features(7), 2, "relu_output"), Features(7)), "7 features have "
     "128 patterns.*up to 6.*expected_loss"),
    (lambda: patterns(Features(9, density=.1)), "up to 6"),
    (lambda: optimum(Features(4, density=.5), 2, "absolute"), "4 features can be active at "
     "once.*up to 3"),
    (lambda: expected_loss(models(Features(3), 2, "relu_output"), Features(2)),
     r"shape \(1, 3, 2, 3\) do not fit 1 instances of 2"),
    (lambda: expected_loss(models(Features(2), 2, "relu_output"), Features(2, [[.1], [.2]])),
     "do not fit 2 instances"),
    (lambda: expected_loss(Toy(torch.ones(1, 2), torch.zeros(2)), Features(2)),
     r"W is \(instances, seeds, m, n\)"),
    (lambda: optimum(Features(2), 1, starts=0), "starts must be at least 1, got 0"),
    (lambda: optimum(Features(2), 1, "relu"), "no model of kind 'relu'"),
    (lambda: closed_forms(2, 1), r"p must lie in \(0, 1\], got 2"),
    (lambda: closed_forms(.5, -1.), "r must be finite and above 0, got -1"),
    (lambda: antipodal_boundary(-1), "r must be finite and above 0, got -1"),
    (lambda: antipodal_boundary([1., float("nan")]), "r must be finite and above 0, got nan"),
    (lambda: phase_boundary(-1), "r must be finite and above 0, got -1"),
    (lambda: phase(models(Features(3), 2, "relu_output")),
     "2 features in 1 dimension, got 3 in 2")])
def test_bad_input(wrong, message):
    with pytest.raises(ValueError, match=message): wrong()
