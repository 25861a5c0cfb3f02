"Whole layers: brute force on given numbers, resumption after real kills, a Dask cluster."
import json
import os
import signal
import subprocess
import sys
import time

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

from superpos import dissect as chapter
from superpos.activation import survey
from superpos.cluster import (
    attributions,
    benjamini_hochberg,
    directions,
    find_groups,
    separation,
)
from superpos.data import folder
from superpos.dissect import Dissection, dissect
from superpos.model import SmallAlexNet


class Table(torch.nn.Module):
    "A network whose units are given numbers: image i, whose first two bytes are i, has row i."
    def __init__(self, values):
        super().__init__()
        self.values, self.unit = (torch.nn.Parameter(torch.tensor(values, dtype=torch.float32)),
                                  torch.nn.Identity())

    def forward(self, x): return self.unit(self.values[(x[:, 0, 0, 0]*256 + x[:, 1, 0, 0]).long()])


def as_floats(x): return x.float()


def numbered(n):
    i = torch.arange(n)
    return torch.stack([i//256, i % 256, i*0], 1).to(torch.uint8)[:, :, None, None]


def mixture(n=120, units=8, seed=0):
    "Units 0 and 1 answer to two groups of images, 2 to one, 3 to none; the others tell them apart."
    rng, member = np.random.default_rng(seed), np.arange(n) % 3
    values = rng.normal(size=(n, units))
    values[:, :2] += 4*(member < 2)[:, None]
    values[:, 2] += 4*(member == 2)
    values[:, 4:6] += np.where(member == 0, 6, 0)[:, None]
    values[:, 3] = 1
    return values.astype(np.float32), member


settings = dict(k=40, nulls=39, at="centre", by="values", prepare=as_floats)


@pytest.fixture(scope="module")
def whole(): return dissect(Table(mixture()[0]).eval(), "unit", numbered(120), **settings)


def test_every_column_is_what_its_name_says(whole):
    values, member = mixture()
    table = whole.table
    assert table.name.tolist() == [f"unit:{u}" for u in range(8)]
    np.testing.assert_allclose(table["mean"], values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table["deviation"], values.std(0), rtol=1e-5, atol=1e-6)
    for u in [u for u in range(8) if u != 3]:
        row, top = table.loc[u], np.argsort(-values[:, u], kind="stable")[:40]
        assert row["images"] == top.tolist()
        assert row["values"] == values[top, u].tolist()
        assert row["sizes"] == np.bincount(row["labels"]).tolist()
        alone = find_groups(values[top], nulls=39,
                            seed=int(np.random.SeedSequence([0, u]).generate_state(1)[0]))
        assert ((row["p"], row["groups"], row["score"], row["labels"])
                == (alone.p, alone.count, alone.score, alone.labels.tolist()))
    tested = table.p.notna()
    np.testing.assert_allclose(table.q[tested], benjamini_hochberg(table.p[tested]))
    assert table.groups[0] == 2
    assert {tuple(np.unique(member[g])) for g in whole.groups(0)} == {(0,), (1,)}


def test_a_constant_unit_has_no_groups(whole):
    row = whole.table.loc[3]
    assert row["groups"] == 0 and np.isnan(row["p"]) and np.isnan(row["q"])
    assert row["images"] == [] and whole.groups(3) == []


def test_after_the_relu_silent_images_do_not_count():
    values, _ = mixture()
    values[:, 6] = np.where(np.arange(120) < 20, 1 + np.arange(120)/100, -1)
    values[:, 7] = np.where(np.arange(120) < chapter.min_images - 1, 1 + np.arange(120)/100, -1)
    table = dissect(Table(values).eval(), "unit", numbered(120), when="post", **settings).table
    assert sorted(table["images"][6]) == list(range(20)) and table.groups[6] > 0
    assert len(table["images"][7]) == chapter.min_images - 1
    assert table.groups[7] == 0 and table.labels[7] == [-1]*(chapter.min_images - 1)


def test_little_memory_gives_the_same(whole):
    again = dissect(Table(mixture()[0]).eval(), "unit", numbered(120), memory=100, **settings)
    pd.testing.assert_frame_equal(again.table, whole.table)


def test_saved_and_reopened(whole, tmp_path):
    whole.save(tmp_path/"layer.json")
    again = Dissection.load(tmp_path/"layer.json")
    pd.testing.assert_frame_equal(again.table, whole.table)
    assert again.about == whole.about and again.about["nulls"] == 39 and "seconds" in again.about
    assert again.summary() == whole.summary()
    for text in ("{", "[]", '{"about": 1}', '{"dissection": 1, "about": {}}'):
        (tmp_path/"bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json is not a dissection"):
            Dissection.load(tmp_path/"bad.json")
    with pytest.raises(ValueError, match="unit 99 .* was not dissected"): whole.groups(99)


class Standardised(torch.nn.Conv2d):
    "Standardises its filters where they are used."
    def forward(self, x):
        mean, std = (f(self.weight, (1, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        return self._conv_forward(x, (self.weight - mean)/std, self.bias)


class Padding(torch.nn.Conv2d):
    "Pads in its forward pass."
    def forward(self, x): return super().forward(F.pad(x, (2, 2, 2, 2), value=0))


class Rectified(torch.nn.Conv2d):
    def forward(self, x): return super().forward(x).relu()


def small(kind=torch.nn.Conv2d, **settings):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, 2), torch.nn.ReLU(),
                               kind(6, 4, 3, **settings)).eval().requires_grad_(False)


def some_images(n=24, seed=0):
    return torch.randint(0, 256, (n, 3, 14, 12), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def by_brute_force(net, unit, image, place):
    "What each channel below contributes: what is missing from the silent layer without the others."
    with torch.no_grad():
        below = net[:2](image[None].float())
        alone = torch.zeros(below.shape[1] + 1, *below.shape[1:])
        for c in range(below.shape[1]): alone[c, c] = below[0, c]
        values = net[2](alone)[(slice(None), unit, *place)]
    return values[:-1] - values[-1]


@pytest.mark.parametrize("at", ["centre", "strongest", "maximum", (1, 2)])
@pytest.mark.parametrize("kind,settings_of", [
    (torch.nn.Conv2d, dict(padding=1)), (torch.nn.Conv2d, dict(padding=(2, 1), stride=(1, 2))),
    (torch.nn.Conv2d, dict(dilation=2, padding=2)), (torch.nn.Conv2d, dict(padding="same")),
    (torch.nn.Conv2d, dict(groups=2)), (Standardised, {}), (Padding, {}),
    (torch.nn.Conv2d, dict(padding=2, padding_mode="circular"))])
def test_attributions_are_exact_for_whatever_is_linear(kind, settings_of, at):
    net, images, units = small(kind, **settings_of), some_images(), (0, 3)
    found = survey(net, "2", images, k=16, at=at, prepare=as_floats)
    vectors = list(chapter._own_vectors(net, "2", images, found, units, "attributions", 2**20,
                                        as_floats, 5, False))
    for unit, rows in zip(units, vectors):
        for i, row in list(zip(found.top(unit, 16), rows))[::5]:
            map_of = net(images[i][None].float())[0, unit]
            place = (at if isinstance(at, tuple) else tuple(n//2 for n in map_of.shape)
                     if at == "centre"
                     else found.places(unit)[found.top(unit, 16).tolist().index(i)])
            np.testing.assert_allclose(row, by_brute_force(net, unit, images[i], tuple(place)),
                                       rtol=1e-3, atol=1e-2)
    assert not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("layer", ["features.3", "classifier"])
def test_attributions_are_those_of_one_unit_at_a_time(layer):
    torch.manual_seed(0)
    net = SmallAlexNet(width=4).eval().requires_grad_(False)
    images = torch.randint(0, 256, (20, 3, 48, 40), dtype=torch.uint8)
    found = survey(net, layer, images, k=5, prepare=as_floats)
    for unit, vectors in zip((0, 3), chapter._own_vectors(net, layer, images, found, (0, 3),
                                                          "attributions", 2**20, as_floats, 3,
                                                          False)):
        np.testing.assert_allclose(vectors, attributions(net, f"{layer}:{unit}",
                                                         images[found.top_images[unit]],
                                                         prepare=as_floats), rtol=1e-4, atol=1e-3)


def test_where_attributions_make_no_sense_they_are_refused():
    net, images = SmallAlexNet(width=4).eval(), torch.zeros(3, 3, 48, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match="'avgpool' is AdaptiveAvgPool2d"):
        dissect(net, "avgpool", images, by="attributions")
    with pytest.raises(ValueError, match="the mean of its map"):
        dissect(net, "features.3", images, by="attributions", at="mean")
    with pytest.raises(ValueError, match="Rectified is not linear in its input"):
        dissect(small(Rectified), "2", some_images(), by="attributions", at="centre", k=16,
                nulls=19, prepare=as_floats)


# ---- where, and by what

@pytest.mark.parametrize("at,edge", [("strongest", 1), ("maximum", 0)])
def test_at_its_strongest_place_each_unit_has_its_own_vectors(at, edge):
    net, images = small(padding=1), some_images()
    values = net(images.float())
    # with the padding of the last layer, the outermost fields overhang
    height, width = values.shape[2] - 2*edge, values.shape[3] - 2*edge
    inside = values[:, :, edge:edge + height, edge:edge + width].flatten(2)
    largest = inside.max(2)
    for memory in (2**28, 4*16*4*2 + 1):
        table = dissect(net, "2", images, at=at, by="direction", k=16, nulls=19,
                        prepare=as_floats, memory=memory).table
        for unit, row in table.iterrows():
            top = largest.values[:, unit].sort(descending=True).indices[:16]
            assert row["images"] == top.tolist()
            np.testing.assert_allclose(row["values"], largest.values[top, unit], rtol=1e-5)
            place = largest.indices[top, unit]
            assert row["places"] == [[p//width + edge, p % width + edge] for p in place.tolist()]
            vectors = inside[top, :, place].numpy()
            vectors = vectors/np.linalg.norm(vectors, axis=1, keepdims=True)
            alone = chapter.unit_groups(vectors, unit, nulls=19)
            assert (row["p"], row["labels"]) == (alone.p, alone.labels.tolist())
            np.testing.assert_allclose(row["apart"], separation(vectors)[0], rtol=1e-4)


def test_by_default_units_are_compared_by_direction_where_each_is_strongest():
    found = dissect(small(), "2", some_images(), k=16, nulls=19, prepare=as_floats)
    assert (found.about["at"], found.about["by"]) == ("maximum", "direction")


# ---- what a unit that is called single could still hide

def clouds(distance, units=12, seed=0):
    "Strong images of unit 0 and of eight others, each so far out along an axis of its own."
    rng = np.random.default_rng(seed)
    far = [rng.normal(size=(60, units)) + distance*np.eye(units)[u] for u in range(9)]
    return far[0], {u: far[u] for u in range(1, 9)}


@pytest.mark.parametrize("by", ["values", "direction"])
def test_other_meanings_far_off_are_seen_when_few_and_near_ones_never(by):
    def bound(distance):
        # the parts' own values are left out, so the meaning shows in others' as well
        own, others = clouds(distance)
        own, others = (np.hstack([own, own[:, ::-1]]),
                       {u: np.hstack([x, x[:, ::-1]]) for u, x in others.items()})
        return chapter.smallest_meaning(0, own, others, by)
    assert bound(12) <= .3 and np.isnan(bound(.2))
    assert np.isnan(chapter.smallest_meaning(0, clouds(12)[0], {0: clouds(12)[0]}, by))


def test_bounds_are_in_the_table_and_do_not_depend_on_who_is_asked_for(whole):
    bounds = whole.table.bound
    assert np.isnan(bounds[3]) and set(bounds.dropna()) <= set(chapter.shares)
    net = Table(mixture()[0]).eval()
    some = dissect(net, "unit", numbered(120), units=[5, 1], **settings).table.bound
    np.testing.assert_array_equal(some, bounds[[5, 1]])


def test_after_the_relu_the_strongest_place_stays():
    net, images = small(padding=1), some_images()
    ask = dict(at="strongest", k=16, nulls=19, prepare=as_floats)
    before, after = (dissect(net, "2", images, when=when, **ask) for when in ("pre", "post"))
    again = dissect(net, "2", images, when="post", memory=300, **ask)
    pd.testing.assert_frame_equal(after.table, again.table)
    for unit, row in after.table.iterrows():
        n = len(row["images"])
        for column in ("images", "places", "values"):
            assert row[column] == before.table.loc[unit, column][:n]
        assert all(v <= 0 for v in before.table.loc[unit, "values"][n:])


def test_length_does_not_count_by_direction(whole):
    values, member = mixture()
    stretched = values*np.random.default_rng(1).lognormal(0, 2, (120, 1)).astype(np.float32)
    ask = dict(nulls=39, seed=0)
    assert find_groups(directions(stretched)[member < 2], **ask).count == 2
    assert find_groups(stretched[member < 2], **ask).count == 1
    with pytest.raises(ValueError, match="by is"):
        dissect(Table(values).eval(), "unit", numbered(120), **settings | dict(by="cosine"))


# ---- how many simulations

@pytest.mark.parametrize("width,level", [(4, .05), (256, .05), (384, .05), (256, .03)])
def test_simulations_follow_from_the_number_of_units(width, level):
    nulls = chapter._simulations(width, level)
    assert nulls >= 199 and width/(nulls + 1) <= level
    assert chapter._simulations(4096, .05) == 9999


def test_one_unit_alone_can_be_found():
    "256 units, of which one is double: with 199 simulations its q could not be below 1."
    rng = np.random.default_rng(0)
    values = rng.normal(size=(150, 256)).astype(np.float32)
    strong = np.arange(150) < 40
    values[strong, 0] += 9
    values[:, 1:60] += np.where(np.arange(150) % 2, 2, 0)[:, None]*strong[:, None]
    units = [0, *range(100, 104)]
    ask = dict(units=units, k=40, prepare=as_floats)
    found = dissect(Table(values).eval(), "unit", numbered(150), **ask)
    assert found.about["nulls"] == 256*20 - 1 and found.about["smallest_q"] == 5/(256*20)
    assert found.table.p[0] == 1/(256*20) and found.table.groups[0] > 1
    assert "1 of 5 units have more than one group at q ≤ 0.05" in found.summary()
    coarse = dissect(Table(values).eval(), "unit", numbered(150), nulls=19, **ask)
    assert coarse.about["smallest_q"] == 5/20
    assert "0 of 5 units" in coarse.summary() and "takes 5 units at once" in coarse.summary()


# ---- what a resumed run is asked

def halved(x): return x.float()/2


def test_another_prepare_is_not_resumed(tmp_path):
    net = Table(mixture()[0]).eval()
    net.forward = lambda x: net.unit(net.values[(x[:, 0, 0, 0]*0 + x[:, 1, 0, 0]).long()])
    dissect(net, "unit", numbered(120), folder=tmp_path, **settings)
    with pytest.raises(ValueError, match="prepare = as_floats .* asked for is halved"):
        dissect(net, "unit", numbered(120), folder=tmp_path, **settings | dict(prepare=halved))


def test_other_images_of_the_same_name_and_count_are_not_resumed(tmp_path):
    for kind in ("one", "other"):
        for i, image in enumerate(some_images(20, seed=len(kind))):
            path = tmp_path/kind/"photos"/f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(path)
    ask = dict(prepare=as_floats, k=16, nulls=19, folder=tmp_path/"state")
    one, other = (folder(tmp_path/kind/"photos") for kind in ("one", "other"))
    assert (one.name, len(one)) == (other.name, len(other))
    first = dissect(small(), "2", one, **ask)
    pd.testing.assert_frame_equal(dissect(small(), "2", one, **ask).table, first.table)
    with pytest.raises(ValueError, match="holds a survey with pixels"):
        dissect(small(), "2", other, **ask)


def test_a_training_model_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        dissect(Table(mixture()[0]).train(), "unit", numbered(120), **settings)


# ---- interruptions

def test_an_interruption_keeps_the_units_that_are_done(whole, tmp_path, monkeypatch):
    net, looked_at, original = Table(mixture()[0]).eval(), [], chapter._unit_row
    def row(unit, *rest, **test):
        looked_at.append(unit)
        if len(looked_at) == 4: raise KeyboardInterrupt
        return original(unit, *rest, **test)
    monkeypatch.setattr(chapter, "_unit_row", row)
    with pytest.raises(KeyboardInterrupt):
        dissect(net, "unit", numbered(120), folder=tmp_path, **settings)
    again = dissect(net, "unit", numbered(120), folder=tmp_path, **settings)
    assert sorted(looked_at) == sorted([*range(8), looked_at[3]])
    pd.testing.assert_frame_equal(again.table, whole.table)


def test_a_line_that_was_cut_off_is_done_again(whole, tmp_path):
    net = Table(mixture()[0]).eval()
    dissect(net, "unit", numbered(120), folder=tmp_path, **settings)
    rows = tmp_path/"units.jsonl"
    rows.write_text(rows.read_text()[:-30])
    pd.testing.assert_frame_equal(dissect(net, "unit", numbered(120), folder=tmp_path,
                                          **settings).table, whole.table)
    assert ([json.loads(line).get("unit") for line in rows.read_text().splitlines()][1:]
            == list(range(8)))


killed = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_dissect import Table, mixture, numbered, settings
from superpos.dissect import dissect
dissect(Table(mixture()[0]).eval(), "unit", numbered(120), folder={folder!r},
        **settings | dict(nulls=399))
"""


def test_a_killed_run_goes_on(tmp_path):
    script = killed.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script],
                               env=os.environ | dict(SUPERPOS_QUIET="1"))
    rows, end = tmp_path/"units.jsonl", time.monotonic() + 300
    while (time.monotonic() < end and process.poll() is None
           and not (rows.exists() and rows.read_text().count("\n") > 3)):
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = rows.read_text().splitlines()
    assert 3 < len(written)
    net, images = Table(mixture()[0]).eval(), numbered(120)
    again = dissect(net, "unit", images, folder=tmp_path, **settings | dict(nulls=399))
    assert rows.read_text().splitlines()[:len(written) - 1] == written[:-1]
    pd.testing.assert_frame_equal(again.table,
                                  dissect(net, "unit", images, **settings | dict(nulls=399)).table)


# ---- a cluster

def test_a_dask_cluster_gives_the_same_numbers(whole):
    from distributed import Client, LocalCluster, get_task_stream
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                      silence_logs=50) as cluster, Client(cluster) as client:
        with get_task_stream(client) as stream, joblib.parallel_config("dask"):
            found = dissect(Table(mixture()[0]).eval(), "unit", numbered(120), **settings)
    assert len({task["worker"] for task in stream.data}) == 2
    pd.testing.assert_frame_equal(found.table, whole.table)


def test_temporary_files_of_a_killed_run_are_swept(tmp_path):
    "What a writer leaves that is killed between writing a file and putting it in its place."
    ask = dict(folder=tmp_path, **settings)
    dissect(Table(mixture()[0]).eval(), "unit", numbered(120), **ask)
    orphans = [tmp_path/f".{name}.abcdefgh.tmp" for name in ("survey.safetensors", "units.jsonl")]
    for orphan in orphans: orphan.write_bytes(b"half")
    dissect(Table(mixture()[0]).eval(), "unit", numbered(120), **ask)
    assert not any(orphan.exists() for orphan in orphans)
