"Recording, scores, masks and circuits against brute force and scipy, and what they refuse."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import nn

from superpos.activation import record, strongest_patches
from superpos.circuit import Circuit, auroc, card, respond
from superpos.field import pathway, receptive_field
from superpos.mask import Layout, keep_top, soft, undecided
from superpos.model import SmallAlexNet, fingerprint, load_model, outputs
from superpos.score import magnitude, relevant_weights, snip
from superpos.sparsify import sparsify


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return SmallAlexNet(width=4).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def path(net): return pathway(net, "features.6", (64, 64))


def crops(path, n, seed=0): return path.crop(torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))


# ---- recording

def test_recording_does_not_depend_on_the_batch(net):
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(7)]
    a, b = (record(net, "features.6", images, batch=n).values for n in (2, 64))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert record(net, "features.6", images).top(3, 7).tolist() == np.argsort(-a[:, 3]).tolist()


def test_values_that_are_not_finite_are_named(net):
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8)]*3
    def prepare(x): return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 1, torch.nan, x/255)
    with pytest.raises(FloatingPointError, match="'features.6' is not finite for image 1 and 0 more"): record(net, "features.6", images, prepare)
    with pytest.raises(ValueError, match="no images"): record(net, "features.6", [])


def test_strongest_patch_is_the_best_of_all_positions(net):
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((64, 64), (70, 90), (101, 67))]
    prepare = lambda x: x/255
    found, field = strongest_patches(net, "features.6:2", images, prepare), receptive_field(net, "features.6")
    for image, response, corner in zip(images, found.response, found.corner):
        values = outputs(net, ["features.6"], prepare(image[None]))["features.6"][0, 2]
        inside = {(i, j): values[i, j].item() for i, j in np.ndindex(*values.shape)
                  if all(a >= 0 and b <= n for (a, b), n in zip(field.window((i, j)), image.shape[1:]))}
        best = max(inside, key=inside.get)
        assert inside[best] == response.item() and [w[0] for w in field.window(best)] == corner.tolist()


# ---- scores

def test_snip_takes_the_absolute_value_for_each_image(path):
    x, total = crops(path, 5), {}
    for image in x.split(1):
        weights = {n: w.clone().requires_grad_() for n, w in relevant_weights(path, 3).items()}
        path(image, weights, 3).sum().backward()
        for n, w in weights.items(): total[n] = total.get(n, 0) + (w*w.grad).abs().mean((2, 3)).detach()
    found = snip(path, 3, x)
    for n in total: torch.testing.assert_close(found[n], total[n])
    weights = {n: w.clone().requires_grad_() for n, w in relevant_weights(path, 3).items()}
    path(x, weights, 3).sum().backward()
    summed = torch.cat([(w*w.grad).abs().mean((2, 3)).flatten().detach() for w in weights.values()])
    assert not torch.allclose(summed, torch.cat([s.flatten() for s in found.values()]), rtol=.01)


def test_residual_and_grouped_networks_are_refused_by_reason():
    resnet = load_model("resnet18")
    with pytest.raises(NotImplementedError, match="chain of layers"): relevant_weights(pathway(resnet, "layer2.0.conv2", (64, 64)), 0)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 1, 3)).eval()
    class Four(nn.Module):
        def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Conv2d(3, 4, 1), *grouped)
        def forward(self, x): return self.net(x)
    with pytest.raises(NotImplementedError, match="'net.1' has groups"): relevant_weights(pathway(Four().eval(), "net.2", (9, 9)), 0)


# ---- masks

def test_ties_keep_an_exact_count(): assert keep_top(torch.zeros(100), .07).sum() == 7


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
def test_views_share_memory_and_flatten_is_their_inverse(shapes):
    layout = Layout(tuple(map(str, range(len(shapes)))), tuple(shapes), "kernel")
    flat = torch.arange(float(len(layout)))
    assert torch.equal(layout.flatten(layout.views(flat)), flat)
    layout.views(flat)["0"][:] = -1
    assert (flat[:layout.sizes[0]] == -1).all()


def test_soft_masks_hold_no_denormal_numbers():
    values = soft(torch.linspace(-5, 5, 1001), 200)
    assert ((values == 0) | (values >= 1e-6)).all() and undecided(torch.tensor([-1., 1.]), 200) == 0


# ---- learning

def groups(path): return crops(path, 12, 1), crops(path, 12, 2).flip(1) * .5, crops(path, 16, 3) * .2


@pytest.mark.parametrize("objective", ["preserve", "separate"])
def test_learning_is_exact_in_size_and_repeatable(net, path, objective):
    before = fingerprint(net)
    a, b, c = (sparsify(path, 3, *groups(path), keep=.2, objective=objective, steps=12, seed=s) for s in (0, 0, 1))
    assert a.mask.sum() == round(.2*len(a.layout)) and torch.equal(a.mask, b.mask) and (a.loss == b.loss).all() and (a.loss != c.loss).any()
    assert fingerprint(net) == before


def test_an_undecided_mask_is_refused(path):
    with pytest.raises(RuntimeError, match="undecided"): sparsify(path, 3, *groups(path), keep=.2, steps=3, beta=2).check()


@pytest.mark.parametrize("change,message", [
    (dict(own=torch.zeros(1, 3, 35, 35)), "'own' needs at least two images, got 1"), (dict(keep=0), "got 0"), (dict(keep=1.5), "got 1.5"),
    (dict(keep=1e-9), "keeps nothing"), (dict(objective="win"), "got 'win'"), (dict(steps=1), "got 1"), (dict(per="pixel"), "got 'pixel'")])
def test_bad_input_is_refused(path, change, message):
    own, other, background = groups(path)
    with pytest.raises(ValueError, match=message): sparsify(path, 3, **dict(own=own, other=other, background=background, steps=2) | change)


def test_a_constant_unit_is_refused(path):
    same = torch.zeros(4, *crops(path, 1).shape[1:])
    with pytest.raises(ValueError, match="same value for all images"): sparsify(path, 3, same, same, same, steps=2)


def test_a_diverging_loss_is_explained(path):
    own, other, background = groups(path)
    with pytest.raises(FloatingPointError, match="smaller rate"): sparsify(path, 3, own, other*torch.nan, background, steps=3)


# ---- circuits

def test_card_against_scipy():
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(n, generator=g) + m for n, m in ((20, 3), (30, 1), (50, 0))]
    masked = [w*.5 + torch.randn(len(w), generator=g)*.3 for w in whole]
    found, line = card(*zip(masked, whole)), stats.linregress(whole[0], masked[0])
    assert found["slope"] == pytest.approx(line.slope, rel=1e-5) and found["correlation"] == pytest.approx(line.rvalue, rel=1e-5)
    assert found["auroc_other"] == pytest.approx(stats.mannwhitneyu(masked[0], masked[1]).statistic/600)
    assert auroc(torch.tensor([1.]), torch.tensor([1.])) == .5


def test_circuit_files(net, path, tmp_path):
    layout, file = Layout.of(path, 3), tmp_path/"c.safetensors"
    circuit = Circuit.of(net, "features.6:3", keep_top(layout.flatten(magnitude(path, 3)), .13), layout, "dogs", "magnitude", seed=1)
    circuit.save(file)
    assert torch.equal(Circuit.load(file, net).mask, circuit.mask) and Circuit.load(file, net).layout == layout
    torch.testing.assert_close(circuit.response(path, crops(path, 3)), respond(path, 3, crops(path, 3), circuit.mask, layout))
    whole = file.read_bytes()
    for damaged in (whole[:-5], whole[:20], b"", b"{}"*50):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="not the file of a circuit"): Circuit.load(file, net)
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="belongs to other weights"): Circuit.load(file, SmallAlexNet(width=4))
    with pytest.raises(ValueError, match="booleans"): Circuit.of(net, "features.6:3", torch.ones(3).bool(), layout, "", "")


def test_a_circuit_is_bound_to_biases_too(net, path, tmp_path):
    layout, file = Layout.of(path, 3), tmp_path/"c.safetensors"
    Circuit.of(net, "features.6:3", torch.ones(len(layout)).bool(), layout, "", "").save(file)
    shifted = SmallAlexNet(width=4).eval()
    shifted.load_state_dict(net.state_dict())
    Circuit.load(file, shifted)
    with torch.no_grad(): shifted.features[3].bias[0] += 1
    with pytest.raises(ValueError, match="belongs to other weights"): Circuit.load(file, shifted)


def test_images_that_cannot_be_recorded_are_refused(net):
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(3, 70, 64, dtype=torch.uint8)]
    with pytest.raises(ValueError, match=r"image 1 is \(3, 70, 64\)"): record(net, "features.6", images)
    with pytest.raises(ValueError, match="no images"): strongest_patches(net, "features.6:0", [])
    with pytest.raises(FloatingPointError, match="features.6:0 is not finite for image 0"):
        strongest_patches(net, "features.6:0", images, lambda x: x*torch.nan)


def test_a_unit_out_of_range_is_named(path):
    for unit in (-1, 24):
        with pytest.raises(ValueError, match=f"units 0..23, got {unit}"): relevant_weights(path, unit)
