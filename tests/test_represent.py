"Measures of a representation: double loops, closed forms, invariances, and what is refused."
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import special_ortho_group

from superpos.represent import (
    class_dimensionality,
    class_means,
    cosine_statistics,
    cosines,
    davies_bouldin,
    effective_features,
    effective_rank,
    group_scores,
    measures,
    nearest_mean_disagreement,
    neural_collapse,
    participation_ratio,
    selectivity,
    silhouette,
    tsne,
)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)

def clouds(seed=0, sizes=(7, 5, 9), d=4):
    "Classes of different sizes around different centres."
    labels = torch.tensor([c for c, n in enumerate(sizes) for _ in range(n)])
    return random(seed, len(labels), d) + 2*random(seed + 1, len(sizes), d)[labels], labels

def simplex(C): return torch.eye(C, dtype=torch.double) - 1/C

def turn(d, seed): return torch.from_numpy(special_ortho_group(d, seed=seed).rvs())

# ---- cosines


@given(st.integers(0, 99), st.sampled_from([(3, 3), (2, 6, 4), (9, 2)]),
       st.sampled_from([2, 5, 40]))
@settings(max_examples=10, deadline=None)
def test_cosine_statistics_are_those_of_all_pairs(seed, sizes, d):
    x, labels = clouds(seed, sizes, d)
    pairs = {"all": [], "within": [], "between": []}
    for i, j in itertools.combinations(range(len(x)), 2):
        c = float(x[i] @ x[j]/(x[i].norm()*x[j].norm()))
        pairs["all"].append(c)
        pairs["within" if labels[i] == labels[j] else "between"].append(c)
    found = dataclasses.astuple(cosine_statistics(x, labels))
    np.testing.assert_allclose(found, [f(v) for v in pairs.values() for f in (np.mean, np.std)],
                               atol=1e-9)
    for kind, values in pairs.items():
        np.testing.assert_allclose(sorted(cosines(x, labels, kind).tolist()), sorted(values),
                                   atol=1e-12)

def test_cosines_of_units_are_those_of_the_transpose():
    x, labels = clouds()
    assert cosine_statistics(x, of="units") == cosine_statistics(x.T)
    assert math.isnan(cosine_statistics(x).within)
    torch.testing.assert_close(cosines(x, of="units"), cosines(x.T))

def test_identical_points_have_cosine_one():
    found = cosine_statistics(torch.ones(6, 3), [0, 0, 0, 1, 1, 1])
    assert np.allclose(dataclasses.astuple(found), [1, 0]*3, atol=1e-7)

def test_zero_vectors_are_left_out():
    x, labels = clouds()
    padded, more = torch.cat([x, torch.zeros(2, 4)]), torch.cat([labels, torch.tensor([0, 1])])
    np.testing.assert_allclose(dataclasses.astuple(cosine_statistics(padded, more)),
                               dataclasses.astuple(cosine_statistics(x, labels)), atol=1e-12)

def test_a_histogram_of_a_draw_is_unbiased_and_repeats():
    x, labels = clouds(sizes=(400, 300))
    drawn = cosines(x, labels, "between", most=300, seed=1)
    assert abs(drawn.mean() - cosine_statistics(x, labels).between) < .05 and len(drawn) < 300*299/2
    torch.testing.assert_close(drawn, cosines(x, labels, "between", most=300, seed=1), rtol=0,
                               atol=0)

# ---- clusters


def test_collapsed_classes_are_perfect_clusters():
    labels = torch.arange(5).repeat_interleave(4)
    x = simplex(5)[labels]
    assert math.isclose(silhouette(x, labels), 1, rel_tol=1e-6) and davies_bouldin(x, labels) < 1e-6

def test_clusters_by_hand():
    x, labels = torch.tensor([[0.], [2], [10], [12]]), [0, 0, 1, 1]
    # own distance 2; the other class at 11 and 9 on average
    assert math.isclose(silhouette(x, labels), np.mean([1 - 2/11, 1 - 2/9]), rel_tol=1e-6)
    assert math.isclose(davies_bouldin(x, labels), (1 + 1)/10, rel_tol=1e-6)

def test_map_has_a_point_for_each_image_and_repeats():
    x, _ = clouds(sizes=(15, 15))
    first = tsne(x, perplexity=5, seed=3)
    assert first.shape == (30, 2) and np.array_equal(first, tsne(x, perplexity=5, seed=3))

# ---- dimensions


@pytest.mark.parametrize("d", [1, 2, 6])
def test_equal_variances_fill_all_dimensions(d):
    x = torch.cat([torch.eye(d), -torch.eye(d)]).double()
    assert math.isclose(participation_ratio(x), d) and math.isclose(effective_rank(x + 3), d)
    assert abs(participation_ratio(random(0, 20_000, d)) - d) < .02*d

def test_dimensions_by_covariance():
    x = random(0, 50, 4) @ torch.diag(torch.tensor([4., 2, 1, .1])).double()
    values = np.linalg.eigvalsh(np.cov(x.T.numpy()))
    shares = np.sqrt(values)/np.sqrt(values).sum()
    assert math.isclose(participation_ratio(x), values.sum()**2/(values**2).sum())
    assert math.isclose(effective_rank(x), np.exp(-(shares*np.log(shares)).sum()))

def test_two_points_span_one_dimension():
    assert math.isclose(participation_ratio([[1., 2, 3], [3, 1, 1]]), 1)
    assert math.isclose(effective_rank([[1., 2], [3, 1]]), 1)

# ---- classes


def collapse_by_definition(x, labels, weight):
    "As in the paper, with full covariance matrices."
    x, labels, weight, C = x.numpy(), labels.numpy(), weight.numpy(), len(labels.unique())
    mu = np.stack([x[labels == c].mean(0) for c in range(C)])
    M = mu - mu.mean(0)
    within = sum(np.cov(x[labels == c].T, bias=True) for c in range(C))/C
    length = np.linalg.norm(M, axis=1)
    cos = [M[i] @ M[j]/length[i]/length[j] for i in range(C) for j in range(C) if i != j]
    nearest = ((x[:, None] - mu)**2).sum(-1).argmin(1)
    return (np.trace(within @ np.linalg.pinv(M.T @ M/C, rcond=1e-9))/C, length.std()/length.mean(),
            np.std(cos), np.mean(np.abs(np.array(cos) + 1/(C - 1))),
            np.linalg.norm(weight/np.linalg.norm(weight) - M/np.linalg.norm(M))**2,
            np.mean((x @ weight.T).argmax(1) != nearest))

@pytest.mark.parametrize("sizes,d", [((8, 8, 8), 5), ((4, 9, 6, 3), 2), ((5, 7), 6)])
def test_collapse_is_what_the_paper_defines(sizes, d):
    x, labels = clouds(4, sizes, d)
    weight = random(9, len(sizes), d)
    found = dataclasses.astuple(neural_collapse(x, labels, weight, x @ weight.T))
    np.testing.assert_allclose(found, collapse_by_definition(x, labels, weight), rtol=1e-7,
                               atol=1e-9)

@pytest.mark.parametrize("C", [2, 3, 10])
def test_a_simplex_has_collapsed(C):
    labels = torch.arange(C).repeat(3)
    x, head = 7*simplex(C)[labels] + 5, .1*simplex(C)
    assert max(dataclasses.astuple(neural_collapse(x, labels, head, (x - 5) @ head.T))) < 1e-9
    torch.testing.assert_close(class_dimensionality(x, labels),
                               torch.full((C,), (C - 1)/C).double())

def test_orthogonal_class_means_are_a_simplex_around_their_mean():
    labels = torch.arange(6).repeat(2)
    found = neural_collapse(torch.eye(6)[labels], labels)
    assert max(found.norms, found.angles, found.simplex) < 1e-9
    assert math.isnan(found.nc3) and math.isnan(found.nc4)

def test_classes_in_fewer_dimensions_share_them():
    angles = torch.arange(8).double()*math.pi/4
    x, labels = torch.stack([angles.cos(), angles.sin()], 1).repeat(2, 1), torch.arange(8).repeat(2)
    torch.testing.assert_close(class_dimensionality(x, labels), torch.full((8,), .25).double())
    assert neural_collapse(x, labels).angles > .5

def test_nearest_mean_by_hand():
    means = torch.tensor([[0., 0], [4, 0]])
    assert nearest_mean_disagreement([[1., 0], [3, 0], [1, 1], [5, 0]],
                                     [[1., 0], [1, 0], [0, 1], [0, 1]], means) == .5

def test_only_classes_that_are_there_count():
    x, labels = clouds()
    weight, names = random(3, 10, 4), torch.tensor([2, 5, 9])
    few = neural_collapse(x, labels, weight[names], (x @ weight.T)[:, names])
    assert (dataclasses.astuple(neural_collapse(x, names[labels], weight, x @ weight.T))
            == dataclasses.astuple(few))
    torch.testing.assert_close(class_means(x, names[labels])[1], x[labels == 1].mean(0))

def test_selectivity_by_loops():
    x, labels = clouds()[0].abs(), clouds()[1]
    for unit, found in enumerate(selectivity(x, labels).tolist()):
        means = sorted(x[labels == c, unit].mean().item() for c in range(3))
        assert math.isclose(found, (means[2] - np.mean(means[:2]))/(means[2] + np.mean(means[:2])))

def test_selectivity_at_its_ends():
    labels = torch.arange(3).repeat(4)
    units = torch.stack([(labels == 1).float(), torch.ones(12), torch.zeros(12)], 1)
    np.testing.assert_equal(selectivity(units, labels).numpy(), [1, 0, np.nan])

# ---- counts and groups


def test_counts_repeat_and_do_not_depend_on_company():
    tables = torch.stack([random(s, 60, 3).float() for s in (0, 1)])
    given = dict(width=7, steps=15, seeds=(4, 5))
    both, alone = effective_features(tables, **given), effective_features(tables[1], **given)
    assert both.values.shape == both.unexplained.shape == (2, 2)
    assert alone.values.shape == (2,) and alone.sd > 0
    torch.testing.assert_close(both.values[:, 1], alone.values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(effective_features(50*tables[1] + 9, **given).values, alone.values,
                               rtol=.02, atol=.02)
    assert effective_features(tables[1], width=7, steps=2, seeds=(4,)).sd.isnan()

def test_counts_find_orthogonal_features():
    rng = torch.Generator().manual_seed(0)
    found = effective_features(torch.eye(4)[torch.randint(4, (500,), generator=rng)], width=12,
                               steps=400, seeds=(0, 1))
    assert 3 < found.values.min() <= found.values.max() < 8 and found.unexplained.max() < .1

def test_groups_of_a_silent_unit_are_not_counted():
    x = random(0, 80, 3).abs()
    x[:, 1] = 0
    x[:70, 2] = 0  # ten images drive it: too few to tell
    scores = group_scores(x, k=40, nulls=19)
    assert scores[0] >= 1 and scores[1:].isnan().all()

# ---- all together


def test_measures_are_their_parts():
    x, labels = clouds(sizes=(20, 20, 20))
    head, x = random(5, 3, 4), x.abs()
    found = measures(x, labels, head, x @ head.T, autoencoders=2, dissected=2)
    assert (found.images, found.units, found.classes) == (60, 4, 3)
    assert found.cosine == cosine_statistics(x).mean
    assert found.unit_cosine == cosine_statistics(x, of="units").mean
    assert found.nc3 == neural_collapse(x, labels, head).nc3
    assert found.selectivity == selectivity(x, labels).mean().item()
    assert found.group_score == group_scores(x, [0, 3]).mean().item()
    assert found.effective_features_sd > 0
    bare = measures(x - 1, labels)
    empty = {f.name for f in dataclasses.fields(bare) if math.isnan(getattr(bare, f.name))}
    assert empty == {"nc3", "nc4", "selectivity", "effective_features", "effective_features_sd",
                     "group_score"}

@pytest.mark.parametrize("seed", range(4))
def test_turning_scaling_and_reordering_change_nothing(seed):
    x, labels = clouds(seed, (9, 12, 8, 7), 5)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    before, after = measures(x, labels), measures(3*(x @ turn(5, seed))[order], (3 - labels)[order])
    basis = {"unit_cosine", "unit_cosine_sd"}  # of units there are as many as axes
    for f in dataclasses.fields(before):
        if f.name not in basis:
            np.testing.assert_allclose(getattr(after, f.name), getattr(before, f.name), rtol=1e-7,
                                       err_msg=f.name)

def test_moving_changes_only_what_looks_from_the_origin():
    x, labels = clouds()
    before, after = measures(x, labels), measures(x + 10, labels)
    changed = {f.name for f in dataclasses.fields(before)
               if not np.isclose(getattr(after, f.name), getattr(before, f.name), rtol=1e-6,
                                 equal_nan=True)}
    assert changed == {"cosine", "cosine_sd", "cosine_within", "cosine_between", "unit_cosine",
                       "unit_cosine_sd", "selectivity"}

# ---- what is refused


x, labels = clouds()
broken = x.clone()
broken[3, 1] = math.nan

@pytest.mark.parametrize("call,message", [
    (lambda: participation_ratio(broken), "1 of the 84 features are not finite"),
    (lambda: effective_features(broken, steps=1), "not finite"),
    (lambda: measures(broken, labels), "not finite"),
    (lambda: participation_ratio(x[0]), r"shape \(images, units\), got \(4,\)"),
    (lambda: effective_features(x[0]), "got"),
    (lambda: effective_rank(x[:1]), "1 images are too few"),
    (lambda: participation_ratio(torch.ones(5, 3)), "all 5 images have the same features"),
    (lambda: effective_features(torch.ones(5, 3)), "the same features"),
    (lambda: silhouette(x, torch.zeros(21, dtype=int)), "all 21 images are of class 0"),
    (lambda: measures(x, [7]*21), "all 21 images are of class 7"),
    (lambda: davies_bouldin(x, [0]*20 + [1]), "class 1 has one image only"),
    (lambda: davies_bouldin(torch.ones(6, 2),
                            [0, 0, 1, 1, 2, 2]), "the 3 class means are all the same"),
    (lambda: neural_collapse(x, labels[:-1]), "labels must be 21 integers"),
    (lambda: neural_collapse(x, labels.float()), "float32"),
    (lambda: class_dimensionality(torch.ones(6, 2), [0, 0, 1, 1, 2, 2]), "the 3 class means are "
     "all the same"),
    (lambda: neural_collapse(x, labels, weight=torch.ones(2, 4)), "the head must have shape"),
    (lambda: nearest_mean_disagreement(x, torch.ones(21, 2),
                                       torch.ones(3, 4)), r"logits must have shape \(21, 3\)"),
    (lambda: selectivity(x, labels), "not negative, got -"),
    (lambda: cosines(x, pairs="within"), "need labels"),
    (lambda: cosines(x, labels, "inside"), "'inside'"),
    (lambda: cosine_statistics(x, of="rows"), "'images' or 'units', got 'rows'"),
    (lambda: cosine_statistics(x, labels, of="units"), "units have no class"),
    (lambda: cosine_statistics(torch.zeros(4, 3)), "0 of the 4 images have a direction"),
    (lambda: tsne(x, perplexity=30), "perplexity must lie between 0 and the number of images, 21, "
     "got 30"),
    (lambda: effective_features(x, penalty=0), "penalty above 0"),
    (lambda: effective_features(x, seeds=()), "at least one seed"),
    (lambda: group_scores(x, k=8), "8 images of each unit are too few"),
    (lambda: group_scores(x, [4], k=20), r"units 0..3, got 4")])
def test_refused(call, message):
    with pytest.raises(ValueError, match=message): call()
