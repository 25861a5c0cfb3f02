"Every notebook runs: `nbdev_test`, once for all of them, with a verdict for each."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from superpos.book import notebooks

root = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    results = shutil.copytree(root/"nbs"/"results", tmp_path_factory.mktemp("kept")/"results")
    command = shutil.which("nbdev_test", path=Path(sys.executable).parent)
    env = os.environ | dict(OMP_NUM_THREADS="1", SUPERPOS_QUIET="1",
                            SUPERPOS_RESULTS=str(results))  # what a page concludes is not kept
    return subprocess.run([command, "--do_print", "--n_workers", "2"], cwd=root, env=env,
                          capture_output=True, text=True)


@pytest.mark.parametrize("name", [nb.name for nb in notebooks(root)])
def test_notebook_runs(run, name):
    said = f"nbdev_test did not run {name}:\n{run.stdout}{run.stderr}"
    assert f"Completed {root/'nbs'/name}" in run.stdout, said
    _, _, failed = run.stderr.partition("nbdev Tests Failed On The Following Notebooks")
    report = next((part for part in run.stderr.split("Error in ")
                   if part.startswith(str(root/"nbs"/name))), run.stderr)
    assert name not in failed.split(), report


def test_nbdev_test_agrees(run):
    assert (run.returncode == 0) == ("Success." in run.stdout)
    assert (run.returncode == 0) == ("nbdev Tests Failed" not in run.stderr)
