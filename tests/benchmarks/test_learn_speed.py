"""Training and scoring against a plain DataLoader loop of the same model, turn by turn; and what
the strategies add to one pass over a pool."""
import statistics
import time

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from turns import interleaved

from superpos.acquire import Pool, query, strategies
from superpos.data import Images
from superpos.learn import Plan, ResidentImages, _optimizer, logits_and_features, network, train

normal = [T.ToTensor(), T.Normalize([.485, .456, .406], [.229, .224, .225])]
plan = Plan(steps=4, batch=128)


class Pictures(Dataset):
    "What `torchvision.datasets.CIFAR10` does."
    def __init__(self, images, transform):
        self.pixels, self.labels, self.transform = (images.source.transpose(0, 2, 3, 1),
                                                    images.labels, transform)
    def __len__(self): return len(self.labels)
    def __getitem__(self, i):
        return (self.transform(Image.fromarray(np.ascontiguousarray(self.pixels[i]))),
                int(self.labels[i]))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return Images("noise", rng.integers(0, 256, (plan.steps*plan.batch, 3, 32, 32), dtype=np.uint8),
                  rng.integers(0, 10, plan.steps*plan.batch), tuple("0123456789"))


def report(benchmark, seconds, count):
    plain, ours = seconds.values()
    for name, s in seconds.items():
        benchmark.extra_info[name] = f"{count/s:,.0f} images/s, {plain/s:.2f} times plain"
        print(f"\n  {name}: {benchmark.extra_info[name]}", end="")
    return plain/ours


def plain_training(model, images):
    loader = DataLoader(Pictures(images, T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(),
                                                    *normal])), plan.batch, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), .05, .9, nesterov=True, weight_decay=5e-4)
    model.train()
    for x, y in loader:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def plain_scoring(model, images):
    kept, logits = [], []
    handle = model.get_submodule("head" if hasattr(model, "head")
                                 else "fc").register_forward_pre_hook(
                                     lambda module, given: kept.append(given[0]))
    model.eval()
    for x, _ in DataLoader(Pictures(images, T.Compose(normal)), 500): logits.append(model(x))
    handle.remove()
    return torch.cat(logits), torch.cat(kept)


def contiguous(model): return model.to(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("name,least", [("resnet8", 1.2), ("resnet18", .9)])
def test_training(benchmark, images, name, least):
    theirs = contiguous(network(name, 10))
    ours = network(name, 10)
    data = ResidentImages(images, "cpu", plan.pad)
    optimizer, rows = _optimizer(ours, plan), torch.arange(len(data))
    ways = {"plain DataLoader loop": lambda: plain_training(theirs,
                                                            images), "resident": lambda: train(
                                                                ours, optimizer, data, rows, plan)}
    gain = report(benchmark, interleaved(ways, 3), len(data))
    benchmark.pedantic(ways["resident"], rounds=1)
    assert gain > least


@pytest.mark.parametrize("name,least", [("resnet8", 1.2), ("resnet18", .9)])
def test_scoring(benchmark, images, name, least):
    theirs = contiguous(network(name, 10))
    ours = network(name, 10)
    data = ResidentImages(images, "cpu")
    assert torch.allclose(plain_scoring(theirs, images)[1], logits_and_features(ours, data)[1],
                          atol=1e-3)
    ways = {"plain DataLoader loop": lambda: plain_scoring(theirs, images),
            "resident": lambda: logits_and_features(ours, data)}
    gain = report(benchmark, interleaved(ways, 5), len(data))
    benchmark.pedantic(ways["resident"], rounds=1)
    assert gain > least


def test_feeding(benchmark, images):
    "Batches alone, without a network: what is left where a device makes the network cheap."
    data, rows = ResidentImages(images, "cpu", plan.pad), torch.arange(len(images))
    loader = DataLoader(Pictures(images, T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(),
                                                    *normal])), plan.batch, shuffle=True)
    ways = {"plain DataLoader": lambda: list(loader), "resident": lambda: [
        data.batch(part, torch.Generator().manual_seed(0), True)
        for part in rows.split(plan.batch)]}
    gain = report(benchmark, interleaved(ways, 5), len(data))
    benchmark.pedantic(ways["resident"], rounds=1)
    assert gain > 3


@pytest.mark.parametrize("name,width", [("resnet18", 512), ("resnet8", 64)])
def test_strategies_over_inference(benchmark, images, name, width):
    """All strategies on one pool of 45,000 images (5,000 to choose, 5,000 labelled; a committee of
    8; 64 directions of the features), against a pass over so many, extrapolated from 512 in turn
    with the strategies."""
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(10, width, generator=rng)
    labels = torch.randint(10, (50_000,), generator=rng)
    draws, turn = (torch.randn(n, width, generator=rng) for n in (50_000, width))
    mixed = draws @ (turn*torch.linspace(2, .05, width)/width**.5)
    features = (.5*centres[labels] + mixed).relu()
    committee = .03*features[:45_000] @ centres.T + .3*torch.randn(8, 45_000, 10, generator=rng)
    model, data, spent, passes = network(name, 10), ResidentImages(images, "cpu"), {}, []
    small = torch.Generator().manual_seed(0)
    # loads scikit-learn
    query(Pool(torch.randn(99, 2, generator=small), torch.randn(99, 2, generator=small)), 5,
          "typiclust")
    start = time.perf_counter()
    pool = Pool(committee, features[:45_000], features[45_000:], labels[:45_000]).reduced(64)
    spent["making the pool"] = time.perf_counter() - start
    for strategy in strategies:
        start = time.perf_counter()
        logits_and_features(model, data)
        passes.append((time.perf_counter() - start)*45_000/len(data))
        start = time.perf_counter()
        query(pool, 5000, strategy)
        spent[strategy] = time.perf_counter() - start
    one_pass = statistics.median(passes)
    print(f"\n  {name}, one pass over 45,000 images: {one_pass:.1f} s (from {len(data)})", end="")
    for strategy, s in spent.items(): print(f"\n  {strategy}: {s:.2f} s, {s/one_pass:.1%}", end="")
    print(f"\n  all {len(strategies)} together: {sum(spent.values()):.1f} s, "
          f"{sum(spent.values())/one_pass:.1%}", end="")
    benchmark.extra_info["all strategies over one pass"] = round(sum(spent.values())/one_pass, 3)
    benchmark.pedantic(lambda: query(pool, 5000, "entropy"), rounds=1)
    assert max(spent.values()) < .1*one_pass and sum(spent.values()) < .1*one_pass
