"Reports: one file that holds all it shows, whatever is put into it."
import re

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib import pyplot as plt

from superpos.report import Picture, digits, html_table, made_with, report

nasty = '<script>alert("x")</script> & "quotes"'


def read(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.fixture
def page(tmp_path):
    "A page with all kinds of parts, everywhere a text that would be markup."
    fig, ax = plt.subplots()
    table = pd.DataFrame({nasty: [nasty, None], "share_of": [1.23456, np.nan], "n": [7, 12345]})
    parts = [nasty, table, Picture("one", fig, nasty, nasty), table.head(0), table]
    return read(report(tmp_path/"new"/"folder", nasty, nasty, {nasty: parts, "none": []}, nasty))


def test_all_text_is_text(page):
    assert not page.find_all(["script", "link", "iframe"])
    texts = [page.title, page.h1, page.h2, page.footer, page.figcaption, *page.find_all("p")]
    assert [t.text for t in texts] == [nasty]*7
    assert page.img["alt"] == nasty and page.th.text == nasty.replace("_", " ")


def test_nothing_is_fetched(page):
    assert page.img["src"].startswith("data:image/png;base64,")
    assert not re.search(r"https?://|url\(|@import", str(page))
    assert "prefers-color-scheme: dark" in page.style.text
    assert page.find("meta", attrs=dict(name="viewport"))


def test_figures_are_files_too_and_closed(tmp_path):
    fig, _ = plt.subplots()
    report(tmp_path, "t", "l", {"s": [Picture("one", fig, "c", "a")]}, "a")
    assert (tmp_path/"figures"/"one.png").read_bytes()[:4] == b"\x89PNG"
    assert not plt.fignum_exists(fig.number)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "report.html"]


def test_tables(page):
    first, empty, last = page.find_all("table")
    cells = [[cell.text for cell in row.find_all("td")] for row in first.find_all("tr")[1:]]
    assert cells == [[nasty, "1.23", "7"], ["–", "–", "12345"]]
    assert not empty.find_all("td") and first["id"] != last["id"]
    ids = [tag["id"] for tag in page.find_all(id=True)]
    assert len(ids) == len(set(ids))


def test_words_are_to_the_left_and_numbers_to_the_right():
    frame = pd.DataFrame(dict(a=["x"], b=[1.5], c=[2]))
    style = BeautifulSoup(html_table(frame, "t"), "html.parser").style.text
    assert re.findall(r"\.col(\d) \{\s*text-align: left", style) == ["0"]


@pytest.mark.parametrize("v,text", [(0., "0"), (1e-15, "0"), (.00123456, "0.00123"),
                                    (-12.345, "-12.3"), (12345.6, "12,346"), (999.6, "1,000")])
def test_digits(v, text):
    assert digits(v) == text


def test_settings_without_a_value_are_left_out():
    assert made_with(a=0, b="", c=None, d="x").startswith("a = 0, d = x. superpos ")
