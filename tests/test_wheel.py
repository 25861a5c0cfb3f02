"The wheel: it holds the modules and nothing else, and works where there are no notebooks."
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent

use = """
import importlib, importlib.metadata, pathlib, pkgutil, sys
import superpos
site = pathlib.Path(sys.argv[1])
assert pathlib.Path(superpos.__file__).is_relative_to(site), superpos.__file__
names = sorted(m.name for m in pkgutil.iter_modules(superpos.__path__))
for name in names: importlib.import_module(f"superpos.{name}")
[about] = importlib.metadata.distributions(path=[str(site)])
assert about.version == superpos.__version__
for entry in about.entry_points: entry.load()

import torch
from superpos.data import shapes
from superpos.dissect import dissect
from superpos.model import SmallAlexNet
from superpos.toy import Features, train
assert train(Features(5, density=.1), 2, steps=50, quiet=True).toy.W.isfinite().all()
torch.manual_seed(0)
net, images = SmallAlexNet(width=4).eval(), shapes(40, size=40)
table = dissect(net, "features.3", images, k=20, nulls=19, units=range(3)).table
assert len(table) == 3 and table.p.notna().all()
print(*names)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(root/name, tree)
    shutil.copytree(root/"superpos", tree/"superpos", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=tree, check=True,
                   capture_output=True)
    [file] = out.iterdir()
    return file


def test_a_wheel_holds_the_modules_and_nothing_else(wheel):
    inside = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    modules = {p.name for p in inside if p.parts[0] == "superpos"}
    assert modules == {p.name for p in (root/"superpos").glob("*.py")}
    assert all(p.parts[0] == "superpos" or p.parts[0].endswith(".dist-info") for p in inside)
    assert "LICENSE" in {p.name for p in inside}


def test_a_wheel_works_without_notebooks(wheel, tmp_path):
    site, elsewhere = tmp_path/"site", tmp_path/"elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
                    "--no-compile", "--target", str(site), str(wheel)], check=True,
                   capture_output=True)
    env = os.environ | dict(PYTHONPATH=str(site), SUPERPOS_CACHE=str(tmp_path/"cache"),
                            SUPERPOS_QUIET="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", use, str(site)], cwd=elsewhere,
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = {p.stem for p in (root/"superpos").glob("*.py")} - {"__init__"}
    assert done.stdout.split() == sorted(modules)
    assert not list(elsewhere.iterdir())
