"""The rendered site in a real browser, opened from disk: a headless Chromium or Chrome.

The site is `_docs` if that holds the pages as they are written now; otherwise a few pages are
rendered for these tests.
"""
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from superpos.book import _is_study, _page_name, _written, notebooks, reference

root = Path(__file__).resolve().parent.parent
few = "index.ipynb", "01_plot.ipynb", "19_absolute_value.ipynb", "71_reference.ipynb"
phone, desk, columns = 390, 1400, 100
rendering = """
from superpos.book import render
if __name__ == "__main__": render(executed=False)
"""


def is_fresh(site: Path) -> bool:
    kept = site/"notebooks"
    if not (site/"book.js").exists(): return False
    if not filecmp.cmp(root/"nbs"/"styles.css", site/"styles.css", shallow=False): return False
    return all((kept/nb.name).exists() and _written(nb) == _written(kept/nb.name)
               for nb in notebooks(root))


def render_few(folder: Path) -> Path:
    for name in ("superpos", "settings.ini", "_quarto.yml"):
        (shutil.copytree if (root/name).is_dir() else shutil.copy)(root/name, folder/name)
    (folder/"nbs").mkdir()
    for name in (*few, "styles.css", "favicon.svg"): shutil.copy(root/"nbs"/name, folder/"nbs")
    (folder/"nbs"/"_quarto.yml").symlink_to("../_quarto.yml")
    env = os.environ | dict(PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
    (folder/"rendering.py").write_text(rendering)
    done = subprocess.run([sys.executable, "rendering.py"], cwd=folder, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder/"_docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    if (root/"_docs").exists() and is_fresh(root/"_docs"):
        return shutil.copytree(root/"_docs", folder/"_docs")
    return render_few(folder)


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    "A function that opens a page, and returns what it has become and what the console said."
    names = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("no chromium or google-chrome on the PATH (on Debian: apt install chromium)")
    profile = tmp_path_factory.mktemp("profile")

    def opened(page: Path, *flags: str, milliseconds: int = 5000) -> tuple[str, list[str]]:
        fixed = ["--headless", "--hide-scrollbars", "--no-sandbox", "--disable-gpu",
                 "--disable-background-networking", "--no-first-run", "--window-size=1200,900",
                 "--enable-logging=stderr", f"--user-data-dir={profile}",
                 f"--virtual-time-budget={milliseconds}", "--dump-dom"]
        done = subprocess.run([found, *fixed, *flags, page.as_uri()], capture_output=True,
                              text=True, timeout=600)
        assert done.returncode == 0 and "<html" in done.stdout, done.stderr[-2000:]
        return done.stdout, re.findall(r"CONSOLE[:(]\d+\)?\] (.*)", done.stderr)

    return opened


# ---- every page, at the width of a phone and of a screen, light and dark

tour = """<!doctype html><meta charset="utf-8"><body><script>
const pages = PAGES, seen = {};
const later = (ms) => new Promise((done) => setTimeout(done, ms));
const channels = (colour) => {
  const c = colour.match(/[\\d.]+/g).map(Number);
  return c.length < 4 ? [...c, 1] : c;
};
const over = (top, below) => top.slice(0, 3)
  .map((c, i) => c*top[3] + below[i]*(1 - top[3])).concat(1);
const linear = (v) => v <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4;
const light = (c) => [.2126, .7152, .0722].reduce((sum, w, i) => sum + w*linear(c[i]/255), 0);
const ratio = (a, b) => {
  const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + .05)/(y + .05);
};
const faint = (frame) => {
  const found = {}, view = frame.contentWindow;
  const known = new Map([[null, {paper: [255, 255, 255, 1], opacity: 1}]]);
  const behind = (e) => {
    if (!known.has(e)) {
      const above = behind(e.parentElement), style = view.getComputedStyle(e);
      const paper = over(channels(style.backgroundColor), above.paper);
      known.set(e, {paper, opacity: above.opacity*style.opacity, style});
    }
    return known.get(e);
  };
  for (const e of frame.contentDocument.querySelectorAll("body *")) {
    const unread = "svg, .anchorjs-link, math annotation, script, noscript";
    if (!e.getClientRects().length || e.closest(unread)) continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const {paper, opacity, style} = behind(e);
    if (style.visibility === "hidden") continue;
    const text = channels(style.color);
    text[3] *= opacity;
    const needed = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
    const got = ratio(over(text, paper), paper), name = [e.tagName.toLowerCase(), ...e.classList];
    const where = `${name.join(".")} in ${e.parentElement.className}: ${style.color}`;
    if (got < needed) found[where] = got.toFixed(2);
  }
  return found;
};
const code = (frame) => {
  for (const fold of frame.contentDocument.querySelectorAll("details")) fold.open = true;
  const blocks = [...frame.contentDocument.querySelectorAll("main div.sourceCode > pre")];
  return blocks.filter((pre) => pre.getClientRects().length).map((pre) => {
    const lines = pre.querySelector("code").textContent.trimEnd().split("\\n");
    const style = frame.contentWindow.getComputedStyle(pre);
    return {columns: Math.max(...lines.map((line) => line.length)), lines: lines.length,
      high: pre.querySelector("code").getBoundingClientRect().height/parseFloat(style.lineHeight),
      size: parseFloat(style.fontSize), cut: pre.scrollWidth > pre.clientWidth + 1};
  });
};
const shares = (body) => {
  const main = body.querySelector("main"), start = main.getBoundingClientRect();
  const pictures = [...main.querySelectorAll("figure, .cell-output-display svg, main img")]
    .filter((e) => e.getBoundingClientRect().height > 50);
  const blocks = [...main.querySelectorAll("div.sourceCode")]
    .filter((e) => !e.closest("details:not([open])"));
  const high = blocks.reduce((sum, e) => sum + e.getBoundingClientRect().height, 0);
  const first = pictures.length ? pictures[0].getBoundingClientRect().top : NaN;
  return {high: Math.round(start.height), code: high/start.height,
    first: Math.round(first + body.defaultView.scrollY)};
};
const judged = async (frame) => {  // by axe-core, but for the contrast, which `faint` measures
  const script = frame.contentDocument.createElement("script");
  const loaded = new Promise((done) => script.onload = done);
  script.src = "axe.min.js";
  frame.contentDocument.head.append(script);
  await loaded;
  const {violations} = await frame.contentWindow.axe.run(frame.contentDocument, {
    resultTypes: ["violations"], rules: {"color-contrast": {enabled: false}}});
  return violations.filter((v) => ["serious", "critical"].includes(v.impact))
    .map((v) => `${v.id}: ${v.nodes.length} of ${v.nodes[0].html.slice(0, 120)}`);
};
const look = async (page) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = "width: PHONEpx; height: 800px; border: 0";
  frame.src = page;
  const loaded = new Promise((done) => frame.onload = done);
  document.body.append(frame);
  await loaded;
  await later(60);
  const body = frame.contentDocument, view = frame.contentWindow;
  frame.style.width = "DESKpx";
  await later(60);
  const shape = shares(body);
  const button = body.querySelector(".book-beside button");
  const folds = "main details:is(.code-fold, .book-signature)";
  const closed = () => body.querySelectorAll(`${folds}:not([open])`).length;
  const pressed = button && [closed(), button.click(), closed(), button.click(), closed()];
  frame.style.width = "PHONEpx";
  await later(60);
  const width = body.documentElement.scrollWidth;
  const sticksOut = (e) => e.getBoundingClientRect().right > PHONE + 1
    && !e.closest("pre, .sd-table, math");
  const wide = width <= PHONE ? [] : [...body.querySelectorAll("main *")].filter(sticksOut)
    .map((e) => e.tagName.toLowerCase() + "." + e.className).slice(0, 3);
  const cut = [...body.querySelectorAll("main .sd-table, main :not(.sd-table) > table")]
    .filter((e) => e.scrollWidth > e.clientWidth + 1);
  const edges = cut.map((e) => view.getComputedStyle(e).backgroundImage.includes("gradient"));
  const pictures = [...body.images];
  const cards = [...body.querySelectorAll("main table.book-cards td")].map((cell) => ({
    name: view.getComputedStyle(cell, "::before").content,
    shape: view.getComputedStyle(cell).display,
    out: cell.getBoundingClientRect().right > PHONE}));
  const said = {title: body.title, width, wide, shape, pressed, edges, cards,
    folded: body.querySelectorAll(folds).length, faint: faint(frame),
    words: body.querySelector("main").innerText.length,
    blind: pictures.filter((i) => !i.alt.trim()).length,
    broken: pictures.filter((i) => !i.naturalWidth).length,
    afar: view.performance.getEntriesByType("resource").map((r) => r.name)
      .filter((n) => !/^(file|data|blob):/.test(n)),
    folds: [...body.querySelectorAll("details")].map((d) => {
      const was = d.open;
      d.querySelector("summary").click();
      return d.open !== was;
    })};
  said.axe = await judged(frame);
  said.narrow = code(frame);
  frame.style.width = "DESKpx";
  await later(60);
  said.broad = code(frame);
  const paper = () => view.getComputedStyle(body.body).backgroundColor, before = paper();
  (view.smalldocsToggleScheme || view.quartoToggleColorScheme)();
  frame.style.width = "1200px";
  await later(200);
  said.toggled = [before, paper()];
  said.dark = faint(frame);
  said.turned = [...body.querySelectorAll("main img[data-kind]")].map((i) =>
    [i.dataset.kind, view.getComputedStyle(i).filter.includes("invert")]);
  (view.smalldocsToggleScheme || view.quartoToggleColorScheme)();
  frame.remove();
  return said;
};
(async () => {
  for (const page of pages) try { seen[page] = await look(page); }
    catch (e) { seen[page] = {failed: String(e)}; }
  document.body.textContent = JSON.stringify(seen);
  document.body.id = "finished";
})();
</script>"""


@pytest.fixture(scope="module")
def toured(site, browse):
    "What a visit to every page found, by page, and what the console said."
    pages = sorted(p.name for p in site.glob("*.html"))
    asked = dict(PAGES=json.dumps(pages), PHONE=str(phone), DESK=str(desk))
    script = re.sub("PAGES|PHONE|DESK", lambda m: asked[m[0]], tour)
    (site/"tour.htm").write_text(script, encoding="utf-8")
    shutil.copy(root/"tests"/"axe.min.js", site)
    page, console = browse(site/"tour.htm", "--allow-file-access-from-files",
                           milliseconds=2000*len(pages))
    found = re.search(r'<body id="finished">(.*)</body>', page, re.S)
    assert found, page[-1000:]
    seen = json.loads(unescape(found[1]))
    assert sorted(seen) == pages and len(pages) >= len(few)
    return seen, console


def test_every_page_loads_without_errors(toured):
    seen, console = toured
    assert not console
    assert {page: s["failed"] for page, s in seen.items() if "failed" in s} == {}
    assert min(s["words"] for s in seen.values()) > 200


def test_pictures_are_there_and_described(toured):
    seen, _ = toured
    counts = {page: (s["broken"], s["blind"]) for page, s in seen.items()}
    assert {page: count for page, count in counts.items() if any(count)} == {}


def test_nothing_comes_from_the_network(toured):
    assert {page: s["afar"] for page, s in toured[0].items() if s["afar"]} == {}


def test_pages_fit_a_phone(toured):
    widths = {page: (s["width"], s["wide"]) for page, s in toured[0].items()}
    assert {page: wide for page, wide in widths.items() if wide[0] > phone} == {}


def test_tables_that_scroll_show_an_edge(toured):
    edges = [edge for s in toured[0].values() for edge in s["edges"]]
    assert edges and all(edges)


def test_code_keeps_its_lines(toured):
    for page, s in toured[0].items():
        for block in s["broad"]:
            fits = not block["cut"] or block["columns"] > columns
            assert block["size"] >= 14 and fits, f"{page}: {block}"
        for block in s["narrow"] + s["broad"]:
            assert block["high"] < block["lines"] + 1, f"{page}: a line is wrapped: {block}"
    assert any(b["columns"] > 90 for s in toured[0].values() for b in s["broad"])
    assert any(b["cut"] for s in toured[0].values() for b in s["narrow"])


@pytest.mark.parametrize("scheme", ["faint", "dark"])
def test_text_stands_out_from_its_background(toured, scheme):
    assert {page: s[scheme] for page, s in toured[0].items() if s[scheme]} == {}


def test_nothing_serious_stands_in_the_way_of_assistive_technology(toured):
    assert {page: s["axe"] for page, s in toured[0].items() if s["axe"]} == {}


def test_pages_respond(toured):
    for page, s in toured[0].items():
        assert len(set(s["toggled"])) == 2, f"{page}: light and dark look alike"
        assert all(s["folds"]), f"{page}: a fold does not open"


def test_code_of_studies_is_folded(site, toured):
    for page, s in sorted(toured[0].items()):
        shape = s["shape"]
        print(f"{page:<26}{shape['high']:>8} px, code {shape['code']:4.0%}, first figure at "
              f"{shape['first'] or '–'}")
    studies = {p.stem for p in (root/"nbs").glob("*.ipynb") if _is_study(p)}
    seen = {page: s for page, s in toured[0].items()
            if any(page == _page_name(f"{stem}.html") for stem in studies)}
    assert seen and max(s["shape"]["code"] for s in seen.values()) <= .2
    for page, s in toured[0].items():
        assert s["shape"]["code"] <= .5 and bool(s["pressed"]) == bool(s["folded"]), page
        if s["pressed"]:
            closed, _, none, _, again = s["pressed"]
            assert closed <= again > none == 0, page


def test_every_page_begins_with_its_figure(toured):
    firsts = {page: s["shape"]["first"] for page, s in toured[0].items() if s["shape"]["first"]}
    assert {page: first for page, first in firsts.items() if first >= 900} == {}
    assert "index.html" in firsts


def test_drawings_are_turned_in_the_dark(toured):
    turned = [tuple(kind) for s in toured[0].values() for kind in s["turned"]]
    assert set(turned) <= {("book-drawing", True), ("book-photograph", False)}
    assert ("book-drawing", True) in turned


def test_rows_are_cards_on_a_phone(toured):
    cards = [(page, card) for page, s in toured[0].items() for card in s["cards"]]
    assert cards and not [page for page, card in cards if card["out"]]
    assert {card["shape"] for _, card in cards} <= {"grid", "none"}
    assert {"", "none", "normal"}.isdisjoint(card["name"] for _, card in cards)


def test_pages_are_light(site):
    sizes = {p.name: p.stat().st_size for p in site.glob("*.html")}
    assert {name: size for name, size in sizes.items() if size > 1.5e6} == {}


def search(site: Path, browse, words: str) -> list[str]:
    asks = """<script>addEventListener("load", () => {
      const box = document.querySelector(".smalldocs-search input");
      box.value = WORDS; box.dispatchEvent(new Event("input"));
    });</script></body>""".replace("WORDS", json.dumps(words))
    index = (site/"index.html").read_text(encoding="utf-8")
    (site/"asked.htm").write_text(index.replace("</body>", asks), encoding="utf-8")
    page, console = browse(site/"asked.htm")
    assert not console
    return re.findall(r'class="search-result" href="(?:\./)?([^"]+)"', page)


def test_search_answers_from_disk(site, browse):
    if 'content="smalldocs' not in (site/"index.html").read_text(encoding="utf-8"):
        pytest.skip("the search box is Quarto's")
    found = search(site, browse, "circuit_diagram")
    assert "plot.html" in {address.partition("#")[0] for address in found}
    assert all((site/address.partition("#")[0]).exists() for address in found)


# ---- what lies beside the pages


def test_every_page_has_its_source_its_notebook_and_its_module(site):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        beside = re.search(r'<p class="book-beside">(.*?)</p>', text)
        addresses = re.findall(r'href="([^"]+)"', beside[1])
        kept = site/addresses[1]
        assert _written(kept) == _written(root/"nbs"/kept.name)
        assert addresses[0].endswith(f"/nbs/{kept.name}")
        exports = re.search(r"#\| *default_exp +(\w+)", kept.read_text(encoding="utf-8"))
        modules = [f"reference.html#superpos.{exports[1]}"] if exports else []
        assert addresses[2:] == modules, page.name
        assert text.count('class="book-beside"') == 1


def test_contents_for_programs(site):
    text = (site/"llms.txt").read_text(encoding="utf-8")
    assert text.startswith("# superpos\n\n> ") and text.count("\n## ") >= 2
    entries = re.findall(r"^- \[.+?\]\(https://superpos\.github\.io/superpos/([\w.]+)\): \S.*$",
                         text, re.M)
    assert set(entries) == {p.name for p in site.glob("*.html")}
    assert len(entries) == len(set(entries)) == text.count("\n- ")


def test_reference_is_current():
    page = json.loads((root/"nbs"/"71_reference.ipynb").read_text(encoding="utf-8"))
    stored = page["cells"][-1]["outputs"][0]["data"]["text/markdown"]
    assert "".join(stored) == reference(root), "run `make write`"


# ---- the colours of the style sheet, without a browser


def variables(block: str) -> dict[str, str]:
    return dict(re.findall(r"--book-([\w-]+): (#[0-9a-f]{3,6});", block))


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(c*2 for c in colour[1:])
    values = [int(digits[i:i + 2], 16)/255 for i in (0, 2, 4)]
    return sum(w*(v/12.92 if v <= .04045 else ((v + .055)/1.055)**2.4)
               for w, v in zip((.2126, .7152, .0722), values))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + .05)/(low + .05)


def test_contrast_is_that_of_the_standard():
    assert contrast("#fff", "#000000") == pytest.approx(21)
    assert contrast("#777", "#ffffff") == pytest.approx(4.48, abs=.01)


@pytest.mark.parametrize("selector", [":root", ".quarto-dark"])
def test_colours_stand_out(selector):
    sheet = (root/"nbs"/"styles.css").read_text(encoding="utf-8")
    block = re.search(rf"(?m)^{re.escape(selector)} \{{(.*?)^\}}", sheet, re.S | re.M)
    colours = variables(block[1])
    ratios = {(ink, paper): contrast(colours[ink], colours[paper])
              for ink in ("ink", "quiet", "link") for paper in ("paper", "tint")}
    assert min(ratios.values()) >= 4.5, ratios
