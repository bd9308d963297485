"""What is made of the columns of a curvature, by every back end that has them."""

import pytest
import torch
from torch.func import jacrev

from laplace.curvature import AutogradEF, AutogradGGN, AutogradHessian, EFInterface, GGNInterface
from laplace.curvature.columns import lowrank
from laplace.errors import UnsupportedError
from laplace.structures.gather import GatherBlock
from laplace.structures.jacobian import DenseBlock
from laplace.structures.product import ProductBlock
from tests.cases import CASES
from tests.contracts import check_columns, generator
from tests.networks import named
from tests.tools import assert_close

BACK_ENDS = [
    (AutogradGGN, False),
    (AutogradEF, True),
    (AutogradHessian, False),
    (GGNInterface, False),
    (EFInterface, True),
]


@pytest.mark.every(4)
@pytest.mark.parametrize(("cls", "fisher"), BACK_ENDS, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("case", [case for case in CASES if case.likelihood != "reward_modeling"], ids=str)
def test_last_layers(cls, fisher, case):
    check_columns(cls(case.extractor(), case.likelihood, last_layer=True), case, fisher=fisher)


@pytest.mark.parametrize(("cls", "fisher"), BACK_ENDS[:3], ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("case", [case for case in CASES if case.likelihood == "reward_modeling"], ids=str)
def test_last_layers_that_compare_pairs(cls, fisher, case):
    check_columns(cls(case.extractor(), case.likelihood, last_layer=True), case, fisher=fisher)


@pytest.mark.parametrize("cls", [AutogradGGN, AutogradEF, GGNInterface, EFInterface])
@pytest.mark.parametrize("name", ["mlp", "mlp_regression", "conv2d", "positions"])
def test_all_weights(cls, name):
    network, model = named(name), named(name).model()
    problem, engine = network.problem(model), cls(model, network.likelihood)
    H = problem.ggn() if issubclass(cls, GGNInterface) else problem.empirical_fisher()
    (x, y), V = network.data(), torch.randn(len(H), 4, generator=generator(0))
    for ours, exact in zip(engine.blockdiag(x, y)[1], problem.groups(H), strict=True):
        assert_close(ours, exact)
    loss, products, trace = engine.lowrank(x, y, V)
    assert_close(loss, problem.nll())
    assert_close(products, H @ V)
    assert_close(trace, H.trace())


def test_the_true_hessian_of_all_weights():
    network, model = named("mlp"), named("mlp").model()
    problem, engine = network.problem(model), AutogradHessian(model, network.likelihood)
    H, V = problem.true_hessian(), torch.randn(len(problem.theta()), 4, generator=generator(0))
    for ours, exact in zip(engine.blockdiag(*network.data())[1], problem.groups(H), strict=True):
        assert_close(ours, exact)
    loss, products, trace = engine.lowrank(*network.data(), V)
    assert_close(loss, problem.nll())
    assert_close(products, H @ V)
    assert trace is None


@pytest.mark.parametrize("cls", [AutogradGGN, AutogradEF, AutogradHessian])
@pytest.mark.parametrize("structure", ["kron", "blockdiag", "ekfac", "lowrank"])
def test_single_weights_have_no_groups_and_are_refused(cls, structure):
    network, index = named("mlp"), torch.tensor([7, 1, 20])
    engine = cls(network.model(), network.likelihood, subnetwork_indices=index)
    further = {"kron": (1,), "ekfac": ([[None]], [(3,)]), "lowrank": (torch.randn(3, 2),)}.get(structure, ())
    with pytest.raises(UnsupportedError, match=f"does not provide hessian_structure='{structure}'.*'subnetwork'"):
        getattr(engine, structure)(*network.data(), *further)


def product_block(transposed: bool = False, groups: int = 1) -> ProductBlock:
    return ProductBlock(torch.randn(2, 4, groups, 3, 2), torch.randn(4, groups, 3, 5), transposed)


def gather_block() -> GatherBlock:
    values, datum, token = torch.randn(2, 6, 3), torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([4, 1, 1, 0, 2, 4])
    return GatherBlock(values, datum, token, 4, 5, values, token)


BLOCKS = {
    "dense": lambda: DenseBlock(torch.randn(2, 4, 7)),
    "product": product_block,
    "transposed": lambda: product_block(transposed=True),
    "groups": lambda: product_block(groups=3),
    "rotated": lambda: product_block(groups=3).rotate([None, torch.linalg.qr(torch.randn(5, 5)).Q], (6, 5)),
    "gather": gather_block,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_transpose_is_that_of_the_product_with_directions(name):
    block = BLOCKS[name]()
    w = torch.randn(3, 2, 4)
    v = torch.zeros(1, block.n_params)
    transposed = jacrev(lambda v: torch.einsum("sqb,qb->s", w, block.apply(v)[0]))(v)[:, 0]
    assert_close(block.apply_transposed(w), transposed)
    assert_close(block.apply_transposed(w), torch.einsum("sqb,qbp->sp", w, block.dense()))


def test_no_columns_and_no_rows_are_no_curvature():
    empty = [DenseBlock(torch.zeros(2, 0, 5))]
    for columns in ([], [empty]):
        products, trace = lowrank(columns, torch.randn(5, 2), [5])
        assert not bool(products.any())
        assert float(trace) == 0
