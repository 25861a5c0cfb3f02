"""Every page as Quarto would read it, without Quarto: see `quarto.py`.

The pages are staged once for all of these tests, with the outputs that the notebooks keep.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from quarto import markdown, pandoc

from superpos.book import _formula, _page_name, notebooks

root = Path(__file__).resolve().parent.parent
pages = [_page_name(nb.name) for nb in notebooks(root)]
staging = """
import sys
from pathlib import Path
from superpos.book import stage
if __name__ == "__main__": stage(Path(), for_quarto=True, executed=False)
"""


# ---- the same things counted in the text itself


def written(nb: dict) -> str:
    "The text of a page, without code."
    texts = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown"]
    outputs = [o for c in nb["cells"] for o in c.get("outputs", ())]
    texts += ["".join(o["data"]["text/markdown"]) for o in outputs
              if "text/markdown" in o.get("data", {})]
    return "\n\n".join(texts)


def without_code(text: str) -> str:
    return _formula.sub(lambda m: "x" if m["fence"] or m["tick"] else m[0], text)


def counted(text: str) -> dict[str, int]:
    text, formulas = without_code(text), 0
    for m in _formula.finditer(text): formulas += bool(m["display"] or m["inline"])
    return dict(headings=len(re.findall(r"(?m)^#{1,6} ", text)),
                items=len(re.findall(r"(?m)^ *(?:[-*+]|\d+\.) +\S", text)),
                tables=len(re.findall(r"(?m)^\|(?: *:?-+:? *\|)+ *$", text)), formulas=formulas)


def found(html: str) -> dict[str, int]:
    soup = BeautifulSoup(html, "html.parser")
    return dict(headings=len(soup.find_all(re.compile(r"^h[1-6]$"))), items=len(soup("li")),
                tables=len([t for t in soup("table") if "dataframe" not in (t.get("class") or ())
                            and not (t.get("id") or "").startswith("T_")]),
                formulas=len(soup("math")))


# ---- the pages


@pytest.fixture(scope="session")
def staged(tmp_path_factory):
    "The pages, as they are given to Quarto, by name."
    folder = tmp_path_factory.mktemp("staged")
    for name in ("superpos", "nbs"): shutil.copytree(root/name, folder/name, symlinks=True)
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(root/name, folder/name)
    env = os.environ | dict(PYTHONPATH=str(folder), OMP_NUM_THREADS="1", SUPERPOS_QUIET="1")
    (folder/"staging.py").write_text(staging)
    done = subprocess.run([sys.executable, "staging.py"], cwd=folder, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {page: json.loads((folder/"_proc"/page).read_text()) for page in pages}


@pytest.fixture(scope="session")
def read(staged):
    "What pandoc makes of every page, and what it warns of."
    texts = [markdown(nb) for nb in staged.values()]
    with ThreadPoolExecutor(2) as pool: return dict(zip(staged, pool.map(pandoc, texts)))


@pytest.mark.parametrize("page", pages)
def test_page_is_a_notebook_of_lines(staged, page):
    nb = staged[page]
    nbformat.validate(nb)
    texts = [c["source"] for c in nb["cells"]]
    for output in (o for c in nb["cells"] for o in c.get("outputs", ())):
        texts += [output[k] for k in ("text",) if k in output]
        texts += [text for mime, text in output.get("data", {}).items() if mime.startswith("text/")]
    for text in texts:
        assert isinstance(text, list)
        assert all(line.endswith("\n") for line in text[:-1])


@pytest.mark.parametrize("page", pages)
def test_pandoc_reads_a_page_as_it_is_written(staged, read, page):
    html, warnings = read[page]
    assert not warnings
    assert found(html) == counted(written(staged[page]))


@pytest.mark.parametrize("page", pages)
def test_captions_stand_on_one_line_and_have_a_picture(staged, page):
    for cell in (c for c in staged[page]["cells"] if c["cell_type"] == "code"):
        source = "".join(cell["source"])
        assert not re.search(r"(?m)^#\| *[\w-]+: *>", source)
        if re.search(r"(?m)^#\| *(label: *fig-|fig-cap:|fig-alt:)", source):
            mimes = [mime for o in cell["outputs"] for mime in o.get("data", ())]
            assert any(mime.startswith("image/") for mime in mimes), source[:200]


# ---- the stand-in sees what is wrong


def test_a_string_loses_its_lines():
    text = "## One\n\nTwo\n\n- three\n- four\n"

    def page(source): return markdown(dict(cells=[dict(cell_type="markdown", source=source)]))
    assert found(pandoc(page(text))[0]) != counted(text)
    kept = pandoc(page(text.splitlines(keepends=True)))[0]
    assert found(kept) == counted(text) == dict(headings=1, items=2, tables=0, formulas=0)


@pytest.mark.parametrize("text,lost", [
    ("A list\n- that is none", "items"), ("A text\n## no heading", "headings"),
    ("A text\n|a|b|\n|---|---|\n|1|2|", "tables")])
def test_what_is_lost_is_counted(text, lost):
    assert found(pandoc(text)[0])[lost] < counted(text)[lost]


def test_pandoc_warns_of_what_is_no_formula():
    for latex in (r"\Bigl x", r"\\mathrm{x}"):
        assert "Could not convert TeX math" in pandoc(f"${latex}$")[1]
    assert not pandoc(r"$\bigl( x \bigr)$")[1]
