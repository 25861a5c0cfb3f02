"""What all tests share.

The pages are run by one process beside the tests, which end with what it says; tests marked
`nightly` are left out unless they are asked for, as `make nightly` does; and the last line of a run
says how many tests passed and failed, and nothing else.
"""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
running = pytest.StashKey()


def examples(count: int) -> int:
    "How many examples a slow property is tried on: all of them at night, a quarter by day."
    return count if os.environ.get("SUPERPOS_NIGHTLY") else max(10, count//4)


class Notebooks:
    "`nbdev_test` over some notebooks, as it runs."
    def __init__(self, names: list[str], workers: int):
        self.folder = Path(tempfile.mkdtemp())
        results = shutil.copytree(root/"nbs"/"results", self.folder/"results")
        only = f"^({'|'.join(map(re.escape, names))})$"
        command = [shutil.which("nbdev_test", path=Path(sys.executable).parent), "--do_print",
                   "--n_workers", str(workers), "--file_re", only]
        env = os.environ | dict(OMP_NUM_THREADS="1", SUPERPOS_QUIET="1",
                                SUPERPOS_RESULTS=str(results))  # what a page concludes is not kept
        self.files = [(self.folder/name).open("w+") for name in ("out", "err")]
        self.process = subprocess.Popen(command, cwd=root, env=env, stdout=self.files[0],
                                        stderr=self.files[1], start_new_session=True)

    def wait(self) -> tuple[int, str, str]:
        "Exit code and what was printed."
        code = self.process.wait()
        return code, *((self.folder/name).read_text() for name in ("out", "err"))

    def stop(self):
        with contextlib.suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()
        for file in self.files: file.close()
        shutil.rmtree(self.folder)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name == "test_notebooks.py")


def pytest_collection_finish(session):
    asked = [item for item in session.items if item.path.name == "test_notebooks.py"]
    if not asked or session.config.option.collectonly: return
    names = [item.callspec.params["name"] for item in asked if hasattr(item, "callspec")]
    # beside other tests one core is left for it
    session.config.stash[running] = Notebooks(names, 1 + (len(asked) == len(session.items)))


@pytest.fixture(scope="session")
def nbdev_test(request): return request.config.stash[running].wait()


def pytest_unconfigure(config):
    if notebooks := config.stash.get(running, None): notebooks.stop()
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None: return
    passed, failed, broken = (len(reporter.stats.get(kind, ()))
                              for kind in ("passed", "failed", "error"))
    print(f"{passed} passed, {failed + broken} failed", flush=True)
