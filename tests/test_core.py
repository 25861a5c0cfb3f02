"Saved results: two at once, a kill, a full disk, foreign files; what is saved comes back the same."
import contextlib
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superpos import core
from superpos.core import (
    Finding,
    MissingResult,
    atomic_write,
    cached,
    conclude,
    decode,
    default_device,
    encode,
    findings,
    mean_interval,
    naming,
    progress,
    recall,
    save_tensors,
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


unsigned = dict(name="study", params={"n": 1}, provenance={}, value=1)
another = unsigned | dict(params={"n": 5})


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", '{"name": "study"}', "["*100_000 + "]"*100_000, '"\\ud800',
    '{"digest": ' + "["*100_000 + "]"*100_000 + "}", json.dumps(unsigned),
    json.dumps(another | dict(digest=core._digest(another)))])
def test_a_foreign_file_is_set_aside(tmp_path, content):
    cached("study", lambda n: n + 1, folder=tmp_path, n=1)
    file = next(tmp_path.glob("*.json"))
    file.write_text(content)
    with pytest.warns(UserWarning, match=f"{file.name} cannot be trusted"):
        again = cached("study", lambda n: n + 1, folder=tmp_path, n=1)
    assert again.value == 2 and [p.read_text() for p in tmp_path.glob("*.damaged-*")] == [content]


def test_a_file_that_was_changed_is_set_aside(tmp_path):
    made = cached("study", lambda n: {"auroc": np.float32([.1, .9]), "n": n}, folder=tmp_path, n=1)
    [file] = tmp_path.iterdir()
    whole = file.read_text()
    seconds = f'"seconds": {made.provenance["seconds"]}'
    changes = [(".899", ".999"), ('"n": 1', '"n": 2'), ("float32", "float64"), ("[2]", "[2, 1]"),
               (seconds, '"seconds": 7'), ('"digest": "', '"digest": "0')]
    for old, new in changes:
        assert old in whole, old
        file.write_text(whole.replace(old, new))
        with pytest.warns(UserWarning, match="do not fit its digest"), pytest.raises(MissingResult):
            recall("study", folder=tmp_path, n=1)
        assert not file.exists()
    file.write_text(whole)
    assert recall("study", folder=tmp_path, n=1).value["n"] == 1


def test_every_saved_result_and_finding_of_the_book_fits_its_digest():
    home = Path(__file__).parents[1]/"nbs"/"results"
    files = [*home.glob("*.json"), *(home/"findings").glob("*.json")]
    assert len(files) > 100
    for file in files:
        saved = json.loads(file.read_text(encoding="utf-8"))
        assert saved["digest"] == core._digest(saved), file.name


def test_findings_that_were_changed_are_set_aside(tmp_path):
    found = Finding("A1", "", "holds", "", (1., .5, 2.), 3, "", "")
    conclude("10_page", [found], tmp_path); conclude("20_page", [found], tmp_path)
    assert [row["page"] for row in findings(tmp_path)] == ["10_page", "20_page"]
    file = tmp_path/"findings"/"10_page.json"
    file.write_text(file.read_text().replace("2.0", "1.5"))
    with pytest.warns(UserWarning, match="10_page.json cannot be trusted"):
        rows = findings(tmp_path)
    assert [row["page"] for row in rows] == ["20_page"] and not file.exists()
    conclude("10_page", [found], tmp_path)
    assert len(findings(tmp_path)) == 2


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


# ---- full disks


@contextlib.contextmanager
def small_files(folder):
    "The system refuses to let any file grow beyond 64 kB, as a full disk does."
    resource = pytest.importorskip("resource")
    folder.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def saved_by_torch(path, n):
    with atomic_write(path) as p: torch.save(dict(a=torch.zeros(n)), p)


def text(path, n):
    with atomic_write(path) as p: p.write_text("0"*4*n)


def frame(path, n):
    with atomic_write(path) as p: pd.DataFrame(dict(a=np.arange(n))).to_csv(p)


writers = dict(text=text, frame=frame, torch=saved_by_torch,
               tensors=lambda path, n: save_tensors(path, dict(a=torch.zeros(n))))


def writes_all_or_nothing(writer, file):
    writer(file, 10)
    old = file.read_bytes()
    with pytest.raises(OSError, match=re.escape(str(file))): writer(file, 1_000_000)
    assert list(file.parent.iterdir()) == [file] and file.read_bytes() == old
    writer(file, 100)
    assert file.read_bytes() != old


@pytest.mark.parametrize("writer", writers)
def test_a_full_disk_is_named_with_its_file_and_leaves_the_old_one(tmp_path, writer):
    with small_files(tmp_path/"disk"):
        writes_all_or_nothing(writers[writer], tmp_path/"disk"/"a.file")


def large(n): return [n]*1_000_000


def fill(disk):
    "What every writer does on a disk of 1 MB that is really full."
    for name, writer in writers.items():
        (disk/name).mkdir()
        writes_all_or_nothing(writer, disk/name/"a.file")
    with pytest.raises(OSError, match=f"space left .*{disk}/r/study-.*json") as full:
        cached("study", large, folder=disk/"r", n=1)
    assert full.value.errno == errno.ENOSPC and not any((disk/"r").iterdir())
    [kept] = re.findall(r"kept in (\S+), to be moved", str(full.value))
    assert str(disk) not in kept
    assert recall("study", folder=Path(kept).parent, n=1).value == large(1)
    shutil.rmtree(Path(kept).parent)


def test_on_a_disk_that_is_really_full(tmp_path):
    "A file system of 1 MB, in a name space of its own, where this system lets us have one."
    disk = tmp_path/"disk"
    disk.mkdir()
    inside = lambda *then: subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-ec",
         'mount -t tmpfs -o size=1m tmpfs "$0"; "$@"', disk, *then], capture_output=True, text=True,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]),
                              SUPERPOS_CACHE=str(disk/"cache"), TMPDIR=str(tmp_path)))
    if not shutil.which("unshare") or inside("true").returncode:
        pytest.skip("this system lets nobody but its administrator mount a file system")
    code = "import sys, pathlib, test_core; test_core.fill(pathlib.Path(sys.argv[1]))"
    ran = inside(sys.executable, "-W", "ignore", "-c", code, disk)
    assert not ran.returncode, ran.stderr
    assert list(tmp_path.iterdir()) == [disk], "nothing but the disk"


def test_a_result_that_cannot_be_saved_is_kept_and_can_be_moved_to_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERPOS_CACHE", str(tmp_path/"cache"))
    home, runs = tmp_path/"results", []
    def study(n):
        runs.append(n)
        return {"n": np.float32([n])}
    home.touch()
    with pytest.raises(OSError, match=f"{home}/study-.*json'$") as refused:
        cached("study", study, folder=home, n=1)
    [kept] = re.findall(r"kept in (\S+), to be moved", str(refused.value))
    assert kept.startswith(str(tmp_path/"cache"/"unsaved-"))
    home.unlink(); home.mkdir(); shutil.move(kept, home)
    assert cached("study", study, folder=home, n=1).value == {"n": np.float32([1])} and runs == [1]


def test_a_result_that_can_be_kept_nowhere_is_in_the_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERPOS_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    full = pytest.raises(OSError, match="not kept anywhere else, but is this error's `value`")
    with small_files(tmp_path/"disk"), full as refused:
        cached("study", large, folder=tmp_path/"disk", n=1)
    assert refused.value.value == large(1) and not list(tmp_path.rglob("unsaved-*"))
    unsaveable = object()
    with pytest.raises(TypeError, match="cannot save a builtins.object") as refused:
        cached("study", lambda: [unsaveable], folder=tmp_path/"disk")
    assert refused.value.value == [unsaveable]


def test_an_error_that_has_nothing_to_do_with_writing_stays_what_it_is(tmp_path):
    missing = FileNotFoundError(2, "no", "b")
    for error in (ValueError("x"), RuntimeError("y"), OSError("z"), missing):
        with pytest.raises(type(error)) as caught, naming(tmp_path/"a"): raise error
        assert caught.value is error and str(tmp_path) not in str(error)
    with pytest.raises(OSError, match=r"space left on device: '.*/a'"), naming(tmp_path/"a"):
        raise OSError(errno.ENOSPC, "No space left on device")


# ---- what a kill leaves


def begin(file):
    with atomic_write(file) as p:
        p.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_kill_leaves_is_swept_when_the_file_is_written_again(tmp_path):
    context, file = multiprocessing.get_context("fork"), tmp_path/"a.json"
    others = [tmp_path/".a.json.swp", tmp_path/".b.json.01234567.tmp", tmp_path/".a.json"]
    for other in others: other.write_text("not ours")
    for _ in range(2):
        writer = context.Process(target=begin, args=(file,))
        writer.start(); writer.join()
    assert len(set(tmp_path.iterdir()) - set(others)) == 1, "the second swept what the first left"
    with atomic_write(file) as p: p.write_text("whole")
    assert set(tmp_path.iterdir()) == {file, *others}
    begun = context.Process(target=begin, args=(core._result_path("study", {}, tmp_path/"r"),))
    cached("study", lambda: 1, folder=tmp_path/"r")
    begun.start(); begun.join()
    assert len(list((tmp_path/"r").iterdir())) == 2
    cached("study", lambda: 1, folder=tmp_path/"r")
    assert len(list((tmp_path/"r").iterdir())) == 1


def test_what_a_living_writer_has_begun_is_not_swept(tmp_path):
    file, begun, go_on = tmp_path/"a", threading.Event(), threading.Event()
    def slowly():
        with atomic_write(file) as p:
            p.write_text("slow")
            begun.set(); go_on.wait(60)
    writer = threading.Thread(target=slowly); writer.start()
    begun.wait(60)
    with atomic_write(file) as p: p.write_text("fast")
    assert file.read_text() == "fast" and len(list(tmp_path.iterdir())) == 2
    go_on.set(); writer.join()
    assert file.read_text() == "slow" and list(tmp_path.iterdir()) == [file]


def write_often(file, answers):
    try:
        for n in range(300):
            with atomic_write(file) as p: p.write_text(str(n))
        answers.put(None)
    except Exception as problem: answers.put(repr(problem))


def test_many_writers_of_one_file_do_not_sweep_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    writing = [context.Process(target=write_often, args=(tmp_path/"a", answers)) for _ in range(4)]
    for p in writing: p.start()
    assert [answers.get(timeout=120) for _ in writing] == [None]*4
    for p in writing: p.join()
    assert (tmp_path/"a").read_text() == "299" and list(tmp_path.iterdir()) == [tmp_path/"a"]


def test_tensors_come_back_with_what_is_said_of_them(tmp_path):
    from safetensors import safe_open
    x = torch.arange(6.).view(2, 3).T.requires_grad_()
    save_tensors(tmp_path/"deep"/"a.safetensors", dict(x=x), dict(of="test"))
    with safe_open(tmp_path/"deep"/"a.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("x"), x) and file.metadata() == {"of": "test"}


def test_core_and_data_are_there_before_torch_is():
    asked = "import sys, superpos.core, superpos.data; print({'torch', 'scipy'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_a_cache_that_cannot_be_made_is_no_error_before_it_is_needed(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("in the way")
    monkeypatch.setenv("SUPERPOS_CACHE", str(tmp_path/"file"/"cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingResult): recall("study")
    with pytest.raises(OSError, match=re.escape(str(tmp_path/"file"))): cached("study", lambda: 1)


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


def test_modules_that_need_no_torchvision_do_not_import_it():
    "`optvis` encodes JPEGs by it; all others import it where they use it."
    names = sorted(p.stem for p in Path(core.__file__).parent.glob("[!_]*.py"))
    code = ("import importlib, sys\n"
            f"for name in {[n for n in names if n != 'optvis']}:\n"
            "    importlib.import_module(f'superpos.{name}')\n"
            "    assert 'torchvision' not in sys.modules, name\n")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env=os.environ | dict(PYTHONPATH=str(Path(core.__file__).parent.parent)))
    assert ran.returncode == 0, ran.stderr
