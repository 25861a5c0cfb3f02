"The command line: exit codes, one sentence for what goes wrong, help, JSON, reports and Ctrl-C."
import dataclasses
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
import typing
from pathlib import Path

import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from PIL import Image
from safetensors.torch import save_file

from superpos import __version__, acquire, cli, learn
from superpos.circuit import Circuit
from superpos.cli import main
from superpos.data import shapes
from superpos.learn import Plan
from superpos.sparsify import methods
from superpos.target import ablations
from superpos.toy import Toy

net = """import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(),
                         nn.Conv2d(12, UNITS, 3, 2, 1)).train()

def grey():
    return nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 4, 5, 2))

class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.c = nn.Conv2d(6, 4, 3, 2, 1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(x + self.b(x).relu())

def skip(): return Skip()
def broken(): raise OSError("the disk is gone")

def valid(): return nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 4, 5, 2))
def words(): return "a network"
def halves(x): return x/2
def brightness(x): return x.float().mean(1, keepdim=True)/255
def lost(x): return x.nowhere
"""
dissect = ("dissect --model tiny:build --layer 4 --images photos --k 40 --nulls 19 --show 2 "
           "--at centre --by values")
sources = os.environ.get("SUPERPOS_DATA", "")
folders = "--own photos/red --other photos/blue --background photos/green"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a module, weights and images."
    root = tmp_path_factory.mktemp("place")
    (root/"tiny.py").write_text(net.replace("UNITS", "4"))
    (root/"large.py").write_text(net.replace("UNITS", "24"))
    drawn = shapes(160, seed=0)
    for i, colour in enumerate(drawn.factors["colour"]):
        (root/"photos"/colour).mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.source[i].transpose(1, 2, 0)).save(root/"photos"/colour/f"{i:03}.png")
    return root


@pytest.fixture(autouse=True)
def there(place, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(place)
    monkeypatch.setenv("SUPERPOS_CACHE", str(tmp_path_factory.getbasetemp()/"cache"))
    monkeypatch.setenv("SUPERPOS_QUIET", "1")
    monkeypatch.delenv("SUPERPOS_DATA", raising=False)


@pytest.fixture
def said(capsys):
    "Runs a command line; its exit code, what it printed, and its errors."
    def run(line, *more):
        code = main([*line.split(), *more])
        out, err = capsys.readouterr()
        return code, out, err
    return run


@pytest.fixture(scope="module")
def state(place):
    torch.manual_seed(1)
    return {"0.weight": torch.randn(8, 3, 5, 5), "0.bias": torch.zeros(8),
            "2.weight": torch.randn(12, 8, 3, 3), "2.bias": torch.zeros(12),
            "4.weight": torch.randn(4, 12, 3, 3), "4.bias": torch.zeros(4)}


# ---- understanding what is typed


def test_overview(said):
    code, out, err = said("--help")
    shown = {line.split()[1] for line in out.splitlines() if line.startswith("│ ")}
    assert code == 0 and not err and {name.split()[0] for name in cli._commands()} <= shown
    assert said("") == (0, out, "")
    assert said("--version") == (0, f"{__version__}\n", "")
    assert said("studies") == said("studies --help")
    assert all(f"│ {name}" in said("studies")[1] for name in ("list", "show", "run", "resume"))


@pytest.mark.parametrize("width", [60, 66, 80, 100, 200])
def test_the_overview_is_what_cyclopts_says(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    cli._parser([])(["--help"], result_action="return_value")
    slow = capsys.readouterr().out
    assert cli.main(["--help"]) == 0 and capsys.readouterr().out == slow


def understood(line):
    "The command of a line, and what it is given."
    words = line.split()
    name = next(n for n in cli._commands() if words[:len(n.split())] == n.split())
    return cli._understood(name, words)


@pytest.mark.parametrize("name", cli._commands())
def test_help_teaches_by_example(said, name):
    code, out, _ = said(f"{name} --help")
    before, _, options = out.partition("─ Parameters ─")
    lines = before.replace("\\\n", " ").splitlines()[1:]
    examples = [line.strip() for line in lines if re.match(r"\s+(\w+=\S+ )?superpos ", line)]
    assert code == 0 and any(f"superpos {name}" in e for e in examples)
    assert "--json" in options and '[default: ""]' not in out
    for example in examples:                       # every example is understood as it stands
        asked = understood(example[example.index("superpos") + len("superpos"):])
        assert asked[0] in cli._commands() and asked[3] == ("--json" in example) and not asked[4]


@pytest.mark.parametrize("name", cli._commands())
def test_every_option_is_explained(said, name):
    told = " ".join(re.sub("[│╭╰─╮╯]", " ", said(f"{name} --help")[1]).split())
    for option in cli._options(cli._commands()[name]):
        assert option.annotation.__metadata__[-1].help in told and f"--{option.name}" in told


def test_help_names_what_there_is_to_choose_from(said):
    names = {cli.Strategy: acquire.strategies, cli.Protocol: learn.protocols,
             cli.Network: learn.networks}
    told = " ".join(re.sub("[│\n]", " ", said("label --help")[1]).split())
    for choices, known in names.items():
        assert set(typing.get_args(choices)) == set(known)
        assert f"[choices: {', '.join(typing.get_args(choices))}]" in told


def test_help_says_what_each_strategy_asks_for(said):
    told = said("label --help")[1].partition("─ Parameters ─")[0]
    assert set(re.findall(r"^ {4}(\w+) {2,}\w", told, re.M)) == set(acquire.strategies)


def test_every_field_of_a_plan_is_an_option():
    asked = dataclasses.asdict(cli.Training())
    said_at_once = {k: v for k, v in asked.items() if v is not None}
    assert Plan(**said_at_once) == Plan() and set(asked) == set(Plan.__dataclass_fields__)
    given = understood("label --images digits --no-flip --dims 3 --seed 5")[2]["plan"]
    assert (given.flip, given.dims, given.seed, given.loops) == (False, 3, 5, 10)


def test_the_shell_completes_options_and_choices():
    script = cli._parser(cli._commands()).generate_completion(shell="bash")
    assert all(word in script for word in ("dissect", "--layer", "cumulative_warm", "--own"))


@pytest.mark.parametrize("line,words", [
    ("disect --layer 4", 'Did you mean "dissect"?'), ("studies lst", 'Did you mean "list"?'),
    ("dissect --layer 4", "--model"), ("dissect --modle a", "--model instead of --modle"),
    ("dissect --model a --layer b --images c --colour red", "--colour"),
    ("dissect --model a --layer b --images c --unts 3", "Did you mean --units?"),
    ("circuit", "--unit"), ("toy --n many", '"many"'), ("studies show", "--study"),
    ("label", "--images"), ("dissect --model a --layer b --images c --size -4", '"-4" for --size'),
    ("dissect --model a --layer b --images c --workers 0", '"0" for --workers. Must be >= 1'),
    ("dissect --model a --layer b --images c --seed -1", '"-1" for --seed. Must be >= 0'),
    ("dissect --model a --layer b --images c --at edge", '"centre"'),
    ("circuit --unit 4:0 --method guess", '"snip"'),
    ("circuit --unit 4:0 --controls -1", '"-1" for --controls'),
    ("sparsify --unit 4:0 --seeds 0", '"0" for --seeds'),
    ("label --images digits --strategy best", '"least_confidence"'),
    ("toy --kind cube", '"relu_output"')])
def test_usage_errors_are_2(said, line, words):
    code, out, err = said(line)
    assert code == 2 and words in err and "Traceback" not in err and not out
    assert err.count("\n") == 1 and err.startswith("superpos")


# ---- one sentence for what goes wrong


wrong = [
    ("dissect --model nowhere:build --layer 4 --images photos", "--model nowhere:build",
     "nowhere.py"),
    ("dissect --model tiny:biuld --layer 4 --images photos", "'biuld'", "there is build"),
    ("dissect --model tiny:words --layer 4 --images photos", "str", "torch.nn.Module"),
    ("dissect --model tiny:broken --layer 4 --images photos", "--model tiny:broken",
     "OSError: the disk is gone"),
    ("dissect --model tiny --layer 4 --images photos", "--model tiny", "module:function"),
    ("dissect --model tiny.build --layer 4 --images photos", "--model tiny.build",
     "module:function"),
    ("dissect --model alexnett --layer 4 --images photos", "'alexnett'", "alexnet"),
    ("dissect --model tiny:build --layer conv4 --images photos", "'conv4'", "nearest names are"),
    ("dissect --model tiny:build --layer 4 --images nophotos", "--images nophotos",
     "folder of images"),
    ("dissect --model tiny:build --layer 4 --images empty", "no images in it", ".png"),
    ("dissect --model tiny:build --layer 4 --images mixed", "2 sizes", "--size"),
    ("dissect --model tiny:build --layer 4 --images few", "3 images", "at least 16"),
    ("dissect --model tiny:build --layer 4 --images photos --units 3,9", "got 9", "0..3"),
    ("dissect --model tiny:build --layer 4 --images photos --units a-b", "--units a-b", "0,5,7-9"),
    ("dissect --model tiny:build --layer 4 --images photos --units 9-4", "--units 9-4",
     "from the smaller number to the larger"),
    ("dissect --model tiny:build --layer 4 --images photos --units 1,1", "--units 1,1: 1 is there",
     "once"),
    ("dissect --model tiny:build --layer 4 --images photos --units 0-2,1", "1 is there twice",
     "once"),
    ("dissect --model tiny:grey --layer 2 --images digits --prepare tiny:brightness",
     "--prepare tiny:brightness: it makes 1 × 8 × 8 of images of 3 × 8 × 8", "do not fit"),
    ("dissect --model large:valid --layer 2 --images digits", "images of 8 × 8 pixels", "--size"),
    ("dissect --model tiny:build --layer 4 --images photos --prepare tiny:brightness",
     "--prepare tiny:brightness: it makes 1 × 32 × 32", "prepare them otherwise"),
    ("dissect --model tiny:build --layer 4 --images photos --prepare tiny:lost",
     "--prepare tiny:lost", "AttributeError"),
    (f"circuit --unit 4:0 --model tiny:build {folders} --prepare tiny:brightness",
     "--prepare tiny:brightness: it makes 1 × 32 × 32", "prepare them otherwise"),
    (f"sparsify --unit 4:0 --model tiny:build {folders} --keeps 0.1,0.1", "--keeps 0.1,0.1",
     "once"),
    ("dissect --model tiny:build --layer 4 --images photos --prepare grey", "--prepare grey",
     "imagenet"),
    ("dissect --model tiny:build --layer 4 --images photos --nulls 3", "level", "1/(nulls + 1)"),
    ("dissect --model tiny:build --weights none.safetensors --layer 4 --images photos",
     "none.safetensors", "no such file"),
    ("dissect --model tiny:build --weights cut.safetensors --layer 4 --images photos",
     "cut.safetensors", "plain weights"),
    ("dissect --model tiny:build --weights text.pth --layer 4 --images photos", "text.pth",
     "plain weights"),
    ("dissect --model tiny:build --weights evil.pth --layer 4 --images photos", "evil.pth",
     "nothing else is loaded"),
    ("dissect --model tiny:build --weights other.safetensors --layer 4 --images photos",
     "other.safetensors", "does not fit"),
    ("dissect --model tiny:build --weights nan.safetensors --layer 4 --images photos",
     "nan.safetensors", "not finite"),
    ("circuit --unit 4:0", "--model", "--dissection"),
    ("circuit --unit 4:0 --model tiny:build", "--own 0", "--dissection"),
    ("circuit --unit 4:0 --dissection photos", "--dissection photos", "superpos dissect"),
    (f"circuit --unit 4 --model tiny:build {folders}", "'4'", "layer:index"),
    (f"circuit --unit 4:7 --model tiny:build {folders}", "got 7", "0..3"),
    (f"circuit --unit 4:0 --model tiny:build {folders} --keep 2", "got 2", "fraction"),
    ("circuit --unit 4:0 --model tiny:build --own few --other photos/blue --background "
     "photos/green", "--own", "at least 5"),
    ("circuit --unit 4:0 --model tiny:build --own photos/red --other photos/blue", "--background",
     "folder of images"),
    (f"sparsify --unit 4:0 --model tiny:build {folders} --keeps some", "--keeps some", "0.01"),
    ("label --images digits --first 5000", "50,000", "lower first, ask or loops"),
    ("toy --density 2", "density", "(0, 1]"),
    ("studies list", "no saved results", "SUPERPOS_RESULTS"),
    ("studies show nothing", "'nothing'", "studies list"),
    ("studies run 39_two_circuits", "not inside a copy", "project"),
    ("data fetch imagenet", "'imagenet'", "https://image-net.org"),
    ("data fetch mnist", "'mnist'", "cifar10")]


@pytest.fixture(scope="module")
def rubbish(place, state):
    class Payload:
        def __reduce__(self): return os.mkdir, (str(place/"taken over"),)
    pickle.dump(dict(weight=Payload()), open(place/"evil.pth", "wb"))
    (place/"text.pth").write_text("these are no weights")
    save_file(state, place/"other.safetensors")
    save_file(state | {"4.bias": torch.full((4,), torch.nan)}, place/"nan.safetensors")
    (place/"cut.safetensors").write_bytes((place/"other.safetensors").read_bytes()[:200])
    save_file({"head.weight": torch.zeros(2)}, place/"other.safetensors")
    (place/"empty").mkdir()
    for n, name in enumerate(("mixed", "few")):
        (place/name).mkdir()
        for i in range(3):
            Image.new("RGB", (32, 32 + 4*(i == 2 and n == 0))).save(place/name/f"{i}.png")


@pytest.mark.parametrize("line,value,fix", wrong,
                         ids=[f"{line.split()[0]}-{value}" for line, value, _ in wrong])
def test_one_sentence_names_the_value_and_the_fix(said, rubbish, place, line, value, fix):
    code, out, err = said(line)
    assert code == 1 and not out
    assert value in err and fix in err
    assert err.count("\n") == 1 and err.startswith("superpos ") and "Traceback" not in err
    assert not (place/"taken over").exists()


def test_an_error_that_nobody_foresaw(said, monkeypatch):
    def do_toy(): return {}["nowhere"]
    monkeypatch.setattr(cli, "do_toy", do_toy)
    do_toy.__doc__ = cli.do_info.__doc__
    code, _, err = said("toy")
    assert code == 1
    assert err == "superpos toy: KeyError: 'nowhere'; --debug shows where it comes from\n"
    with pytest.raises(KeyError): main(["toy", "--debug"])


def test_without_a_network_fetch_says_what_to_put_where(said, monkeypatch, place):
    import requests

    from superpos import data
    def refuse(*given, **more): raise requests.ConnectionError("no route to host")
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    code, out, err = said("data fetch cifar10 --root sets")
    assert code == 1 and "cifar-10-python.tar.gz" in err
    assert str(Path("sets")/"cifar-10-batches-py") in err and "Traceback" not in err


# ---- what commands write


def check_report(path):
    "A page that holds all it shows."
    text = Path(path).read_text()
    soup = BeautifulSoup(text, "html.parser")
    assert soup.find("html")["lang"] == "en" and soup.title.text and soup.h1
    assert not soup.find_all(["script", "link", "iframe"])
    images = soup.find_all("img")
    assert images
    assert all(t["src"].startswith("data:image/png;base64,") and len(t["alt"]) > 15 for t in images)
    assert not re.search(r"https?://", text) and "prefers-color-scheme: dark" in text
    return soup


@pytest.fixture(scope="module")
def dissected(place):
    here = os.getcwd()
    os.chdir(place)
    try: assert main([*dissect.split(), "--out", "dissection"]) == 0
    finally: os.chdir(here)
    return place/"dissection"


def test_dissect_writes_a_folder(said, dissected):
    table = pd.read_csv(dissected/"units.csv")
    assert (sorted(table.unit if "unit" in table else [int(n[2:]) for n in table.name])
            == [0, 1, 2, 3])
    assert {"groups", "score", "q"} <= {*table}
    images = pd.read_csv(dissected/"images.csv")
    assert len(images) == 160
    assert all(Path(f).parent.name == label for f, label in zip(images.file, images.label))
    assert "4:0" in check_report(dissected/"report.html").text
    assert {p.suffix for p in (dissected/"figures").iterdir()} == {".png"}


def test_json(said, dissected):
    code, out, err = said(f"{dissect} --out dissection --json")
    found = json.loads(out, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert code == 0 and found["units"] == 4 and found["images"] == 160
    assert len(found["table"]) == 4 and found["report"].endswith("report.html")


def test_a_network_in_training_mode_and_other_weights_and_inputs(said, place, state, capsys):
    save_file(state, place/"w.safetensors")
    torch.save(state, place/"w.pth")
    ways = dict(a="", b="--weights w.safetensors", c="--weights w.pth", f="--batch 7",
                d="--weights w.pth --prepare tiny:halves", e="--prepare plain --size 28")
    line = f"{dissect} --units 0,2-3 --json"
    tables = {out: json.loads(said(f"{line} --out {out} {more}")[1])["table"]
              for out, more in ways.items()}
    assert {len(t) for t in tables.values()} == {3}
    assert tables["b"] == tables["c"] and tables["a"] != tables["b"]
    names = [[(row["name"], row["groups"]) for row in tables[k]] for k in "af"]
    assert names[0] == names[1]


def test_batches_are_of_the_asked_size(said, monkeypatch):
    from superpos import dissect as module
    def stop(*given, batch, **more): raise ValueError(f"batches of {batch}")
    monkeypatch.setattr(module, "dissect", stop)
    assert "batches of 3" in said(f"{dissect} --out sized --batch 3")[2]
    assert "batches of None" in said(f"{dissect} --out sized")[2]


def test_one_channel(said, place):
    "A network of one channel, by a function that makes one channel of three."
    line = "--model tiny:grey --prepare tiny:brightness"
    line = f"{line} --unit 2:1 --keep 0.5 --steps 5 --controls 1"
    code, out, err = said(f"circuit {line} {folders} --out one-circuit")
    assert code == 0, err
    assert check_report(place/"one-circuit"/"report.html").find("img", alt=re.compile("nodes"))


def test_units_at_their_strongest_place_by_direction(said, place):
    line = ("dissect --model tiny:build --layer 4 --images photos --k 40 --show 2 --at strongest "
            "--units 0,1")
    code, out, err = said(f"{line} --out strongest --json")
    assert code == 0 and len(json.loads(out)["table"]) == 2, err
    assert "places" not in pd.read_csv(place/"strongest"/"units.csv")
    told = check_report(place/"strongest"/"report.html").text
    assert "at = strongest" in told and "nulls = 199" in told and "smallest q" in told
    code, _, err = said("circuit --unit 4:0 --dissection strongest")
    assert code == 1 and "looks at the strongest of a unit's map" in err


@pytest.mark.skipif(not sources, reason="needs AlexNet's weights and photographs of ImageNet")
def test_units_known_to_be_double_are_found_by_default(said):
    "Hamblin et al. publish the images of units 9 and 161; the other four are drawn by lot."
    code, out, err = said("dissect --model alexnet --layer features.10 --size 224 --show 2 --json "
                          f"--weights {sources}/weights/alexnet_features.safetensors "
                          f"--images {sources}/imagenet-samples --units 9,11,77,140,161,200 "
                          "--out known")
    assert code == 0, err
    table = pd.DataFrame(json.loads(out)["table"]).set_index("name")
    for unit in ("features.10:9", "features.10:161"):
        assert table.groups[unit] > 1 and table.q[unit] <= .05


def test_a_report_does_not_say_that_there_are_none(said, place):
    line = f"{dissect.replace('--nulls 19', '--nulls 19 --level 0.05')} --units 0,1 --out none"
    assert json.loads(said(f"{line} --json")[1])["several_groups"] == 0
    lead = check_report(place/"none"/"report.html").find(class_="lead").text
    assert "not shown to answer to more than one group" in lead and "None" not in lead


def test_another_dissection_is_not_taken_for_this_one(said, dissected):
    code, _, err = said(dissect.replace("--nulls 19", "--nulls 59") + " --out dissection")
    assert code == 1 and "nulls = 19, asked for is 59" in err


def test_every_method_and_ablation_has_its_word():
    assert typing.get_args(cli.Method) == tuple(methods)
    assert typing.get_args(cli.Ablation) == ablations
    taken = {name for method in methods.values() for name in method.takes}
    assert {"objective", "steps", "seed", "ablation"} <= taken


@pytest.mark.parametrize("method", ["learned", "separate", "snip", "magnitude", "force"])
def test_circuit_writes_a_folder(said, place, method):
    out = f"circuit-{method}"
    code, printed, _ = said(f"circuit --unit 4:1 --model tiny:build {folders} --keep 0.3 --steps "
                            f"12 --controls 2 --method {method} --ablation mean --out {out} --json")
    found, about = json.loads(printed), json.loads((place/out/"summary.json").read_text())
    learned = dict(ablation="mean", steps=12) if method in ("learned", "separate") else {}
    objective = dict(objective="preserve") if method == "learned" else {}
    assert about["settings"] == dict(keep=.3, per="kernel", seed=0) | learned | objective
    assert code == 0 and found["groups"] == ["red", "blue"]
    assert abs(found["keep"] - .3) < .01 and len(found["controls"]) == 2
    assert 1 not in found["controls"]
    check_report(place/out/"report.html")
    cards = pd.read_csv(place/out/"cards.csv")
    assert {"whole network", "circuit", *(f"circuit, {a}" for a in ablations[1:]), "complement",
            "random"} == {*cards.test}
    assert "faithful: it" in check_report(place/out/"report.html").text
    assert {*cards.group} == {"red", "blue"}
    module = cli._network("tiny:build", "")
    kept = Circuit.load(place/out/"red.safetensors", module)
    assert str(kept.unit) == "4:1" and kept.method == method
    assert kept.cluster == "red" and abs(kept.keep - .3) < .01
    assert 0 <= found["jaccard"] <= 1


def test_circuit_where_branches_join(said, place):
    assert said(f"circuit --unit c:1 --model tiny:skip {folders} --keep 0.5 --steps 6 --controls 1 "
                "--out skipped")[0] == 0
    assert ({*pd.read_csv(place/"skipped"/"cards.csv").test}
            == {"whole network", "circuit", "complement", "random",
                *(f"circuit, {a}" for a in ("mean", "resample", "adversarial"))})
    assert "There is no diagram" in check_report(place/"skipped"/"report.html").text


def test_circuit_of_a_dissection(said, dissected, place):
    rows = json.loads(said(dissect.replace("--nulls 19", "--nulls 9") + " --level 0.99 --out "
                           "lenient --json")[1])["table"]
    unit = next(row["name"] for row in rows if row["groups"] > 1)
    code, out, _ = said(f"circuit --unit {unit} --dissection lenient --keep 0.3 --steps 10 "
                        "--controls 0 --out of-groups --json")
    assert code == 0 and json.loads(out)["groups"] == ["group 0", "group 1"]
    assert json.loads(out)["control_units"] == []
    assert "no evidence by itself" in (place/"of-groups"/"report.html").read_text()
    code, _, err = said("circuit --unit 4:0 --model tiny:build --own photos/red --other photos/red "
                        "--background photos/green")
    assert code == 1 and "must not overlap" in err
    table = pd.read_csv(dissected/"units.csv")
    one = table[table.groups == 1].name.iloc[0]
    code, _, err = said(f"circuit --unit {one} --dissection dissection")
    assert code == 1 and f"--other 1: {one} has 1 group of images" in err
    code, _, err = said("circuit --unit 2:0 --dissection dissection")
    assert code == 1 and "of layer '4'" in err
    code, _, err = said("circuit --unit 4:0 --dissection dissection --model large:build")
    assert code == 1 and "other weights" in err


def test_sparsify_writes_a_folder(said, place):
    line = (f"sparsify --unit 4:1 --model tiny:build {folders} --keeps 0.2,0.5 --seeds 2 --steps "
            "10 --json")
    code, out, _ = said(line)
    table = pd.read_csv(place/"frontier"/"frontier.csv")
    assert code == 0 and len(table) == 4 and {*table.keep} == {.2, .5}
    assert table.auroc_other.between(0, 1).all()
    check_report(place/"frontier"/"report.html")
    before = [p.stat().st_mtime_ns for p in sorted((place/"frontier"/"state").iterdir())]
    assert said(line)[1] == out
    assert [p.stat().st_mtime_ns for p in sorted((place/"frontier"/"state").iterdir())] == before


def test_label_writes_a_folder_and_goes_on(said, place):
    line = "label --images digits --first 30 --steps 6 --batch 16 --loops 2 --json"
    code, out, _ = said(line)
    assert code == 0 and [row["labelled"] for row in json.loads(out)["table"]] == [30, 60]
    check_report(place/"labels"/"report.html")
    assert said(line)[1] == out
    code, _, err = said(line.replace("--steps 6", "--steps 7"))
    assert code == 1 and "holds another run" in err and "steps" in err
    assert "{" not in err and "strategy" not in err


def test_toy_writes_a_folder(said, place):
    code, out, _ = said("toy --density 1,0.1 --steps 600 --json")
    assert code == 0 and [row["represented"] for row in json.loads(out)["table"]] == [2, 5]
    assert len(pd.read_csv(place/"toy"/"features.csv")) == 10
    assert Toy.load(place/"toy"/"toy.safetensors").n == 5
    check_report(place/"toy"/"report.html")
    assert said("toy --n 6 --m 3 --steps 50 --out three")[0] == 0


# ---- studies, data, info


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of one page."
    (tmp_path/"nbs").mkdir()
    (tmp_path/"settings.ini").write_text("[DEFAULT]\n")
    def page(*sources):
        cells = [dict(cell_type="code", id=f"c{n}", metadata={}, execution_count=None, outputs=[],
                      source=[s]) for n, s in enumerate(sources)]
        (tmp_path/"nbs"/"10_sums.ipynb").write_text(
            json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    monkeypatch.chdir(tmp_path)
    page("from pathlib import Path\nfrom superpos.core import cached", '#| slow\nassert not '
         'Path("stop").exists(), "stopped"\ncached(\'sum\', lambda a, b: a + b, a=1, b=2)',
         '#| gpu\nopen("gpu", "w").close()')
    return tmp_path


def test_studies_run_show_and_resume(said, project):
    page = (project/"nbs"/"10_sums.ipynb").read_bytes()
    (project/"nbs"/"stop").touch()
    code, _, err = said("studies run sums")
    assert code == 1 and "AssertionError: stopped" in err
    assert err.splitlines()[-1].startswith("superpos studies run: 10_sums did not finish")
    (project/"nbs"/"stop").unlink()
    assert json.loads(said("studies resume --json")[1]) == dict(finished=1, pages="10_sums")
    assert json.loads(said("studies resume --json")[1])["finished"] == 0
    code, out, _ = said("studies list --json")
    assert json.loads(out)["table"][0]["study"] == "sum"
    assert json.loads(out)["table"][0]["page"] == "10_sums"
    (file, shown), = json.loads(said("studies show 10_sums --json")[1]).items()
    assert file.startswith("sum-") and shown["params"] == dict(a=1, b=2)
    assert {"seconds", "date", "device", "torch"} <= {*shown["provenance"]}
    assert "a                 1" in said("studies show sum")[1]
    assert (project/"nbs"/"10_sums.ipynb").read_bytes() == page
    assert [p.name for p in (project/"nbs").glob("*.ipynb")] == ["10_sums.ipynb"]
    assert (project/"nbs"/"gpu").exists() == torch.cuda.is_available()
    assert "nearest names are" in said("studies run sns")[2]


def test_data(said, tmp_path, monkeypatch, state):
    monkeypatch.setenv("SUPERPOS_DATA", str(tmp_path))
    assert json.loads(said("data list --json")[1])["found"] == 0
    (tmp_path/"weights").mkdir()
    save_file(state, tmp_path/"weights"/"w.safetensors")
    assert "w.safetensors: 6 finite tensors" in json.loads(said("data check --json")[1])["weights"]
    (tmp_path/"weights"/"w.safetensors").write_bytes(b"no weights")
    code, _, err = said("data check")
    assert code == 1 and "1 of 1 sets cannot be used: weights" in err and "w.safetensors" in err


def test_a_truncated_archive_is_named(said, monkeypatch, tmp_path):
    from superpos import data
    name = "cifar-10-batches-py"
    url, known = data.archives[name]
    archive = tmp_path/url.rsplit("/", 1)[1]
    (tmp_path/"bytes").write_bytes(os.urandom(10**5))
    with tarfile.open(archive, "w:gz") as pack: pack.add(tmp_path/"bytes", f"{name}/a")
    archive.write_bytes(archive.read_bytes()[:50_000])
    monkeypatch.setitem(data.archives, name, (url, data._hash(archive, known)))
    code, _, err = said(f"data fetch cifar10 --root {tmp_path}")
    assert code == 1 and f"{archive} is damaged or cut short" in err and err.count("\n") == 1


@pytest.mark.parametrize("line", ["data list", "info", "studies list"])
def test_a_cache_that_cannot_be_written_is_not_needed(said, project, monkeypatch, line):
    (project/"file").touch()
    monkeypatch.setenv("SUPERPOS_CACHE", str(project/"file"/"cache"))
    (project/"nbs"/"results").mkdir()
    (project/"nbs"/"results"/"sum-0.json").write_text(json.dumps(dict(
        name="sum", params={}, value=3, provenance=dict(seconds=1, date="", device="cpu"))))
    code, out, err = said(line)
    assert code == 0 and not err, err


def test_sets_are_where_the_library_finds_them(monkeypatch, tmp_path):
    from superpos import data
    monkeypatch.setenv("SUPERPOS_CACHE", str(tmp_path))
    (tmp_path/"data"/"weights").mkdir(parents=True)
    (tmp_path/"data"/"cifar-10-batches-bin").mkdir()
    found = {name: place for name, place in cli._where().items() if place}
    assert found == {name: data.find_data(cli._sets[name][0]) for name in ("cifar10", "weights")}
    monkeypatch.setenv("SUPERPOS_DATA", str(tmp_path/"data"/"there"))
    (tmp_path/"data"/"there"/"weights").mkdir(parents=True)
    assert cli._where()["weights"] == data.find_data("weights")


@pytest.mark.parametrize("line", ["--help", "label --help", "data list", "circuit --help"])
def test_what_needs_no_torch_does_not_import_it(line):
    code = ("import sys\nfrom superpos.cli import main\n"
            f"assert main({line.split()}) == 0\n"
            "heavy = {'torch', 'torchvision', 'pandas', 'matplotlib', 'scipy'} & {*sys.modules}\n"
            "assert not heavy, heavy\n"
            f"assert {line!r} != '--help' or 'cyclopts' not in sys.modules")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env=os.environ | dict(PYTHONPATH=str(Path(cli.__file__).parent.parent)))
    assert ran.returncode == 0, ran.stderr


def test_info(said):
    found = json.loads(said("info --json")[1])
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found["data"]) == set(cli._sets) and found["machine"]["threads"] >= 1


def test_a_reader_who_has_read_enough():
    running = superpos("data list")
    running.stdout.close()
    assert running.stderr.read() == "" and running.wait(60) == 0


def test_what_pages_need():
    code = ('find_data("weights/a.safetensors")\nfolder(find_data(f"polysemantic/{x}"))\n'
            'cifar10("test")\nmy_cifar10()')
    assert cli._needs(code) == {"weights", "polysemantic", "cifar10"}


# ---- Ctrl-C


def superpos(line, **how):
    env = os.environ | dict(PYTHONPATH=str(Path(cli.__file__).parent.parent), OMP_NUM_THREADS="1")
    # what runs in the background of a shell ignores Ctrl-C
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-m", "superpos.cli", *line.split()],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                            preexec_fn=heard, **how)


def test_interrupted_dissection_goes_on(said, place):
    line = ("dissect --model large:build --layer 4 --images photos --k 40 --nulls 99 --units 0-15 "
            "--show 0 --out stopped")
    rows = place/"stopped"/"state"/"units.jsonl"
    running = superpos(line)
    until = time.monotonic() + 300
    while (running.poll() is None and time.monotonic() < until
           and not (rows.exists() and rows.read_text().count("\n") > 1)):
        time.sleep(.005)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 130 and not out and "Traceback" not in err
    kept = rows.read_text().splitlines()
    done = len(kept) - 1
    assert 1 <= done < 16
    assert err == (f"superpos dissect: stopped; {Path('stopped')/'state'} keeps what was finished "
                   f"({done} units); the same command goes on from there\n")
    assert said(line)[0] == 0
    assert rows.read_text().splitlines()[:done + 1] == kept
    assert len(pd.read_csv(place/"stopped"/"units.csv")) == 16


def test_interrupted_with_nothing_to_keep(said, monkeypatch):
    def stop(*given): raise KeyboardInterrupt
    monkeypatch.setattr(cli, "_network", stop)
    code, out, err = said(f"{dissect} --out fresh")
    assert code == 130
    assert err == ("superpos dissect: stopped; nothing was finished yet, so the same command "
                   "starts afresh\n")
    monkeypatch.setattr(cli, "_parser", stop)
    assert said("label --images digits") == (130, "",
                                             "superpos label: stopped; nothing was begun\n")
