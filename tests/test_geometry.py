"Geometry of directions: double loops as oracles, closed forms, invariance, noise, refusals."
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import special_ortho_group

from superpos.geometry import (
    approximate_rank,
    capacity,
    components,
    dimensionality,
    dimensions_per_feature,
    gram,
    gram_deviation,
    interference,
    named_polytopes,
    norms,
    polytope,
    polytopes,
    represented,
)

everything = [(n, name, i) for n in (*range(1, 11), 12)
              for name, shapes in named_polytopes(n).items() for i in range(len(shapes))]
shape_of = lambda n, name, i: named_polytopes(n)[name][i]

def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def turned(W, seed, m=None):
    "Rotated or reflected into m dimensions, features reordered."
    m = m or max(3, len(W))
    mirror = torch.tensor([-1. if seed % 2 else 1] + [1]*(m - 1))
    turn = torch.from_numpy(special_ortho_group(m, seed=seed).rvs())*mirror
    order = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(seed))
    return turn[:, :len(W)] @ W[:, order]

def distance(A, B):
    "Relative difference of the Gram matrices at the best scale, order kept."
    G, R = (gram(V)/gram(V).norm() for V in (A, B))
    return (G - (G*R).sum()*R).norm().item()

def disturbed(W, size, seed):
    "W with noise such that its Gram matrix deviates by `size`, order kept."
    noise, low, high = random(seed, *W.shape), 0., 3.
    for _ in range(16):
        middle = (low + high)/2
        low, high = (middle, high) if distance(W + middle*noise, W) < size else (low, middle)
    return W + low*noise

# ---- measures


def by_loops(W):
    m, n = W.shape
    dot = lambda i, j: sum(W[k, i].item()*W[k, j].item() for k in range(m))
    length = [math.sqrt(dot(i, i)) for i in range(n)]
    share = lambda x, y: x/y if y else 0.
    paper = [sum(share(dot(i, j), length[i])**2 for j in range(n) if j != i) for i in range(n)]
    angles = [sum(share(dot(i, j), length[i]*length[j])**2 for j in range(n) if j != i)
              for i in range(n)]
    D = [share(length[i]**2, sum(share(dot(i, j), length[i])**2 for j in range(n)))
         for i in range(n)]
    C = [share(dot(i, i)**2, sum(dot(i, j)**2 for j in range(n))) for i in range(n)]
    return length, [[dot(i, j) for j in range(n)] for i in range(n)], paper, angles, D, C

@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.sets(st.integers(0, 6)))
@settings(max_examples=12, deadline=None)
def test_measures_are_the_double_loops(m, n, seed, zero):
    W = random(seed, 2, 3, m, n)
    W[..., [i for i in zero if i < n]] = 0
    length, G, paper, angles, D, C = (torch.tensor(x, dtype=W.dtype) for x in by_loops(W[1, 2]))
    pairs = ((norms(W), length), (gram(W), G), (interference(W), paper),
             (interference(W, normalised=True), angles), (dimensionality(W), D))
    for value, oracle in pairs:
        torch.testing.assert_close(value[1, 2], oracle)
    torch.testing.assert_close(D, C)
    torch.testing.assert_close(capacity(W)[1, 2], D.sum())
    if W[1, 2].any():
        torch.testing.assert_close(dimensions_per_feature(W)[1, 2], m/(length**2).sum())
    assert torch.equal(represented(W, 1.)[1, 2], length > 1)

@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_capacity_never_exceeds_the_dimensions(m, n, seed):
    W = random(seed, m, n)
    assert (dimensionality(W) <= 1 + 1e-12).all()
    assert capacity(W) <= approximate_rank(W, 0.).item() + 1e-9
    assert approximate_rank(W, 0.) <= min(m, n)
    torch.testing.assert_close(dimensionality(turned(W, seed, m + 3)).sort().values,
                               dimensionality(7*W).sort().values)

def test_zeros_have_no_dimension_and_no_nan():
    W = torch.zeros(2, 3, 4)
    assert dimensions_per_feature(W).isinf().all() and not approximate_rank(W).any()
    assert not represented(W).any()
    for measure in (norms, interference, dimensionality):
        assert torch.equal(measure(W), torch.zeros(2, 4))
    assert torch.equal(interference(W, normalised=True), torch.zeros(2, 4))
    assert torch.equal(capacity(W), torch.zeros(2))
    assert components(W[0]) == polytopes(W[0]) == []

normalised = lambda W: interference(W, normalised=True)
@pytest.mark.parametrize("measure", [norms, gram, interference, normalised, dimensionality,
                                     capacity, dimensions_per_feature])
def test_gradients(measure):
    assert torch.autograd.gradcheck(measure, random(0, 2, 3, 4).requires_grad_())
    holed = random(1, 3, 4).index_fill_(1, torch.tensor(2), 0).requires_grad_()
    assert torch.autograd.grad(measure(holed).sum(), holed)[0].isfinite().all()

# ---- components


def test_two_orthogonal_digons_are_two_components():
    W = torch.tensor([[1., 0, -1, 0], [0, 1, 0, -1]])
    assert polytopes(W) == [("digon", (0, 2)), ("digon", (1, 3))] and polytope(W) == "square"

@given(st.integers(0, 999), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_components_are_those_of_a_plain_search(seed, threshold):
    W = random(seed, 4, 9)*torch.linspace(.05, 1, 9, dtype=torch.float64)
    kept = [i for i in range(9) if norms(W)[i] > .5]
    joined = lambda i, j: abs(W[:, i] @ W[:, j])/(W[:, i].norm()*W[:, j].norm()) > threshold
    group = {i: {i} for i in kept}
    for i, j in itertools.combinations(kept, 2):
        if joined(i, j) and group[i] is not group[j]:
            merged = group[i] | group[j]
            group.update(dict.fromkeys(merged, merged))
    assert components(W, threshold) == sorted({tuple(sorted(g)) for g in group.values()})

@given(st.integers(0, 999), st.floats(.1, 10))
@settings(max_examples=20, deadline=None)
def test_components_do_not_depend_on_length(seed, scale):
    W = random(seed, 4, 9)
    assert components(scale*W, represented_above=0) == components(W, represented_above=0)

def test_a_tetrahedron_of_any_length_is_found_over_a_range_of_thresholds():
    # at length .88 the product of a direction with another feature is .293, its cosine a third
    for length, threshold in itertools.product((.6, .88, 1.2), (.15, .2, .25, .3)):
        W = length*torch.block_diag(*[shape_of(4, "tetrahedron", 0)]*2)
        assert [name for name, _ in polytopes(W, threshold)] == ["tetrahedron"]*2

@pytest.mark.parametrize("n, threshold", [(4, .2), (5, .2), (6, .15), (7, .15), (8, .12)])
def test_a_simplex_is_named_below_its_cosine(n, threshold):
    W = .8*shape_of(n, "tetrahedron" if n == 4 else "simplex", 0)
    assert [len(members) for _, members in polytopes(W, threshold)] == [n]
    assert len(polytopes(W, 1/(n - 1) + .01)) == n

def test_only_represented_features_belong_somewhere():
    W = torch.tensor([[1., -1, .4], [0, 0, 0]])
    assert components(W) == [(0, 1)] and components(W, represented_above=.3) == [(0, 1, 2)]
    assert polytopes(W, represented_above=.3) == [("other", (0, 1, 2))]

# ---- shapes


flat = 1/(1 + 2*math.sqrt(2))
closed_forms = {  # sorted cosines to the other features, for every kind of feature
    ("digon", 2): [[-1]], ("triangle", 3): [[-1/2]*2], ("tetrahedron", 4): [[-1/3]*3],
    ("square", 4): [[-1, 0, 0]], ("pentagon", 5): [[-(1 + 5**.5)/4]*2 + [(5**.5 - 1)/4]*2],
    ("hexagon", 6): [[-1, -.5, -.5, .5, .5]], ("octahedron", 6): [[-1, 0, 0, 0, 0]],
    ("octagon", 8): [[-1, -.5**.5, -.5**.5, 0, 0, .5**.5, .5**.5]], ("simplex", 5): [[-1/4]*4],
    ("simplex", 9): [[-1/8]*8],
    ("triangular bipyramid", 5): [[-.5, -.5, 0, 0], [-1, 0, 0, 0]],
    ("cross polytope", 10): [[-1] + [0]*8],
    ("pentagonal bipyramid", 7): [[-(1 + 5**.5)/4]*2 + [0, 0] + [(5**.5 - 1)/4]*2, [-1] + [0]*5],
    ("cube", 8): [[-1] + [-1/3]*3 + [1/3]*3],
    ("square antiprism", 8): [[-flat - (1 - flat)/2**.5]*2 + [2*flat - 1] + [flat]*4],
    ("square pyramid", 5): [[-1, 0, 0, 0], [0]*4],
    ("icosahedron", 12): [[-1] + [-5**-.5]*5 + [5**-.5]*5]}

@pytest.mark.parametrize("name,n", closed_forms)
def test_shapes_are_what_geometry_books_say(name, n):
    shape, kinds = named_polytopes(n)[name][0], closed_forms[name, n]
    # the diagonal is −1 − eps, first
    rows = [sorted(row) for row in (gram(shape) - 2*torch.eye(n)).tolist()]
    near = lambda a, b: np.allclose(a, b, atol=1e-12)
    assert all(any(near(sorted(row), sorted([-1.] + kind)) for kind in kinds) for row in rows)
    assert all(any(near(sorted(row), sorted([-1.] + kind)) for row in rows) for kind in kinds)
    expected = {round(1/(1 + sum(c*c for c in kind)), 9) for kind in kinds}
    assert {round(d, 9) for d in dimensionality(shape).tolist()} == expected

def test_dimensionality_of_the_plateaus():
    D = {name: dimensionality(named_polytopes(n)[name])[-1, 0].item() for name, n in closed_forms}
    plateaus = {"digon": 1/2, "triangle": 2/3, "tetrahedron": 3/4, "pentagon": 2/5,
                "square antiprism": 3/8, "square pyramid": 3/5}
    assert {name: D[name] for name in plateaus} == pytest.approx(plateaus)

@pytest.mark.parametrize("n", range(3, 11))
def test_families(n):
    shapes = named_polytopes(n)
    assert (name := next(iter(shapes))) == {3: "triangle", 4: "tetrahedron"}.get(n, "simplex")
    torch.testing.assert_close(dimensionality(shapes[name])[0],
                               torch.full((n,), (n - 1)/n, dtype=torch.float64))
    polygon, = (s for s in shapes.values() if s.shape[1] == 2)
    torch.testing.assert_close(dimensionality(polygon)[0],
                               torch.full((n,), 2/n, dtype=torch.float64))

# ---- naming


@pytest.mark.parametrize("n,name,i", everything)
def test_names_survive_rotation_reflection_order_and_scale(n, name, i):
    shape = shape_of(n, name, i)
    for seed in (0, 1):
        assert polytope(10**(2*seed - 1)*turned(shape, seed, len(shape) + 3).float()) == name
    assert approximate_rank(shape) == len(shape)

@given(st.sampled_from(everything), st.integers(0, 9999))
@settings(max_examples=30, deadline=None)
def test_half_the_tolerance_is_forgiven(which, seed):
    n, name, i = which
    shape = shape_of(*which)
    if n == 1: assert polytope(shape*(seed + 1)) == "single"
    else: assert polytope(turned(disturbed(shape, .05, seed), seed)) == name

@pytest.mark.parametrize("n,name", sorted({(n, name) for n, name, _ in everything
                                           if 4 < n < 13 and name != "square antiprism"}))
def test_far_more_than_the_tolerance_is_other(n, name):
    shape = shape_of(n, name, 0)
    noisy = disturbed(shape, .2, 0)
    found = polytope(turned(noisy, 0), .1)
    assert found == "other"
    assert polytope(turned(noisy, 0), .25) == name

def test_directions_at_random_have_no_name():
    assert {polytope(random(seed, m, n)) for seed in range(5)
            for m, n in ((2, 5), (3, 8), (4, 9), (3, 12), (20, 40))} == {"other"}

@pytest.mark.parametrize("fraction", [0, .2, .5, .8, 1])
def test_every_height_between_is_still_an_antiprism(fraction):
    z2 = flat + fraction*(1/3 - flat)
    angles, up = torch.arange(8)*torch.pi/4, torch.tensor([1., -1]).repeat(4)*z2**.5
    assert (polytope(torch.stack([(1 - z2)**.5*angles.cos(), (1 - z2)**.5*angles.sin(), up]))
            == "square antiprism")

def all_orders(A, B):
    G, R = (gram(V)/gram(V).norm() for V in (A, B))
    orders = torch.tensor(list(itertools.permutations(range(len(G)))))
    best = (R[orders[:, :, None], orders[:, None, :]]*G).sum((1, 2)).max()
    return (1 - best**2).clamp_min(0).sqrt().item()

@pytest.mark.parametrize("n", [2, 4, 5, 6])
def test_deviation_is_the_best_over_all_orders(n):
    for seed, shapes in enumerate(named_polytopes(n).values()):
        W = random(seed, 3, n)
        assert gram_deviation(W, shapes[-1]) == pytest.approx(all_orders(W, shapes[-1]), abs=1e-6)
        assert gram_deviation(shapes[-1], 3*W) == pytest.approx(all_orders(W, shapes[-1]), abs=1e-6)

@given(st.integers(2, 6), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_the_bound_rejects_nothing_within_reach(n, seed):
    from superpos.geometry import _least, _scaled_gram
    A, B = random(seed, 3, n), random(seed + 1, 2, n)
    assert _least(_scaled_gram(A), _scaled_gram(B)) <= all_orders(A, B) + 1e-9

@given(st.integers(2, 5), st.integers(2, 8), st.integers(0, 999), st.floats(.01, .5))
@settings(max_examples=40, deadline=None)
def test_rank_is_the_cheapest_truncation(m, n, seed, tolerance):
    W = random(seed, m, n)*torch.logspace(0, -2, m, dtype=torch.float64)[:, None]
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    lost = [(gram(W) - gram(torch.diag(s[:k]) @ V[:k])).norm()/gram(W).norm()
            for k in range(len(s))] + [0]
    fewest = next(k for k, part in enumerate(lost) if part <= tolerance)
    assert approximate_rank(W, tolerance) == fewest

def test_a_model_of_many_shapes():
    parts = [(2, "digon"), (3, "triangle"), (4, "tetrahedron"), (5, "pentagon"),
             (8, "square antiprism"), (2, "digon"), (1, "single")]
    W = torch.block_diag(*(named_polytopes(n)[name][0] for n, name in parts))
    noisy = turned(W, 4) + .02*random(5, *W.shape)
    assert sorted(name for name, _ in polytopes(noisy)) == sorted(name for _, name in parts)
    assert sorted(i for _, features in polytopes(noisy) for i in features) == list(range(25))

# ---- refusals


ok = torch.eye(2)
@pytest.mark.parametrize("call,words", [
    (lambda: norms(torch.ones(3)), r"shape \(\.\.\., dimensions, features\), got \(3,\)"),
    (lambda: gram([[1.]]), "torch tensor of floats"),
    (lambda: gram(ok.int()), "torch tensor of floats"),
    (lambda: dimensionality(ok/0), "not finite"), (lambda: capacity(ok*float("nan")), "not finite"),
    (lambda: interference(ok*float("inf")), "not finite"),
    (lambda: dimensions_per_feature(ok*float("nan")), "not finite"),
    (lambda: components(ok[None]), "takes one model"),
    (lambda: polytope(ok[None]), "takes one model"),
    (lambda: polytopes(ok[None]), "takes one model"),
    (lambda: gram_deviation(ok, ok[None]), "takes one model"),
    (lambda: components(ok, -.1), "threshold must be at least 0, got -0.1"),
    (lambda: represented(ok, -1), "threshold"),
    (lambda: polytope(ok, -.1), "tolerance"), (lambda: polytope(ok, 1), "below 1"),
    (lambda: approximate_rank(ok, float("nan")), "tolerance"),
    (lambda: polytope(0*ok), "no feature that is not zero"),
    (lambda: polytope(ok[:, :0]), "no feature that is not zero"),
    (lambda: gram_deviation(ok, torch.eye(3)), "equally many features"),
    (lambda: gram_deviation(ok, 0*ok), "every feature is zero"),
    (lambda: named_polytopes(0), "at least one feature")])
def test_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error: call()
    assert "\n" not in str(error.value)
