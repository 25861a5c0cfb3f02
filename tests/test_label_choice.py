"The studies of label choice: what their pages do not show of their own functions."
import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from superpos.acquire import strategies

page = Path(__file__).resolve().parent.parent/"nbs"/"49_label_choice.ipynb"


def functions(page):
    "A page's imports and functions."
    names, kept = {}, (ast.Import, ast.ImportFrom, ast.FunctionDef)
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "#| slow" not in source:
            body = [node for node in ast.parse(source).body if isinstance(node, kept)
                    or ast.unparse(node).startswith("unused =")]
            exec(compile(ast.Module(body, []), page.name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def study():
    return functions(page)


@pytest.fixture(scope="module")
def frozen():
    return functions(page.parent/"47_frozen_trunk.ipynb")


@pytest.fixture
def brief(study):
    given = (study["studies"]("laptop")["digits: primary"]
             | dict(steps=8, each=20, chunk=20, loops=3))
    return given | dict(arms=[("least_confidence", "sequential"), ("shuffled", "sequential"),
                              ("full", "sequential")], seeds=1)


def test_a_study_goes_on_where_it_stopped(study, brief, tmp_path):
    first = study["tables"](tmp_path, **brief)["loops"]
    saved = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.json")}
    both = study["tables"](tmp_path, **brief | dict(seeds=2))["loops"]
    assert len(saved) == 3
    assert all(p.stat().st_mtime_ns == t for p, t in saved.items())
    assert len(list(tmp_path.glob("*.json"))) == 6
    assert both[both.seed == 1].reset_index(drop=True).equals(first)
    assert not both[both.seed == 2].reset_index(drop=True).equals(first)


def test_one_network_is_kept_of_each_run(study, brief, tmp_path):
    study["tables"](tmp_path, **brief)
    assert {len(list(p.glob("loop-*"))) for p in tmp_path.iterdir() if p.is_dir()} == {1}


def test_arms_share_what_they_should(study, brief, tmp_path):
    chosen, shuffled, full = (study["run"](tmp_path, **job).value for job in study["jobs"](**brief))
    flat = lambda found: np.concatenate(found["asked"])
    assert (chosen["asked"][0] == shuffled["asked"][0]).all()
    assert sorted(flat(chosen)) == sorted(flat(shuffled))
    assert (flat(chosen) != flat(shuffled)).any()
    assert len(full["asked"][0]) == 200
    assert full["loops"].steps.iloc[-1] == chosen["loops"].steps.iloc[-1] == 24
    assert chosen["loops"].accuracy[0] == shuffled["loops"].accuracy[0]


def test_pools_of_a_seed_are_balanced_and_apart_from_the_test_images(study):
    images, test = study["pool_and_test"]("digits", 8, 10, 60, 0, 3)
    assert (np.bincount(images.labels) == 60).all() and len(images) + len(test) == 1797
    seen = {p.tobytes() for p in images.source}
    # scikit-learn's set has a few copies of its own
    assert sum(p.tobytes() in seen for p in test.source) < 5


def learned(frozen, arm, design="cumulative", seeds=(0, 1), loops=3):
    "An arm on 300 random points of three classes, with ten channels."
    rng = torch.Generator().manual_seed(0)
    x, labels = torch.randn(400, 12, generator=rng), torch.arange(400) % 3
    x[:, :3] += 2*torch.nn.functional.one_hot(labels, 3)
    data = x[:300], labels[:300], x[300:], labels[300:], x[300:, :10] > 0
    with mock.patch.dict(frozen, effective_features=lambda tables, seeds: SimpleNamespace(
            mean=torch.ones(len(tables)))):
        return frozen["one_arm"](data, arm, design, list(seeds), hidden=8, width=6, chunk=20,
                                 loops=loops, steps=20, batch=16, lr=1e-2, decay=.01, dropout=.2)


@pytest.mark.parametrize("arm", sorted(set(strategies) - {"mean_kl", "consensus_entropy"}))
def test_every_strategy_asks_a_frozen_trunk(frozen, arm):
    found = learned(frozen, arm)
    first = learned(frozen, "random", loops=1)["asked"]
    for asked, start in zip(found["asked"], first):
        assert [len(part) for part in asked] == [20, 20, 20] and (asked[0] == start[0]).all()
        assert len(np.unique(np.concatenate(asked))) == 60


def test_a_chunk_is_learned_alone_and_labels_are_kept(frozen):
    seen = []
    with mock.patch.dict(frozen, train=lambda p, adam, x, labels, rows, *_: seen.append(
            (len(rows[0]), p[0].detach().clone()))):
        learned(frozen, "random", "sequential")
        learned(frozen, "random", "cumulative")
        learned(frozen, "full", "sequential")
    assert [size for size, _ in seen] == [20, 20, 20, 20, 40, 60, 300]
    assert all(weights.equal(seen[0][1]) for _, weights in seen)


def test_seeds_in_company_are_what_they_are_alone(frozen):
    alone, both = (learned(frozen, "margin", seeds=s)["rows"].query("seed == 1").accuracy.to_numpy()
                   for s in ([1], [0, 1]))
    assert np.allclose(alone, both, atol=.02)


def test_a_probe_is_judged_on_images_it_was_not_fitted_on(frozen):
    rng = torch.Generator().manual_seed(1)
    noise, marks = torch.randn(120, 50, generator=rng), torch.rand(120, 8, generator=rng) < .3
    assert .3 < frozen["probed"](noise, marks).mean() < .7
    code = marks.float() @ torch.randn(8, 12, generator=rng)
    assert frozen["probed"](code, marks).min() > .99


@pytest.mark.parametrize("values", [[.01, .02, .03], [.5, .001, .04, .04]])
def test_holm_is_the_step_down_procedure(study, values):
    order, worst, expected = np.argsort(values), 0., [0.]*len(values)
    for rank, i in enumerate(order):
        worst = max(worst, min(1., (len(values) - rank)*values[i]))
        expected[i] = worst
    assert np.allclose(study["holm"](values), expected)


def narrow_columns(table, page=96):
    "Columns in which a word, or three of a long text, do not fit on a page of so many characters."
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    for k, name in enumerate(head):
        shown = [re.sub(r"\]\([^)]*\)|[*[]", "", row[k]) for row in (head, *rows)]
        longest = max((word for cell in shown for word in re.split(r"[\s–/-]", cell)), key=len)
        needed = max(len(longest) + 2, 18*(max(map(len, shown)) > 60))
        if page*len(rule[k])/sum(map(len, rule)) < needed: yield name, longest


@pytest.mark.parametrize("name", ["47_frozen_trunk", "49_label_choice", "50_claims"])
def test_words_fit_into_the_columns_of_wide_tables(name):
    cells = json.loads((page.parent/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = "\n\n".join("".join(out.get("data", {}).get("text/markdown", ())) for cell in cells
                        for out in cell.get("outputs", ()))
    tables = [part.splitlines() for part in shown.split("\n\n") if part.startswith("| ")]
    assert tables and not [found for table in tables for found in narrow_columns(table)]


def test_narrow_columns_are_seen():
    table = ["| claim | a | b |", "|---|---|---|", f"| [superposition](x.html) | {'a'*31} | b |"]
    assert list(narrow_columns(table)) == [("a", "a"*31)]
