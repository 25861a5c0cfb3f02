"Every notebook runs: `nbdev_test`, once for all of them, with a verdict for each."
from pathlib import Path

import pytest

from superpos.book import notebooks

root = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", [nb.name for nb in notebooks(root)])
def test_notebook_runs(nbdev_test, name):
    _, out, err = nbdev_test
    assert f"Completed {root/'nbs'/name}" in out, f"nbdev_test did not run {name}:\n{out}{err}"
    _, _, failed = err.partition("nbdev Tests Failed On The Following Notebooks")
    report = next((part for part in err.split("Error in ")
                   if part.startswith(str(root/"nbs"/name))), err)
    assert name not in failed.split(), report


def test_nbdev_test_agrees(nbdev_test):
    code, out, err = nbdev_test
    assert (code == 0) == ("Success." in out) == ("nbdev Tests Failed" not in err)
