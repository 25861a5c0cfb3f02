"The engines of the pages on parameter decomposition and on basins, against what is known."
import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from superpos import exact
from superpos.toy import Features, Toy, untrained_toy

pages = Path(__file__).resolve().parent.parent/"nbs"


def functions(page):
    "A page's imports, functions and quadrature; its compiled functions as plain Python."
    names = {}
    for cell in json.loads((pages/page).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "#| slow" in source: continue
        for node in ast.parse(source).body:
            rule = isinstance(node, ast.Assign) and "nodes" in ast.unparse(node.targets)
            if isinstance(node, ast.FunctionDef): node.decorator_list = []
            if rule or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef)):
                exec(compile(ast.Module([node], []), page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def parts(): return functions("19_decomposition.ipynb")


@pytest.fixture(scope="module")
def basins(): return functions("15_basins.ipynb")


def test_a_part_that_is_needed_stays_whole_and_one_that_is_not_is_left_to_chance(parts):
    h = torch.tensor([[[-1., .2, .9]]])
    masks, paid = parts["gates"](h, torch.full((1, 3), 5.).log(), torch.zeros(1, 3))
    torch.testing.assert_close(masks, torch.tensor([[[-.05, 1., 1.]]]))
    torch.testing.assert_close(paid, torch.tensor([[[0., 1., 1.035]]]))


def test_every_example_has_a_feature_and_none_is_negative(parts):
    x = parts["some_features"](2, 500, 6, .05, torch.Generator().manual_seed(0))
    assert x.shape == (2, 500, 6) and x.min() == 0 and ((x > 0).sum(2) >= 1).all()


def test_attribution_keeps_the_parts_of_active_features(parts):
    W = torch.eye(2, 3).expand(1, 2, 3)
    U, V = W.mT.contiguous(), torch.eye(3)[None]  # the third part does nothing
    x = torch.tensor([[[.9, 0, 0], [0, .8, 0]]])
    y = (x @ W.mT @ W).relu()
    kept, paid = parts["mask_attributed"](x, y, W, U, V, None, None, None)
    assert kept.tolist() == [[[1, 0, 0], [0, 1, 0]]]
    torch.testing.assert_close(paid, torch.tensor([1.]))


def test_parts_add_up_to_the_weights(parts):
    W = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    for way in parts["mask_stochastic"], parts["mask_attributed"]:
        U, V = parts["decompose"](W, torch.zeros(2, 4), way, C=8, steps=150)
        assert ((U.mT @ V - W).norm(dim=(1, 2)) < .2*W.norm(dim=(1, 2))).all()


def test_masks_of_a_unit_add_up_to_one(parts):
    W, v, neuron, given = parts["planted"](0, 2)
    assert (W[neuron[:, None] == given].mean() > 5*W[neuron[:, None] != given].abs().mean())
    masks, *_ = parts["split"](W, v, parts["images"](given, 200, 0), steps=5)
    torch.testing.assert_close(masks.sum(0), torch.ones_like(W))


@pytest.mark.parametrize("n, m", [(3, 2), (4, 3)])
def test_the_basins_gradient_is_the_exact_one(basins, n, m):
    features = Features(n, density=.3)
    p, room = features.density[0, 0].double().item(), untrained_toy(features, m, seeds=range(2))
    W = room.W.double()
    W[0, 1] = 0
    W[0, 1, 0, :2] = torch.tensor([1., -1.])  # a digon, a single, and interference of nought
    W[0, 1, 1, 2] = 1
    toy = Toy(W, .1*torch.randn(1, 2, n, generator=torch.Generator().manual_seed(1)).double())
    theirs = exact.gradient(toy, features)
    for k in range(2):
        mine = basins["gradient"](toy.W[0, k].numpy(), toy.b[0, k].numpy(), p)
        for a, b in zip(mine, (theirs.W[0, k], theirs.b[0, k])):
            np.testing.assert_allclose(a, b.numpy(), atol=3e-5)


def test_the_flow_goes_down_and_keeps_symmetry(basins):
    features = Features(3, density=.3)
    p, W = features.density[0, 0].double().item(), np.array([[.6, -.5, .1], [.2, .1, .7]])
    end, b = basins["flow"](W, np.zeros(3), p, long=6.)
    turned, same = basins["flow"](W[:, ::-1].copy(), np.zeros(3), p, long=6.)
    np.testing.assert_allclose(turned[:, ::-1], end, atol=1e-6)
    np.testing.assert_allclose(same[::-1], b, atol=1e-6)
    loss = [exact.expected_loss(Toy(torch.tensor(w)[None, None], torch.tensor(c)[None, None]),
                                features).item() for w, c in ((W, np.zeros(3)), (end, b))]
    assert loss[1] < .5*loss[0]
    assert basins["shape"](np.array([[1., -1, 0], [0, 0, 1]])) == "digon + single"
