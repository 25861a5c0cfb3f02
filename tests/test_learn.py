"Batches, training and runs against plain ways; runs that are killed, refused, or short of classes."
import dataclasses
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import accuracy_score, log_loss

from superpos import learn
from superpos.acquire import largest, least_confidence, query, strategies, strategy
from superpos.core import cached, decode
from superpos.data import Images, digits, shapes
from superpos.learn import (
    Plan,
    ResidentImages,
    RunRecord,
    evaluate,
    experiment,
    fitting,
    frozen_features,
    linear_head,
    load_loop,
    logits_and_features,
    network,
    reliability,
    saved_loops,
    train,
)
from superpos.model import fingerprint, imagenet_input

everything = digits()
images, test = everything.select(slice(0, 200)), everything.select(slice(200, 300))
small = Plan(first=20, ask=10, loops=3, steps=6, batch=8, network="resnet8_half", lr=.05, pad=1,
             flip=False)


@pytest.fixture(autouse=True)
def few_classes_are_no_news():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "loop . has labels of")
        yield


def run(folder=None, chunks=None, **changes):
    return experiment(dataclasses.replace(small, **changes), images, test, folder, chunks, "cpu",
                      every=0)


def same(a, b):
    assert a.weights == b.weights
    assert all(np.array_equal(x, y) for x, y in zip(a.asked, b.asked, strict=True))
    for name in ("accuracy", "loss", "ece", "counts", "steps", "labelled"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


# ---- batches


@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_crops(flip):
    toys, pad, n = shapes(20, size=16), 3, 400
    data, rows = ResidentImages(toys, "cpu", pad), torch.arange(n) % 20
    found = data.batch(rows, torch.Generator().manual_seed(1), flip)
    seen = set()
    for row, x in zip(rows.tolist(), found):
        padded = torch.nn.functional.pad(toys[row], [pad]*4)
        ways = {(i, j, m): padded[:, i:i + 16, j:j + 16].flip(2) if m
                else padded[:, i:i + 16, j:j + 16] for i in range(7) for j in range(7)
                for m in (False, True)}
        places = [place for place, way in ways.items()
                  if torch.allclose(imagenet_input(way), x, atol=1e-5)]
        assert places, "no crop of the image"
        if len(places) == 1: seen.add(places[0])
    assert {i for i, _, _ in seen} == {j for _, j, _ in seen} == set(range(7))
    assert any(m for _, _, m in seen) == flip


@pytest.mark.parametrize("size,batch", [(7, 3), (3, 7), (5, 5), (1, 4)])
def test_every_image_comes_round_equally_often(size, batch):
    drawn = torch.cat([learn._positions(size, batch, step, 1, 2) for step in range(3*size)])
    assert (drawn.view(-1, size).sort(1).values == torch.arange(size)).all()


# ---- networks


def test_stems_and_pretrained_weights(tmp_path):
    from safetensors.torch import save_file
    plain = learn.load_model("resnet18")
    save_file(plain.state_dict(), tmp_path/"w.safetensors")
    ours = network("resnet18", 5, str(tmp_path/"w.safetensors"))
    assert torch.equal(ours.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)
    assert ours.fc.weight.shape == (5, 512)
    assert ours.training and all(p.requires_grad for p in ours.parameters())
    assert ours.conv1.kernel_size == (7, 7)
    assert network("resnet18_3x3", 5).conv1.kernel_size == (3, 3)
    assert network("resnet18_3x3", 5).layer1(torch.zeros(1, 64, 32, 32)).shape == (1, 64, 32, 32)


def test_a_network_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(loops=1, dropout=.3)
    assert torch.equal(before, torch.get_rng_state())


def test_scan_is_a_forward_pass():
    data, model = ResidentImages(images, "cpu", pad=2), network("resnet8", 10)
    rows = torch.tensor([3, 9, 4])
    logits, features = logits_and_features(model, data, rows, batch=2)
    model.eval()
    with torch.no_grad():
        expected = model(imagenet_input(torch.stack([images[i] for i in rows.tolist()])))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(linear_head(model)(features), expected, atol=1e-5)
    assert not linear_head(model)._forward_pre_hooks


def test_measures_agree_with_scikit_learn():
    data, model = ResidentImages(test, "cpu"), network("resnet8", 10)
    found, logits = evaluate(model, data), logits_and_features(model, data)[0]
    assert found["accuracy"] == accuracy_score(test.labels, logits.argmax(1))
    assert found["loss"] == pytest.approx(log_loss(test.labels, logits.double().softmax(1),
                                                   labels=range(10)))


def test_calibration_error_by_its_definition():
    g = torch.Generator().manual_seed(0)
    logits, labels = 3*torch.randn(500, 4, generator=g), torch.randint(4, (500,), generator=g)
    sure, said = logits.double().softmax(1).max(1)
    expected = 0.
    for k in range(15):
        inside = (sure >= k/15) & (sure < (k + 1)/15)
        if inside.any():
            gap = sure[inside].mean() - (said == labels)[inside].double().mean()
            expected += inside.sum().item()/500*abs(gap.item())
    confidence, accuracy, share = reliability(logits, labels)
    assert np.nansum(share*abs(confidence - accuracy)) == pytest.approx(expected)
    assert share.sum() == pytest.approx(1)
    certain = reliability(torch.tensor([[100., 0]]), torch.tensor([0]))
    assert certain[0][-1] == certain[1][-1] == certain[2][-1] == 1


# ---- training


def plain_training(plan, rows):
    "The same training, written down plainly."
    model = network(plan.network, 10, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=.9, nesterov=True,
                                weight_decay=plan.decay)
    data = ResidentImages(images, "cpu", plan.pad)
    for step in range(plan.steps):
        at = learn._positions(len(rows), plan.batch, step, plan.seed, 0)
        rng = learn._rng(plan.seed, 0, "step", step)
        optimizer.param_groups[0]["lr"] = (plan.lr*min(1, (step + 1)/max(1, plan.steps//20))*.5*(
            1 + math.cos(math.pi*step/plan.steps)))
        model.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.batch(rows[at], rng, plan.flip)),
                                          torch.from_numpy(images.labels)[rows[at]]).backward()
        optimizer.step()
    return model


def test_training_is_what_it_says():
    plan, rows = dataclasses.replace(small, steps=40, flip=True), torch.arange(5, 95)
    model, data = network(plan.network, 10, seed=3), ResidentImages(images, "cpu", plan.pad)
    train(model, learn._optimizer(model, plan), data, rows, plan)
    for a, b in zip(model.state_dict().values(), plain_training(plan, rows).state_dict().values()):
        assert torch.allclose(a, b, atol=1e-5)


def test_dropped_features_are_the_rate():
    plan, before, after = dataclasses.replace(small, dropout=.25, steps=60), [], []
    model, data = network(plan.network, 10), ResidentImages(images, "cpu", 1)
    first = linear_head(model).register_forward_pre_hook(lambda module, given: before.append(
        given[0]))
    linear_head(model).register_forward_hook(lambda module, given, out: after.append(given[0]))
    train(model, learn._optimizer(model, plan), data, torch.arange(50), plan)
    before, after = torch.cat(before), torch.cat(after)
    kept = after[before > 0] > 0
    assert kept.float().mean() == pytest.approx(.75, abs=4*math.sqrt(.75*.25/len(kept)))
    assert torch.allclose(after[before > 0][kept], before[before > 0][kept]/.75)
    first.remove()
    assert not linear_head(model)._forward_pre_hooks


# ---- runs


def test_arms_of_a_seed_are_pairs():
    arms = [run(strategy=s, protocol=p)
            for s, p in (("random", "sequential"), ("margin", "cumulative_warm"),
                         ("core_set", "cumulative_cold"))]
    assert len({tuple(a.asked[0]) for a in arms}) == len({(a.loss[0], a.ece[0]) for a in arms}) == 1
    other = run(seed=1)
    assert set(other.asked[0]) != set(arms[0].asked[0]) and other.loss[0] != arms[0].loss[0]


@pytest.mark.parametrize("protocol", learn.protocols)
def test_protocols_by_hand(protocol):
    record = run(protocol=protocol, strategy="entropy")
    plan = dataclasses.replace(small, protocol=protocol)
    data = ResidentImages(images, "cpu", small.pad)
    fresh = lambda: network(plan.network, 10, seed=learn._seed(0, "weights"))
    model = fresh()
    optimizer, labelled = learn._optimizer(model, plan), []
    for loop, new in enumerate(record.asked):
        labelled = sorted(labelled + new.tolist())
        if protocol == "cumulative_cold" and loop:
            model = fresh()
            optimizer = learn._optimizer(model, plan)
        rows = sorted(new.tolist()) if protocol == "sequential" else labelled
        train(model, optimizer, data, torch.tensor(rows), plan, loop)
        found = evaluate(model, ResidentImages(test, "cpu"))
        assert ((found["accuracy"], found["loss"], found["ece"])
                == (record.accuracy[loop], record.loss[loop], record.ece[loop]))
        if loop < 2:
            rest = [i for i in range(200) if i not in labelled]
            probabilities = logits_and_features(model, data,
                                                torch.tensor(rest))[0].double().softmax(1)
            entropy = dict(zip(rest, torch.special.entr(probabilities).sum(1).tolist()))
            assert record.asked[loop + 1].tolist() == sorted(rest, key=lambda i: -entropy[i])[:10]
    assert fingerprint(model) == record.weights
    assert record.steps.tolist() == [6, 12, 18] and record.labelled.tolist() == [20, 30, 40]
    assert (record.counts == [np.bincount(images.labels[rows], minlength=10)
                              for rows in record.asked]).all()


@pytest.mark.parametrize("name", strategies)
def test_every_strategy_runs(name):
    record = run(strategy=name, loops=2, steps=3, dropout=.2, dims=8)
    assert len(np.unique(np.concatenate(record.asked))) == 30 and np.isfinite(record.loss).all()


@pytest.mark.parametrize("committee", ["seeds", "checkpoints"])
def test_committees(committee, monkeypatch):
    pools = []
    monkeypatch.setattr(learn, "query", lambda pool, *rest: (pools.append(pool),
                                                             query(pool, *rest))[1])
    record = run(strategy="bald", committee=committee, members=3)
    assert [pool.logits.shape for pool in pools] == [(3, 180, 10), (3, 170, 10)]
    for pool in pools: assert len({m.sum().item() for m in pool.logits}) == 3
    assert record.committee_steps.tolist() == ([12, 24, 24] if committee == "seeds" else [0, 0, 0])
    same(record, run(strategy="bald", committee=committee, members=3))


def test_full_data_is_a_run_of_one_loop():
    record = run(first=200, loops=1)
    assert sorted(record.asked[0]) == list(range(200)) and record.steps.tolist() == [6]


def test_replayed_chunks_are_the_same_run():
    asked = run(strategy="margin", protocol="sequential")
    replayed = run(strategy="margin, again", protocol="sequential", chunks=asked.asked)
    same(asked, replayed)
    back = run(strategy="margin, reversed", protocol="sequential", chunks=asked.asked[::-1])
    assert back.labelled.tolist() == [10, 20, 40] and back.weights != asked.weights


@pytest.mark.parametrize("protocol", learn.protocols)
def test_the_order_of_asking_is_no_matter(protocol):
    asked = run(strategy="margin", protocol=protocol)
    turned = run(protocol=protocol, chunks=[rows[::-1] for rows in asked.asked])
    assert turned.weights == asked.weights and (turned.accuracy == asked.accuracy).all()


def test_what_is_labelled_is_known_in_the_order_of_the_pool(monkeypatch):
    pools = []
    monkeypatch.setattr(learn, "query", lambda pool, *rest: (pools.append(pool),
                                                             query(pool, *rest))[1])
    data, model = ResidentImages(images, "cpu", small.pad), network(small.network, 10)
    state = learn._State(model, None, [torch.tensor([9, 3]), torch.tensor([5, 1])], {})
    learn._ask(state, data, dataclasses.replace(small, strategy="core_set"), [], None)
    expected = logits_and_features(model, data, torch.tensor([1, 3, 5, 9]))[1]
    assert torch.equal(pools[0].known, expected)


def test_a_new_strategy_is_one_function():
    @strategy("features")
    def half_random(pool, count, rng):
        unsure = largest(least_confidence(pool), count//2, rng)
        others = torch.randperm(len(pool), generator=rng)
        return torch.cat([unsure, others[~torch.isin(others, unsure)][:count - len(unsure)]])
    try: assert len(np.unique(np.concatenate(run(strategy="half_random").asked))) == 40
    finally: del strategies["half_random"]


def test_record_is_kept(tmp_path):
    record = run(tmp_path/"run")
    again = RunRecord.of(cached("a-run", lambda: record.as_dict(), folder=tmp_path).value)
    same(record, again)
    same(record, RunRecord.of(decode(json.loads((tmp_path/"run"/"record.json").read_text()))))
    assert again.plan["strategy"] == "least_confidence"
    assert again.data["classes"] == list("0123456789")
    same(record, pickle.loads(pickle.dumps(record)))


def test_arms_travel_to_workers():
    plan, data = pickle.loads(pickle.dumps((small, images)))
    same(experiment(plan, data, test, device="cpu"), run())


# ---- kills


script = """
import sys, dataclasses, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
from test_learn import *
torch.set_num_threads({threads})
plan = dataclasses.replace(small, steps=60, strategy={strategy!r}, protocol={protocol!r},
                           optimizer={optimizer!r}, dropout=.1, committee="checkpoints", members=3)
experiment(plan, images, test, {folder!r}, device="cpu", every=0)
"""


def tensors(path):
    with safe_open(path, "pt") as file: return {k: file.get_tensor(k) for k in file.keys()}


@pytest.mark.parametrize("strategy,protocol,optimizer", [("badge", "cumulative_cold", "adamw"),
                                                         ("bald", "sequential", "sgd")])
def test_a_killed_run_comes_to_the_same_bits(tmp_path, strategy, protocol, optimizer):
    plan = dataclasses.replace(small, steps=60, strategy=strategy, protocol=protocol,
                               optimizer=optimizer, dropout=.1, committee="checkpoints", members=3)
    folder = tmp_path/"killed"
    code = script.format(tests=os.path.dirname(__file__), threads=torch.get_num_threads(),
                         folder=str(folder), strategy=strategy, protocol=protocol,
                         optimizer=optimizer)
    with subprocess.Popen([sys.executable, "-c", code],
                          env=os.environ | dict(SUPERPOS_QUIET="1")) as process:
        until = time.monotonic() + 300
        while len(saved_loops(folder)) < 2 and time.monotonic() < until and process.poll() is None:
            time.sleep(.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and 1 <= len(saved_loops(folder)) <= 3
    info = learn._read(saved_loops(folder)[-1])[0]
    assert info["loop"] < 2 or info["step"] < 60
    resumed = experiment(plan, images, test, folder, device="cpu")
    whole = experiment(plan, images, test, tmp_path/"whole", device="cpu")
    same(resumed, whole)
    for a, b in zip(saved_loops(folder), saved_loops(tmp_path/"whole"), strict=True):
        a, b = tensors(a), tensors(b)
        assert a.keys() == b.keys() and any(k.startswith("optimizer.") for k in a)
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("protocol", learn.protocols)
def test_any_save_can_be_taken_up(tmp_path, monkeypatch, protocol):
    whole, save, count = run(protocol=protocol), learn._State.save, [0, 0]
    def failing(self, path, about):
        count[0] += 1
        if count[0] > count[1]: raise OSError("disk full")
        save(self, path, about)
    monkeypatch.setattr(learn._State, "save", failing)
    # a loop makes six saves, the sixth with what is asked next
    for number in (0, 1, 5, 6, 7, 12, 13, 18):
        count[:] = 0, number
        folder = tmp_path/str(number)
        if number < 18:
            with pytest.raises(OSError, match="disk full"): run(folder, protocol=protocol)
        count[1] = 99
        same(run(folder, protocol=protocol), whole)


def test_a_finished_run_is_read(tmp_path, monkeypatch):
    record = run(tmp_path)
    monkeypatch.setattr(learn, "train", None)
    same(run(tmp_path), record)


def test_networks_of_every_loop_are_there(tmp_path):
    record = run(tmp_path)
    found = [evaluate(load_loop(tmp_path, k), ResidentImages(test, "cpu"))["loss"]
             for k in range(3)]
    assert found == record.loss.tolist() and fingerprint(load_loop(tmp_path)) == record.weights
    assert not load_loop(tmp_path).training


# ---- what cannot be


@pytest.mark.parametrize("changes,message", [
    (dict(ask=100), "the plan labels 220 images and digits has 200; lower first, ask or loops"),
    (dict(strategy="margn"), "there is no strategy 'margn'; there is least_confidence"),
    (dict(strategy="vote_entropy"), "'vote_entropy' needs a committee; set dropout above 0, or "
     "committee to 'checkpoints' or 'seeds'"),
    (dict(strategy="bald", committee="seeds", members=1),
     "a committee needs at least 2 members, got 1"),
    (dict(strategy="bald", committee="checkpoints", members=4), "need at least 8 steps, got 6"),
    (dict(protocol="warm"), "protocol is one of sequential, cumulative_warm, cumulative_cold, got "
     "'warm'"),
    (dict(network="resnet9"), "network is one of .*, got 'resnet9'"),
    (dict(steps=0), "steps must be a whole number of at least 1, got 0"),
    (dict(dropout=1.), "dropout must lie in 0..1, below 1, got 1.0"),
    (dict(weights="w.pth"), "weights w.pth are for network 'resnet18'"),
    (dict(chunks=[[0], [1]]), "3 loops need as many chunks, got 2"),
    (dict(chunks=[[0, 1], [2], [1]]), "row 1 is there 2 times"),
    (dict(chunks=[[0], [1], [200]]), "row 200 is out of range; a pool of 200 has rows 0..199"),
    (dict(chunks=[[0], [], [2]]), "chunk 1 is empty"),
])
def test_one_clear_sentence(changes, message, monkeypatch):
    monkeypatch.setattr(learn, "train", None)  # found before anything is trained
    with pytest.raises(ValueError, match=message): run(**changes)


def test_other_classes_are_refused():
    with pytest.raises(ValueError,
                       match="digits and shapes must have the same classes, got 10 and 4"):
        experiment(small, images, shapes(10), device="cpu")


def test_other_runs_are_refused(tmp_path):
    run(tmp_path, loops=1)
    with pytest.raises(ValueError,
                       match="holds another run: its seed is 0, not 1; give another folder"):
        run(tmp_path, loops=1, seed=1)
    with pytest.raises(ValueError, match="its images is 'digits', not 'figures'; give"):
        experiment(dataclasses.replace(small, loops=1), dataclasses.replace(images, name="figures"),
                   test, tmp_path, device="cpu")
    letters = tuple("abcdefghij")
    with pytest.raises(ValueError, match="another run: its images have other classes; give"):
        experiment(dataclasses.replace(small, loops=1),
                   dataclasses.replace(images, classes=letters),
                   dataclasses.replace(test, classes=letters), tmp_path, device="cpu")
    changed = dataclasses.replace(images, source=255 - images.source)
    with pytest.raises(ValueError, match="another run: it was made with other images, labels or"):
        experiment(dataclasses.replace(small, loops=1), changed, test, tmp_path, device="cpu")


def test_damaged_files_are_named(tmp_path):
    run(tmp_path)
    saved_loops(tmp_path)[-1].write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="loop-02.safetensors cannot be read as a run .* remove it "
                       "to go on from the loop before"):
        run(tmp_path)
    saved_loops(tmp_path)[-1].unlink()
    same(run(tmp_path), run())
    with pytest.raises(ValueError, match="has the loops 0, 1, 2, not 7"): load_loop(tmp_path, 7)
    with pytest.raises(FileNotFoundError, match="holds no run"): load_loop(tmp_path/"nowhere")


def test_a_broken_training_is_seen_and_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="the loss is nan after step .* of loop 0; a lower "
                       "lr than 1e.* may help"):
        run(tmp_path, lr=1e30)
    for file in saved_loops(tmp_path):
        assert all(t.isfinite().all() for t in tensors(file).values())


def test_few_classes_are_allowed_and_said():
    with pytest.warns(UserWarning, match="loop 0 has labels of 1 of the 10 classes"):
        record = run(loops=1, chunks=[np.flatnonzero(images.labels == 4)])
    assert record.counts[0, 4] == record.counts.sum() == (images.labels == 4).sum()
    nothing_else = Images("two", images.source[images.labels < 2], images.labels[images.labels < 2],
                          images.classes)
    with pytest.warns(UserWarning, match="labels of 2 of the 10 classes"):
        experiment(small, nothing_else, test, device="cpu")


# ---- frozen trunks, and plans for a set

def test_features_of_a_trunk_are_kept_by_content(monkeypatch, tmp_path):
    monkeypatch.setenv("SUPERPOS_CACHE", str(tmp_path))
    trunk, seen = network("resnet8_half", 3).eval(), []
    trunk.register_forward_hook(lambda *_: seen.append(1))
    first = frozen_features(trunk, images, 16, batch=64)
    assert first.shape == (200, 3) and first.dtype == torch.half and len(seen) == 4
    whole = trunk(ResidentImages(images.fit(16, 16), "cpu").batch(torch.arange(200))).half()
    assert torch.allclose(first.float(), whole.float(), atol=5e-3)
    seen.clear()
    assert frozen_features(trunk, images, 16).equal(first) and not seen
    with torch.no_grad(): learn.linear_head(trunk).bias[0] += 1
    for changed in ((images, 16), (images.select(slice(0, 100)), 16), (images, 12)):
        before = len(seen)
        assert not frozen_features(trunk, *changed)[:100].equal(first[:100]) or changed[1] == 16
        assert len(seen) > before


def test_features_of_a_trunk_do_not_depend_on_where_images_are_kept(monkeypatch, tmp_path):
    from PIL import Image
    monkeypatch.setenv("SUPERPOS_CACHE", str(tmp_path))
    trunk, files = network("resnet8_half", 3).eval(), []
    for k in range(4):
        files.append(tmp_path/f"{k}.png")
        Image.fromarray(images[k].permute(1, 2, 0).numpy()).save(files[-1])
    kept = Images("files", tuple(files), images.labels[:4], images.classes)
    first = frozen_features(trunk, kept, 16)
    assert first.equal(frozen_features(trunk, images.select(slice(0, 4)), 16))
    Image.fromarray(images[9].permute(1, 2, 0).numpy()).save(files[0])
    assert not frozen_features(trunk, kept, 16)[0].equal(first[0])


@pytest.mark.parametrize("count,side,wanted", [
    (1437, 8, dict(first=71, ask=71, network="resnet8_half", pad=0, flip=False, steps=60)),
    (50_000, 32, dict(first=2500, network="resnet18_3x3", pad=4, flip=True, steps=800)),
    (300, 224, dict(first=15, network="resnet18", flip=True, steps=60))])
def test_a_plan_fits_the_set(count, side, wanted):
    pixels = np.broadcast_to(np.zeros((1, 3, side, side), np.uint8), (count, 3, side, side))
    plan = fitting(Images("made up", pixels, np.arange(count) % 2, ("a", "b")))
    assert wanted.items() <= dataclasses.asdict(plan).items() and plan.total <= count/2


def test_what_is_given_stays_as_it_is():
    assert fitting(everything, first=30, loops=3, flip=True).total == 90
    assert fitting(everything, ask=10, network="resnet8").ask == 10
    assert fitting(everything, strategy="bald").dropout > 0
    assert not fitting(everything, strategy="bald", committee="seeds").dropout
    assert fitting(everything, strategy="bald", dropout=.5).dropout == .5
