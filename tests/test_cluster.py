"Groups against k-means, brute force and planted answers; the test against its own null."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from superpos.cluster import (
    _one_cloud,
    _principal,
    _two_means,
    attributions,
    benjamini_hochberg,
    directions,
    enriched_classes,
    exemplars,
    find_groups,
    hdbscan_groups,
    nonsense_p,
    separation,
    unit_separation,
)
from superpos.cluster import test_groups as groups_test
from superpos.model import ResNet8, SmallAlexNet, imagenet_input, layer_outputs


def cloud(seed, n=80, d=40):
    return np.random.default_rng(seed).normal(size=(n, d))/np.arange(1, d + 1)**.5


def apart(seed, counts, distance=6., d=40):
    rng, member = np.random.default_rng(seed), np.repeat(range(len(counts)), counts)
    return (cloud(seed, len(member), d) + distance*rng.normal(size=(len(counts), d))[member]/d**.5,
            member)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), dims=st.integers(1, 10), distance=st.floats(0, 5))
def test_the_best_cut_is_as_good_as_kmeans(seed, dims, distance):
    X, _ = apart(seed, (50, 30), distance)
    Z = _principal(X, dims)
    side, line = _two_means(Z[None])
    loss = sum(((Z[side[0] == g] - Z[side[0] == g].mean(0))**2).sum() for g in (False, True))
    assert loss <= 1.02*KMeans(2, n_init=10, random_state=0).fit(Z).inertia_
    np.testing.assert_allclose(line[0], Z[side[0]].mean(0) - Z[~side[0]].mean(0), atol=1e-8)


def test_a_stack_is_cut_like_each_alone():
    Z = np.stack([_principal(apart(s, (40, 40), 3.)[0], 5) for s in range(6)])
    together = _two_means(Z)[0]
    for z, side in zip(Z, together):
        assert abs(adjusted_rand_score(_two_means(z[None])[0][0], side)) > .95


def test_principal_components_are_those_of_scikit_learn():
    X = cloud(0)
    np.testing.assert_allclose(abs(_principal(X, 7)), abs(PCA(7).fit_transform(X)), atol=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_the_separation_is_ashmans_d_of_kmeans(seed):
    X, _ = apart(seed, (60, 30), 5.)
    Z = PCA(10).fit_transform(X)
    side = KMeans(2, n_init=20, random_state=0).fit_predict(Z) == 1
    z = Z @ (Z[side].mean(0) - Z[~side].mean(0))
    by_hand = abs(z[side].mean() - z[~side].mean())*(2/(z[side].var() + z[~side].var()))**.5
    found, cut = separation(X)
    assert adjusted_rand_score(cut, side) == 1 and found == pytest.approx(by_hand)
    stacked, cuts = separation(np.stack([X, 3*X + 1]))
    assert stacked == pytest.approx([found, found]) and (cuts[0] == cut).all()
    assert separation(X, least=.4)[0] == 0


def test_small_parts_and_points_that_coincide_have_a_distance():
    few = np.r_[np.zeros((98, 4)), np.ones((2, 4))] + np.random.default_rng(0).normal(
        0, .01, (100, 4))
    assert separation(few)[0] == 0 < separation(few, least=.01)[0]
    assert 1e6 < separation(np.repeat([[0., 1.], [1., 0.]], 10, axis=0))[0] < np.inf


def turned(seed, angle, n=90, d=40):
    "Two groups, a third of them turned away, whose lengths say nothing but differ a lot."
    rng, member = np.random.default_rng(seed), np.arange(n) < n//3
    ways = np.linalg.qr(rng.normal(size=(d, 2)))[0].T
    along = np.where(member[:, None], np.cos(angle)*ways[0] + np.sin(angle)*ways[1], ways[0])
    return (3*along + rng.normal(size=(n, d))*.3)*rng.lognormal(1, 1, size=(n, 1)), member


def test_directions_have_length_one_and_nothing_else_is_lost():
    X, _ = turned(0, 1.)
    np.testing.assert_allclose(np.linalg.norm(directions(X), axis=1), 1)
    np.testing.assert_allclose(directions(X*7.), directions(X))
    assert (directions(np.zeros((3, 4))) == 0).all()


def test_by_separation_lengths_do_not_hide_groups():
    X, member = turned(1, 1.)
    by_way, by_value = (groups_test(X, 99, by=by) for by in ("separation", "dip"))
    assert by_way.p == .01 and adjusted_rand_score(member, by_way.labels) > .95
    assert by_value.p > .05 and by_way.stability > .95
    assert by_way.statistic == pytest.approx(sum(separation(directions(v))[0]
                                                 for v in (X, X.clip(0))))
    assert by_way.statistic == unit_separation(X)[0] == unit_separation(X[None])[0][0]
    found = find_groups(X, nulls=99, by="separation")
    assert found.count == 2 and adjusted_rand_score(member, found.labels) > .95
    assert found.share == pytest.approx(by_way.share)
    with pytest.raises(ValueError, match="by is 'dip' or 'separation', got 'cosine'"):
        groups_test(X, by="cosine")


def test_nonsense_is_called_double_no_more_often_than_stated():
    rng = np.random.default_rng(0)
    ps = [nonsense_p(found, shuffled, ways) for found, shuffled, ways in
          ((rng.gamma(2), rng.gamma(2, size=64), rng.gamma(2, size=40)) for _ in range(1000))]
    for level in (.05, .2):
        assert stats.binomtest(sum(p <= level for p in ps), 1000, level, "greater").pvalue > .01
    assert nonsense_p(9, [1, 2], [1, 2, 3]) == 1/3 and nonsense_p(2, [1, 2, 3]) == 3/4


def test_by_separation_single_clouds_are_called_double_as_often_as_they_should():
    ps = [groups_test(cloud(s, d=30) + 2*(np.arange(30) == 0), 39, boots=0, seed=s,
                      by="separation").p for s in range(60)]
    for level in (.05, .2, .5):
        assert stats.binomtest(sum(p <= level for p in ps), 60, level, "greater").pvalue > .01
    assert stats.binomtest(sum(p <= .5 for p in ps), 60, .5, "less").pvalue > .01


def test_the_null_has_the_mean_and_the_covariance_of_the_data():
    X = cloud(1, n=60, d=6)
    null = _one_cloud(X + np.arange(6), 4000, np.random.default_rng(0)).reshape(-1, 6)
    np.testing.assert_allclose(np.cov(null.T), np.cov(X.T), atol=.02)
    np.testing.assert_allclose(null.mean(0), X.mean(0) + np.arange(6), atol=.02)


def test_p_values_under_the_null_are_uniform_or_larger():
    p = [groups_test(np.random.default_rng(s).normal(size=(60, 5))*[3, 2, 1, 1, 1], nulls=39,
                     boots=0, seed=s).p for s in range(120)]
    assert stats.binomtest(sum(v <= .05 for v in p), len(p), .05, "greater").pvalue > .01
    assert stats.binomtest(sum(v <= .5 for v in p), len(p), .5, "greater").pvalue > .01


def test_a_simulation_that_stops_early_is_as_honest():
    "Besag and Clifford's p-values are uniform or larger too, and small ones take all simulations."
    ask = dict(nulls=399, boots=0, enough=4)
    found = [groups_test(np.random.default_rng(s).normal(size=(60, 5))*[3, 2, 1, 1, 1], seed=s,
                         **ask) for s in range(120)]
    for level in (.05, .5):
        small = sum(t.p <= level for t in found)
        assert stats.binomtest(small, len(found), level, "greater").pvalue > .01
    assert np.mean([len(t.null) for t in found]) < 100
    for t in found[:20]:
        reached = int((t.null >= t.statistic).sum())
        assert t.p == (4/len(t.null) if reached == 4 else (1 + reached)/400)
        assert reached < 4 or t.null[-1] >= t.statistic
    sure = groups_test(apart(0, (50, 30), 8.)[0], **ask)
    assert sure.p == 1/400 and len(sure.null) == 399


def test_same_seed_same_answer():
    X, _ = apart(0, (50, 30), 4.)
    one, two = (groups_test(X, nulls=39, seed=3) for _ in "12")
    assert (one.p, one.statistic, one.stability) == (two.p, two.statistic, two.stability)
    assert (one.null == two.null).all()


def test_order_and_rotation_do_not_matter():
    X, member = apart(2, (50, 30), 5.)
    order = np.random.default_rng(0).permutation(80)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0]
    plain, moved = groups_test(X, nulls=39), groups_test((X @ turn + 3)[order], nulls=39)
    assert abs(plain.statistic - moved.statistic) < 1e-9
    assert adjusted_rand_score(plain.labels[order], moved.labels) == 1
    assert adjusted_rand_score(member, plain.labels) == 1
    assert (plain.labels == 0).sum() == 50 and plain.stability > .95


def test_the_share_of_variance_is_the_r2_of_an_analysis_of_variance():
    X, member = apart(4, (50, 30), 6.)
    within = sum(((X[member == g] - X[member == g].mean(0))**2).sum() for g in (0, 1))
    found = find_groups(X, nulls=39)
    assert (found.share == pytest.approx(1 - within/((X - X.mean(0))**2).sum())
            == pytest.approx(groups_test(X, nulls=39).share))


@pytest.mark.parametrize("counts", [(80,), (50, 40), (60, 40, 20), (40, 40, 40, 40)])
def test_groups_are_counted(counts):
    X, member = apart(5, counts, 8.)
    found = find_groups(X, nulls=99)
    assert found.count == len(counts) and adjusted_rand_score(member, found.labels) > .97
    assert found.score == pytest.approx(np.exp(stats.entropy(counts)), rel=.03)
    assert (np.diff(np.bincount(found.labels)) <= 0).all()


def test_small_parts_are_not_cut_off():
    X, _ = apart(6, (60, 20), 9.)
    assert find_groups(X, nulls=39, least=21).count == 1
    assert find_groups(X, nulls=39, least=20).count == 2


@pytest.mark.parametrize("method", ["raw", "reduced"])
def test_hdbscan_finds_what_is_plain(method):
    X, member = apart(7, (60, 60), 12.)
    found = hdbscan_groups(X, method)
    assert found.max() == 1
    assert adjusted_rand_score(member[found >= 0], found[found >= 0]) == 1
    assert (found < 0).mean() < .1
    assert hdbscan_groups(X, method, least=100).max() <= 0


def test_correction_is_benjamini_and_hochbergs():
    p = np.random.default_rng(0).random(30)**2
    order = np.argsort(p)
    by_hand = np.minimum.accumulate((p[order]*30/np.arange(1, 31))[::-1])[::-1]
    np.testing.assert_allclose(benjamini_hochberg(p)[order], by_hand.clip(max=1))


def test_exemplars_are_nearest_to_the_centre():
    X, member = apart(8, (30, 20), 5.)
    for g, at in enumerate(exemplars(X, member, 3)):
        distances = np.linalg.norm(X - X[member == g].mean(0), axis=1)
        assert at.tolist() == sorted(np.flatnonzero(member == g), key=lambda i: distances[i])[:3]


def test_telling_names():
    labels = np.repeat([0, 1], [20, 20])
    names = np.array(["dog"]*18 + ["cat"]*2 + ["box"]*15 + ["dog"]*5)
    found = enriched_classes(labels, names)
    assert found.iloc[0][["group", "name"]].tolist() == [1, "box"]
    assert found.iloc[0].inside == .75 and found.iloc[0].outside == 0
    dog = found[(found["group"] == 0) & (found["name"] == "dog")].iloc[0]
    assert dog.odds == pytest.approx(18*15/(2*5)) and dog.p < .01
    assert found[found["name"] == "cat"].p.item() > .2


@pytest.mark.parametrize("at", ["centre", "maximum"])
@pytest.mark.parametrize("kind,layer", [(SmallAlexNet, "features.10"), (SmallAlexNet, "classifier"),
                                        (ResNet8, "stages.2.conv1")])
def test_contributions_add_up(kind, layer, at):
    torch.manual_seed(0)
    net = kind(width=4).eval()
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    values = layer_outputs(net, [layer], imagenet_input(images))[layer][:, 2].reshape(
        5, -1).detach()
    side = int(values.shape[1]**.5)
    picked = values.amax(1) if at == "maximum" else values[:, side//2*side + side//2]
    bias = getattr(net.get_submodule(layer), "bias", None)
    found = attributions(net, f"{layer}:2", images, at=at, batch=2)
    np.testing.assert_allclose(found.sum(1), picked - (0 if bias is None else bias[2].item()),
                               atol=1e-4)
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_one_contribution_by_brute_force():
    torch.manual_seed(0)
    net = SmallAlexNet(width=4).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    conv = net.features[6]
    below = layer_outputs(net, ["features.5"], imagenet_input(images))["features.5"]
    found = attributions(net, "features.6:1", images)
    for channel in range(conv.in_channels):
        alone = torch.zeros_like(below)
        alone[:, channel] = below[:, channel]
        value = (conv(alone) - conv(torch.zeros_like(below)))[:, 1]
        np.testing.assert_allclose(found[:, channel],
                                   value[:, value.shape[1]//2, value.shape[2]//2].detach(),
                                   atol=1e-5)
