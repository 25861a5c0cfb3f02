"Reports: one file that holds all it shows, whatever is put into it."
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from matplotlib import pyplot as plt
from torch import nn

from superpos.data import shapes
from superpos.dissect import Dissection
from superpos.field import pathway
from superpos.model import Unit, imagenet_input
from superpos.report import (
    Groups,
    Picture,
    _answer,
    _could_be_missed,
    _overview,
    as_text,
    control_units,
    digits,
    html_table,
    judge,
    made_with,
    plain,
    report,
    two_masks,
)
from superpos.target import Target

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


def test_plain_values_are_json():
    frame = pd.DataFrame(dict(a=[1, 2], b=[np.nan, .5]))
    found = plain(dict(frame=frame, array=np.arange(2), path=Path("x"),
                       tensor=torch.tensor([np.inf])))
    assert found == dict(frame=[dict(a=1, b=None), dict(a=2, b=.5)], array=[0, 1], path="x",
                         tensor=[None])
    json.dumps(found, allow_nan=False)


def test_text_for_a_terminal():
    found = dict(n=1234, x=.123456, names=("a", "b"), none=pd.DataFrame(),
                 table=pd.DataFrame(dict(word=["long word", "w"], value=[1.5, None])))
    assert as_text(found) == ("n                 1,234\nx                 0.123\n"
                              "names             a, b\n\nword       value\n"
                              "long word    1.5\nw              -")


@pytest.mark.parametrize("several,words", [
    (0, "They are not shown to answer to more than one group"),
    (1, "1 of them answers to more than one group"), (2, "2 of them answer to more than one")])
def test_what_is_not_shown_is_not_denied(several, words):
    found = Dissection(pd.DataFrame(dict(name=["a:0", "a:1"])), dict(layer="a", level=.05))
    said = _answer(found, several, 100)
    assert words in said and ("the others are not shown to" in said) == (several == 1)


def test_the_overview_is_sorted_by_p_and_shows_the_effect():
    table = pd.DataFrame(dict(p=[.5, .001, np.nan, .2, .001], apart=[3., 5, np.nan, 2, 7],
                              bound=[.2, .1, np.nan, .3, .1]))
    several = table.loc[[1, 4]]
    picture = _overview(table, several, .05)
    for ax, expected in zip(picture.figure.axes, ([.001, .001, .2, .5], [7, 5, 2, 3])):
        places, heights = np.concatenate([dots.get_offsets() for dots in ax.collections]).T
        assert places.tolist() == [1, 2, 3, 4] and heights.tolist() == expected
    plt.close(picture.figure)
    assert "Of the 3 others, 1 would have shown" in _could_be_missed(table.drop(several.index))
    assert _could_be_missed(table.head(0)) == ""


@pytest.fixture(scope="module")
def groups():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()
    net[2].weight.data[3], net[2].bias.data[3] = 0., 1.                 # a unit that is constant
    images = shapes(60, seed=0)
    thirds = [images.select(np.arange(60)[k::3]) for k in range(3)]
    return Groups.of(pathway(net, "2", (32, 32)), Unit("2", 0), thirds, imagenet_input, most=15)


def test_groups_are_split_and_told_apart(groups):
    assert [len(x) for x in groups.learn] == [9]*3 and [len(x) for x in groups.test] == [6]*3
    both = [torch.cat(half).flatten(1) for half in (groups.learn, groups.test)]
    assert not (both[0][:, None] == both[1]).all(-1).any()
    assert len(set(groups.names[:2])) == 2


def test_control_units_are_alive_and_others(groups):
    assert sorted(control_units(groups, 9)) == [1, 2, 4]
    assert control_units(groups, 2, seed=1) == control_units(groups, 2, seed=1)


def test_masks_of_a_unit_beside_those_of_controls(groups):
    asked = []
    def find(unit, own):
        asked.append((unit, own))
        target = Target(groups.path, unit)
        return torch.arange(len(target)) % 2 == own, target, {}
    masks, judged = two_masks(groups, find, [2, 4])
    assert asked == [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0), (4, 1)]
    assert [bool(mask[1]) for mask, *_ in masks] == [False, True]
    card = judge(groups, masks[1][1], 1, masks[1][0])
    row = judged[groups.names[1], "auroc_other"]
    assert row["value"] == card["auroc_other"] and len(row["controls"]) == 2
    assert two_masks(groups, find)[1] == {}
