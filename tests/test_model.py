"Networks and units: hooks that go, weights that stay, files that are refused."
import copy
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

from superpos.data import MissingData, cifar10, find_data
from superpos.model import (
    CifarResNet,
    ResNet8,
    SmallAlexNet,
    Unit,
    check_unit,
    find_layer,
    fingerprint,
    imagenet_input,
    layer_outputs,
    layers,
    load_model,
)


def small(seed=0):
    torch.manual_seed(seed)
    return SmallAlexNet(width=4).eval().requires_grad_(False)

def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
               for m in model.modules())

# units

@settings(deadline=None)
@given(st.from_regex(r"[a-z_][a-z0-9_]*(\.[a-z0-9_]+)*", fullmatch=True), st.integers(0, 10**9))
def test_a_unit_is_its_name(layer, index):
    assert Unit.parse(str(Unit(layer, index))) == Unit(layer, index)

@pytest.mark.parametrize("text", ["", ":", "features.10", "features.10:", ":3", "features.10:-1",
                                  "features.10:1.5", "features.10:x"])
def test_what_names_no_unit_is_refused(text):
    with pytest.raises(ValueError, match="names no unit; write layer:index"): Unit.parse(text)

def test_near_names_are_offered():
    net = small()
    with pytest.raises(ValueError, match="no layer 'feature.10'; the nearest names are "
                       ".*features.10"):
        find_layer(net, "feature.10")
    with pytest.raises(ValueError, match="no layer 'zzzzzz'; the nearest names are features.0, "
                       "features.3"):
        find_layer(net, "zzzzzz")
    with pytest.raises(ValueError, match="no layer ''"): find_layer(net, "")
    with pytest.raises(ValueError, match="has units 0..11, got 12"):
        check_unit(net, "features.3:12")
    with pytest.raises(ValueError, match="so it has no units"): check_unit(net, "features.1:0")
    with pytest.raises(ValueError, match="no network 'alexnett'; the nearest names are .*alexnet"):
        load_model("alexnett")

# outputs

def test_before_the_relu_means_before_even_where_the_relu_writes_in_place():
    net, x = small(), torch.rand(3, 3, 32, 32)
    names = [n for n in layers(net) if n.startswith("features")]
    found, value = layer_outputs(net, names, x), x
    for i, module in enumerate(net.features):
        value = module(value.clone())
        if f"features.{i}" in names:
            assert torch.equal(found[f"features.{i}"], value) and (value < 0).any()
            assert torch.equal(layer_outputs(net, [f"features.{i}"], x, "post")[f"features.{i}"],
                               value.relu())
    assert list(found) == names

def test_the_pass_ends_where_all_is_known():
    net, reached = small(), []
    for name, m in net.named_modules():
        m.register_forward_hook(lambda *_, name=name: reached.append(name))
    layer_outputs(net, ["features.0", "features.3"], torch.rand(1, 3, 32, 32))
    assert "features.3" in reached and "features.4" not in reached and "classifier" not in reached

def test_hooks_go_even_after_an_error():
    net, x = small(), torch.rand(1, 3, 32, 32)
    unused = nn.Sequential(net, nn.Conv2d(3, 3, 1))
    unused.forward = net.forward
    tries = [(net, ["features.0"], torch.rand(1, 5, 32, 32)),
             (net, ["features.0", "features.99"], x), (net, ["features.10"], x[..., :4, :4]),
             (unused, ["0.features.0", "1"], x)]
    for model, names, given_x in tries:
        with pytest.raises((RuntimeError, ValueError)): layer_outputs(model, names, given_x)
        assert hooks(model) == 0
    with pytest.raises(ValueError, match="never reached 1"): layer_outputs(unused, ["1"], x)
    with pytest.raises(ValueError, match="when is 'pre' or 'post', got 'after'"):
        layer_outputs(net, ["features.0"], x, "after")

def test_weights_of_ones_own_leave_the_model_alone():
    net, other, x = small(), small(1), torch.rand(2, 3, 32, 32)
    before, pointers = fingerprint(net), [p.data_ptr() for p in net.parameters()]
    name = "features.10"
    swapped = layer_outputs(net, [name], x, weights=dict(other.named_parameters()))[name]
    assert torch.equal(swapped, layer_outputs(other, [name], x)[name])
    assert not torch.equal(swapped, layer_outputs(net, [name], x)[name])
    with pytest.raises(RuntimeError):
        layer_outputs(net, [name], x, weights={"features.0.weight": torch.zeros(1, 1, 1, 1)})
    assert fingerprint(net) == before
    assert [p.data_ptr() for p in net.parameters()] == pointers and hooks(net) == 0

def test_gradients_reach_weights_of_ones_own():
    net, x = small(), torch.rand(2, 3, 32, 32)
    w = net.features[0].weight.clone().requires_grad_()
    layer_outputs(net, ["features.3"], x,
                  weights={"features.0.weight": w})["features.3"].sum().backward()
    plain = small()
    plain.features[0].weight.requires_grad_()
    plain.features[:4](x).sum().backward()
    assert torch.equal(w.grad, plain.features[0].weight.grad)

@pytest.mark.parametrize("net", [SmallAlexNet(width=4), ResNet8(width=4), CifarResNet(8)],
                         ids=lambda m: type(m).__name__)
def test_a_model_copies_and_pickles_after_use(net):
    net.eval()
    x = torch.rand(2, 3, 32, 32)
    layer_outputs(net, [next(iter(layers(net)))], x)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(again(x), net(x)) and fingerprint(again) == fingerprint(net)

# files of weights

@pytest.fixture(scope="module")
def squeezenet(): return load_model("squeezenet1_1")

def test_both_kinds_of_file_give_the_same_network(squeezenet, tmp_path):
    state = squeezenet.state_dict()
    torch.save(state, tmp_path/"a.pth"); save_file(state, tmp_path/"a.safetensors")
    for file in ("a.pth", "a.safetensors"):
        net = load_model("squeezenet1_1", tmp_path/file)
        assert fingerprint(net) == fingerprint(squeezenet) and not net.training
        assert not any(p.requires_grad for p in net.parameters())
    assert (fingerprint(load_model("squeezenet1_1", str(tmp_path/"a.pth")))
            == fingerprint(squeezenet))

def test_what_a_file_does_not_cover_is_said(squeezenet, tmp_path):
    state = {k: v for k, v in squeezenet.state_dict().items() if not k.startswith("classifier")}
    save_file(state, tmp_path/"trunk.safetensors")
    with pytest.warns(UserWarning, match="trunk.safetensors covers 50 of 52 tensors; .*: "
                      "classifier.1.weight, classifier.1.bias"):
        load_model("squeezenet1_1", tmp_path/"trunk.safetensors")

class Payload:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

def test_a_file_that_would_run_code_is_refused_and_does_not_run(squeezenet, tmp_path):
    torch.save({**squeezenet.state_dict(), "extra": Payload(str(tmp_path/"ran"))},
               tmp_path/"evil.pth")
    with pytest.raises(Exception, match="nothing else is loaded"):
        load_model("squeezenet1_1", tmp_path/"evil.pth")
    assert not (tmp_path/"ran").exists()

def test_weights_that_are_not_numbers_are_refused_by_name(squeezenet, tmp_path):
    for bad in (float("nan"), float("inf")):
        state = {k: v.clone() for k, v in squeezenet.state_dict().items()}
        state["features.3.squeeze.weight"][0, 0] = bad
        save_file(state, tmp_path/"bad.safetensors")
        with pytest.raises(ValueError, match="bad.safetensors holds values that are not finite, in "
                           "features.3.squeeze.weight"):
            load_model("squeezenet1_1", tmp_path/"bad.safetensors")

def test_weights_of_another_network_are_refused_by_name(squeezenet, tmp_path):
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path/"other.safetensors")
    torch.save({"state_dict": squeezenet.state_dict()}, tmp_path/"wrapped.pth")
    with pytest.raises(ValueError, match="other.safetensors does not fit SqueezeNet: "
                       "features.0.weight not there or of another shape"):
        load_model("squeezenet1_1", tmp_path/"other.safetensors")
    with pytest.raises(ValueError, match="wrapped.pth does not fit SqueezeNet: state_dict"):
        load_model("squeezenet1_1", tmp_path/"wrapped.pth")
    with pytest.raises(FileNotFoundError, match="none.pth: no such file of weights"):
        load_model("squeezenet1_1", tmp_path/"none.pth")

# CIFAR ResNets

def by_hand(state, x, n):
    "Logits as section 4.2 of He et al. describes them, from nothing but the tensors of a file."
    def normed(key, value):
        mean, variance, weight, bias = (state[f"{key}.{part}"] for part in (
            "running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(value, mean, variance, weight, bias)
    x = normed("bn1", F.conv2d(x, state["conv1.weight"], padding=1)).relu()
    for stage in (1, 2, 3):
        for block in range(n):
            key, stride = f"layer{stage}.{block}", 2 if stage > 1 and not block else 1
            y = F.conv2d(x, state[f"{key}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(normed(f"{key}.bn1", y).relu(), state[f"{key}.conv2.weight"], padding=1)
            around = x[:, :, ::stride, ::stride]
            each = (y.shape[1] - x.shape[1])//2
            x = (normed(f"{key}.bn2", y) + F.pad(around, (0, 0, 0, 0, each, each))).relu()
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])

@pytest.mark.parametrize("depth", [8, 20])
def test_a_cifar_resnet_is_what_the_paper_describes(depth, tmp_path):
    torch.manual_seed(0)
    net, x = CifarResNet(depth), torch.rand(16, 3, 32, 32)
    net(x)  # statistics that are not 0 and 1
    state = {k: v for k, v in net.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path/"net.pth")
    loaded = load_model(f"resnet{depth}_cifar10", tmp_path/"net.pth")
    torch.testing.assert_close(loaded(x), by_hand(state, x, (depth - 2)//6), rtol=1e-4, atol=1e-5)
    assert len(layers(loaded)) == depth and not loaded.training

def test_a_cifar_resnet_of_another_depth_is_refused():
    for depth in (2, 18):
        with pytest.raises(ValueError, match=f"6n [+] 2 layers .*not {depth}"):
            load_model(f"resnet{depth}_cifar10")
    with pytest.raises(ValueError, match="no weights 'DEFAULT' for resnet20_cifar10; name a file"):
        load_model("resnet20_cifar10", "DEFAULT")
    with pytest.raises(ValueError, match="no network 'resnet20_cifar'; .* resnet20_cifar10"):
        load_model("resnet20_cifar")

@pytest.mark.parametrize("depth, published", [(20, .9173), (56, .934)])
def test_published_weights_classify_as_published(depth, published):
    try: weights = find_data(f"weights/resnet{depth}_cifar10.safetensors"); test = cifar10("test")
    except MissingData as missing: pytest.skip(str(missing))
    net, few = load_model(f"resnet{depth}_cifar10", weights), range(500)
    x = imagenet_input(torch.from_numpy(test.source[few]))
    with torch.no_grad(): answers = torch.cat([net(part).argmax(1) for part in x.split(20)])
    share = (answers.numpy() == test.labels[few]).mean()
    assert abs(share - published) < 3*(published*(1 - published)/len(few))**.5

# digests and pixels

def test_one_bit_changes_the_fingerprint():
    net = small()
    before = {n: fingerprint(net, [n]) for n in net.state_dict()}
    bits = net.features[6].weight.view(torch.int32)
    bits[1, 2, 0, 1] ^= 1
    after = {n: fingerprint(net, [n]) for n in net.state_dict()}
    assert [n for n in before if before[n] != after[n]] == ["features.6.weight"]
    assert fingerprint(net) != fingerprint(small())
    bits[1, 2, 0, 1] ^= 1
    assert fingerprint(net) == fingerprint(small())

def test_the_fingerprint_does_not_depend_on_memory_format_but_on_statistics():
    net = ResNet8(width=4).eval()
    before = fingerprint(net)
    assert fingerprint(net.to(memory_format=torch.channels_last)) == before
    net(torch.rand(1, 3, 32, 32)); assert fingerprint(net) == before
    net.bn1.running_mean += 1; assert fingerprint(net) != before

def test_pixels_are_prepared_as_torchvision_does():
    official = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.transforms()
    plain = v2.Compose([v2.ToDtype(torch.float32, scale=True),
                        v2.Normalize(official.mean, official.std)])
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.allclose(imagenet_input(every), plain(every), atol=1e-6)
    assert torch.equal(imagenet_input(every[0]), imagenet_input(every)[0])
    x = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    assert torch.allclose(imagenet_input(x)[..., 16:240, 16:240], official(x), atol=1e-6)
    assert imagenet_input(x).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(TypeError, match="pixels must be uint8, got torch.float32"):
        imagenet_input(x/255)
