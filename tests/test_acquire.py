"Strategies against plain loops, other libraries and enumerations; bad pools and bad answers."
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpos import acquire
from superpos.acquire import (
    Pool,
    by_score,
    check_rows,
    core_set,
    largest,
    mc_dropout,
    query,
    strategies,
    strategy,
)

scores = {name: getattr(acquire, name) for name in ("least_confidence", "margin", "ratio",
                                                    "entropy", "most_confident", "vote_entropy",
                                                    "consensus_entropy", "mean_kl", "bald")}


def random_pool(n=60, classes=5, members=4, width=7, known=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return Pool(2*draw(members, n, classes), draw(n, width), draw(known, width),
                torch.randint(classes, (n,), generator=g))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- scores, image by image


def plain(name, members):
    "A score of one image from its members' probabilities, in plain arithmetic."
    classes = range(len(members[0]))
    mean = [sum(p[c] for p in members)/len(members) for c in classes]
    first, second = sorted(mean, reverse=True)[:2]
    h = lambda p: -sum(x*math.log(x) for x in p if x > 0)
    votes = [p.index(max(p)) for p in members]
    return dict(least_confidence=1 - first, margin=second - first, ratio=second/first,
                entropy=h(mean), most_confident=first - 1,
                vote_entropy=h([votes.count(c)/len(votes) for c in classes]),
                consensus_entropy=h(mean),
                mean_kl=sum(p[c]*math.log(p[c]/mean[c]) for p in members
                            for c in classes)/len(members),
                bald=h(mean) - sum(h(p) for p in members)/len(members))[name]


@pytest.mark.parametrize("name", scores)
@pytest.mark.parametrize("seed", range(3))
def test_score_is_its_definition(name, seed):
    pool = random_pool(seed=seed)
    p = pool.logits.double().softmax(-1)
    expected = [plain(name, p[:, i].tolist()) for i in range(len(pool))]
    assert scores[name](pool).tolist() == pytest.approx(expected, abs=1e-12)
    assert (query(pool, 7, name).tolist() == sorted(range(len(pool)),
                                                    key=lambda i: -expected[i])[:7]
            or name == "vote_entropy")


@pytest.mark.parametrize("name", ["least_confidence", "margin", "ratio", "entropy"])
def test_one_model_is_a_committee_of_one(name):
    pool = random_pool()
    assert torch.equal(scores[name](Pool(pool.logits[0])), scores[name](Pool(pool.logits[:1])))


def test_near_certainty_keeps_an_order():
    pool = Pool(torch.tensor([[30., 0, 0], [31., 0, 0], [29., 0, 0]]))
    assert (pool.logits.softmax(-1).amax(-1) == 1).all()
    for name in ("least_confidence", "ratio", "entropy"):
        assert query(pool, 3, name).tolist() == [2, 0, 1], name


@pytest.mark.parametrize("gap", [700., 745., 800., 1e4])
def test_what_no_member_expects_adds_nothing(gap):
    sure = Pool(torch.tensor([[[gap, 0], [1, 0]], [[gap, 0], [0, 1]]], dtype=torch.double))
    assert scores["mean_kl"](sure)[0] == pytest.approx(0, abs=1e-300)
    assert query(sure, 1, "mean_kl").item() == 1
    split = Pool(torch.tensor([[[gap, 0], [1, 0]], [[0, gap], [0, 1]]], dtype=torch.double))
    assert scores["mean_kl"](split)[0] == pytest.approx(math.log(2))


@pytest.mark.parametrize("seed", range(5))
def test_two_strategies_are_others_by_another_name(seed):
    pool = random_pool(seed=seed)
    for name, other in dict(mean_kl="bald", consensus_entropy="entropy").items():
        assert query(pool, 20, name).tolist() == query(pool, 20, other).tolist()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(value):
    by_score()(broken := lambda pool: torch.where(torch.arange(len(pool)) == 7, value, 1.))
    strategies["broken"] = strategies.pop(broken.__name__)
    try:
        with pytest.raises(ValueError, match="1 of the 60 scores are not finite, the first of row "
                           "7; a strategy gives a number for every image"):
            query(random_pool(), 3, "broken")
    finally: del strategies["broken"]


# ---- other libraries, where they implement the same


def test_agrees_with_scikit_activeml():
    other = pytest.importorskip("skactiveml.pool")
    pool = random_pool()
    p = pool.probabilities.numpy()
    for ours, theirs in dict(least_confidence="least_confident", entropy="entropy",
                             margin="margin_sampling").items():
        found = other.uncertainty_scores(p, method=theirs) - (1 if ours == "margin" else 0)
        assert np.allclose(scores[ours](pool), found, atol=1e-9), ours
    members = pool.members.exp().numpy()
    assert np.allclose(scores["mean_kl"](pool), other.average_kl_divergence(members), atol=1e-9)
    assert np.allclose(scores["vote_entropy"](pool),
                       other.vote_entropy(members.argmax(-1).T, classes=list(range(pool.classes))),
                       atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_core_set_agrees_with_scikit_activeml(seed):
    other = pytest.importorskip("skactiveml.pool")
    pool = random_pool(200, seed=seed)
    everything = np.concatenate([pool.features, pool.known])
    found, _ = other.k_greedy_center(everything, np.r_[np.full(200, np.nan), np.zeros(9)], 25)
    assert query(pool, 25, "core_set").tolist() == found.tolist()


def test_agrees_with_modal():
    uncertainty = pytest.importorskip("modAL.uncertainty")
    disagreement = pytest.importorskip("modAL.disagreement")
    pool = random_pool()
    model = SimpleNamespace(predict_proba=lambda x: pool.probabilities.numpy())
    assert np.allclose(scores["least_confidence"](pool),
                       uncertainty.classifier_uncertainty(model, None))
    assert np.allclose(scores["margin"](pool), -uncertainty.classifier_margin(model, None))
    assert np.allclose(scores["entropy"](pool), uncertainty.classifier_entropy(model, None))
    class Committee:
        classes_ = np.arange(pool.classes)
        def predict_proba(self, x): return pool.probabilities.numpy()
        def vote_proba(self, x): return pool.members.exp().numpy().transpose(1, 0, 2)
        def vote(self, x): return pool.members.argmax(-1).numpy().T
        def __len__(self): return len(pool.members)
    x = np.zeros((len(pool), 1))
    assert np.allclose(scores["vote_entropy"](pool), disagreement.vote_entropy(Committee(), x))
    assert np.allclose(scores["consensus_entropy"](pool),
                       disagreement.consensus_entropy(Committee(), x))


# ---- strategies that look at distances


def greedy(points, centres, count):
    "k-centre greedy by its definition, in double precision."
    centres, chosen = [c.double() for c in centres], []
    for _ in range(count):
        gaps = [min((p.double() - c).norm().item() for c in centres) if i not in chosen else -1
                for i, p in enumerate(points)]
        chosen.append(max(range(len(points)), key=gaps.__getitem__))
        centres.append(points[chosen[-1]].double())
    return chosen


@pytest.mark.parametrize("width", [1, 2, 7])
@pytest.mark.parametrize("block", [1, 8, 1024])
def test_core_set_is_greedy(width, block):
    pool = random_pool(80, width=width, known=3)
    assert core_set(pool, 30, rng(), block).tolist() == greedy(pool.features, pool.known, 30)


def test_core_set_without_labels_begins_anywhere():
    pool = random_pool(40)
    bare = Pool(pool.logits, pool.features)
    starts = set()
    for seed in range(30):
        first, *rest = query(bare, 6, "core_set", seed).tolist()
        assert rest == greedy(bare.features, bare.features[first:first + 1], 5)
        starts.add(first)
    assert len(starts) > 10


def test_core_set_takes_everything_even_copies():
    pool = Pool(torch.zeros(30, 2), torch.ones(30, 3))
    assert sorted(query(pool, 30, "core_set").tolist()) == list(range(30))


def test_badge_measures_gradients():
    pool = random_pool(12, members=1)
    head = torch.nn.Linear(7, 5, bias=False)
    found = []
    for logits, h in zip(pool.logits[0], pool.features):
        given = (head(h) - head(h).detach() + logits)[None]
        loss = torch.nn.functional.cross_entropy(given, given.argmax(-1))
        found.append(torch.autograd.grad(loss, head.weight)[0].ravel())
    gradients = torch.stack(found)
    said = torch.nn.functional.one_hot(pool.probabilities.argmax(-1), 5)
    error = (pool.probabilities - said).float()
    assert torch.allclose(acquire._products((error, pool.features), (error, pool.features)),
                          gradients @ gradients.T, atol=1e-5)


@pytest.mark.parametrize("block", [2, 64])
def test_badge_draws_as_k_means_plus_plus(block):
    pool = random_pool(6, classes=3, members=1, width=2, seed=4)
    error = pool.probabilities - torch.nn.functional.one_hot(pool.probabilities.argmax(-1), 3)
    g = (error[:, :, None]*pool.features[:, None].double()).flatten(1)
    first = g.square().sum(1).argmax().item()
    def chance(order):
        probability, centres = 1., [first]
        for row in order:
            gaps = torch.stack([(g - g[c]).square().sum(1) for c in centres]).amin(0)
            probability *= (gaps[row]/gaps.sum()).item()
            centres.append(row)
        return probability
    orders = list(itertools.permutations([i for i in range(6) if i != first], 3))
    expected = np.array([chance(o) for o in orders])
    draws, generator = 4000, rng()
    found = [tuple(acquire.badge(pool, 4, generator, block).tolist()) for _ in range(draws)]
    assert {f[0] for f in found} == {first} and expected.sum() == pytest.approx(1)
    seen = np.array([sum(f[1:] == o for f in found) for o in orders])
    likely = expected*draws > 5
    chi2 = ((seen - expected*draws)**2/(expected*draws))[likely].sum()
    assert chi2 < likely.sum() + 4*math.sqrt(2*likely.sum())


def test_typiclust_takes_the_most_typical_of_each_group(monkeypatch):
    pool = random_pool(60, known=6)
    groups = np.random.default_rng(0).integers(0, 5, 66)
    monkeypatch.setattr(acquire, "_groups", lambda x, count, rng: groups)
    x = torch.nn.functional.normalize(pool.features).double()
    waiting = {}
    for group in range(5):
        rows = [i for i in range(60) if groups[i] == group]
        k = min(20, len(rows) - 1)
        waiting[group] = sorted(rows,
                                key=lambda i: sum(sorted((x[i] - x[j]).norm().item() for j in rows
                                                         if j != i)[:k])/k)
    order = sorted(waiting, key=lambda group: ((groups[60:] == group).sum(), -len(waiting[group])))
    rounds = [waiting[group][turn] for turn in range(60) for group in order
              if turn < len(waiting[group])]
    for count in (3, 17, 60): assert query(pool, count, "typiclust").tolist() == rounds[:count]


def test_reducing_keeps_products():
    pool = random_pool(100, width=30)
    flat = Pool(pool.logits, pool.features @ torch.diag(torch.tensor([1.]*5 + [0.]*25)),
                pool.known @ torch.diag(torch.tensor([1.]*5 + [0.]*25)))
    less = flat.reduced(5)
    assert less.features.shape == (100, 5)
    assert torch.allclose(less.features @ less.known.T, flat.features @ flat.known.T, atol=1e-4)
    assert torch.allclose(pool.reduced(29).features.square().sum(),
                          torch.linalg.svdvals(pool.features)[:29].square().sum())


# ---- chance, streams, controls


def test_equal_scores_are_broken_by_the_seed():
    pool = Pool(torch.zeros(10, 2))
    times = torch.zeros(10)
    for seed in range(2000): times[query(pool, 3, "least_confidence", seed)] += 1
    assert (times - 600).abs().max() < 4*math.sqrt(2000*.3*.7)
    assert torch.equal(query(pool, 3, "margin", 5), query(pool, 3, "margin", 5))


def test_stream_cannot_look_ahead():
    g = rng()
    logits = torch.randn(400, 3, generator=g)
    order = torch.randperm(400, generator=rng(7))
    changed = logits.clone()
    changed[order[200:]] = torch.randn(200, 3, generator=g)*9
    place = {row: k for k, row in enumerate(order.tolist())}
    early = [[place[row] for row in query(Pool(x), 80, "stream", 7).tolist() if place[row] < 200]
             for x in (logits, changed)]
    assert early[0] == early[1] and early[0] == sorted(early[0]) and 20 < len(early[0]) <= 41


@pytest.mark.parametrize("scale", [0., 50.])
def test_stream_spends_its_budget(scale):
    assert len(query(Pool(torch.randn(200, 3, generator=rng())*scale), 37, "stream")) == 37


@pytest.mark.parametrize("count", [1, 9, 30, 55])
def test_balanced_is_as_even_as_can_be(count):
    pool = Pool(torch.zeros(55, 4), labels=torch.tensor([0]*40 + [1]*10 + [2]*5))
    found = pool.labels[query(pool, count, "balanced")].bincount(minlength=3).tolist()
    level = max(found)
    assert all(f >= min(level - 1, size) for f, size in zip(found, (40, 10, 5)))


def test_dropout_committee_is_dropout():
    head, x = torch.nn.Linear(40, 3), torch.randn(5, 40, generator=rng())
    ours = mc_dropout(x, head, .3, members=4000)
    theirs = torch.stack([head(torch.nn.functional.dropout(x, .3)) for _ in range(4000)])
    assert torch.allclose(ours.mean(0), theirs.mean(0), atol=.1)
    assert torch.allclose(ours.std(0), theirs.std(0), rtol=.1)
    assert torch.equal(mc_dropout(x, head, .3, seed=1), mc_dropout(x, head, .3, seed=1))
    assert not ours.requires_grad


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), classes=st.integers(2, 5), members=st.integers(1, 3),
       known=st.integers(0, 4), seed=st.integers(0, 99), data=st.data())
def test_every_strategy_answers(n, classes, members, known, seed, data):
    pool = random_pool(n, classes, members, 3, known, seed)
    count = data.draw(st.integers(1, n))
    for name in strategies:
        rows = query(pool, count, name, seed)
        assert (rows.dtype == torch.int64 and len(set(rows.tolist())) == count
                and 0 <= rows.min() <= rows.max() < n), name
        assert torch.equal(rows, query(pool, count, name, seed)), name


# ---- one function is a strategy


def test_a_new_strategy_is_one_function():
    @by_score("features")
    def longest(pool): return pool.features.norm(dim=1)
    @strategy("labels")
    def first_class(pool, count, rng): return largest((pool.labels == 0).float(), count, rng)
    try:
        pool = random_pool()
        assert (query(pool, 5, "longest").tolist()
                == pool.features.norm(dim=1).argsort(descending=True)[:5].tolist())
        assert (pool.labels[query(pool, 4, "first_class")] == 0).all()
        with pytest.raises(ValueError, match="'longest' needs features"):
            query(Pool(torch.zeros(3, 2)), 1, "longest")
    finally: del strategies["longest"], strategies["first_class"]
    assert query(pool, 2, lambda pool, count, rng: torch.tensor([3, 1])).tolist() == [3, 1]


# ---- what cannot be


bare = Pool(torch.zeros(4, 3))


@pytest.mark.parametrize("ask,message", [
    (lambda: query(bare, 5, "margin"), "asked for 5 images of a pool of 4; ask for 1..4"),
    (lambda: query(bare, 0, "margin"), "asked for 0 images"),
    (lambda: query(bare, 1., "margin"), "asked for 1.0 images"),
    (lambda: query(bare, 1, "margn"), "there is no strategy 'margn'; the nearest names are margin"),
    (lambda: query(bare, 1, "badge"), "'badge' needs features, and this pool has none"),
    (lambda: query(bare, 1, "balanced"), "'balanced' needs labels, and this pool has none"),
    (lambda: query(bare, 1, "vote_entropy"), "'vote_entropy' needs a committee"),
    (lambda: query(bare, 2, lambda pool, count, rng: [1]), "chose 1 images where 2 were asked for"),
    (lambda: check_rows([1, 2, 1], 5), "row 1 is there 2 times"),
    (lambda: check_rows([1, 5], 5), "row 5 is out of range; a pool of 5 has rows 0..4"),
    (lambda: check_rows([-1], 5), "row -1 is out of range"),
    (lambda: check_rows([.5], 5), "rows are a list of integers"),
    (lambda: check_rows([True, False], 2), "rows are a list of integers"),
    (lambda: Pool(torch.full((4, 3), torch.nan)), "12 of the 12 logits are not finite"),
    (lambda: Pool(torch.zeros(4, 3), torch.full((4, 1), torch.inf)), "4 of the 4 features are not "
     "finite"),
    (lambda: Pool(torch.zeros(4)), "logits have shape"),
    (lambda: Pool(torch.zeros(4, 1)), "logits have shape"),
    (lambda: Pool(torch.zeros(4, 3), torch.zeros(5, 2)),
     r"features must have shape \(4, 2\) for this pool, got \(5, 2\)"),
    (lambda: Pool(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(6, 3)),
     r"known must have shape \('any', 2\) for this pool, got \(6, 3\)"),
    (lambda: Pool(torch.zeros(4, 3), labels=torch.tensor([0, 1, 2])),
     r"labels must have shape \(4,\)"),
    (lambda: Pool(torch.zeros(4, 3), labels=torch.tensor([0, 1, 2, -1])),
     "labels must lie in 0..2, got -1..2"),
    (lambda: mc_dropout(torch.zeros(4, 3), torch.nn.Linear(3, 2), 0),
     "rate between 0 and 1, got 0"),
])
def test_one_clear_sentence(ask, message):
    with pytest.raises(ValueError, match=message): ask()
