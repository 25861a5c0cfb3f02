"Planted motifs are found, and nothing else; a cut does what it says; a predicted rise is counted."
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpos.motif import (
    balance_neurons,
    cut_path,
    explain,
    find_motifs,
    predicted_increase,
    remove_inhibition,
)
from superpos.toy import Features, Toy


def planted(asymmetry=2., small=.25, extra=2, seed=None):
    """Features 0 blue, 1 orange, 2 red in four neurons, and `extra` more with two neurons each;
    hidden by scales and permutations if there is a seed."""
    n, a, s = 3 + extra, asymmetry, small
    W, V = torch.zeros(4 + 2*extra, n), torch.zeros(n, 4 + 2*extra)
    for k, side in enumerate((1, -1)):
        W[k, 0], W[k, 1], V[0, k], V[2, k] = 2*side, s*side, .5, -a*a/s
        W[2 + k, 1], W[2 + k, 2], V[1, 2 + k], V[2, 2 + k] = a*side, -side/a, 1/a, a
        for i in range(extra): W[4 + 2*i + k, 3 + i], V[3 + i, 4 + 2*i + k] = side, 1
    names = torch.arange(n), torch.arange(len(W))
    if seed is not None:
        g = torch.Generator().manual_seed(seed)
        names = torch.randperm(n, generator=g), torch.randperm(len(W), generator=g)
        scale = torch.exp(torch.randn(len(W), 1, generator=g))
        W, V = W*scale, V/scale.T
    features, neurons = names
    hidden_W, hidden_V = torch.zeros_like(W), torch.zeros_like(V)
    hidden_W[neurons[:, None], features[None]], hidden_V[features[:, None], neurons[None]] = W, V
    return (Toy(hidden_W, torch.zeros(n), V=hidden_V, kind="absolute"), features.tolist(),
            neurons.tolist())

def key(f): return f.neuron, f.aggressor, f.victim, f.inhibitor, f.primary, f.side

@given(st.integers(0, 10**6), st.floats(1.5, 6), st.floats(.01, 1), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_the_planted_motifs_are_found_and_nothing_else(seed, asymmetry, small, extra):
    toy, feature, neuron = planted(asymmetry, small, extra, seed)
    found = find_motifs(toy)
    wanted = {(neuron[2 + k], feature[1], feature[2], neuron[k], feature[0], side)
              for k, side in enumerate((1, -1))}
    assert len(found) == 2 and {key(f) for f in found} == wanted
    for f in found:
        assert f.interference == pytest.approx(asymmetry**2, rel=1e-4)
        assert f.inhibition == pytest.approx(asymmetry**2, rel=1e-4)
        assert f.reverse == pytest.approx(asymmetry**-2, rel=1e-4)
        assert f.repair == pytest.approx(0, abs=1e-6)

def test_thresholds():
    toy, _, _ = planted()
    # the in-weights are 2 and ½
    assert len(find_motifs(toy, asymmetry=3.9)) == 2 and not find_motifs(toy, asymmetry=4.1)
    assert len(find_motifs(toy, gain=.99)) == 2 and not find_motifs(toy, gain=1.01)
    weak = dataclasses.replace(toy, V=torch.where(toy.V < 0, .6*toy.V, toy.V))
    assert len(find_motifs(weak)) == 2 and not find_motifs(weak, inhibition=.7)
    none = dataclasses.replace(toy, V=toy.V.clamp(min=0))
    assert not find_motifs(none) and len(find_motifs(none, inhibition=0.)) == 2

def test_inhibition_must_be_on_the_side_of_the_interference():
    toy, _, _ = planted()
    W = toy.W.clone()
    # now both inhibitors hear orange where it is positive, and none where it is negative
    W[1, 1] = .25
    assert [f.side for f in find_motifs(dataclasses.replace(toy, W=W))] == [1]

def test_nothing_is_found_where_nothing_is():
    m = 12
    dedicated = Toy(torch.eye(6).repeat_interleave(2, 0)*torch.tensor([1., -1.]).repeat(6)[:, None],
                    torch.zeros(6), V=torch.eye(6).repeat_interleave(2, 1), kind="absolute")
    assert dedicated.m == m and not find_motifs(dedicated, inhibition=0.)
    assert explain(dedicated).share() == {"as expected": 1., "motif": 0., "rest": 0.}
    equal = Toy(torch.tensor([[1., -1.], [-1., 1.]]), torch.zeros(2), V=torch.ones(2, 2),
                kind="absolute")
    assert not find_motifs(equal, inhibition=0.)

def test_an_inhibition_shared_by_two_neurons_is_not_found():
    "A limit that the chapter states: neither of the two takes half."
    toy, _, _ = planted(extra=0)
    W, V = torch.cat([toy.W[:2], toy.W]), torch.cat([toy.V[:, :2]/2, toy.V], 1)
    V[:, 2:4] /= 2
    V[2, :4] *= .9
    shared = Toy(W, toy.b, V=V, kind="absolute")
    assert not find_motifs(shared) and len(find_motifs(shared, inhibition=.4)) == 2

def test_random_models_hold_few():
    """Dense Gaussian weights of size 1 hold about half a motif a model by chance, and fewer than
    one in three of their unequal pairs is inhibited; of trained models' pairs it is nearly all."""
    g = torch.Generator().manual_seed(0)
    models = [Toy(torch.randn(8, 10, generator=g), torch.zeros(10),
                  V=torch.randn(10, 8, generator=g), kind="absolute") for _ in range(200)]
    found = [[len(find_motifs(toy, inhibition=least)) for least in (0., .5)] for toy in models]
    unequal, motifs = torch.tensor(found).double().mean(0).tolist()
    assert motifs < 1 and motifs < unequal/3

def test_scaling_and_order_change_nothing():
    toy, feature, neuron = planted()
    hidden, feature, neuron = planted(seed=5)
    assert ({key(f) for f in find_motifs(hidden)}
            == {(neuron[f.neuron], feature[f.aggressor], feature[f.victim], neuron[f.inhibitor],
                 feature[f.primary], f.side) for f in find_motifs(toy)})
    even = balance_neurons(hidden)
    torch.testing.assert_close(even.W.norm(dim=1), even.V.norm(dim=0))
    x = Features(5, signed=True, density=.4).sample(500)[0, 0]
    torch.testing.assert_close(even(x), hidden(x), atol=1e-4, rtol=1e-4)
    many = balance_neurons(Toy(*(t.expand(2, 3, *t.shape) for t in (hidden.W, hidden.b)),
                               V=hidden.V.expand(2, 3, *hidden.V.shape), kind="absolute"))
    torch.testing.assert_close(many.W[1, 2], even.W)
    dead = Toy(torch.zeros(2, 2), torch.zeros(2), V=torch.ones(2, 2), kind="absolute")
    assert torch.equal(balance_neurons(dead).W, dead.W)
    assert torch.equal(balance_neurons(dead).V, dead.V) and not find_motifs(dead)

def random_model(seed, m=5, n=4):
    g = torch.Generator().manual_seed(seed)
    return Toy(torch.randn(m, n, generator=g), .2*torch.randn(n, generator=g),
               V=torch.randn(n, m, generator=g), kind="absolute")

@pytest.mark.parametrize("seed", range(5))
def test_a_cut_takes_one_path_and_leaves_the_rest(seed):
    toy, x = random_model(seed), torch.randn(200, 4, generator=torch.Generator().manual_seed(9))
    for feature, neuron, output in itertools.product(range(4), range(5), range(4)):
        severed = cut_path(toy, (feature, neuron, output))
        h = (x @ toy.W.T).relu()
        deaf = (x @ toy.W.T - x[:, [feature]]*toy.W[:, feature]).relu()
        z = h @ toy.V.T + toy.b
        z[:, output] += toy.V[output, neuron]*(deaf - h)[:, neuron]
        torch.testing.assert_close(severed(x), z.relu(), atol=1e-5, rtol=1e-5)
        assert severed.m == toy.m + 1

def increase(toy, path, x):
    "Of the squared error of the output at the end of a path, when it is cut."
    error = lambda t: (t(x) - x.abs())[:, path[2]].square().mean().item()
    return error(cut_path(toy, path)) - error(toy)

@pytest.mark.parametrize("seed", range(4))
def test_the_predicted_rise_is_the_counted_one(seed):
    """With all features among those whose states count, the prediction is exact up to the
    quadrature; alone, it is exact for examples in which nothing else is active."""
    toy = random_model(seed, n=3)
    features = Features(3, density=torch.tensor([[.3, .5, .8]]),
                        importance=torch.tensor([[1., .7, .4]]), signed=True)
    path = (0, seed, 1 + seed % 2)
    x = features.sample(1 << 18)[0, 0]
    rises = ((cut_path(toy, path)(x) - x.abs()).square()
             - (toy(x) - x.abs()).square()) @ features.importance[0]
    # four standard errors
    assert (predicted_increase(toy, path, features, among=(1, 2), nodes=32)
            == pytest.approx(rises.mean().item(), rel=.002, abs=4*rises.std().item()/512))
    assert (predicted_increase(toy, path, features)
            == pytest.approx(predicted_increase(toy, path, features, among=(), nodes=4)))
    x, side = torch.zeros(20_001, 3), toy.W[path[1], 0].sign()
    x[:, 0] = side*torch.linspace(0, 1, 20_001)
    rise = increase(toy, path, x)
    assert (predicted_increase(toy, path, features)
            == pytest.approx(rise*features.importance[0, path[2]].item()*.3/2, rel=1e-3, abs=1e-6))

def test_a_path_onto_its_own_feature():
    toy, features = random_model(1, n=3), Features(3, density=.4, signed=True)
    x, side = torch.zeros(20_001, 3), toy.W[2, 1].sign()
    x[:, 1] = side*torch.linspace(0, 1, 20_001)
    rise = increase(toy, (1, 2, 1), x)
    assert (predicted_increase(toy, (1, 2, 1), features, nodes=64)
            == pytest.approx(rise*.4/2, rel=1e-3))

def test_removing_a_planted_inhibition():
    toy, _, _ = planted()
    motif, features = find_motifs(toy)[0], Features(5, density=.05, signed=True)
    without = remove_inhibition(toy, motif)
    assert key(motif) not in {key(f) for f in find_motifs(without)}
    assert len(find_motifs(without)) == 1
    assert predicted_increase(toy, motif.path, features) == pytest.approx(.05*4**2/6, rel=1e-5)
    # blue would have silenced red anyway
    assert (predicted_increase(toy, motif.path, features, (0, 2))
            < predicted_increase(toy, motif.path, features))

def test_parts_add_up():
    toy, _, _ = planted(seed=3)
    parts = explain(toy)
    assert sum(parts.share().values()) == pytest.approx(1) and len(parts.motifs) == 2
    W = sum(parts.only(name).W for name in parts.share())
    torch.testing.assert_close(W, parts.toy.W)
    torch.testing.assert_close(sum(parts.only(name).V for name in parts.share()), parts.toy.V)
    assert set(parts.inward.unique().tolist()) <= {0, 1, 2} and not parts.only().W.any()

tied = Toy(torch.ones(2, 3), torch.zeros(3))
hidden = dataclasses.replace(tied, kind="relu_hidden")

@pytest.mark.parametrize("call,message", [
    (lambda t: find_motifs(hidden), "kind 'relu_hidden' has not"),
    (lambda t: find_motifs(t[None]), r"got \(1, 8, 5\); select one"),
    (lambda t: find_motifs(dataclasses.replace(t, W=t.W*torch.nan)), "not finite"),
    (lambda t: find_motifs(t, gain=0.), "gain must be above 0, got 0"),
    (lambda t: find_motifs(t, asymmetry=1.), "asymmetry must be above 1"),
    (lambda t: find_motifs(t, inhibition=-1.), "at least 0, got -1"),
    (lambda t: balance_neurons(tied), "nothing to balance"),
    (lambda t: cut_path(t, (0, 8, 1)), r"no path \(0, 8, 1\) in a model of 5 features and 8"),
    (lambda t: explain(t).only("odd"), "no kind of weight 'odd'"),
    (lambda t: predicted_increase(t, (0, 0, 1), Features(5)), "5 signed, independent features"),
    (lambda t: predicted_increase(t, (0, 0, 1), Features(5, signed=True, exactly=2)),
     "5 signed, independent features")])
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message): call(planted()[0])
