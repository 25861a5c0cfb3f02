"Images: brute-force oracles, damaged files, hostile archives, broken downloads, real sets."
import hashlib
import io
import os
import pickle
import shutil
import socket
import tarfile
import threading
import warnings
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS

from superpos import data
from superpos.data import (
    Images,
    MissingData,
    cifar10,
    digits,
    fetch,
    find_data,
    folder,
    imagenet_val,
    on_device,
    photographs,
    shapes,
    tiny_imagenet,
)


@pytest.fixture(autouse=True)
def own_places(tmp_path_factory, monkeypatch):
    "No test reads or writes the user's cache or data."
    monkeypatch.setenv("SUPERPOS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("SUPERPOS_DATA", raising=False)

def noise(h=20, w=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)

def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path

def quiet_folder(root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return folder(root)

# Images

@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    "Twelve images whose bytes are their index, in memory and in files, labelled by it modulo 3."
    root = tmp_path_factory.mktemp("numbered")
    source = np.arange(12, dtype=np.uint8)[:, None, None, None]*np.ones((1, 3, 2, 2), np.uint8)
    files = tuple(write(root/f"{i:02}.png", np.full((2, 2, 3), i, np.uint8)) for i in range(12))
    return [Images("numbered", s, np.arange(12) % 3, tuple("abc"), factors={"i": np.arange(12)})
            for s in (source, files)]

indices = st.lists(st.integers(-12, 11), max_size=30)
@settings(max_examples=60, deadline=None)
@given(st.one_of(indices, indices.map(lambda i: np.array(i, dtype=int)),
                 indices.map(lambda i: torch.tensor(i, dtype=torch.long)),
                 st.lists(st.booleans(), min_size=12, max_size=12).map(np.array), st.slices(12)),
       indices)
def test_select_keeps_images_labels_and_factors_together(numbered, first, then):
    expected = np.arange(12)[first.numpy() if isinstance(first, torch.Tensor) else first].tolist()
    then = [i % len(expected) for i in then] if expected else []
    expected = [expected[i] for i in then]
    for images in numbered:
        chosen = images.select(first).select(then)
        assert [int(image[0, 0, 0]) for image in chosen] == expected == chosen.factors["i"].tolist()
        assert chosen.labels.tolist() == [i % 3 for i in expected]
        assert chosen.labels.dtype == np.int64

def test_images_refuse_what_does_not_fit_together():
    pixels = np.zeros((2, 3, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="2 images but 3 labels"):
        Images("x", pixels, [0, 0, 0], ("a",))
    with pytest.raises(ValueError, match="2 images but 1 hue"):
        Images("x", pixels, [0, 0], ("a",), factors={"hue": [1]})
    with pytest.raises(ValueError, match="labels 0..1 for 1 classes"):
        Images("x", pixels, [0, 1], ("a",))
    with pytest.raises(ValueError, match="labels -1..0"): Images("x", pixels, [0, -1], ("a",))
    for wrong in (pixels/255, pixels[:, 0], pixels.transpose(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="pixels must be uint8 of shape"):
            Images("x", wrong, [0, 0], ("a",))

def test_an_image_is_a_copy_and_one_at_a_time(numbered):
    for images in numbered:
        images[1].zero_()
        assert images.select(3).labels.tolist() == [0] and images.select(3)[0].eq(3).all()
        assert images[1].eq(1).all() and images[-1].eq(11).all()
        assert images[np.int64(3)].eq(3).all() and len(list(images)) == 12
        with pytest.raises(IndexError): images[12]
        with pytest.raises(TypeError): images[:2]

def test_a_loader_takes_images(numbered):
    for images in numbered:
        batches = list(torch.utils.data.DataLoader(images, batch_size=5))
        assert torch.equal(torch.cat(batches)[:, 0, 0, 0], torch.arange(12, dtype=torch.uint8))

# embedded sources

def test_embedded_sources_never_open_a_connection(monkeypatch):
    def refuse(*args): raise AssertionError("tried to open a connection")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(digits()) == 1797 and len(shapes(3)) == 3 and len(photographs(18)) == 18

def test_digits_keep_all_grey_levels():
    from sklearn.datasets import load_digits
    d, true = digits(), load_digits()
    assert np.array_equal(np.rint(d.source[:, 0]*(16/255)), true.images)
    assert np.array_equal(d.labels, true.target)
    assert (d.source[:, 0] == d.source[:, 2]).all()

def drawn(factors, i, size, fine):
    "One shape by brute force: hard edges at `fine` times the resolution, then averaged."
    at = (np.arange(size*fine) + .5)/size/fine
    r, (du, dv) = factors["size"][i]/2, np.meshgrid(at - factors["x"][i], at - factors["y"][i])
    u, v = du/r, dv/r
    tip, foot, half = -1.14, .57, 1.14*np.sin(np.radians(60))
    inside = {"circle": u**2 + v**2 < 1, "square": (abs(u) < .86) & (abs(v) < .86),
              "triangle": (v < foot) & (abs(u) < half*(v - tip)/(foot - tip)),
              "cross": ((abs(u) < 1) & (abs(v) < .36)) | ((abs(v) < 1) & (abs(u) < .36))}[
                  factors["shape"][i]]
    a, b = du/data._period % 1 - .5, dv/data._period % 1 - .5
    bright = {"solid": a < 2, "stripes": abs(b) < .25, "checks": (abs(a) < .25) ^ (abs(b) < .25),
              "dots": np.hypot(a, b) < .34}[factors["texture"][i]]
    colour = np.array(data._colours[factors["colour"][i]], float)
    picture = np.where(inside[None], np.where(bright, 1, data._shade)*colour[:, None, None],
                       data._background)
    return picture.reshape(3, size, fine, size, fine).mean((2, 4))

def test_shapes_agree_with_brute_force():
    s = shapes(80, size=48, seed=3)
    errors = np.array([abs(s.source[i] - drawn(s.factors, i, 48, 6)) for i in range(len(s))])
    assert errors.mean((1, 2, 3)).max() < 1.5 and (errors > 40).mean() < 2e-3

def test_shapes_stay_inside_and_are_never_blank():
    s = shapes(1000, size=96, seed=1)
    border = np.concatenate([s.source[:, :, 0], s.source[:, :, -1], s.source[:, :, :, 0],
                             s.source[:, :, :, -1]], axis=2)
    assert (border == data._background).all()
    assert (shapes(1000, size=8, seed=1).source < data._background - 20).any((1, 2, 3)).all()

def test_shapes_depend_on_seed_alone():
    few, many = shapes(7, seed=5), shapes(600, seed=5)
    assert (few.source == many.source[:7]).all()
    assert all((few.factors[k] == many.factors[k][:7]).all() for k in few.factors)
    assert all((few.factors[k] == shapes(7, size=64, seed=5).factors[k]).all() for k in few.factors)
    assert [few.classes[k] for k in few.labels] == few.factors["shape"].tolist()
    for n, size in ((0, 32), (5, 7)):
        with pytest.raises(ValueError, match=f"n={n}, size={size}"): shapes(n, size)

def test_photographs_are_patches_of_what_they_are_labelled():
    p = photographs(180, size=32, seed=4)
    grey = {"brick", "camera", "cell", "clock_motion", "coins", "grass", "gravel", "moon"}
    is_grey = (p.source == p.source[:, :1]).all((1, 2, 3))
    names = np.array(p.classes)[p.labels]
    assert set(names[is_grey]) == grey and not grey & set(names[~is_grey])
    assert (p.source[:18] == photographs(18, size=32, seed=4).source).all()
    with pytest.raises(ValueError, match="size of 1..300"): photographs(1, size=301)
    whole = photographs(18, size=300)
    clock = whole.classes.index("clock_motion")
    assert whole[clock].shape == (3, 300, 300) and whole.source[clock].std() > 10

# images in files

def test_every_kind_of_picture_becomes_rgb(tmp_path):
    rgb = noise()
    colours, grey = Image.fromarray(rgb), Image.fromarray(rgb[..., 0])
    half = colours.convert("RGBA"); half.putalpha(128)
    gone = colours.convert("P"); gone.info["transparency"] = gone.getpixel((0, 0))
    write(tmp_path/"0.png", colours); write(tmp_path/"1.png", grey); write(tmp_path/"2.png", half)
    write(tmp_path/"3.png", Image.merge("LA", (grey, Image.new("L", grey.size, 0))))
    write(tmp_path/"4.png", gone, transparency=gone.info["transparency"])
    write(tmp_path/"5.png", Image.fromarray(rgb[..., 0].astype(np.uint16)*256 + 17))
    write(tmp_path/"6.png", colours.convert("1"))
    write(tmp_path/"7.tif", colours.convert("CMYK"))
    write(tmp_path/"8.jpg", colours.resize((200, 200)).convert("CMYK"), quality=95)
    write(tmp_path/"9.webp", colours, lossless=True)
    f = folder(tmp_path)
    assert len(f) == 10 and all(image.dtype == torch.uint8 and image.shape[0] == 3 for image in f)
    assert not f.skipped and f.classes == (tmp_path.name,)
    image = [x.permute(1, 2, 0).numpy() for x in f]
    assert (image[0] == rgb).all() and (image[1] == rgb[..., :1]).all() and (image[9] == rgb).all()
    assert abs(image[2] - (rgb/2 + 127.5)).max() < 2
    assert (image[3] == 255).all() and (image[4][0, 0] == 255).all() and not (image[4] == 255).all()
    assert (image[5] == rgb[..., :1]).all() and set(np.unique(image[6])) == {0, 255}
    assert (image[7] == rgb).all()
    assert abs(image[8].astype(int) - np.asarray(colours.resize((200, 200)))).mean() < 20

def test_values_that_are_no_bytes_are_refused(tmp_path):
    write(tmp_path/"good.png", noise())
    write(tmp_path/"float.tif", Image.fromarray(np.full((4, 4), .5, np.float32)))
    write(tmp_path/"int.tif", Image.fromarray(np.full((4, 4), 70000, np.int32)))
    f = quiet_folder(tmp_path)
    assert [p.name for p in f.source] == ["good.png"]
    assert all("do not fit into bytes" in why for _, why in f.skipped)

def test_damaged_files_are_skipped_counted_and_named(tmp_path, monkeypatch):
    good = write(tmp_path/"a"/"good.jpg", noise(64, 64))
    fine = write(tmp_path/"b"/"fine.png", noise(64, 64))
    (tmp_path/"a"/"torn.jpg").write_bytes(good.read_bytes()[:-400])
    (tmp_path/"a"/"padded.jpg").write_bytes(good.read_bytes() + bytes(16))
    (tmp_path/"b"/"torn.png").write_bytes(fine.read_bytes()[:-400])
    torn = write(tmp_path/"b"/"torn.webp", noise(64, 64))
    torn.write_bytes(torn.read_bytes()[:-400])
    (tmp_path/"b"/"empty.png").touch()
    (tmp_path/"b"/"letter.jpg").write_text("Dear reader,\nthis is not a photograph.\n")
    write(tmp_path/"b"/"huge.png", np.zeros((200, 200), np.uint8))
    write(tmp_path/"b"/"large.png", np.zeros((90, 90), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    with pytest.warns(UserWarning, match="skipped 7 of 10 image files") as caught:
        f = folder(tmp_path, "pets")
    assert len(caught) == 1 and "pets" in str(caught[0].message)
    assert Path(caught[0].filename) == Path(__file__)
    assert {p.name for p, _ in f.skipped} == {"torn.jpg", "torn.png", "torn.webp", "empty.png",
                                              "letter.jpg", "huge.png", "large.png"}
    why = {p.name: reason for p, reason in f.skipped}
    assert why["letter.jpg"] == "not an image" and "bomb" in why["huge.png"]
    assert "bomb" in why["large.png"]
    assert [p.name for p in f.source] == ["good.jpg", "padded.jpg", "fine.png"]
    assert f.labels.tolist() == [0, 0, 1]
    assert len(on_device(f, "cpu")[0]) == 3 and "7 skipped" in repr(f)

def test_a_file_that_breaks_later_is_named(tmp_path):
    path = write(tmp_path/"a.png", noise(64, 64))
    raw = bytearray(path.read_bytes()); raw[len(raw)//2] ^= 255; path.write_bytes(raw)
    f = folder(tmp_path)
    with pytest.raises(OSError, match=r"a\.png cannot be read"): f[0]
    path.unlink()
    with pytest.raises(OSError, match=r"a\.png cannot be read"): f[0]

def test_layouts_of_folders(tmp_path):
    for place in ("set/cat/a.png", "set/cat/deep/b.PNG", "set/dog/c.png", "set/.hidden/d.png",
                  "set/beside.png", "flat/e.png"):
        write(tmp_path/place, noise())
    for empty in ("set/bird", "flat/notes", "none"): (tmp_path/empty).mkdir()
    (tmp_path/"flat"/"notes"/"x.txt").touch()
    with pytest.warns(UserWarning, match="lies beside the classes' folders"):
        f = folder(tmp_path/"set")
    assert f.classes == ("bird", "cat", "dog") and f.labels.tolist() == [1, 1, 2]
    assert f.name == "set"
    flat = folder(tmp_path/"flat")
    assert flat.classes == ("flat",) and flat.labels.tolist() == [0]
    with pytest.raises(ValueError, match="no images in it"): folder(tmp_path/"none")
    with pytest.raises(MissingData, match="nowhere"): folder(tmp_path/"nowhere")
    (tmp_path/"flat"/"e.png").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="none of its 1 image files can be used .*not an image"):
        folder(tmp_path/"flat")

def test_one_tensor_needs_one_size(tmp_path, numbered):
    write(tmp_path/"a.png", noise(20, 30)); write(tmp_path/"b.png", noise(30, 20))
    said = r"image 1 has shape \(3, 30, 20\) and image 0 \(3, 20, 30\)"
    with pytest.raises(ValueError, match=said): on_device(folder(tmp_path), "cpu")
    with pytest.raises(ValueError, match="no images"): on_device(numbered[0].select([]), "cpu")
    x, y = on_device(numbered[0], "cpu")
    x.zero_(); y.zero_()
    assert numbered[0][5].eq(5).all() and numbered[0].labels[5] == 2 and y.dtype == torch.int64

# where data are looked for

def test_search_order(tmp_path, monkeypatch):
    places = {k: tmp_path/k for k in ("named", "variable", "cache")}
    for place in places.values(): place.mkdir()
    monkeypatch.setenv("SUPERPOS_DATA", str(places["variable"]))
    monkeypatch.setenv("SUPERPOS_CACHE", str(places["cache"]))
    with pytest.raises(MissingData) as e: find_data(["set", "other"], how="draw it yourself")
    assert all(part in str(e.value) for part in ("set or other", str(places["variable"]),
                                                 str(places["cache"]/"data"), "draw it yourself"))
    assert isinstance(e.value, FileNotFoundError)
    (places["cache"]/"data"/"set").mkdir(parents=True)
    assert find_data("set") == places["cache"]/"data"/"set"
    (places["variable"]/"other").mkdir()
    assert find_data(["set", "other"]) == places["variable"]/"other"
    with pytest.raises(MissingData, match="named"): find_data("set", places["named"])
    (places["named"]/"set").mkdir()
    assert (find_data("set", places["named"]) == find_data("set", str(places["named"]/"set"))
            == places["named"]/"set")
    monkeypatch.delenv("SUPERPOS_DATA")
    with pytest.raises(MissingData, match="SUPERPOS_DATA is not set"): find_data("other")
    with pytest.raises(ValueError, match="'other' cannot be fetched; there is cifar-10-batches-py, "
                       "tiny-imagenet-200"):
        find_data("other", download=True)

@pytest.mark.parametrize("source, words", [
    (cifar10, ("cifar-10-batches-py or cifar-10-batches-bin", "download=True",
               "cifar-10-python.tar.gz")),
    (tiny_imagenet, ("tiny-imagenet-200", "download=True", "cs231n.stanford.edu")),
    (imagenet_val, ("imagenet", "image-net.org", "torchvision"))])
def test_missing_sets_say_how_to_get_them(source, words):
    with pytest.raises(MissingData) as e: source()
    assert all(word in str(e.value) for word in (*words, "SUPERPOS_DATA is not set"))
    assert "\n" not in str(e.value)

# archives

def tar_bytes(*members, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as t:
        for name, content, kind in members:
            info = tarfile.TarInfo(name); info.type = kind
            if kind == tarfile.REGTYPE: info.size = len(content)
            else: info.linkname = content.decode()
            t.addfile(info, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return buffer.getvalue()

def zip_bytes(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items(): z.writestr(name, content)
    return buffer.getvalue()

good, outside = ("set/a.txt", b"good", tarfile.REGTYPE), "would be unpacked outside"
@pytest.mark.parametrize("name, content, message", [
    ("slip.zip", zip_bytes(**{"set/a.txt": "good", "../evil.txt": "x"}), outside),
    ("absolute.zip", zip_bytes(**{"/evil.txt": "x"}), outside),
    ("deep.zip", zip_bytes(**{"set/../../evil.txt": "x"}), outside),
    ("large.zip", zip_bytes(**{"set/zeros": bytes(2_000_000)}), "more than 1,000,000 bytes"),
    ("other.zip", zip_bytes(**{"other/a.txt": "good"}), "holds no folder 'set'"),
    ("slip.tar.gz", tar_bytes(good, ("../evil.txt", b"x", tarfile.REGTYPE)), outside),
    ("absolute.tar.gz", tar_bytes(good, ("/evil.txt", b"x", tarfile.REGTYPE)), outside),
    ("symlink.tar.gz", tar_bytes(good, ("set/link", b"/etc", tarfile.SYMTYPE)),
     "neither a file nor a folder"),
    ("hardlink.tar.gz", tar_bytes(good, ("set/link", b"/etc/passwd", tarfile.LNKTYPE)),
     "neither a file nor a folder"),
    ("device.tar.gz", tar_bytes(good, ("set/null", b"", tarfile.CHRTYPE)),
     "neither a file nor a folder"),
    ("large.tar.gz", tar_bytes(good, ("set/zeros", bytes(2_000_000), tarfile.REGTYPE)),
     "more than 1,000,000 bytes")])
def test_hostile_archives_leave_nothing_behind(tmp_path, name, content, message):
    home = tmp_path/"home"; home.mkdir()
    archive = home/name; archive.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data._unpack(archive, home/"set", limit=1_000_000)
    assert [p.name for p in tmp_path.rglob("*") if p != home] == [name]
    assert not Path("/evil.txt").exists()

@pytest.mark.parametrize("name, content", [
    ("a.zip", zip_bytes(**{"set/b/c.txt": "good"})),
    ("a.tar.gz", tar_bytes(("set/b/c.txt", b"good", tarfile.REGTYPE)))])
def test_good_archives_unpack(tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    data._unpack(tmp_path/name, tmp_path/"set")
    assert (tmp_path/"set"/"b"/"c.txt").read_text() == "good"
    assert {p.name for p in tmp_path.iterdir()} == {name, "set"}

@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("kept", [0, .3, .8])
def test_an_archive_that_is_cut_short_is_named(tmp_path, ending, kept):
    noise = np.random.default_rng(0).bytes(60_000)
    whole = (zip_bytes(**{"set/a": noise}) if ending == "zip" else
             tar_bytes(("set/a", noise, tarfile.REGTYPE), mode="w:gz" if "gz" in ending else "w"))
    archive = tmp_path/f"set.{ending}"
    archive.write_bytes(whole[:int(kept*len(whole))])
    with pytest.raises(ValueError, match=rf"{archive} is damaged or cut short \(.+\); remove"):
        data._unpack(archive, tmp_path/"set")
    assert list(tmp_path.iterdir()) == [archive]
    archive.write_bytes(whole)
    data._unpack(archive, tmp_path/"set")
    assert (tmp_path/"set"/"a").read_bytes() == noise

def test_a_bit_that_flipped_in_an_archive_is_noticed(tmp_path):
    for ending, whole in dict(zip=payload, gz=tar_bytes(good)).items():
        raw = bytearray(whole)
        raw[len(raw)//2] ^= 16
        (tmp_path/f"set.{ending}").write_bytes(raw)
        with pytest.raises(ValueError, match=rf"set.{ending} is damaged or cut short"):
            data._unpack(tmp_path/f"set.{ending}", tmp_path/"set")

def test_a_disk_that_fills_while_unpacking_is_named_and_left_clean(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path/"set.zip").write_bytes(payload)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(OSError, match=f"too large: '{tmp_path}/set'"):
            data._unpack(tmp_path/"set.zip", tmp_path/"set")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip"]

def test_what_a_kill_left_of_unpacking_is_swept(tmp_path):
    for name in (".set.01234567.tmp", ".other.01234567.tmp", ".set.mine"):
        (tmp_path/name/"set").mkdir(parents=True)
    (tmp_path/"set.zip").write_bytes(payload)
    data._unpack(tmp_path/"set.zip", tmp_path/"set")
    left = {".other.01234567.tmp", ".set.mine", "set", "set.zip"}
    assert {p.name for p in tmp_path.iterdir()} == left

def test_what_is_written_down_here_is_what_torchvision_says():
    address, known = data.archives[CIFAR10.base_folder]
    assert (address, known) == (CIFAR10.url, f"md5:{CIFAR10.tgz_md5}")
    assert data._image_endings == IMG_EXTENSIONS

# downloads

payload = zip_bytes(**{"set/noise.bin": np.random.default_rng(0).bytes(600_000)})

@contextmanager
def serving(content, limits=(), ranges=True):
    """A server on the loopback that hangs up after `limits[k]` bytes of its k-th reply.
    Yields its address and the ranges asked for."""
    asked, limits = [], list(limits)
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):
            asked.append(self.headers["Range"])
            if self.path != "/set.zip": return self.send_error(404)
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if ranges else 0
            if start >= len(content): return self.send_error(416)
            self.send_response(206 if ranges else 200)
            self.send_header("Content-Length", str(len(content) - start)); self.end_headers()
            self.wfile.write(content[start:start + limits.pop(0)] if limits else content[start:])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01))
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_address[1]}/set.zip", asked
    finally: server.shutdown(); server.server_close(); thread.join()

@pytest.fixture
def offered(monkeypatch):
    "Makes an address the official one of the set 'set'."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    def offer(url, content=payload):
        known = f"md5:{hashlib.md5(content).hexdigest()}"
        monkeypatch.setitem(data.archives, "set", (url, known))
    return offer

def assert_whole(home):
    assert {p.name for p in home.iterdir()} == {"set"}
    assert (home/"set"/"noise.bin").stat().st_size == 600_000

# urllib3 before 2.0 does not notice when a reply is too short
@pytest.mark.parametrize("noticed", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(tmp_path, offered, noticed, monkeypatch):
    get = requests.get
    def get_and_notice(*args, **options):
        reply = get(*args, **options)
        reply.raw.enforce_content_length = noticed
        return reply
    monkeypatch.setattr(requests, "get", get_and_notice)
    with serving(payload, limits=[200_000, 150_000]) as (url, asked):
        offered(url)
        assert find_data("set", tmp_path, download=True) == tmp_path/"set"
    starts = [int(r[6:-1]) for r in asked]
    assert starts[0] == 0 < starts[1] < starts[2] and len(starts) == 3
    assert 200_000 - starts[1] < 2**16
    assert_whole(tmp_path)

def test_a_later_call_goes_on_where_an_earlier_one_gave_up(tmp_path, offered):
    with serving(payload, limits=[300_000, 0, 0, 0, 0]) as (url, asked):
        offered(url)
        with pytest.raises(ConnectionError,
                           match=r"call again to go on from what is kept in .*set\.zip\.part"):
            fetch("set", tmp_path)
        kept = (tmp_path/"set.zip.part").stat().st_size
        assert [p.name for p in tmp_path.iterdir()] == ["set.zip.part"]
        assert 300_000 - kept < 2**16 and len(asked) == 5
        fetch("set", tmp_path)
        assert asked[-1] == f"bytes={kept}-" and len(asked) == 6
        fetch("set", tmp_path)
        assert len(asked) == 6
    assert_whole(tmp_path)

def test_a_server_without_ranges_starts_again(tmp_path, offered):
    with serving(payload, limits=[300_000], ranges=False) as (url, asked):
        offered(url); fetch("set", tmp_path)
    assert len(asked) == 2
    assert_whole(tmp_path)

def test_a_download_that_was_only_not_moved_is_used(tmp_path, offered):
    (tmp_path/"set.zip.part").write_bytes(payload)
    with serving(payload) as (url, asked): offered(url); fetch("set", tmp_path)
    assert asked == [f"bytes={len(payload)}-"]
    assert_whole(tmp_path)

def test_an_archive_that_lay_there_already_is_used_if_it_is_the_right_one(tmp_path, offered):
    for content in (payload, payload[:-9]):
        home = tmp_path/str(len(content))
        home.mkdir()
        (home/"set.zip").write_bytes(content)
        with serving(payload) as (url, asked): offered(url); fetch("set", home)
        assert asked == ([] if content == payload else ["bytes=0-"])
        assert_whole(home)

def test_a_wrong_hash_is_refused_and_forgotten(tmp_path, offered):
    with serving(payload) as (url, asked):
        offered(url, b"something else")
        with pytest.raises(ValueError, match="does not match the known hash"):
            fetch("set", tmp_path)
        assert not list(tmp_path.iterdir())
        offered(url); fetch("set", tmp_path)
    assert asked == ["bytes=0-"]*2
    assert_whole(tmp_path)

def test_a_missing_page_is_not_asked_for_again(tmp_path, offered):
    with serving(payload) as (url, asked):
        offered(url.replace("set.zip", "moved.zip"))
        with pytest.raises(requests.HTTPError, match="404"): fetch("set", tmp_path)
        assert len(asked) == 1
    # nobody listens any more
    with pytest.raises(ConnectionError, match="moved.zip could not be fetched"):
        fetch("set", tmp_path)

# CIFAR-10

@pytest.fixture
def records():
    rng, names = np.random.default_rng(0), [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    return {name: (rng.integers(0, 10, 4), rng.integers(0, 256, (4, 3072), dtype=np.uint8))
            for name in names}

def check_cifar10(records, root):
    train, test = cifar10(root=root), cifar10("test", root=root)
    assert np.array_equal(train.source.reshape(20, -1),
                          np.concatenate([records[f"data_batch_{k}"][1] for k in range(1, 6)]))
    assert np.array_equal(test.labels, records["test_batch"][0])
    assert train[0].shape == (3, 32, 32) and test.classes[3] == "cat"
    assert np.array_equal(test[1].flatten().numpy(), records["test_batch"][1][1])

def test_binary_batches(tmp_path, records, monkeypatch):
    home = tmp_path/"cifar-10-batches-bin"; home.mkdir()
    for name, (labels, pixels) in records.items():
        raw = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1).tobytes()
        (home/f"{name}.bin").write_bytes(raw)
        monkeypatch.setitem(data._cifar10_sha1, f"{name}.bin", hashlib.sha1(raw).hexdigest())
    check_cifar10(records, tmp_path)
    raw = bytearray((home/"data_batch_4.bin").read_bytes())
    raw[5000] ^= 1
    (home/"data_batch_4.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=r"data_batch_4\.bin is not the official file"):
        cifar10(root=tmp_path)
    assert len(cifar10("test", tmp_path)) == 4
    with pytest.raises(ValueError, match="not 'val'"): cifar10("val", tmp_path)

class Wicked:
    def __reduce__(self): return (pytest.fail, ("a batch with a wrong hash was unpickled",))

def test_pickled_batches(tmp_path, records, monkeypatch):
    home = tmp_path/"cifar-10-batches-py"; home.mkdir()
    def put(name, content):
        (home/name).write_bytes(raw := pickle.dumps(content))
        return [name, hashlib.md5(raw).hexdigest()]
    entries = [put(name, dict(data=pixels, labels=labels.tolist()))
               for name, (labels, pixels) in records.items()]
    name, md5 = put("batches.meta", dict(label_names=list(data._cifar10_classes)))
    monkeypatch.setattr(CIFAR10, "train_list", entries[:5])
    monkeypatch.setattr(CIFAR10, "test_list", entries[5:])
    monkeypatch.setattr(CIFAR10, "meta", dict(CIFAR10.meta, filename=name, md5=md5))
    check_cifar10(records, tmp_path)
    put("data_batch_2", Wicked())
    with pytest.raises(ValueError, match="data_batch_2 is not the official file"):
        cifar10(root=tmp_path)

# the ImageNets

def test_tiny_imagenet_says_how_much_it_found(tmp_path):
    home = tmp_path/"tiny-imagenet-200"
    for wnid, n in (("n02", 2), ("n01", 3)):
        for i in range(n): write(home/"train"/wnid/"images"/f"{wnid}_{i}.JPEG", noise(64, 64, i))
    (home/"wnids.txt").write_text("n02\nn01\n")
    for i in (0, 2, 10): write(home/"val"/"images"/f"val_{i}.JPEG", noise(64, 64, i))
    rows = [(0, "n02"), (1, "n01"), (2, "n01"), (10, "n02")]
    (home/"val"/"val_annotations.txt").write_text("".join(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n"
                                                          for i, wnid in rows))
    with pytest.warns(UserWarning, match="5 of 100,000 images"):
        train = tiny_imagenet(root=tmp_path)
    with pytest.warns(UserWarning, match="3 of 10,000 images"): val = tiny_imagenet("val", tmp_path)
    assert train.classes == val.classes == ("n01", "n02")
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert [p.name for p in val.source] == ["val_0.JPEG", "val_2.JPEG", "val_10.JPEG"]
    assert val.labels.tolist() == [1, 0, 1]
    assert "5 of 100,000" in repr(train)
    with pytest.raises(ValueError, match="not 'test'"): tiny_imagenet("test", tmp_path)

def test_imagenet_needs_all_its_classes(tmp_path, monkeypatch):
    dot = write(tmp_path/"dot.png", noise(2, 2)).read_bytes()
    for i in range(1000):
        (tmp_path/"imagenet"/"val"/f"n{i:08}").mkdir(parents=True)
        (tmp_path/"imagenet"/"val"/f"n{i:08}"/"a.png").write_bytes(dot)
    monkeypatch.setenv("SUPERPOS_DATA", str(tmp_path))
    for root in (None, tmp_path/"imagenet", tmp_path/"imagenet"/"val"):
        assert imagenet_val(root).labels.tolist() == list(range(1000))
    shutil.rmtree(tmp_path/"imagenet"/"val"/"n00000500")
    with pytest.raises(ValueError, match="has 999 class folders, not 1000"): imagenet_val()
    with pytest.raises(MissingData, match="there is no folder .*nowhere; to get ImageNet"):
        imagenet_val(tmp_path/"nowhere")

# real sets

home = os.environ.get("SUPERPOS_DATA")

def needs(name):
    there = home and (Path(home)/name).exists()
    why = "not in SUPERPOS_DATA" if home else "SUPERPOS_DATA is not set"
    return pytest.mark.skipif(not there, reason=f"needs {name}: {why}")

@needs("cifar-10-batches-bin")
def test_real_cifar10():
    test = cifar10("test", home)
    assert (np.bincount(test.labels) == 1000).all() and test.classes[test.labels[0]] == "cat"
    assert abs(test.source.mean((0, 2, 3))/255 - (.494, .485, .450)).max() < .002

@needs("tiny-imagenet-200")
def test_real_tiny_imagenet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        val = tiny_imagenet("val", home)
    assert len(val) == 10_000 and (np.bincount(val.labels) == 50).all()
    assert not val.skipped and len(val.classes) == 200
    assert on_device(val.select(slice(50)), "cpu")[0].shape == (50, 3, 64, 64)

@needs("imagenet-samples")
def test_real_imagenet_samples():
    samples = folder(find_data("imagenet-samples", home))
    assert len(samples) == 1000 and samples.classes[0] == "n01440764" and not samples.skipped

@needs("polysemantic/features.10_9")
def test_real_polysemantic_clusters():
    clusters = folder(find_data("polysemantic/features.10_9", home))
    assert clusters.classes == ("cluster_0", "cluster_1")
    assert np.bincount(clusters.labels).tolist() == [36, 35]

def test_images_are_fitted_as_imagenet_networks_are_tested():
    p = photographs(2, size=120)
    tall = data.Images("tall", np.concatenate([p.source, p.source], 2), [0, 1], ("a", "b"))
    ours = tall.fit(56)
    theirs = transforms.Compose([transforms.Resize(64, antialias=True), transforms.CenterCrop(56)])
    for i in (0, 1): assert torch.equal(ours[i], theirs(tall[i]))
    assert "56 of 64 px" in ours.name and torch.equal(ours.select([1])[0], ours[1])
    with pytest.raises(ValueError, match="a square of 80 pixels cannot be cut out of images whose "
                       "short side is 64"):
        tall.fit(80, short=64)
