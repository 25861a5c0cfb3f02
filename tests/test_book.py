"The build: what it says of a failure, what it leaves alone, and what the check of the site sees."
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import quarto
from PIL import Image

from superpos.book import (
    NotebookError,
    _dependencies,
    _finished,
    _for_page,
    _furnish,
    _options,
    _unfolded,
    _without_links,
    execute,
    main,
    mathml,
    moved_numbers,
    notebooks,
    problems,
    readme,
    reference,
    superpos_imports,
    write,
)

here = Path(__file__).resolve().parent
settings = """[DEFAULT]
repo = tiny
lib_name = tiny
title = tiny
description = A book of two pages
user = tiny
branch = main
author = nobody
author_email = nobody@example.org
copyright = none
license = mit
status = 3
language = English
min_python = 3.10
version = 0.0.1
nbs_path = nbs
lib_path = tiny
doc_path = _docs
doc_host = https://tiny.example.org
doc_baseurl = /tiny
git_url = https://example.org/tiny
custom_sidebar = True
tst_flags = slow gpu
"""
site_config = """project: {type: website, output-dir: _docs, resources: ["*.txt"]}
format: {html: {theme: {light: cosmo, dark: darkly}, toc: true, html-math-method: mathml}}
website:
  sidebar:
    contents:
      - index.ipynb
      - {section: Pages, contents: [10_two.ipynb, 11_not_written_yet.ipynb]}
      - {section: Later, contents: [12_nor_this.ipynb]}
metadata-files: [nbdev.yml]
"""


def page(path: Path, *sources: str, outputs: dict[int, list] | None = None) -> Path:
    "A notebook; sources that begin with '# ', or with a single '%', are text."
    made = []
    for n, source in enumerate(sources):
        cell = dict(id=f"c{n}", metadata={}, source=source)
        is_text = source.startswith("# ") or source[0] == "%" != source[1]
        if is_text: made.append(cell | dict(cell_type="markdown", source=source.lstrip("%")))
        else:
            made.append(cell | dict(cell_type="code", execution_count=None,
                                    outputs=(outputs or {}).get(n, [])))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def built(path: Path) -> Path:
    "The copy of a notebook that is executed."
    return path.parent.parent/"_build"/"nbs"/path.name


def printed(*lines: str) -> list[dict]:
    return [dict(output_type="stream", name="stdout", text=[f"{line}\n" for line in lines])]


@pytest.fixture
def project(tmp_path):
    (tmp_path/"settings.ini").write_text(settings)
    return tmp_path


def failure(project: Path) -> str:
    with pytest.raises(NotebookError) as caught: execute(project)
    return str(caught.value)


# ---- running


def test_failure_names_notebook_cell_and_error(project):
    page(project/"nbs"/"07_sums.ipynb", "# Sums", "def divide(a):\n    return a/0",
          "#| hide\n\ntotal = divide(3)", "never = 1")
    before = (project/"nbs"/"07_sums.ipynb").read_bytes()
    said = failure(project)
    assert "07_sums.ipynb, cell 3 of 4 (`total = divide(3)`): ZeroDivisionError" in said
    assert "divide, line 2: return a/0" in said
    assert said.endswith("ZeroDivisionError: division by zero")
    assert "IPython" not in said and len(said.splitlines()) < 8
    assert (project/"nbs"/"07_sums.ipynb").read_bytes() == before


def test_a_claim_that_no_longer_holds_says_what_to_do(project):
    page(project/"nbs"/"00_a.ipynb", "density = .6", "assert density < .5")
    said = failure(project)
    assert "cell 2 of 2 (`assert density < .5`): AssertionError" in said
    assert "`make lab` shows the figures" in said


def test_syntax_error_is_a_failure(project):
    page(project/"nbs"/"00_a.ipynb", "x = = 1")
    assert "cell 1 of 1 (`x = = 1`): SyntaxError" in failure(project)


def test_process_that_dies_is_a_failure(project):
    page(project/"nbs"/"00_a.ipynb", "import os", "os._exit(9)")
    said = failure(project)
    assert "00_a.ipynb, cell 2 of 2 (`os._exit(9)`)" in said and "code 9" in said


def test_unreadable_notebook_is_a_failure(project):
    page(project/"nbs"/"00_a.ipynb", "1").write_text('{"cells": [')
    assert failure(project).startswith("00_a.ipynb is not a notebook")


def test_failure_stops_the_rest(project):
    page(project/"nbs"/"00_a.ipynb", "1/0")
    for n in range(1, 6): page(project/"nbs"/f"0{n}_b.ipynb", "x = 1; x")
    with pytest.raises(NotebookError): execute(project, workers=1)
    assert not built(project/"nbs"/"05_b.ipynb").exists()


def test_slow_cells_are_skipped_and_emptied(project):
    notebook = page(project/"nbs"/"00_a.ipynb", "#| slow\n1/0", "#| gpu\n1/0",
                    "#| eval: false\n1/0", "2", outputs=dict.fromkeys(range(4), printed("old")))
    execute(project)
    *skipped, last = read(built(notebook))
    assert [c["outputs"] for c in skipped] == [[], [], []]
    assert last["outputs"][0]["data"]["text/plain"] == ["2"]


def test_running_twice_changes_nothing(project):
    sources = ("import matplotlib.pyplot as plt", "plt.plot([1, 3, 2]);", "object()",
               "{'b', 'a', 'c'}", "print(set('xyz'))")
    copy = built(page(project/"nbs"/"00_a.ipynb", *sources))
    execute(project)
    once = copy.read_bytes()
    assert b"image/png" in once and b"at 0x" not in once
    (project/"_build"/"executed.json").unlink()
    execute(project)
    assert copy.read_bytes() == once


def test_only_what_changed_runs_again(project, capsys):
    a, b = page(project/"nbs"/"00_a.ipynb", "1"), page(project/"nbs"/"01_b.ipynb", "2")
    (project/"nbs"/"results").mkdir()

    def ran() -> list[str]:
        execute(project, workers=1)
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()
                if line.endswith("ok")]
    assert ran() == [a.name, b.name]
    assert ran() == []
    page(a, "3")
    assert ran() == [a.name]
    page(a, "3", outputs={0: printed("4")})  # what it showed before has no say
    assert ran() == []
    built(a).write_text(built(a).read_text().replace('"3"', '"4"'))
    assert ran() == [a.name]
    (project/"nbs"/"results"/"study-1.json").write_text("{}")
    assert ran() == [a.name, b.name]


def test_dependencies_reach_through_modules(project):
    (project/"superpos").mkdir()
    for name, source in dict(low="from .lowest import y", lowest="y = 1", other="z = 1").items():
        (project/"superpos"/f"{name}.py").write_text(source)
    (project/"constraints.txt").write_text("numpy==2")
    notebook = page(project/"nbs"/"00_a.ipynb", "def f():\n    from superpos.low import y",
                 "%%time\n1")
    needed = {p.name for p in _dependencies(project, notebook)}
    assert needed == {"low.py", "lowest.py", "constraints.txt"}


def test_page_that_uses_the_book_depends_on_every_module(project):
    (project/"superpos").mkdir()
    for name in ("_modidx", "book", "other"): (project/"superpos"/f"{name}.py").write_text("")
    notebook = page(project/"nbs"/"00_a.ipynb", "from superpos.book import reference")
    assert {p.name for p in _dependencies(project, notebook)} == {"book.py", "other.py"}


@pytest.mark.parametrize("source,names", [
    ("import superpos.plot as p, torch", {"plot"}),
    ("from superpos import core, plot", {"core", "plot"}),
    ("from .core import f", {"core"}), ("from . import mask", {"mask"}),
    ("class A:\n    def f(self):\n        from superpos.field import g", {"field"}),
    ("import superpose.core", set()), ("from superpos import __version__", set())])
def test_superpos_imports(source, names):
    assert superpos_imports(source) == names


def test_notebook_saved_meanwhile_is_left_alone(project, monkeypatch):
    notebook = page(project/"nbs"/"00_a.ipynb", "from pathlib import Path",
                    "with Path('00_a.ipynb').open('a') as f: f.write(' ')")
    assert "was changed while it was running" in failure(project)
    assert built(notebook).read_text().endswith(" ")


def test_folder_without_notebooks_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no notebooks"): notebooks(tmp_path)


def test_unknown_command_is_refused():
    with pytest.raises(SystemExit, match="unknown command 'serve'; there are execute"):
        main(["serve"])


# ---- a clone that stays clean


def contents(project: Path) -> dict[str, bytes]:
    made = {"_build", "_proc", "_docs", "__pycache__"}
    return {str(p.relative_to(project)): p.read_bytes() for p in project.rglob("*")
            if p.is_file() and not made & set(p.relative_to(project).parts)}


concluding = """from pathlib import Path
from superpos.core import results_dir
(results_dir()/"findings"/"00_a.json").write_text("[1]");"""


def test_nothing_is_written_but_in_the_build_folder(project):
    (project/"nbs"/"results"/"findings").mkdir(parents=True)
    (project/"nbs"/"results"/"study-1.json").write_text("{}")
    (project/"nbs"/"results"/"findings"/"00_a.json").write_text("[0]")
    page(project/"nbs"/"00_a.ipynb", concluding, "Path('beside').write_text('x');",
         "results_dir().name, sorted(p.name for p in results_dir().iterdir())",
         outputs={2: printed("old")})
    before = contents(project)
    execute(project)
    assert contents(project) == before
    kept = project/"_build"/"nbs"/"results"
    assert (kept/"findings"/"00_a.json").read_text() == "[1]"
    given = read(built(project/"nbs"/"00_a.ipynb"))[2]["outputs"][0]["data"]["text/plain"]
    assert given == ["('results', ['findings', 'study-1.json'])"]


def test_conclusions_are_read_when_all_are_drawn(project, capsys):
    (project/"nbs").mkdir()
    read_all = "def findings():\n    from superpos.core import results_dir\n" \
               "    return [p.read_text() for p in (results_dir()/'findings').iterdir()]"
    page(project/"nbs"/"00_a.ipynb", "import time\ntime.sleep(1)", concluding)
    claims = page(project/"nbs"/"50_claims.ipynb", read_all, "findings()")
    execute(project)
    assert read(built(claims))[1]["outputs"][0]["data"]["text/plain"] == ["['[1]']"]
    page(project/"nbs"/"00_a.ipynb", concluding.replace("[1]", "[2]"))
    execute(project)
    assert read(built(claims))[1]["outputs"][0]["data"]["text/plain"] == ["['[2]']"]
    (project/"nbs"/"00_a.ipynb").unlink()
    execute(project)
    assert read(built(claims))[1]["outputs"][0]["data"]["text/plain"] == ["[]"]
    assert not built(project/"nbs"/"00_a.ipynb").exists()


def test_a_wrong_output_does_not_reach_the_site(project):
    page(tiny(project)/"nbs"/"10_two.ipynb", "# Two\n\n> Two times.", "print(6*7)",
         outputs={1: printed("43 is a lie")})
    page(project/"nbs"/"index.ipynb", "# Tiny\n\n> A book of two pages.",
         "%See [two](10_two.ipynb).")
    before = contents(project)
    for step in ("execute", "render", "check"):
        done = command(project, step)
        assert done.returncode == 0, done.stderr
    assert {**contents(project), "nbs/nbdev.yml": 0} == {**before, "nbs/nbdev.yml": 0}
    texts = [p.read_text() for p in (project/"_docs").rglob("*.*")
             if p.suffix in (".html", ".ipynb", ".json")]
    assert len(texts) >= 5 and not [t for t in texts if "a lie" in t]
    assert "42" in (project/"_docs"/"two.html").read_text()
    assert "1 numbers differ from those kept by more than 2%" in done.stdout


def test_only_what_was_executed_is_rendered(project):
    page(tiny(project)/"nbs"/"10_two.ipynb", "# Two\n\n> Two times.", "1")
    execute(project)
    page(project/"nbs"/"10_two.ipynb", "# Two\n\n> Two times.", "2")
    done = command(project, "render")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == (
        "10_two.ipynb has not been executed as it is now; run `make site`")


def test_outputs_are_written_back_and_what_moved_is_said(project, capsys):
    (project/"nbs"/"images").mkdir(parents=True)
    source = "#| label: fig-a\n#| fig-cap: A line.\n#| fig-alt: A line.\nplt.plot([1, 2]);"
    index = page(project/"nbs"/"index.ipynb", "# Tiny\n\n> A book.", concluding,
                 "print('loss', 1.004, 'of', 3)\nprint(19)", "import matplotlib.pyplot as plt",
                 source, outputs={2: printed("loss 1.002 of 3", "9")})
    execute(project)
    capsys.readouterr()
    write(project)
    said = capsys.readouterr().out.splitlines()
    assert said == ["index.ipynb, cell 3: 1.002 → 1.004",
                    "index.ipynb, cell 3: 9 → 19  (further than 2%)",
                    "2 numbers moved, 1 of them further than 2%"]
    assert index.read_bytes() == built(index).read_bytes()
    assert (project/"nbs"/"results"/"findings"/"00_a.json").read_text() == "[1]"
    assert "![A line.](nbs/images/fig-a.png)" in (project/"README.md").read_text()
    write(project)
    assert capsys.readouterr().out == "0 numbers moved, 0 of them further than 2%\n"


@pytest.mark.parametrize("old,new,moved", [
    ("loss .0431", "loss .0431", []),
    ("loss .0431", "loss .0433", [(".0431", ".0433", True)]),
    ("loss .0431 of 2", "loss .0551 of 2", [(".0431", ".0551", False)]),
    ("1,000 steps, 1e-3", "1,001 steps, 2e-3",
     [("1,000", "1,001", True), ("1e-3", "2e-3", True)]),  # one more in the last digit
    ("p = .010", "p = .012", [(".010", ".012", False)]),
    ("−3.00 and -4.00", "3.00 and -4.01", [("−3.00", "3.00", False), ("-4.00", "-4.01", True)]),
    ("unit 4:9\nfour   4", "unit 4:9\nfour 5", [("4", "5", True)]),
    ("yes\n8 of 9", "no\n8 of 9", [("yes", "no", False)]),
    ("a\nb 10", "b 20", [("a", "", False), ("10", "20", False)]),
    ("features.10 of conv2d", "features.10 of conv2d", [])])
def test_numbers_that_moved(old, new, moved):
    assert moved_numbers(old, new) == moved


other_processor = dict(ATEN_CPU_CAPABILITY="default", DNNL_MAX_CPU_ISA="SSE41",
                       MKL_CBWR="COMPATIBLE", NPY_DISABLE_CPU_FEATURES="AVX2 AVX512F",
                       OPENBLAS_CORETYPE="Nehalem")
sample = """
import torch
from superpos.data import shapes
from superpos.dissect import dissect
from superpos.model import SmallAlexNet
from superpos.toy import Features, expected_loss, train
features = Features(5, density=.1, importance=.8**torch.arange(5))
run = train(features, 2, seeds=range(4), steps=500, quiet=True)
for v in (expected_loss(run.toy, features), run.toy.W.norm(dim=-1)):
    print(*(f"{x:.4f}" for x in v.flatten()))
torch.manual_seed(0)
net, images = SmallAlexNet(width=4).eval(), shapes(40, size=40)
print(dissect(net, "features.3", images, k=20, nulls=19, units=range(3)).table.round(4).to_string())
"""


def test_another_processor_agrees_to_the_tolerance():
    "Another processor's instructions, and two threads instead of one."
    def run(**env) -> str:
        env = os.environ | dict(OMP_NUM_THREADS="1", SUPERPOS_QUIET="1") | env
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", sample], env=env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    here, there = run(), run(OMP_NUM_THREADS="2", **other_processor)
    assert len(here.split()) > 20
    assert [m for m in moved_numbers(here, there) if not m[2]] == []


# ---- formulas


@pytest.mark.parametrize("text", [
    "`$x$`", "``a ` $x$``", "```python\n'$x$'\n```", "~~~\n$x$\n~~~", r"\$5 and \$6", "$5 and $6",
    "a $ b $ c", "$x\n\ny$"])
def test_what_is_no_formula_stays(text):
    assert mathml(text) == text


@pytest.mark.parametrize("latex,part", [
    ("x_1", "<msub><mi>x</mi><mn>1</mn></msub>"), (r"\sigma(\beta s)", "<mi>&#x003C3;</mi>"),
    (r"\lVert s \rVert_1", 'form="postfix"'),
    (r"\frac{a}{b}", "<mfrac>"), (r"\hat W", "<mover"), (r"W^\top", "<mi>&#x022A4;</mi>"),
    (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "<mtable")])
def test_formulas_become_mathml(latex, part):
    inline, block = mathml(f"so ${latex}$, and"), mathml(f"so\n\n$$\n{latex}\n$$\n\nand")
    assert part in inline and inline.startswith("so <math")
    assert 'display="inline"' in inline and inline.endswith("</math>, and")
    assert part in block and 'display="block"' in block and "$" not in block + inline


def test_markup_inside_a_formula_is_not_markdown():
    assert not set("*_`[]") & set(mathml("$a^* b^* [c] d_1$"))


@pytest.mark.parametrize("latex", [r"\nosuchcommand{x}", r"\left( x", "a & b", r"\\mathrm{x}"])
def test_formula_that_cannot_be_written_is_refused(latex):
    with pytest.raises(ValueError, match="no MathML for"): mathml(f"${latex}$")


# ---- the site


def tiny(project: Path) -> Path:
    "A project of two pages with everything that a page can hold."
    Image.new("L", (8, 2)).save(drawn := io.BytesIO(), "PNG")
    data = {"image/png": base64.b64encode(drawn.getvalue()).decode(), "text/plain": ["<Figure>"]}
    table = {"text/html": "<table><tr><td>1</td></tr></table>", "text/plain": "1"}
    png, html = ([dict(output_type="display_data", metadata={}, data=d)] for d in (data, table))
    (project/"tiny").mkdir()
    (project/"tiny"/"__init__.py").write_text('__version__ = "0.0.1"\n')
    page(project/"nbs"/"index.ipynb", "# Tiny\n\n> A book of two pages.",
         "%Look at [two](10_two.ipynb#twice), or\nat [its figure](10_two.ipynb#fig-dot).\n\n"
         "## Where\n\n- $x^2_i$ is,\n- and is not.",
         "#| label: fig-here\n#| fig-cap: >-\n#|   A dot:\n#|   one.\n#| fig-alt: >-\n#|   One\n"
         "#|   dot.\n1", outputs={2: png})
    page(project/"nbs"/"10_two.ipynb", "# Two\n\n> Two times.", "#| default_exp two",
         "%Text with `twice`.", "#| export\nfrom dataclasses import dataclass",
          '#| export\n@dataclass\nclass Pair:\n    "Two."\n    left: int  # the first of them\n    '
          '_: int = 0',
          '#| export\ndef twice(\n    x: float,  # a number\n) -> float:\n    "$2x$, by adding."\n '
          '   return x + x',
         '#| label: fig-dot\n#| fig-cap: "A dot."\n#| fig-alt: "One dot."\ntwice(1)',
         "#| slow\n#| label: fig-none\n#| fig-cap: >-\n#|   What was\n#|   not drawn.\n"
         "#| fig-alt: Nothing.\ntwice(2)", "twice(.5)", outputs={6: png, 8: html})
    (project/"nbs"/"_quarto.yml").write_text(site_config)
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; "
                    "nbdev_export.__wrapped__()"], cwd=project, check=True)
    return project


def as_executed(project: Path) -> Path:
    "A project whose notebooks, as they are, count as those that were executed."
    shutil.copytree(project/"nbs", project/"_build"/"nbs")
    return project


beside_python = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"


def command(project: Path, *words: str, path: str = beside_python) -> subprocess.CompletedProcess:
    env = os.environ | dict(PATH=path)
    return subprocess.run([sys.executable, "-m", "superpos.book", *words], cwd=project, env=env,
                          capture_output=True, text=True)


def test_site_is_rendered_and_checked(project):
    done = command(as_executed(tiny(project)), "render")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"the site is at {project/'_docs'/'index.html'}"
    index, two = ((project/"_docs"/name).read_text() for name in ("index.html", "two.html"))
    assert "two.html#twice" in index and "two.html#fig-dot" in index
    assert 'id="fig-dot"' in two and 'id="twice"' in two
    assert "<msubsup>" in index and "katex" not in (index + two).lower()
    half_of_its_pixels = '<img width="4" data-kind="book-drawing" alt="One dot."'
    assert index.count(half_of_its_pixels) == 1
    assert "not_written_yet" not in index and "Later" not in index
    assert ('class="book-beside"><a href="https://example.org/tiny/blob/main/nbs/10_two.ipynb">'
            'Source</a> <a href="notebooks/10_two.ipynb" download>') in two
    assert "A dot: one." in index and "fig-none" not in two and "not drawn" not in two
    assert ((project/"_docs"/"notebooks"/"10_two.ipynb").read_bytes()
            == (project/"nbs"/"10_two.ipynb").read_bytes())
    assert two.count("# the first of them") == 1 and "_: int" not in two
    assert (project/"_docs"/"llms.txt").read_text() == (
        "# tiny\n\n> A book of two pages.\n\nA book whose pages are notebooks and whose code is "
        "the Python package `tiny`. The notebook behind "
        "`https://tiny.example.org/tiny/NAME.html` is in "
        "`https://tiny.example.org/tiny/notebooks/`, with its number in front of its name.\n\n"
        "## Start here\n\n- [Tiny](https://tiny.example.org/tiny/index.html): A book of two "
        "pages.\n\n"
        "## Pages\n\n- [Two](https://tiny.example.org/tiny/two.html): Two times.\n")
    assert (project/"_docs"/"search.js").read_text().startswith("window.searchIndex = [")
    sheets = "".join(p.read_text() for p in (project/"_docs").rglob("*.css"))
    assert "fonts.googleapis" not in sheets
    checked = command(project, "check")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == "2 pages, every link leads somewhere\n"
    spoilt = two.replace('id="fig-dot"', "").replace('alt="One dot."', "")
    (project/"_docs"/"two.html").write_text(spoilt)
    checked = command(project, "check")
    assert checked.returncode == 1
    assert {"index.html: no such place two.html#fig-dot",
            "two.html: no alternative text for picture 1"} <= set(checked.stderr.splitlines())


def test_quarto_is_used_where_it_is_installed(project):
    (project/"bin").mkdir()
    stand_in = f'#!/bin/sh\necho "$@" > arguments\nexec {sys.executable} {here/"quarto.py"}\n'
    (project/"bin"/"quarto").write_text(stand_in)
    (project/"bin"/"quarto").chmod(0o755)
    path = f"{project/'bin'}:/usr/bin:/bin"
    done = command(as_executed(tiny(project)), "render", path=path)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert (project/"_proc"/"arguments").read_text().split()[0] == "render"
    assert "html-math-method: mathml" in (project/"_proc"/"_quarto.yml").read_text()
    index, two = ((project/"_docs"/name).read_text() for name in ("index.html", "two.html"))
    assert '<h2 id="where">Where</h2>' in index and index.count("<li>") == 2
    assert "<msubsup>" in index and 'href="two.html#twice"' in index
    assert 'alt="One dot."' in index and "A dot: one." in index
    assert "<td>1</td>" in two and "fig-none" not in two and "not drawn" not in two
    assert not re.search("cdn.example|define", index + two)
    checked = command(project, "check", path=path)
    assert checked.stdout == "2 pages, every link leads somewhere\n", checked.stderr


def test_what_is_loaded_from_another_host_is_taken_out():
    kept = ('<link href="https://x.org/a" rel="canonical"> <a href="https://x.org">x</a>'
            '<script src="site_libs/a.js"></script> <script>defined(1)</script>'
            '<link href="a.css" rel="stylesheet"> <code>&lt;script src="https://x.org"&gt;</code>')
    assert _finished(quarto.afar + kept) == kept
    assert _finished("<link rel=stylesheet href=//x.org/k.css><SCRIPT defer src='//x.org/k.js'>"
                     "</SCRIPT>") == ""


def test_folded_options_are_unfolded():
    source = ("#| label: fig-a\n#| fig-cap: >-\n#|   A \"quoted\": word,\n#|   and more.\n"
              "#| fig-alt: >\n#|   One\n#| code-fold: true\nplot()\n#|   no option")
    flat = ('#| label: fig-a\n#| fig-cap: "A \\"quoted\\": word, and more."\n'
            '#| fig-alt: "One\\n"\n#| code-fold: true\nplot()\n#|   no option')
    assert _unfolded(source) == flat and _unfolded(flat) == flat
    assert _options(source) == _options(flat)
    assert _options(flat)["fig-cap"] == 'A "quoted": word, and more.'


def test_what_is_not_drawn_has_no_caption(project):
    drawn = [dict(output_type="display_data", metadata={}, data={"image/png": ""})]
    source = "#| label: fig-a\n#| fig-cap: >-\n#|   Long\n#| fig-alt: Alt\n#| slow\nplot()"
    cells = [source, source, "#| label: tbl-a\n1"]
    notebook = page(project/"nbs"/"00_a.ipynb", *cells, outputs={1: drawn})
    empty, full, drawing, _, table = (c["source"] for c in json.loads(_for_page(notebook))["cells"])
    assert empty == ["#| slow\n", "plot()"]
    assert full[1:] == ["#| label: fig-a\n", '#| fig-cap: "Long"\n', "#| fig-alt: Alt\n"]
    assert drawing == empty
    assert table == ["#| label: tbl-a\n", "1"]


def test_a_page_opens_with_its_key_figure(project):
    drawn = [dict(output_type="stream", name="stdout", text="said"),
             dict(output_type="display_data", metadata={}, data={"image/png": ""})]
    figures = [f"#| label: fig-{x}\n#| fig-cap: >-\n#|   Of {x}.\n#| fig-alt: Alt\ndraw()"
               for x in "ab"]

    def staged(path): return json.loads(_for_page(path))["cells"]
    given = ["# A", "%In short: [it](#fig-b) is so.", "%## By hand", *figures]
    opened = page(project/"nbs"/"00_a.ipynb", *given, outputs={3: drawn, 4: drawn})
    title, figure, _, _, first, left, link = staged(opened)
    assert "".join(title["source"]) == "# A"
    assert "".join(figure["source"]) == ('#| echo: false\n#| label: fig-b\n'
                                         '#| fig-cap: "Of b."\n#| fig-alt: Alt\n')
    assert [*figure["outputs"], *left["outputs"]] == drawn[::-1]
    assert left["source"] == ["draw()"] and "fig-a" in "".join(first["source"])
    assert "(#fig-b)" in "".join(link["source"])
    unnamed = page(project/"nbs"/"01_b.ipynb", "# B", *figures, outputs={1: drawn, 2: drawn})
    assert "#| label: fig-a\n" in staged(unnamed)[1]["source"]
    script = {"text/html": "<script></script>"}
    slider = [dict(output_type="display_data", metadata={}, data=script)]
    shows = page(project/"nbs"/"02_c.ipynb", "# C", "1", *figures, outputs={1: slider, 2: drawn})
    assert len(staged(shows)) == 4
    assert len(staged(page(project/"nbs"/"03_d.ipynb", "# D", *figures))) == 3


def test_pictures_say_whether_the_dark_may_turn_them():
    def shown(shades):
        Image.fromarray(shades).save(kept := io.BytesIO(), "png")
        data = base64.b64encode(kept.getvalue()).decode()
        return _finished(f'<img src="data:image/png;base64,{data}">')

    noise = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
    white = np.full_like(noise, 255)
    half = np.concatenate([noise[:38], white])
    assert '<img width="30" data-kind="book-photograph" src="data:image/webp;' in shown(noise)
    for drawing in (half, noise//64*64, white):
        given = shown(drawing)
        assert 'data-kind="book-drawing"' in given
        kept = base64.b64decode(given.split("base64,")[1].split('"')[0])
        assert (np.asarray(Image.open(io.BytesIO(kept))) == drawing).all()


def test_rows_become_cards_where_columns_have_names():
    head = "<thead><tr><th></th><th>AUROC</th><th>kept <b>%</b></th></tr></thead>"
    body = "<tbody><tr><td>SNIP</td><td>.9</td><td>5</td></tr></tbody>"
    made = _finished(f"<p>a</p><table>{head}{body}</table>")
    assert 'class="book-cards"' in made and made.startswith("<p>a</p>")
    assert re.findall('data-label="(.*?)"', made) == ["", "AUROC", "kept %"]
    for plain in (f"<table>{body}</table>", f"<table>{head}{body}</table>".replace(
            "<td>.9", '<td colspan="2">.9'), "<table><thead><tr><th>a</th></tr></thead></table>"):
        assert _finished(plain) == plain


def test_code_of_a_study_is_folded(project):
    own = "#| code-fold: show\n1"
    study = page(project/"nbs"/"00_a.ipynb", "# A", "recall('x')", own)
    chapter = page(project/"nbs"/"01_b.ipynb", "# B", "#| default_exp b", "recall('x')")
    tutorial = page(project/"nbs"/"02_c.ipynb", "# C", "recalled(1)")

    def sources(path): return ["".join(c["source"]) for c in json.loads(_for_page(path))["cells"]]
    assert sources(study) == ["# A", "#| code-fold: true\nrecall('x')", own]
    assert not [s for path in (chapter, tutorial) for s in sources(path) if "code-fold" in s]


def test_search_of_quarto_is_made_to_work_from_disk(project):
    page(project/"nbs"/"00_a.ipynb", "1")
    (site := project/"_docs").mkdir()
    (site/"quarto-search.js").write_text('if (window.location.protocol === "file:" && '
                                         '!shownWarning) return;')
    (site/"search.json").write_text("[]")
    _furnish(project, site, executed=False)
    assert (site/"quarto-search.js").read_text() == "if (false && !shownWarning) return;"
    assert (site/"search.js").read_text() == "window.searchIndex = [];"


low = """
__all__ = ["size", "check", "Box"]
size = 3
def check(x):
    "No more than `size`."
    if x > size: raise ValueError(x)
class Box:
    "A box."
    def __init__(self, a, *rest): check(a)
    @property
    def full(self) -> bool:
        "Whether."
    def open(self, how) -> None:
        "Opens."
        raise errors.Stuck
"""
high = """
__all__ = ["near", "far", "calm"]
from .low import check as same
from . import low as l
def _deep(x): same(x); _deep(x)
def near(x: int | None, *, y=1) -> "dict | None":
    "Is |near|.\\n\\n    More."
    _deep(x)
def far(**k):
    "Far."
    l.Box(k)
def calm():
    "Calm."
    l.size
    try: 1
    except KeyError as e: raise e
"""


def test_reference_names_arguments_and_errors(project):
    (project/"tiny").mkdir()
    for n, (name, source) in enumerate(dict(low=low, high=high).items()):
        (project/"tiny"/f"{name}.py").write_text(source)
        page(project/"nbs"/f"0{n}_{name}.ipynb", f"# {name.title()}\n\n> It is {name}.",
              f"#| default_exp {name}")
    first, second = reference(project).split("\n\n## ")
    head = "| Name, arguments → what it gives | What it does | Can raise |\n|---|---|---|\n"
    assert first == "## tiny.low\n\n[Low](00_low.ipynb): It is low.\n\n" + head + "\n".join([
        "| [size](00_low.ipynb) | `3` | |", "| [check](00_low.ipynb#check)`(x)` | No more than "
        "`size`. | `ValueError` |",
        "| [Box](00_low.ipynb#box)`(a, *rest)` | A box. | `ValueError` |",
        "| [Box.full](00_low.ipynb#box) → `bool` | Whether. |  |",
        "| [Box.open](00_low.ipynb#box)`(how)` | Opens. | `Stuck` |"])
    assert second == "tiny.high\n\n[High](01_high.ipynb): It is high.\n\n" + head + "\n".join([
        "| [near](01_high.ipynb#near)`(x, y)` → `dict or None` | Is &#124;near&#124;. | "
        "`ValueError` |",
        "| [far](01_high.ipynb#far)`(**k)` | Far. | `ValueError` |",
        "| [calm](01_high.ipynb#calm)`()` | Calm. |  |"])


def test_formula_in_a_page_names_the_page(project):
    page(tiny(project)/"nbs"/"10_two.ipynb", "# Two\n\n> Two times.",
         "%A formula $\\nosuchcommand$.")
    done = command(as_executed(project), "render")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(
        r"10_two.ipynb: no MathML for \nosuchcommand")


good_page = ('<html><head><link rel="canonical" href="https://x.org/a"></head><body><main>'
             '<h1 id="here">A</h1>{}</main></body></html>')
planted = [
    ('<a href="b.html">b</a>', "broken link b.html"),
    ('<a href="sub/c.html#gone">c</a>', "no such place sub/c.html#gone"),
    ('<a href="#gone">c</a>', "no such place #gone"),
    ('<a href="../outside.html">c</a>', "broken link ../outside.html"),
    ('<img src="data:image/png;base64,AA">', "no alternative text for picture 1"),
    ('<img alt="" src="data:image/png;base64,AA">', "no alternative text for picture 1"),
    ('<img alt="a" src="gone.png">', "broken link gone.png"),
    ('<img alt="a" src="https://x.org/a.png">', "loads https://x.org/a.png from the network"),
    ('<script src="https://x.org/k.js"></script>', "loads https://x.org/k.js from the network"),
    ('<link rel="stylesheet" href="//x.org/k.css">', "loads //x.org/k.css from the network"),
    ('<style>@import "https://x.org/f";</style>', "loads https://x.org/f from the network"),
    ("see @fig-a.", "unresolved cross-reference @fig-a"),
    ("see <strong>?@sec-b</strong>", "unresolved cross-reference ?@sec-b")]


@pytest.mark.parametrize("html,problem", planted)
def test_planted_problem_is_found(tmp_path, html, problem):
    (tmp_path/"sub").mkdir()
    (tmp_path/"sub"/"c.html").write_text(good_page.format('<a href="../a.html#here">back</a>'))
    (tmp_path/"a.html").write_text(good_page.format(html))
    assert problems(tmp_path) == [f"a.html: {problem}"]


def test_page_without_problems(tmp_path):
    (tmp_path/"a.html").write_text(good_page.format(
        '<a href="#here">here</a> <a href="">self</a> <a href="https://x.org/">away</a> <a '
        'href="mailto:me@fig-x.org">mail</a>'
        '<img alt="a" src="data:image/png;base64,AA"> <code>@fig-a</code>'))
    assert problems(tmp_path) == []


def test_style_sheet_that_loads_a_font_is_found(tmp_path):
    (tmp_path/"a.html").write_text(good_page.format(""))
    own = "p{background:url(data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>)}"
    (tmp_path/"a.css").write_text("@font-face{src:url(https://x.org/f.woff2)} " + own)
    assert problems(tmp_path) == ["a.css: loads https://x.org/f.woff2 from the network"]


def test_site_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pages"): problems(tmp_path)


def test_readme_has_text_and_pictures(project):
    written = dict(output_type="display_data", metadata={},
                   data={"text/markdown": ["By [code](10_two.ipynb),\n", "so."]})
    index = tiny(project)/"nbs"/"index.ipynb"
    nb = json.loads(index.read_text())
    nb["cells"][2]["outputs"].insert(0, written)
    index.write_text(json.dumps(nb))
    files = readme(project)
    text = files[project/"README.md"].decode()
    assert "By [code](nbs/10_two.ipynb),\nso." in text
    assert text.startswith("# Tiny\n") and "[two](nbs/10_two.ipynb#twice)" in text
    assert '<a id="fig-here"></a>\n\n![One dot.](nbs/images/fig-here.png)\n\n*A dot: one.*' in text
    assert files[project/"nbs"/"images"/"fig-here.png"].startswith(b"\x89PNG")


def test_code_shows_no_links():
    block = "```python\ndef f(\n    x,  # as [`g`](a.ipynb#g) gives it, [see](b.html)\n)\n```"
    text = f"[`g`](a.ipynb#g)\n\n{block}\n\n[`g`](a.ipynb#g)"
    plain = block.replace("[`g`](a.ipynb#g)", "`g`")
    assert _without_links(text) == f"[`g`](a.ipynb#g)\n\n{plain}\n\n[`g`](a.ipynb#g)"
