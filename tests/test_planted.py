"Planted networks: the truth is true, the noise as large as promised, marks are what they say."
import copy

import pytest
import torch

from superpos.circuit import effective_mask
from superpos.planted import (
    _costs,
    entrants,
    leaderboard,
    merge_blocks,
    recovery_scores,
    train_blocks,
)


@pytest.fixture(scope="module")
def blocks(): return train_blocks(seed=5, steps=40, shared=.5)


@pytest.fixture(scope="module")
def planted(blocks): return merge_blocks(blocks)


def test_only_the_truth_matters_to_a_block(blocks, planted):
    torch.manual_seed(0)
    for c, truth in enumerate(planted.truth):
        for images in planted.test:
            block = blocks.net(images)[:, c].flatten()
            for part in (1., .5, 0.):  # other kernels: all there, half of them, none
                others = ~planted.truth.any(0) & (torch.rand(len(truth)) < part)
                torch.testing.assert_close(planted.target.respond(images, truth | others), block,
                                           atol=1e-5, rtol=1e-4)
    together = sum(blocks.net(planted.test[-1]).flatten(1).unbind(1))
    torch.testing.assert_close(planted.target.respond(planted.test[-1]), together, atol=1e-5,
                               rtol=1e-4)


def test_every_true_kernel_lies_on_a_path_and_matters(planted):
    for truth in planted.truth:
        assert torch.equal(effective_mask(planted.target, truth), truth)
        images = torch.cat(planted.learn)
        whole = planted.target.respond(images, truth)
        for i in truth.nonzero().ravel()[::5]:
            without = truth.clone().index_fill(0, i, False)
            assert not torch.equal(planted.target.respond(images, without), whole)


def test_a_kernel_costs_what_the_loss_rises_without_it(blocks):
    images = torch.cat(blocks.learn)
    for concept in (0, 1):
        block, wanted = [mask[concept] for mask in blocks.truth], torch.linspace(0, 1, len(images))
        def loss(net, concept=concept, wanted=wanted):
            return (net(images)[:, concept].flatten() - wanted).square().mean().item()
        costs = _costs(blocks.net, block, images, wanted)
        assert len(costs) == sum(int(mask.sum()) for mask in block)
        for layer, o, i in list(costs)[::3]:
            without = copy.deepcopy(blocks.net)
            [m for m in without if isinstance(m, torch.nn.Conv2d)][layer].weight[o, i] = 0
            assert costs[layer, o, i] == pytest.approx(loss(without) - loss(blocks.net), abs=1e-5)


def test_shared_filters_are_in_every_truth(blocks):
    own, shared = train_blocks(seed=5, steps=40), blocks
    assert not (own.truth[0].all(0)).any() and shared.truth[0].shape[1] == 9
    assert own.truth[0].shape[1] == 12
    both = shared.truth[0].all(0).any(1)
    assert both[3:].sum() == 0  # three of each block's six filters are shared, and come first


@pytest.mark.parametrize("noise", [.1, 1.])
def test_noise_has_its_norm_in_every_filter(blocks, noise):
    planted = merge_blocks(blocks, noise)
    clean = merge_blocks(blocks)
    for name in ("conv1", "conv2", "conv3", "unit"):
        a, b = (p.model.get_submodule(name).weight.flatten(1) for p in (clean, planted))
        true, room = a.norm(dim=1), ~clean.layout.views(clean.truth.any(0))[f"{name}.weight"].all(1)
        room &= true > 0
        torch.testing.assert_close((b - a).norm(dim=1)[room], noise*true[room])
    truth = planted.layout.views(planted.truth.any(0))
    for name, mask in truth.items():
        change = planted.model.get_parameter(name) - clean.model.get_parameter(name)
        change = change.flatten(2).abs().sum(2)
        assert (change[mask] == 0).all() and (change[~mask] > 0).all()


def test_noise_leaves_each_channels_mean(blocks):
    clean, noisy, x = merge_blocks(blocks), merge_blocks(blocks, .3), blocks.learn[-1]
    layer = lambda p, n: p.model[:n](x).mean((0, 2, 3))
    for n in (1, 3, 6, 9):
        torch.testing.assert_close(layer(noisy, n), layer(clean, n), atol=1e-4, rtol=1e-3)


def test_marks_by_hand(planted):
    truth = planted.truth[0]
    half = truth.clone()
    half[truth.nonzero().ravel()[::2]] = False
    found = recovery_scores(planted, 0, half)
    assert found["precision"] == 1
    assert found["recall"] == found["iou"] == pytest.approx(int(half.sum())/int(truth.sum()))
    scores = truth.float() + torch.rand(len(truth))*.5
    assert (recovery_scores(planted, 0, scores)["iou"]
            == recovery_scores(planted, 0, scores)["ranking"] == 1)
    nothing = recovery_scores(planted, 0, truth & False)
    assert nothing["auroc_other"] == .5
    assert nothing["iou"] == nothing["precision"] == nothing["correlation"] == 0
    with pytest.raises(ValueError, match="entries are wanted"):
        recovery_scores(planted, 0, truth[1:])
    with pytest.raises(ValueError, match="1 of the scores are not finite"):
        recovery_scores(planted, 0,
                        torch.cat([torch.zeros(len(truth) - 1), torch.tensor([torch.nan])]))


def test_a_network_is_the_same_for_the_same_seed(blocks):
    train_blocks.cache_clear()
    again = train_blocks(seed=5, steps=40, shared=.5)
    for a, b in zip(blocks.net.parameters(), again.net.parameters()): assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(blocks.truth, again.truth))
    assert blocks.concepts == again.concepts


def test_every_method_can_be_entered(blocks):
    quick = {name: entrants[name]
             for name in ("FORCE", "SNIP", "ActGrad", "Taylor", "magnitude", "random")}
    oracle = dict(oracle=lambda *asked: merge_blocks(blocks).truth[0])
    rows = leaderboard(quick | oracle, [5], [0.], .5, steps=40)
    assert len(rows) == 2*7 and [r["iou"] for r in rows if r["method"] == "oracle"][0] == 1
    assert all(r["precision"] == r["recall"] for r in rows if r["method"] not in oracle)
    assert [r["concept"] for r in leaderboard(oracle, [5], [0.], .5, circuits=1, steps=40)] == [0]


@pytest.mark.parametrize("wrong,message", [(dict(concepts=1), "got 1"), (dict(concepts=5), "got 5"),
                                           (dict(shared=.6), "got 0.6"),
                                           (dict(density=0), "got 0")])
def test_bad_input_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message): train_blocks(**wrong)


def test_negative_noise_is_refused(blocks):
    with pytest.raises(ValueError, match="got -1"): merge_blocks(blocks, -1)
