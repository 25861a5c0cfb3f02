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

from superpos import dissect as chapter
from superpos.cluster import attributions, benjamini_hochberg, find_groups
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
    "Units 0 and 1 answer to two groups of images, unit 2 to one, unit 3 to nothing; the others tell the groups apart."
    rng, member = np.random.default_rng(seed), np.arange(n) % 3
    values = rng.normal(size=(n, units))
    values[:, :2] += 4*(member < 2)[:, None]
    values[:, 2] += 4*(member == 2)
    values[:, 4:6] += np.where(member == 0, 6, 0)[:, None]
    values[:, 3] = 1
    return values.astype(np.float32), member


settings = dict(k=40, nulls=39, prepare=as_floats)


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
    for text in ("{", "[]", '{"about": 1}', '{"dissection": 1, "about": {}}'):
        (tmp_path/"bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json is not a dissection"):
            Dissection.load(tmp_path/"bad.json")
    with pytest.raises(ValueError, match="unit 99 .* was not dissected"): whole.groups(99)


@pytest.mark.parametrize("layer", ["features.0", "features.3", "features.10", "classifier"])
def test_attributions_are_those_of_one_unit_at_a_time(layer):
    torch.manual_seed(0)
    net = SmallAlexNet(width=4).eval().requires_grad_(False)
    images = torch.randint(0, 256, (5, 3, 48, 40), dtype=torch.uint8)
    inputs = chapter._inputs(net, layer, images, as_floats, 2)
    for unit in (0, 3):
        np.testing.assert_allclose(chapter._attributions(net, layer, unit, inputs),
                                   attributions(net, f"{layer}:{unit}", images, prepare=as_floats,
                                                batch=2), rtol=1e-4, atol=1e-3)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_where_attributions_make_no_sense_they_are_refused():
    net, images = SmallAlexNet(width=4).eval(), torch.zeros(3, 3, 48, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match="'avgpool' is AdaptiveAvgPool2d"):
        dissect(net, "avgpool", images, by="attributions")
    with pytest.raises(ValueError, match="asked for is 'maximum'"):
        dissect(net, "features.3", images, by="attributions", at="maximum")


def test_a_training_model_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        dissect(Table(mixture()[0]).train(), "unit", numbered(120), **settings)


# ---- interruptions

def test_an_interruption_keeps_the_units_that_are_done(whole, tmp_path, monkeypatch):
    net, looked_at, original = Table(mixture()[0]).eval(), [], chapter._unit_row
    def row(unit, *rest):
        looked_at.append(unit)
        if len(looked_at) == 4: raise KeyboardInterrupt
        return original(unit, *rest)
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
dissect(Table(mixture()[0]).eval(), "unit", numbered(120), folder={folder!r}, **settings | dict(nulls=399))
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
