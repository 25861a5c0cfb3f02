"Saved results: two processes at once, a killed process, foreign files; whatever is saved comes back the same."
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpos.core import (
    MissingResult,
    atomic_write,
    cached,
    decode,
    default_device,
    encode,
    mean_interval,
    progress,
    recall,
    set_seed,
    share_interval,
)


def slow_study(log, seed):
    with open(log, "a") as f: f.write("ran\n")
    time.sleep(.6)
    return {"mean": float(np.random.default_rng(seed).normal())}


def ask(folder, log, answers):
    answers.put(cached("study", slow_study, folder=folder, log=str(log), seed=0).value)


def test_two_processes_at_once_compute_once(tmp_path):
    context = multiprocessing.get_context("fork")
    answers, log = context.Queue(), tmp_path/"log"
    both = [context.Process(target=ask, args=(tmp_path/"results", log, answers)) for _ in range(2)]
    for p in both: p.start()
    found = [answers.get(timeout=120) for _ in both]
    for p in both: p.join()
    assert found[0] == found[1] and log.read_text() == "ran\n"


def test_a_killed_process_leaves_nothing_half_written(tmp_path):
    context, log, results = multiprocessing.get_context("fork"), tmp_path/"log", tmp_path/"results"
    p = context.Process(target=ask, args=(results, log, context.Queue()))
    p.start()
    while not log.exists(): time.sleep(.01)
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    assert not results.exists() or not list(results.iterdir())
    cached("study", slow_study, folder=results, log=str(log), seed=0)
    assert log.read_text() == "ran\nran\n"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"name": "study"}',
                                     '{"name": "other", "params": {}, "provenance": {}, "value": 1}'])
def test_a_foreign_file_is_set_aside(tmp_path, content):
    cached("study", lambda n: n + 1, folder=tmp_path, n=1)
    file = next(tmp_path.glob("*.json"))
    file.write_text(content)
    with pytest.warns(UserWarning, match=f"{file.name} cannot be trusted"):
        again = cached("study", lambda n: n + 1, folder=tmp_path, n=1)
    assert again.value == 2 and [p.read_text() for p in tmp_path.glob("*.damaged-*")] == [content]


def test_a_function_that_fails_saves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError): cached("study", lambda: 1/0, folder=tmp_path)
    with pytest.raises(MissingResult): recall("study", folder=tmp_path)


def test_recompute_replaces(tmp_path):
    values = iter([1, 2])
    for expected in (1, 2):
        assert (cached("study", lambda: next(values), folder=tmp_path, recompute=True).value
                == expected)
    assert recall("study", folder=tmp_path).value == 2


@pytest.mark.parametrize("name", ["", "a b", "../a", "a/b"])
def test_names_are_file_names(tmp_path, name):
    with pytest.raises(ValueError, match="study's name"): cached(name, lambda: 1, folder=tmp_path)


plain = st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60)
                     | st.floats(allow_nan=False) | st.text(),
                     lambda x: st.lists(x) | st.dictionaries(st.text(alphabet="abc", min_size=1),
                                                             x))


@settings(deadline=None)
@given(plain)
def test_plain_values_survive(x): assert decode(json.loads(json.dumps(encode(x)))) == x


@settings(deadline=None)
@given(st.lists(st.floats(width=32)), st.sampled_from(["float32", "float64", "int64", "bool"]))
def test_arrays_survive(values, kind):
    with np.errstate(invalid="ignore"): a = np.array(values, "float32").astype(kind)
    back = decode(json.loads(json.dumps(encode(a))))
    assert back.dtype == a.dtype and back.shape == a.shape
    np.testing.assert_array_equal(back, a)


def test_frames_and_tensors_survive():
    frame = pd.DataFrame(dict(unit=["a", "b"], auroc=[.1, .9], n=[1, 2]))
    pd.testing.assert_frame_equal(decode(json.loads(json.dumps(encode(frame)))), frame)
    assert decode(encode(torch.ones(2, 3))).shape == (2, 3)
    for bad in (object(), {1: 2}):
        with pytest.raises(TypeError): encode(bad)


def test_atomic_write_keeps_the_old_file(tmp_path):
    file = tmp_path/"a.txt"
    file.write_text("old")
    with pytest.raises(OSError), atomic_write(file) as p:
        p.write_text("new")
        raise OSError("disk full")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_seeds_and_devices(monkeypatch):
    for bad in (-1, 2**32):
        with pytest.raises(ValueError, match="seed"): set_seed(bad)
    monkeypatch.setenv("SUPERPOS_DEVICE", "cpu")
    assert default_device() == torch.device("cpu")


def test_progress_is_quiet_when_asked(monkeypatch, capfd):
    monkeypatch.setenv("SUPERPOS_QUIET", "1")
    assert list(progress(range(3), "counting")) == [0, 1, 2] and capfd.readouterr() == ("", "")


def test_a_parameter_that_is_not_a_number_is_still_the_same_parameter(tmp_path):
    runs = []
    for _ in range(2): cached("study", lambda x: runs.append(x), folder=tmp_path, x=float("nan"))
    assert len(runs) == 1 and not list(tmp_path.glob("*.damaged-*"))


@pytest.mark.parametrize("key", ["__array__", "__frame__"])
def test_reserved_keys_are_refused(key):
    with pytest.raises(TypeError, match="not free as a key"): encode({key: 1})


def test_intervals_cover_what_they_promise():
    rng = np.random.default_rng(0)
    inside = [low <= 3 <= high for _, low, high in map(mean_interval, rng.normal(3, 2, (2000, 5)))]
    assert abs(np.mean(inside) - .95) < .015
    inside = [low <= .2 <= high for _, low, high in (share_interval(hits, 30)
                                                     for hits in rng.binomial(30, .2, 2000))]
    assert np.mean(inside) >= .95
    assert mean_interval([1, 1, 1]) == (1, 1, 1)
    assert share_interval(np.ones((2, 3), bool)) == share_interval(6, 6)
    for wrong in ([1.], [[1., 2.]]):
        with pytest.raises(ValueError, match="at least two values"): mean_interval(wrong)
