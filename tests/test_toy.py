"Toy models against the plain loop, themselves in other company, and values nobody should give."
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_toy import plain_loop
from safetensors.torch import save
from scipy import stats

from superpos import fused
from superpos.toy import (
    Features,
    Toy,
    _keys,
    _Plan,
    _uniforms,
    best_seed,
    expected_loss,
    loss,
    train,
    untrained_toy,
)

kinds = ["linear", "relu_output", "relu_hidden", "absolute"]


@pytest.mark.parametrize("density,steps", [(.2, 1000), (.05, 600)])
def test_final_losses_are_those_of_the_plain_loop(density, steps):
    seeds = 48
    features = Features(5, density=density)
    W, b = plain_loop(5, 2, seeds, steps, density, lr=3e-3)
    plain = expected_loss(Toy(W.mT[None].contiguous(), b[None]), features)[0]
    ours = expected_loss(train(features, 2, seeds=range(seeds), steps=steps, lr=3e-3,
                               quiet=True).toy, features)[0]
    assert stats.ks_2samp(plain, ours).pvalue > .01
    assert abs(plain.mean() - ours.mean()) < 4*((plain.var() + ours.var())/seeds)**.5


def test_the_torch_backend_ends_at_the_same_losses():
    features = Features(5, density=.2)
    runs = [train(features, 2, seeds=range(32), steps=600, batch=256, lr=3e-3, backend=backend,
                  quiet=True) for backend in ("numba", "torch")]
    fast, slow = (expected_loss(run.toy, features) for run in runs)
    assert stats.ks_2samp(fast[0], slow[0]).pvalue > .2
    torch.testing.assert_close(runs[0].loss, runs[1].loss, rtol=.02, atol=1e-4)


@pytest.mark.parametrize("kind", kinds)
def test_torch_and_numba_take_the_same_step(kind):
    features = Features(7, density=torch.linspace(.1, 1, 7), importance=torch.linspace(1, .2, 7),
                        signed=kind == "absolute")
    one, other = (train(features, 3, kind, seeds=(4,), steps=3, batch=333, lr=.02, backend=backend,
                        quiet=True).toy for backend in ("numba", "torch"))
    for name in "WbV":
        if getattr(one, name) is not None:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["relu_output", "absolute"])
def test_a_batch_in_blocks_of_which_the_last_is_not_full(kind):
    features = Features(150, density=.3, signed=kind == "absolute")
    runs = [train(features, 10, kind, seeds=(1, 2), steps=2, batch=333, backend=backend,
                  quiet=True) for backend in ("numba", "torch")]
    torch.testing.assert_close(runs[0].loss, runs[1].loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(runs[0].toy.b, runs[1].toy.b, atol=2e-4, rtol=0)


def test_random_numbers_agree_bit_by_bit():
    seeds = torch.tensor([[0, 1, 2**40]])
    keys = _keys(seeds, torch.arange(5))
    for s in range(3):
        for t in range(5):
            out = np.empty(1000, np.float32)
            fused.uniforms(out, np.uint32(keys[0, s, t, 0].item()),
                           np.uint32(keys[0, s, t, 1].item()), 7, 3, 1000)
            assert np.array_equal(out, _uniforms(keys[0, s, t], 7 + 3*torch.arange(1000)).numpy())


def test_streams_of_seeds_and_steps_are_unrelated():
    keys = _keys(torch.arange(20), torch.arange(20))
    u = _uniforms(keys, torch.arange(4000)).reshape(400, 4000)
    r = torch.corrcoef(u).fill_diagonal_(0)
    assert r.abs().max() < stats.norm.isf(1e-4/400**2)*4000**-.5
    assert len(set(map(tuple, keys.reshape(-1, 2).tolist()))) == 400
    assert stats.kstest(u[:, 0].numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(u.mean(1).numpy(), stats.norm(.5, (12*4000)**-.5).cdf).pvalue > 1e-3


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 5), instances=st.integers(1, 3),
       batch=st.sampled_from([1, 31, 64, 700]), threads=st.integers(1, 3),
       kind=st.sampled_from(kinds), data=st.data())
def test_company_does_not_matter(n, m, instances, batch, threads, kind, data):
    features = Features(n, density=torch.rand(instances, 1).clamp(.05))
    seeds = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3, unique=True))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try: together = train(features, m, kind, seeds=seeds, steps=7, batch=batch, quiet=True)
    finally: torch.set_num_threads(before)
    i, s = data.draw(st.integers(0, instances - 1)), data.draw(st.integers(0, len(seeds) - 1))
    alone = train(features[i], m, kind, seeds=seeds[s:s + 1], steps=7, batch=batch, quiet=True)
    assert torch.equal(together.toy.W[i, s], alone.toy.W[0, 0])
    assert torch.equal(together.toy.b[i, s], alone.toy.b[0, 0])


def test_initial_scale_does_not_depend_on_the_number_of_models():
    for instances, seeds in ((1, 400), (40, 10)):
        W = untrained_toy(Features(20, density=torch.full((instances, 1), .5)), 5,
                          seeds=torch.arange(instances*seeds).view(instances, seeds)).W
        assert W.std().item() == pytest.approx((2/25)**.5, rel=.02)


def test_in_and_out_weights_start_apart():
    toy = untrained_toy(Features(30), 10, "absolute", seeds=range(20))
    r = torch.corrcoef(torch.stack([toy.W.flatten(), toy.V.flatten()]))[0, 1]
    assert abs(r) < 4*toy.W.numel()**-.5
    assert toy.V.std().item() == pytest.approx((2/40)**.5, rel=.05)
    assert torch.equal(toy.W, untrained_toy(Features(30), 10, seeds=range(20)).W)
    with pytest.raises(ValueError, match="got 4294967296"):
        untrained_toy(Features(3), 2, seeds=[2**32])


def test_snapshots_do_not_change_the_course():
    features = Features(4, density=.3)
    plain, watched = (train(features, 2, steps=250, keep=keep, quiet=True)
                      for keep in ((), (1, 100, 101, 250)))
    assert torch.equal(plain.toy.W, watched.toy.W) and len(watched.kept) == 4
    assert torch.equal(watched.kept[-1].W, plain.toy.W)
    assert torch.equal(train(features, 2, steps=100, quiet=True).toy.W, watched.kept[1].W)


def test_loss_by_hand():
    toy = Toy(torch.tensor([[[[1., -1.]]]]), torch.tensor([[[0., .5]]]))
    x = torch.tensor([[[[1., 0.], [0., 2.]]]])
    # x = (1, 0): h = 1, x' = ReLU(1, -0.5) = (1, 0)
    # x = (0, 2): h = -2, x' = ReLU(-2, 2.5) = (0, 2.5)
    assert loss(toy, x, torch.tensor([[1., 4.]])).item() == pytest.approx(4*.25/2)


def test_a_linear_model_finds_the_principal_components():
    features = Features(6, density=.4, importance=.7**torch.arange(6))
    toy = train(features, 2, "linear", seeds=range(3), steps=3000, lr=5e-3, schedule="cosine",
                quiet=True).toy
    # the row space against the two most important features
    overlap = torch.linalg.svd(toy.W[0])[2][:, :2, :2]
    assert torch.linalg.svdvals(overlap).min() > .999
    variance = .4/3 - .2**2
    assert (expected_loss(toy, features)[0].numpy()
            == pytest.approx(variance*features.importance[0, 2:].sum().item(), rel=.02))


def test_weight_decay_is_decoupled():
    features, start = Features(3), untrained_toy(Features(3), 2)
    toy = train(features, 2, start=start, steps=1, lr=0., weight_decay=.5, quiet=True).toy
    assert torch.equal(toy.W, start.W)
    dead = train(Features(3, importance=0.), 2, start=start, steps=2, lr=.1, weight_decay=.5,
                 quiet=True).toy
    torch.testing.assert_close(dead.W, start.W*.95**2)


def test_no_bias():
    assert (train(Features(3, density=.5), 2, steps=20, bias=False, quiet=True).toy.b == 0).all()


def test_best_picks_the_smallest_loss():
    toy = untrained_toy(Features(3, density=torch.tensor([[.1], [.2]])), 2, "absolute",
                        seeds=(5, 6, 7))
    chosen = best_seed(toy, torch.tensor([[3., 1., 2.], [0., 5., 5.]]))
    assert torch.equal(chosen.W[:, 0], torch.stack([toy.W[0, 1], toy.W[1, 0]]))
    assert torch.equal(chosen.V[1, 0], toy.V[1, 0])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 6), signed=st.booleans(), data=st.data())
def test_densities_and_groups(n, signed, data):
    density = data.draw(st.lists(st.floats(.05, .45), min_size=n, max_size=n))
    order, seed = data.draw(st.permutations(range(n))), data.draw(st.integers(0, 10**6))
    density[order[1]] = min(density[order[1]], 1 - density[order[0]])
    features = Features(n, density=density, signed=signed, anticorrelated=[order[:2]])
    x = features.sample(20_000, seeds=(seed,))[0, 0]
    active = x != 0
    assert not (active[:, order[0]] & active[:, order[1]]).any()
    assert (active.double().mean(0) - torch.tensor(density)).abs().max() < 6*(.25/20_000)**.5
    assert x.max() <= 1 and x.min() >= -signed


def test_plan_of_groups():
    plan = _Plan.of(Features(5, density=.2, correlated=[(1, 3)], anticorrelated=[(0, 4)]))
    assert plan.gate.tolist() == [0, 1, 2, 1, 0]
    assert plan.shared.tolist() == [False, True, False, True, False]
    torch.testing.assert_close(plan.offset[0, 0, 0], torch.tensor([0, 0, 0, 0, .2]))


def test_it_works_without_numba():
    code = """
import sys, importlib.abc
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('numba', 'hdbscan', 'lucent'):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import superpos.toy as toy
toy.importlib.util.find_spec = lambda name: None
run = toy.train(toy.Features(3, density=.5), 2, steps=20, quiet=True)
assert run.toy.W.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("file", [b"", b"\x80\x04\x95 pickled", b"x" * 400,
                                  save(dict(weight=torch.ones(2)))])
def test_a_damaged_or_foreign_file_is_not_a_model(tmp_path, file):
    (tmp_path/"some.safetensors").write_bytes(file)
    with pytest.raises(ValueError, match="some.safetensors is not the file of a toy model"):
        Toy.load(tmp_path/"some.safetensors")


def test_memory_is_asked_for_before_it_is_taken(monkeypatch):
    from superpos import toy
    def taken(*given): raise AssertionError("models were made before memory was asked for")
    monkeypatch.setattr(toy, "untrained_toy", taken)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(MemoryError, match="1,000 models need .* train at most"):
        train(Features(20), 10, seeds=range(1000))


two = Features(2, density=[[.1], [.2]])
@pytest.mark.parametrize("call,words", [
    (lambda: train(two, 1, seeds=3), "seeds must be a list of whole numbers, .* got 3"),
    (lambda: train(two, 1, seeds="ab"), "seeds must be a list of whole numbers, .* got 'ab'"),
    (lambda: train(two, 1, seeds=(1.7,)), "whole numbers, .* none below 0, got 1.7"),
    (lambda: train(two, 1, seeds=(-1,)), "whole numbers, .* none below 0, got -1"),
    (lambda: two.sample(5, seeds=(0, -3)), "whole numbers, .* none below 0, got -3"),
    (lambda: two.sample(0), "batch must be a whole number, at least 1, got 0"),
    (lambda: Features(2, density="a"), "density must be a number or a tensor of them, got 'a'"),
    (lambda: Features(2, importance="a"), "importance must be a number or a tensor of them"),
    (lambda: Features(2.5), "n must be a whole number, at least 1, got 2.5"),
    (lambda: Features(3, exactly=1.), "exactly must be a whole number, at least 1, got 1.0"),
    (lambda: train(two, 1, device="abacus"), "no device 'abacus' here"),
    (lambda: train(two, 1, device="mps:7"), "no device 'mps:7' here"),
    (lambda: two.sample(5, device="abacus"), "no device 'abacus' here"),
    (lambda: expected_loss(untrained_toy(two, 1), two, batch=0), "batch must be .* got 0"),
    (lambda: train(two, 1, steps=1, perturb=lambda toy, x: x[..., :1]),
     r"perturb must .* the shape it was given, \(2, 1, 1024, 2\), got \(2, 1, 1024, 1\)"),
    (lambda: train(two, 1, steps=1, perturb=lambda toy, x: None), "perturb must return .* None"),
    (lambda: train(two, "1"), "m must be a whole number, at least 1, got '1'")])
def test_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error: call()
    assert "\n" not in str(error.value)


def test_there_are_as_many_instances_as_there_are():
    for which in (2, 5, -3):
        with pytest.raises(IndexError, match=f"no instance {which}; there are 2"): two[which]
    assert [f.density[0, 0].item() for f in two] == pytest.approx([.1, .2])
    assert torch.equal(two[-1].density, two[np.int64(1)].density)
    assert torch.equal(two[[1, 0]].density, two.density.flip(0))


def test_whole_numbers_of_numpy_are_whole_numbers():
    one, other = (train(Features(number(3), exactly=number(1)), number(2), steps=number(4),
                        batch=number(8), seeds=(number(5),), quiet=True)
                  for number in (int, np.int64))
    assert torch.equal(one.toy.W, other.toy.W)
    assert torch.equal(expected_loss(one.toy, Features(3), batch=np.int32(9)),
                       expected_loss(one.toy, Features(3), batch=9))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", kinds)
def test_cuda_graph_takes_the_same_steps(kind):
    features = Features(6, density=torch.tensor([[.5], [.1]]), signed=kind == "absolute")
    cpu, gpu = (train(features, 3, kind, seeds=(0, 1), steps=50, batch=256, backend="torch",
                      device=device, quiet=True) for device in ("cpu", "cuda"))
    torch.testing.assert_close(cpu.loss, gpu.loss, atol=1e-4, rtol=1e-3)
