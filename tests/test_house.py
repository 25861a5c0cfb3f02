"The rules of the house: how notebooks are written, what modules import, what is up to date."
import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import yaml
from execnb.nbio import dict2nb, nb2str
from nbdev.clean import clean_nb
from nbdev.process import extract_directives

from superpos.book import _options, notebooks, readme, superpos_imports

root = Path(__file__).resolve().parent.parent
pages = notebooks(root)
modules = sorted(p for p in (root/"superpos").glob("*.py") if p.name[0] != "_")

# ---- rules for a notebook: each takes its JSON and yields what is wrong


def cells(nb):
    for number, cell in enumerate(nb["cells"], 1):
        yield f"cell {number}", cell, "".join(cell["source"])


def code_cells(nb):
    for where, cell, source in cells(nb):
        if cell["cell_type"] != "code": continue
        made = dict2nb(cells=[dict(cell, source=source)]).cells[0]
        yield where, cell, source, extract_directives(made, remove=False)


def is_slow(directives):
    off = directives.get("eval:", [""])[0].lower() == "false"
    return off or bool({"slow", "gpu"} & set(directives))


def has_picture(cell):
    return any(mime.startswith("image/") for out in cell["outputs"] for mime in out.get("data", {}))


def figures_are_described(nb):
    for where, cell, source, directives in code_cells(nb):
        try: options = _options(source)
        except yaml.YAMLError as problem:
            yield f"{where}: its options are not YAML: {problem}"
            continue
        given = [k for k in ("label", "fig-cap", "fig-alt") if options.get(k)]
        if not (has_picture(cell) or given): continue
        if len(given) < 3 or not options["label"].startswith("fig-"):
            yield f"{where}: a figure needs label (fig-...), fig-cap and fig-alt"
        if "$" in str(options.get("fig-cap")): yield f"{where}: a caption cannot hold LaTeX"
        if not is_slow(directives) and not has_picture(cell):
            yield f"{where}: its figure has not been drawn; run `make write`"


directive_words = {"code", "column", "default_exp", "echo", "eval", "exec_doc", "export",
                   "exporti", "exports", "filter_stream", "gpu", "hide", "hide_line", "include",
                   "label", "output", "slow", "warning"}


def folds_hide_no_directive(nb):  # nbdev takes every line of the head for a directive
    for where, _, source, _ in code_cells(nb):
        for found in re.findall(r"(?m)^#\| {2,}([\w-]+)", source):
            if found in directive_words: yield f"{where}: a folded line begins with {found!r}"


def lines_fit_the_page(nb):
    for where, _, source, _ in code_cells(nb):
        wide = [line for line in source.splitlines() if len(line) > 100]
        yield from (f"{where}: over 100 columns: {line}" for line in wide)


def imports_stand_alone(nb):
    for where, _, source, _ in code_cells(nb):
        if source.lstrip().startswith(("%", "!")): continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body}
        if kinds == {True, False}: yield f"{where}: imports belong in a cell of their own"


def no_cell_failed(nb):
    for where, cell, _, _ in code_cells(nb):
        if any(out["output_type"] == "error" for out in cell["outputs"]):
            yield f"{where}: holds an error"


def outputs_name_no_folder(nb):
    folders = "home|root|tmp|usr|opt|var|mnt|Users|private|work|data|etc"
    absolute = re.compile(rf"(?<![\w.:/<-])(?:/(?:{folders})/\w|[A-Z]:\\\w)")
    for where, cell, _, _ in code_cells(nb):
        texts = [out.get("text", "") for out in cell["outputs"]]
        texts += [text for out in cell["outputs"] for mime, text in out.get("data", {}).items()
                  if mime.startswith("text/")]
        for found in absolute.findall("\n".join("".join(t) for t in texts)):
            yield f"{where}: an absolute path ({found}...) in its output"


def slow_cells_are_empty(nb):
    for where, cell, _, directives in code_cells(nb):
        if is_slow(directives) and cell["outputs"]: yield f"{where}: a slow cell keeps no outputs"


def is_clean(nb):
    cleaned = json.loads(json.dumps(nb))
    clean_nb(cleaned)
    if cleaned != nb: yield "nbdev_clean would change it"


def title_stands_alone(nb):
    lines = [line for line in "".join(nb["cells"][0]["source"]).splitlines() if line.strip()]
    marks = [line[:2] for line in lines]
    if nb["cells"][0]["cell_type"] != "markdown" or marks != ["# ", "> "]:
        yield ("cell 1: holds a '# title', a '> description' and nothing else "
               "(nbdev drops what follows them in the same cell)")


rules = [figures_are_described, folds_hide_no_directive, imports_stand_alone, is_clean,
         lines_fit_the_page, no_cell_failed, outputs_name_no_folder, slow_cells_are_empty,
         title_stands_alone]


@pytest.mark.parametrize("page", pages, ids=lambda p: p.stem)
@pytest.mark.parametrize("rule", rules, ids=lambda r: r.__name__)
def test_notebook(rule, page):
    found = list(rule(json.loads(page.read_text(encoding="utf-8"))))
    assert not found, "\n".join(found)


def bad_cell(source, **output):
    return dict(cell_type="code", id="a", metadata={}, execution_count=None, source=[source],
                outputs=[output] if output else [])


png = dict(output_type="display_data", metadata={}, data={"image/png": "iVBORw0KGgo="})
stream = dict(output_type="stream", name="stdout")
bad = [
    (figures_are_described, bad_cell("#| label: fig-a\n#| fig-cap: seen\nplot()", **png)),
    (figures_are_described, bad_cell("plot()", **png)),
    (figures_are_described, bad_cell('#| label: fig-a\n#| fig-cap: "the value $x$"\n#| fig-alt: '
                                     'a\nplot()', **png)),
    (figures_are_described, bad_cell('#| label: fig-a\n#| fig-cap: "a "quoted" word"\n#| fig-alt: '
                                     'a\nplot()', **png)),
    (figures_are_described, bad_cell("#| label: fig-a\n#| fig-cap: seen\n#| fig-alt: a\nplot()")),
    (figures_are_described, bad_cell("#| label: fig-a\n#| fig-cap: >-\n#|   seen $x$\n"
                                     "#|   twice\n#| fig-alt: a\nplot()", **png)),
    (folds_hide_no_directive, bad_cell("#| label: fig-a\n#| fig-cap: >-\n#|   What they\n"
                                       "#|   hide: a dot.\nplot()")),
    (lines_fit_the_page, bad_cell(f"short = 1\n{'x'*101} = 1")),
    (imports_stand_alone, bad_cell("import torch\nx = 1")),
    (no_cell_failed, bad_cell("1/0", output_type="error", ename="ZeroDivisionError", evalue="",
                              traceback=[])),
    (outputs_name_no_folder, bad_cell("1", **stream, text=["saved to /home/me/a.png"])),
    (outputs_name_no_folder, bad_cell("1", output_type="display_data", metadata={},
                                      data={"text/plain": ["PosixPath('/tmp/x')"]})),
    (slow_cells_are_empty, bad_cell("#| slow\n1", **stream, text=["1"])),
    (slow_cells_are_empty, bad_cell("#| eval: false\n1", **stream, text=["1"])),
    (is_clean, dict(bad_cell("1"), execution_count=3)),
    (title_stands_alone, dict(cell_type="markdown", id="a", metadata={},
                              source=["# Title\n\n> Description.\n\nText."])),
]


@pytest.mark.parametrize("rule,cell", bad,
                         ids=[f"{rule.__name__}-{n}" for n, (rule, _) in enumerate(bad)])
def test_rules_see_what_is_wrong(rule, cell):
    assert len(list(rule(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))) == 1


@pytest.mark.parametrize("page", pages, ids=lambda p: p.stem)
def test_notebook_is_written_as_nbdev_writes_it(page):
    text = page.read_text(encoding="utf-8")
    assert nb2str(json.loads(text)) == text


# ---- rules for the modules


def floor():
    exports = {p: re.search(r"#\| *default_exp +(\w+)", p.read_text(encoding="utf-8"))
               for p in pages}
    return {found[1]: int(p.name[:2]) for p, found in exports.items() if found}


def test_every_module_has_a_notebook():
    assert {m.stem for m in modules} == set(floor())


@pytest.mark.parametrize("module", modules, ids=lambda p: p.stem)
def test_module_imports_only_lower_floors(module):
    number, imported = floor(), superpos_imports(module.read_text(encoding="utf-8"))
    assert all(number[name] < number[module.stem] for name in imported), imported
    assert "plot" not in imported or module.stem == "report", "only pages and reports draw"


@pytest.mark.parametrize("module", modules, ids=lambda p: p.stem)
def test_module_needs_only_numerical_packages(module):
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "scipy", "sklearn"}
    if module.stem == "plot": allowed |= {"matplotlib", "seaborn"}
    # imported by `toy.train` alone, and only where numba is there
    if module.stem == "fused": allowed |= {"numba"}
    nodes = ast.parse(module.read_text(encoding="utf-8")).body
    names = [n for node in nodes if isinstance(node, ast.Import)
             for n in (a.name for a in node.names)]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    assert not {n.split(".")[0] for n in names} - allowed, "import it in the function that uses it"


def undocumented(source):
    "Public names without a docstring, parameters and fields of dataclasses without a comment."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}

    def bare(nodes):  # those without a comment of their own on one of their lines
        spans = [set(range(node.lineno, node.end_lineno + 1)) & commented for node in nodes]
        return [node for k, node in enumerate(nodes)
                if not spans[k].difference(*spans[:k], *spans[k + 1:])]

    def visit(node, name, is_method=False):
        is_class = isinstance(node, ast.ClassDef)
        if not ast.get_docstring(node): yield f"{name} has no docstring"
        if is_class and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
            yield from (f"{name}: {field.target.id} has no comment" for field in bare(fields))
        if not (is_class or is_method):
            given = node.args
            parameters = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs,
                          given.kwarg]
            yield from (f"{name}: {a.arg} has no comment"
                        for a in bare([a for a in parameters if a]))
        for method in node.body if is_class else ():
            if isinstance(method, ast.FunctionDef) and method.name[0] != "_":
                yield from visit(method, f"{name}.{method.name}", is_method=True)

    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
            yield from visit(node, node.name)


@pytest.mark.parametrize("module", modules, ids=lambda p: p.stem)
def test_public_names_are_documented(module):
    missing = list(undocumented(module.read_text(encoding="utf-8")))
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("source,missing", [
    ('def f(\n    a: int,  # a number\n    /, *,\n    b=1,\n    **c,  # more\n)'
     ' -> int:  # a number\n    "Adds."', ["f: b has no comment"]),
    ("def f(a: int): pass", ["f has no docstring", "f: a has no comment"]),
    ('def f(a, b):  # both\n    "Adds."', ["f: a has no comment", "f: b has no comment"]),
    ('@dataclass(frozen=True)\nclass A:\n    "Holds."\n    x: int  # a number\n    y: int\n'
     '    def m(self): pass', ["A: y has no comment", "A.m has no docstring"]),
    ('def _f(a): pass\nclass B(Exception): "Bad."\nx = 1', [])])
def test_undocumented_is_seen(source, missing):
    assert list(undocumented(source)) == missing


def test_package_is_what_the_notebooks_export(tmp_path):
    shutil.copytree(root/"nbs", tmp_path/"nbs", symlinks=True)
    shutil.copy(root/"settings.ini", tmp_path)
    (tmp_path/"superpos").mkdir()
    shutil.copy(root/"superpos"/"__init__.py", tmp_path/"superpos")
    subprocess.run([shutil.which("nbdev_export", path=Path(sys.executable).parent)], cwd=tmp_path,
                   check=True, capture_output=True)
    fresh, kept = ({p.name: p.read_text(encoding="utf-8")
                    for p in (folder/"superpos").glob("*.py")} for folder in (tmp_path, root))
    assert sorted(fresh) == sorted(kept)
    assert not [name for name in fresh if fresh[name] != kept[name]], "run nbdev_export"


# ---- rules for the site


def sidebar(entry):
    if isinstance(entry, str): return [entry]
    return [page for e in entry.get("contents", ()) for page in sidebar(e)]


def test_sidebar_lists_every_notebook_once():
    site = yaml.safe_load((root/"_quarto.yml").read_text(encoding="utf-8"))["website"]
    assert sorted(sidebar(site["sidebar"])) == [p.name for p in pages]


def test_addresses_differ():
    addresses = [re.sub(r"^\d+_", "", p.stem) for p in pages]
    assert len(set(addresses)) == len(addresses)


def test_readme_is_the_first_page():
    stale = [path.name for path, contents in readme(root).items() if not path.exists()
             or path.read_bytes() != contents]
    assert not stale, "run `make write`"
