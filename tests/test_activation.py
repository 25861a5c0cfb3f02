"Recording and patches: the whole pass, brute force over positions, networks that fall back."
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from scipy import stats

from superpos.activation import (
    Survey,
    _batch_size,
    _Reader,
    cut_patches,
    merge,
    record,
    strongest_patches,
    survey,
)
from superpos.field import effective_field, pathway, receptive_field
from superpos.model import ResNet8, SmallAlexNet, fingerprint, imagenet_input, layer_outputs


def network(kind):
    torch.manual_seed(0)
    return kind(width=4).eval().requires_grad_(False)

def bytes_of(n, *size, seed=0):
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize("position", [None, (0, 0), (3, 1)])
@pytest.mark.parametrize("kind,layer", [(SmallAlexNet, "features.6"), (SmallAlexNet, "features.10"),
                                        (ResNet8, "stages.1.conv2")])
def test_a_recording_equals_the_whole_pass(kind, layer, position):
    net, images = network(kind), bytes_of(5, 40, 48)
    before = fingerprint(net)
    found = record(net, layer, images, at=position or "centre", batch=2)
    whole = layer_outputs(net, [layer], imagenet_input(images))[layer]
    row, column = position or (whole.shape[2]//2, whole.shape[3]//2)
    np.testing.assert_allclose(found.values, whole[:, :, row, column], rtol=1e-4, atol=1e-6)
    assert found.position == (row, column) and found.layer == layer
    assert ("chain" in found.how) == (kind is SmallAlexNet) and "the window is all" in found.how
    assert fingerprint(net) == before and not any(m._forward_hooks for m in net.modules())

def test_the_top_is_sorted_and_ties_keep_their_order():
    net = network(SmallAlexNet)
    image = bytes_of(3, 64, 64)
    found = record(net, "features.6", image[[0, 1, 0, 2, 1]])
    for unit in range(4):
        top = found.top(unit, 5)
        assert (np.diff(found.values[top, unit]) <= 0).all() and sorted(top) == list(range(5))
        assert top.tolist().index(0) < top.tolist().index(2)
        assert top.tolist().index(1) < top.tolist().index(4)
    assert len(found.top(0)) == 5

def test_a_patch_alone_gives_the_same_response():
    net = network(SmallAlexNet)
    images = [bytes_of(1, h, w, seed=h)[0] for h, w in ((64, 64), (64, 90), (101, 67))]
    size = receptive_field(net, "features.6").rows.size
    found = strongest_patches(net, "features.6:2", images)
    assert found.pixels.shape == (3, 3, size, size)
    assert found.pixels.dtype == torch.uint8 and len(found) == 3
    for image, patch, response, (top, left) in zip(images, found.pixels, found.response,
                                                   found.corner):
        assert torch.equal(patch, image[:, top:top + size, left:left + size])
        canvas = torch.zeros(1, 3, 64, 64)
        path = pathway(net, "features.6", (64, 64))
        (a, b), (c, d) = path.window
        canvas[..., a:b, c:d] = imagenet_input(patch[None])
        torch.testing.assert_close(path(path.crop(canvas), unit=2)[0], response, rtol=1e-4,
                                   atol=1e-6)

def test_a_bad_unit_is_refused_before_any_image_is_read():
    class Unread(list):
        def __getitem__(self, i): pytest.fail("an image was read")
    for unit, message in (("features.6:99", "has units"), ("features.66:1", "no layer"),
                          ("features.6", "names no unit")):
        with pytest.raises(ValueError, match=message):
            strongest_patches(network(SmallAlexNet), unit, Unread([1]))


def grey(x): return x.float()/255


def test_networks_of_one_channel():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 5, padding=2), torch.nn.ReLU(),
                              torch.nn.MaxPool2d(2), torch.nn.Conv2d(4, 3, 3, padding=1)).eval()
    images = bytes_of(5, 20, 24)[:, :1]
    maps = layer_outputs(net, ["3"], grey(images))["3"].detach()
    found = record(net, "3", images, prepare=grey)
    np.testing.assert_allclose(found.values, maps[:, :, 5, 6], rtol=1e-4, atol=1e-6)
    inside = maps[:, :, 2:8, 2:10]
    strong = survey(net, "3", images, k=5, at="strongest", prepare=grey)
    torch.testing.assert_close(strong.top_values[1], inside[:, 1].flatten(1).amax(1).sort(
        descending=True).values, rtol=1e-4, atol=1e-6)
    patches = strongest_patches(net, "3:1", images, prepare=grey)
    cut = cut_patches(net, "3", [images[i] for i in strong.top(1, 5)], strong.places(1))
    assert patches.pixels.shape == (5, 1, 10, 10) and torch.equal(
        cut, patches.pixels[strong.top(1, 5)])


def test_a_linear_layer_over_channels_has_a_map():
    block = torchvision.models.convnext.CNBlockConfig
    torch.manual_seed(0)
    net = torchvision.models.ConvNeXt([block(8, None, 2)]).eval().requires_grad_(False)
    layer, images = "features.1.0.block.3", bytes_of(4, 64, 72)
    maps = layer_outputs(net, [layer], imagenet_input(images))[layer].movedim(3, 1)
    for at, wanted in dict(centre=maps[:, :, 8, 9], mean=maps.mean((2, 3))).items():
        np.testing.assert_allclose(record(net, layer, images, at=at).values, wanted, rtol=1e-3,
                                   atol=1e-6)
    energy = effective_field(net, f"{layer}:30", imagenet_input(images[:1]), (8, 9))
    (top, bottom), (left, right) = receptive_field(net, layer).window((8, 9))
    assert energy[top:bottom, left:right].sum() == pytest.approx(1, abs=1e-6)


# ---- surveys: bounded memory, resumed after a kill

class Table(torch.nn.Module):
    "A network whose units are given numbers: image i, whose first byte is i, has row i."
    def __init__(self, values):
        super().__init__()
        self.values, self.unit = torch.nn.Parameter(values), torch.nn.Identity()

    def forward(self, x): return self.unit(self.values[x[:, 0, 0, 0].long()])


def numbered(n):
    return torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 1, 1).contiguous()


def as_floats(x): return x.float()


@settings(max_examples=examples(120), deadline=None)
@given(n=st.integers(1, 60), units=st.integers(1, 4), k=st.integers(1, 20),
       sample=st.integers(1, 70), batch=st.integers(1, 20), levels=st.integers(1, 9),
       seed=st.integers(0, 99))
def test_a_survey_is_the_whole_table_in_small(n, units, k, sample, batch, levels, seed):
    # many ties
    table = torch.randint(-levels, levels, (n, units),
                          generator=torch.Generator().manual_seed(seed)).float()
    found = survey(Table(table).eval(), "unit", numbered(n), k=k, sample=sample, batch=batch,
                   seed=seed, prepare=as_floats)
    k = min(k, n)
    order = table.sort(dim=0, descending=True, stable=True).indices[:k].T
    assert torch.equal(found.top_images, order)
    assert torch.equal(found.top_values, table.T.gather(1, order))
    assert found.seen == n
    torch.testing.assert_close(found.mean, table.double().mean(0))
    torch.testing.assert_close(found.deviation, table.double().std(0, correction=0), atol=1e-7,
                               rtol=1e-6)
    assert torch.equal(found.sample_values, table[found.sample_images])
    assert len(set(found.sample_images.tolist())) == min(n, sample)


def test_the_sample_is_uniform():
    drawn = torch.cat([survey(Table(torch.zeros(50, 1)).eval(), "unit", numbered(50), k=1,
                              sample=10, seed=s, prepare=as_floats).sample_images
                       for s in range(200)])
    assert stats.chisquare(torch.bincount(drawn, minlength=50)).pvalue > 1e-3


def test_strata_cover_the_range():
    table = torch.randperm(200, generator=torch.Generator().manual_seed(0)).float()[:, None]
    found = survey(Table(table).eval(), "unit", numbered(200), k=3, sample=200, prepare=as_floats)
    low, middle, high = found.strata(0, (0, .5, .9, 1), each=5)
    assert table[low, 0].tolist() == [0, 25, 50, 74, 99]
    assert table[middle, 0].tolist() == [100, 120, 140, 159, 179]
    assert table[high, 0].tolist() == [180, 185, 190, 194, 199]
    with pytest.raises(ValueError, match="holds 20 of the 200 sampled images, asked for are 21"):
        found.strata(0, (0, .1), each=21)
    with pytest.raises(ValueError, match="must ascend"): found.strata(0, (.5, .1))
    with pytest.raises(ValueError, match="kept the 3 strongest"): found.top(0, 4)


@pytest.mark.parametrize("kind,layer", [(SmallAlexNet, "features.10"), (SmallAlexNet, "classifier"),
                                        (ResNet8, "stages.1"), (ResNet8, "bn1")])
@pytest.mark.parametrize("at,reduce", [("centre", lambda v: v[:, :, v.shape[2]//2, v.shape[3]//2]),
                                       ("maximum", lambda v: v.amax((2, 3))),
                                       ("mean", lambda v: v.mean((2, 3)))])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_any_layer_and_any_number(kind, layer, at, reduce, when):
    net, images = network(kind), bytes_of(6, 40, 40)
    values = layer_outputs(net, [layer], imagenet_input(images), when=when)[layer]
    expected = values if values.ndim == 2 else reduce(values)
    np.testing.assert_allclose(record(net, layer, images, at=at, when=when, batch=4).values,
                               expected, rtol=1e-4, atol=1e-6)
    found = survey(net, layer, images, at=at, when=when, batch=4, sample=6)
    np.testing.assert_allclose(found.sample_values, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer,size,limits", [
    ("features.6", (64, 70), "inside the image"), ("features.10", (24, 24), "do not fit into 24"),
    ("classifier", (40, 40), "has no map"), ("features.4", (64, 70), "inside")])
@pytest.mark.parametrize("when", ["pre", "post"])
def test_the_strongest_place_by_brute_force(layer, size, limits, when):
    net, images = network(SmallAlexNet), bytes_of(9, *size)
    found = survey(net, layer, images, at="strongest", when=when, vectors=True, k=4, batch=4)
    values = layer_outputs(net, [layer], imagenet_input(images), when=when)[layer]
    maps = values if values.ndim == 4 else values[:, :, None, None]
    # layers 4 and 6 see 23 pixels or 11; the outermost places of a map overhang the image
    inside = torch.ones(maps.shape[2:], dtype=torch.bool)
    if "inside" in limits:
        field = receptive_field(net, layer)
        for p in np.ndindex(*inside.shape):
            inside[p] = field.clipped(p, size) == field.window(p)
        assert inside.any() and not inside.all()
    assert limits in found.how
    assert list(found.map_shape) == list(maps.shape[2:])
    for unit in range(4):
        largest = maps[:, unit].masked_fill(~inside, -torch.inf).flatten(1).amax(1)
        for i, value, place, vector in zip(found.top(unit, 4), found.top_values[unit],
                                           found.places(unit), found.top_vectors[unit]):
            assert value == pytest.approx(largest[i].item(), rel=1e-4, abs=1e-6)
            assert inside[tuple(place)]
            torch.testing.assert_close(vector, maps[i, :, *place], rtol=1e-4, atol=1e-6)
            assert vector[unit] == value
        order = largest.sort(descending=True).values[:4]
        torch.testing.assert_close(found.top_values[unit], order, rtol=1e-4, atol=1e-6)


def test_a_survey_of_places_is_kept_and_says_what_it_has_not(tmp_path):
    net, images = network(SmallAlexNet), bytes_of(9, 40, 40)
    ask = dict(at="strongest", k=4, resume=tmp_path/"s.safetensors")
    found = survey(net, "features.6", images, vectors=True, **ask)
    again = Survey.load(tmp_path/"s.safetensors")
    assert found._tensors().keys() == again._tensors().keys()
    assert all(torch.equal(a, b) for a, b in zip(found._tensors().values(),
                                                 again._tensors().values()))
    assert (again.places(1) == found.places(1)).all()
    with pytest.raises(ValueError, match="vectors = True, asked for is False"):
        survey(net, "features.6", images, **ask)
    with pytest.raises(ValueError, match="vectors are kept at 'strongest' or 'maximum'"):
        survey(net, "features.6", images, vectors=True)
    with pytest.raises(ValueError, match="a survey at 'centre' keeps no places"):
        survey(net, "features.6", images, k=4).places(0)


def test_patches_are_grey_beyond_the_image():
    net, image = network(SmallAlexNet), bytes_of(1, 40, 48)[0]
    field = receptive_field(net, "features.6")
    patch, = cut_patches(net, "features.6", [image], [(0, 5)])
    (top, bottom), (left, right) = field.window((0, 5))
    assert top < 0 and patch.shape[1:] == (field.rows.size, field.columns.size)
    assert torch.equal(patch[:, -top:], image[:, :bottom, left:right])
    assert (patch[:, :-top] == patch[0, 0, 0]).all()
    with pytest.raises(ValueError, match="1 images but 2 places"):
        cut_patches(net, "features.6", [image], [(0, 5), (1, 5)])


def test_batches_are_as_large_as_caches_allow():
    net = network(SmallAlexNet)
    for size, batch in ((32, 64), (96, 64), (160, 16), (224, 8), (448, 8)):
        reader = _Reader(net, "classifier", (3, size, size), "centre", "pre", imagenet_input, False)
        assert _batch_size(reader, torch.zeros(3, size, size)) == batch
    assert survey(net, "classifier", bytes_of(3, 40, 40)).asked["batch"] == 64
    assert survey(net, "classifier", bytes_of(3, 40, 40), batch=5).asked["batch"] == 5


class Small(torch.nn.Module):
    "Has memory for three images at a time."
    def __init__(self, error):
        super().__init__()
        self.conv, self.error, self.calls = torch.nn.Conv2d(3, 2, 1), error, []

    def forward(self, x):
        if len(x) > 1: self.calls.append(len(x))
        if len(x) > 3: raise self.error
        return self.conv(x).mean((2, 3))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_batches_are_halved_where_memory_does_not_suffice(error):
    torch.manual_seed(0)
    net, images = Small(error).eval(), bytes_of(20, 4, 4)
    wrapped = torch.nn.Sequential(net).eval()
    found = survey(wrapped, "0", images, batch=10, sample=20)
    np.testing.assert_allclose(found.sample_values,
                               net.conv(imagenet_input(images)).mean((2, 3)).detach(), atol=1e-5)
    assert net.calls[:4] == [10, 5, 2, 2] and max(net.calls[3:]) == 2
    wrong = torch.nn.Sequential(Small(RuntimeError("shapes do not fit"))).eval()
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        survey(wrong, "0", images, batch=10)


def test_a_killed_survey_goes_on(tmp_path):
    script = f"""
import os, signal, sys, torch
from superpos.activation import survey
from superpos.model import SmallAlexNet
torch.manual_seed(0)
net = SmallAlexNet(width=4).eval()
pixels = torch.randint(0, 256, (40, 3, 40, 40), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(1))
class Deadly:
    reads = 0
    def __len__(self): return 40
    def __getitem__(self, i):
        self.reads += 1
        if self.reads > 70 and len(sys.argv) > 1: os.kill(os.getpid(), signal.SIGKILL)
        return pixels[i]
found = survey(net, "features.6", Deadly(), k=7, sample=9, batch=4,
               resume="{tmp_path}/s.safetensors", every=0)
found.save("{tmp_path}/final.safetensors")
"""
    run = lambda *arguments: subprocess.run([sys.executable, "-c", script, *arguments],
                                            env=os.environ | dict(SUPERPOS_QUIET="1"))
    assert run("die").returncode == -signal.SIGKILL
    assert 0 < Survey.load(tmp_path/"s.safetensors").seen <= 28
    assert run().returncode == 0
    torch.manual_seed(0)
    net = SmallAlexNet(width=4).eval()
    straight = survey(net, "features.6", bytes_of(40, 40, 40, seed=1), k=7, sample=9, batch=4)
    resumed = Survey.load(tmp_path/"final.safetensors")
    assert resumed.seen == 40
    assert all(torch.equal(a, b) for a, b in zip(straight._tensors().values(),
                                                 resumed._tensors().values()))


def same(a, b):
    assert a.asked == b.asked and a.seen == b.seen and a.how == b.how and a.first == b.first
    for name, tensor in a._tensors().items():
        if name in ("mean", "deviation"):
            torch.testing.assert_close(getattr(b, name), tensor, rtol=1e-12, atol=1e-7)
        else: assert torch.equal(getattr(b, name), tensor), name


@settings(max_examples=examples(800), deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 9), sample=st.integers(1, 50),
       levels=st.integers(1, 9), data=st.data())
def test_shards_merge_in_any_order_to_one_pass(n, k, sample, levels, data):
    rows = torch.randint(levels, (n, 3), generator=torch.Generator().manual_seed(n)).float()
    parts, net = data.draw(st.integers(1, n)), Table(rows).eval()  # few levels make many ties
    ask = lambda **other: survey(net, "unit", numbered(n), k=k, sample=sample, batch=4,
                                 prepare=as_floats, **other)
    left = [ask(shard=(i, parts)) for i in data.draw(st.permutations(range(1, parts + 1)))]
    while len(left) > 1:
        count = data.draw(st.integers(2, len(left)))
        some, left = merge(left[:count]), left[count:]
        at = data.draw(st.integers(0, len(left)))
        left = [*left[:at], some, *left[at:]]
        assert len(some.missing) == parts - len(some.asked.get("shards", range(parts)))
    same(ask(), merge(left))


def test_shards_keep_places_and_go_on_after_a_kill(tmp_path):
    net, images = network(SmallAlexNet), bytes_of(11, 40, 40)
    ask = lambda **other: survey(net, "features.6", images, at="strongest", vectors=True, k=4,
                                 sample=5, batch=3, **other)
    shards = [ask(shard=(i, 3), resume=tmp_path/f"{i}.safetensors") for i in (3, 1, 2)]
    loaded = [Survey.load(tmp_path/f"{i}.safetensors") for i in (1, 2, 3)]
    whole, found = ask(), merge(loaded)
    same(found, merge(shards))
    for name in ("top_images", "top_places", "sample_images"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    torch.testing.assert_close(found.top_vectors, whole.top_vectors, rtol=1e-4, atol=1e-6)
    found.save(tmp_path/"all.safetensors")
    same(found, Survey.load(tmp_path/"all.safetensors"))
    for other in ({}, dict(shard=(1, 3))):
        with pytest.raises(ValueError, match="shards"):
            ask(resume=tmp_path/"2.safetensors", **other)
    for several, message in [([], "no surveys"), ([*shards, shards[1]], "shard 1 of 3 comes twice"),
                             ([found, shards[0]], "comes twice"),
                             ([shards[0], ask(shard=(1, 2))], "another division"),
                             ([shards[0], survey(net, "features.6", images, k=5, shard=(1, 3))],
                              "surveys with at = ")]:
        with pytest.raises(ValueError, match=message): merge(several)
    for shard in ((0, 3), (4, 3), (1, 12)):
        with pytest.raises(ValueError, match=r"shard is \(1, n\)"): ask(shard=shard)


@pytest.mark.parametrize("file", [b"", b"\x80\x04\x95 pickled", save(dict(weight=torch.ones(2)))])
def test_a_damaged_or_foreign_file_is_not_a_survey(tmp_path, file):
    (tmp_path/"some.safetensors").write_bytes(file)
    with pytest.raises(ValueError, match="some.safetensors is not the file of a survey"):
        Survey.load(tmp_path/"some.safetensors")


def test_what_a_survey_refuses(tmp_path):
    net, images = network(SmallAlexNet), bytes_of(5, 40, 40)
    ask = lambda **other: survey(**dict(model=net, layer="features.6", images=images) | other)
    bright = images.clone()
    bright[3] = 255
    for wrong, message in [(dict(layer="features.66"), "no layer 'features.66'"),
                           (dict(images=[]), "no images"), (dict(k=0), "k must be"),
                           (dict(batch=-1), "batch must"),
                           (dict(at="center"), "at is 'centre'"),
                           (dict(when="after"), "when is 'pre'"),
                           (dict(bf16=True), "bf16 is for CUDA"),
                           (dict(at=(99, 0)), "positions up to"),
                           (dict(images=[*images[:3], bytes_of(1, 50, 40)[0]]),
                            r"image 3 is \(3, 50, 40\)"),
                           (dict(model=network(SmallAlexNet).train()), "training mode")]:
        with pytest.raises(ValueError, match=message): ask(**wrong)
    with pytest.raises(FloatingPointError,
                       match="'features.6' is not finite for image 3 and 0 more"):
        ask(images=bright, prepare=lambda x: torch.where((x == 255).all((1, 2, 3), keepdim=True),
                                                         torch.nan, imagenet_input(x)))
    (tmp_path/"x.safetensors").write_bytes(b"no survey")
    with pytest.raises(Exception, match="(?i)header|invalid"): ask(resume=tmp_path/"x.safetensors")
    with pytest.raises(ValueError, match="holds a survey with model"):
        ask(resume=tmp_path/"y.safetensors")
        torch.manual_seed(5)
        ask(model=SmallAlexNet(width=4).eval(), resume=tmp_path/"y.safetensors")
