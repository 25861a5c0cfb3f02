"Recording and patches: the whole pass, brute force over positions, networks that fall back."
import numpy as np
import pytest
import torch

from superpos.activation import record, strongest_patches
from superpos.field import pathway, receptive_field
from superpos.model import ResNet8, SmallAlexNet, fingerprint, imagenet_input, outputs

def network(kind):
    torch.manual_seed(0)
    return kind(width=4).eval().requires_grad_(False)

def bytes_of(n, *size, seed=0): return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize("position", [None, (0, 0), (3, 1)])
@pytest.mark.parametrize("kind,layer", [(SmallAlexNet, "features.6"), (SmallAlexNet, "features.10"), (ResNet8, "stages.1.conv2")])
def test_a_recording_equals_the_whole_pass(kind, layer, position):
    net, images = network(kind), bytes_of(5, 40, 48)
    before = fingerprint(net)
    found = record(net, layer, images, position=position, batch=2)
    whole = outputs(net, [layer], imagenet_input(images))[layer]
    row, column = position or (whole.shape[2]//2, whole.shape[3]//2)
    np.testing.assert_allclose(found.values, whole[:, :, row, column], rtol=1e-4, atol=1e-6)
    assert found.position == (row, column) and found.layer == layer and ("chain" in found.how) == (kind is SmallAlexNet)
    assert fingerprint(net) == before and not any(m._forward_hooks for m in net.modules())

def test_the_top_is_sorted_and_ties_keep_their_order():
    net = network(SmallAlexNet)
    image = bytes_of(3, 64, 64)
    found = record(net, "features.6", image[[0, 1, 0, 2, 1]])
    for unit in range(4):
        top = found.top(unit, 5)
        assert (np.diff(found.values[top, unit]) <= 0).all() and sorted(top) == list(range(5))
        assert top.tolist().index(0) < top.tolist().index(2) and top.tolist().index(1) < top.tolist().index(4)
    assert len(found.top(0)) == 5

def test_a_patch_alone_gives_the_same_response():
    net = network(SmallAlexNet)
    images = [bytes_of(1, h, w, seed=h)[0] for h, w in ((64, 64), (64, 90), (101, 67))]
    size = receptive_field(net, "features.6").rows.size
    found = strongest_patches(net, "features.6:2", images)
    assert found.pixels.shape == (3, 3, size, size) and found.pixels.dtype == torch.uint8 and len(found) == 3
    for image, patch, response, (top, left) in zip(images, found.pixels, found.response, found.corner):
        assert torch.equal(patch, image[:, top:top + size, left:left + size])
        canvas = torch.zeros(1, 3, 64, 64)
        path = pathway(net, "features.6", (64, 64))
        (a, b), (c, d) = path.window
        canvas[..., a:b, c:d] = imagenet_input(patch[None])
        torch.testing.assert_close(path(path.crop(canvas), unit=2)[0], response, rtol=1e-4, atol=1e-6)

def test_a_bad_unit_is_refused_before_any_image_is_read():
    class Unread(list):
        def __getitem__(self, i): pytest.fail("an image was read")
    for unit, message in (("features.6:99", "has units"), ("features.66:1", "no layer"), ("features.6", "names no unit")):
        with pytest.raises(ValueError, match=message): strongest_patches(network(SmallAlexNet), unit, Unread([1]))
