"""What all structures have in common, each against one dense matrix: a row of a table for each structure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from laplace import linalg
from laplace.errors import UnsupportedError
from laplace.structures import (
    STRUCTURES,
    AbstractCurvature,
    BlockDiagCurvature,
    DiagCurvature,
    EKFACCurvature,
    FullCurvature,
    Kron,
    KronCurvature,
    LowRankCurvature,
)
from laplace.structures.by_hand import BY_HAND, assigned_curvature, independent, zero_curvature, zero_form
from laplace.structures.gather import GatherBlock
from laplace.structures.head_block import head_blocks
from laplace.structures.jacobian import JacobianBlock, SumBlock
from laplace.structures.product import ProductBlock
from tests.contracts import generator, linear_jacobian, shapes_of
from tests.structures.samples import prior, psd, uniform
from tests.tools import assert_close

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed)).Q.contiguous()


class Row(NamedTuple):
    """A curvature over groups of weights of some shapes, the matrix that it is, and which priors it takes."""

    curvature: Any
    dense: Tensor
    per_weight: bool = True


def sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def full(shapes: list[tuple[int, ...]]) -> Row:
    matrix = psd(sum(map(math.prod, shapes)), 1, rank=9)
    return Row(FullCurvature(matrix), matrix)


def diag(shapes: list[tuple[int, ...]]) -> Row:
    vector = uniform(sum(map(math.prod, shapes)), 2)
    return Row(DiagCurvature(vector), vector.diag())


def blockdiag(shapes: list[tuple[int, ...]]) -> Row:
    blocks = [psd(math.prod(shape), seed, rank=4) for seed, shape in enumerate(shapes)]
    return Row(BlockDiagCurvature([FullCurvature(block) for block in blocks]), torch.block_diag(*blocks))


def kron(shapes: list[tuple[int, ...]]) -> Row:
    """Raw sums over 5 rows, the first factor of each group diagonal in every second one."""
    factors = [[psd(n, seed + 7 * n, rank=3) for n in sides(shape)] for seed, shape in enumerate(shapes)]
    dense = [b[0] if len(b) == 1 else torch.kron(b[0], b[1] / 5) for b in factors]
    return Row(KronCurvature(Kron(factors), (5,) * len(shapes)), torch.block_diag(*dense), False)


def ekfac(shapes: list[tuple[int, ...]]) -> Row:
    bases = [[orthogonal(n, seed + 7 * n) for n in sides(shape)] for seed, shape in enumerate(shapes)]
    values = [uniform(math.prod(shape), seed).view(sides(shape)) for seed, shape in enumerate(shapes)]
    wholes = [b[0] if len(b) == 1 else torch.kron(*b) for b in bases]
    dense = [Q @ s.flatten().diag() @ Q.T for Q, s in zip(wholes, values, strict=True)]
    return Row(EKFACCurvature(bases, values), torch.block_diag(*dense), False)


def lowrank(shapes: list[tuple[int, ...]]) -> Row:
    vectors = torch.linalg.qr(normal(sum(map(math.prod, shapes)), 4, seed=3)).Q
    values = torch.tensor([5.0, 2.0, 1.0, 0.5], dtype=F64)[: vectors.shape[1]]
    return Row(LowRankCurvature(vectors, values), vectors @ values.diag() @ vectors.T)


ROWS: dict[str, Callable[[list[tuple[int, ...]]], Row]] = {
    "full": full, "diag": diag, "blockdiag": blockdiag, "kron": kron, "ekfac": ekfac, "lowrank": lowrank,
}  # fmt: skip
every_structure = pytest.mark.parametrize("name", ROWS)
SHAPES = [(3, 4), (3,)]
SIZES = (12, 3)
PRIORS = {"scalar": uniform(1), "per layer": uniform(2), "per weight": uniform(15)}


def test_every_structure_has_a_row():
    assert set(ROWS) == {name.value for name in STRUCTURES}
    assert set(BY_HAND) == set(STRUCTURES.values())


# -- determinants, scales, states -------------------------------------------------------------------------------------


@every_structure
@pytest.mark.parametrize("kind", PRIORS)
def test_determinants_are_those_of_the_matrix_for_every_prior(name, kind):
    row, over = ROWS[name](SHAPES), prior(PRIORS[kind], SIZES)
    if kind == "per weight" and not row.per_weight:
        with pytest.raises(UnsupportedError, match="for each weight"):
            row.curvature.posterior(over)
        return
    P0, scaled = over.diagonal().diag(), row.curvature * 0.7
    A = 0.7 * row.dense + P0
    assert scaled.n_params == scaled.posterior(over).n_params == len(A)
    assert_close(scaled.posterior_logdet(over), A.logdet(), "log-determinant")
    assert_close(scaled.log_det_ratio(over), A.logdet() - P0.logdet(), "its ratio to the prior's")
    assert_close(scaled.posterior(over).logdet(), A.logdet(), "log-determinant of the factorized form")
    delta, factor = PRIORS[kind].clone().requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True)
    found = torch.autograd.grad((row.curvature * factor).log_det_ratio(prior(delta, SIZES)), (delta, factor))
    ratio = (factor * row.dense + prior(delta, SIZES).diagonal().diag()).logdet() - prior(delta, SIZES).logdet()
    for ours, theirs in zip(found, torch.autograd.grad(ratio, (delta, factor)), strict=True):
        assert_close(ours, theirs, "derivatives of the ratio")


@every_structure
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_curvature_is_made_again_from_its_state(name, dtype):
    row = ROWS[name](SHAPES)
    again = type(row.curvature).from_state(row.curvature.state(), dtype)
    assert_close(again.to_dense(), row.dense)
    assert again.to_dense().dtype == dtype
    assert again.n_params == 15
    assert again.is_finite


@every_structure
def test_what_is_not_finite_is_seen(name):
    row = ROWS[name](SHAPES)
    assert row.curvature.is_finite
    state = row.curvature.state()

    def spoiled(value: Any) -> Any:
        if isinstance(value, list):
            return [spoiled(item) for item in value]
        return torch.full_like(value, math.inf) if isinstance(value, Tensor) else value

    for key, value in state.items():
        if key not in ("eigenvectors", "counts", "trace"):
            broken = {**state, key: spoiled(value)}
            if broken[key] is not value and any(isinstance(item, (Tensor, list)) for item in [broken[key]]):
                assert not type(row.curvature).from_state(broken, F64).is_finite, key


@every_structure
@pytest.mark.parametrize("shared", [False, True])
def test_weights_in_other_units_scale_rows_and_columns(name, shared):
    """Of each output, as a noise of its own does; the weight and the bias of a layer may share a factor."""
    row = ROWS[name](SHAPES)
    curvature, dense = row.curvature, row.dense
    per_output = torch.tensor([0.5, 2.0, 3.0], dtype=F64)
    factors = torch.cat([per_output.repeat_interleave(4), per_output])
    if name == "kron":
        G, A = psd(3, 4, rank=3), psd(4, 5, rank=4)
        outer = torch.tensor([1.0, 2.0, 0.5], dtype=F64) if shared else G
        matrix = outer.diag() if shared else G
        curvature = KronCurvature(Kron([[outer, A], [outer if shared else psd(3, 6)]]), (2, 2))
        dense = torch.block_diag(torch.kron(matrix, A / 2), matrix if shared else psd(3, 6))
    if name == "ekfac":
        if not shared:
            with pytest.raises(UnsupportedError, match="mixes them"):
                curvature.scale_weights(factors)
            return
        Q = torch.kron(torch.eye(3, dtype=F64), orthogonal(4, 3))
        first, second = uniform(12, 1), uniform(3, 2)
        curvature = EKFACCurvature([[None, orthogonal(4, 3)], [None]], [first.view(3, 4), second])
        dense = torch.block_diag(Q @ first.diag() @ Q.T, second.diag())
    root, over = factors.sqrt(), prior(uniform(1), SIZES)
    scaled, expected = curvature.scale_weights(factors), root[:, None] * dense * root
    P0 = over.diagonal().diag()
    assert_close(scaled.posterior(over).to_dense(), expected + P0, "posterior precision")
    assert_close(scaled.posterior_logdet(over), (expected + P0).logdet(), "log-determinant")
    assert_close(scaled.log_det_ratio(over), (expected + P0).logdet() - P0.logdet(), "ratio")
    assert_close(curvature.posterior(over).to_dense(), dense + P0, "what was scaled stays as it was")
    if name not in ("kron", "ekfac"):
        assert_close(scaled.to_dense(), expected, "dense")


MEMORY: dict[str, Callable[[int], float]] = {
    "full": lambda item: 3 * item * 15**2,
    "diag": lambda item: 3 * item * 15,
    "blockdiag": lambda item: 3 * item * (12**2 + 3**2),
    "kron": lambda item: 3 * 8 * (3**2 + 4**2),
    "ekfac": lambda item: 3 * 8 * (3**2 + 4**2) + 3 * item * 15,
    "lowrank": lambda item: 4 * item * 15 * 11,
}
"""Curvature, factorization and a copy, in bytes; Kronecker sums are in float64, and of low rank are 11 directions."""


@every_structure
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_cannot_fit_the_memory_is_refused(name, dtype, monkeypatch):
    weights, structure = [torch.zeros(shape) for shape in SHAPES], {s.value: c for s, c in STRUCTURES.items()}[name]
    needed = MEMORY[name](dtype.itemsize)
    monkeypatch.setattr(linalg, "memory_of", lambda device: needed)
    structure.check_memory(weights, dtype)
    monkeypatch.setattr(linalg, "memory_of", lambda device: needed - 1)
    with pytest.raises(UnsupportedError, match=rf"{name}.* for 15 weights"):
        structure.check_memory(weights, dtype)


def test_few_weights_have_no_more_directions_than_weights():
    assert LowRankCurvature.bytes_needed([(2, 3)], torch.float32) == 4 * 4 * 6 * 6


# -- predictions of whole networks ------------------------------------------------------------------------------------

Q, B = 2, 3
"""Columns and data."""


def of_product(block: ProductBlock) -> Tensor:
    """``J_qb = Σ_t g_qbt ⊗ a_bt`` for each group of channels."""
    order = "qbgio" if block.transposed else "qbgoi"
    return torch.einsum(f"qbgto,bgti->{order}", block.left, block.right).flatten(2)


def product(groups: int, positions: int, o: int, i: int, seed: int, *, transposed: bool = False) -> ProductBlock:
    return ProductBlock(
        normal(Q, B, groups, positions, o, seed=seed), normal(B, groups, positions, i, seed=seed + 1), transposed
    )


def network() -> tuple[list[JacobianBlock], Tensor, list[tuple[int, ...]]]:
    """One group of each kind, their derivatives written out ``[columns, data, P]``, and the shapes of the groups."""
    products = [
        product(1, 1, 4, 3, 10),
        product(1, 1, 3, 4, 12, transposed=True),
        product(1, 2, 3, 3, 14),
        product(1, 3, 2, 4, 16, transposed=True),
        product(2, 2, 2, 3, 18),
        product(2, 2, 3, 2, 20, transposed=True),
    ]
    datum, token = torch.tensor([0, 0, 2, 2]), torch.tensor([1, 4, 0, 1])
    values, table = normal(Q, 4, 3, seed=30), torch.zeros(Q, B, 5, 3, dtype=F64)
    for n, (b, t) in enumerate(zip(datum.tolist(), token.tolist(), strict=True)):
        table[:, b, t] = values[:, n]
    left = normal(Q, B, 4, 3, seed=31)
    blocks = [*products, GatherBlock(values, datum, token, B, 5, values, token), SumBlock(left)]
    J = torch.cat([*map(of_product, products), table.flatten(2), left.sum(2)], -1)
    return blocks, J, [block.shape for block in blocks]


limited = pytest.mark.parametrize("limited", [False, True], ids=["at once", "piece by piece"])


def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("jacobian", "product"):
        monkeypatch.setattr(f"laplace.structures.{module}.piece_elements", lambda device: 7)
    monkeypatch.setattr("laplace.structures.gather.chunk_elements", lambda device: 7)
    monkeypatch.setattr("laplace.structures.lowrank_precision.CHUNK_ELEMENTS", 7)


def check_moments(precision: Any, blocks: list[JacobianBlock], J: Tensor, dense: Tensor) -> None:
    """(Co)variances of columns ``J [columns, data, P]`` under a precision that is `dense`."""
    rows = J.transpose(0, 1)
    V = rows @ dense.inverse() @ rows.mT
    flat = rows.flatten(0, 1)
    assert_close(precision.block_variance(blocks), V.diagonal(dim1=1, dim2=2).T, "variance")
    assert_close(precision.block_covariance(blocks), V, "covariance")
    assert_close(precision.block_kernel(blocks), flat @ dense.inverse() @ flat.T, "kernel")


@every_structure
@limited
def test_predictions_of_a_network_are_those_of_written_derivatives(name, limited, monkeypatch):
    blocks, J, shapes = network()
    if limited:
        in_pieces(monkeypatch)
    row, sizes = ROWS[name](shapes), tuple(map(math.prod, shapes))
    for over in (prior(uniform(1), sizes), prior(uniform(len(sizes)), sizes)):
        precision = (row.curvature * 0.7).posterior(over)
        check_moments(precision, blocks, J, 0.7 * row.dense + over.diagonal().diag())
    assert_close(precision.functional_variance(J.transpose(0, 1)), precision.block_covariance(blocks))


@every_structure
@limited
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("mixed", [False, True], ids=["outputs", "mixtures"])
def test_predictions_of_a_head_are_those_of_written_derivatives(name, bias, mixed, limited, monkeypatch):
    if limited:
        in_pieces(monkeypatch)
    shapes, phi = shapes_of(3, 4, bias), normal(5, 4)
    blocks, J = head_blocks(phi, shapes), torch.stack([linear_jacobian(row, 3, bias) for row in phi], 1)
    if mixed:
        mix = normal(2, 3, seed=1)
        blocks, J = [block.mix(mix) for block in blocks], torch.einsum("mq,qbp->mbp", mix, J)
    row, over = ROWS[name](shapes), prior(uniform(len(shapes)), tuple(map(math.prod, shapes)))
    check_moments(row.curvature.posterior(over), blocks, J, row.dense + over.diagonal().diag())
    bias_alone = [head_blocks(phi, [(3,)])[0]]
    row, over = ROWS[name]([(3,)]), prior(uniform(1), (3,))
    eye = torch.eye(3, dtype=F64).unsqueeze(1).expand(3, 5, 3)
    check_moments(row.curvature.posterior(over), bias_alone, eye, row.dense + over.diagonal().diag())


@limited
@pytest.mark.parametrize("index", range(8))
def test_all_that_is_asked_of_a_block_is_that_of_written_derivatives(index, limited, monkeypatch):
    if limited:
        in_pieces(monkeypatch)
    blocks, J, shapes = network()
    start = sum(map(math.prod, shapes[:index]))
    block, J = blocks[index], J[..., start : start + math.prod(shapes[index])]
    p = J.shape[-1]
    w, v, rows = uniform(p, 5), normal(4, p, seed=6), J.transpose(0, 1)
    weighed = rows * w.sqrt()
    assert (block.n_params, block.n_columns, block.n_rows) == (p, Q, B)
    assert_close(block.dense(), J, "dense")
    assert_close(block.dense(slice(1, 3)), J[:, 1:3], "some data")
    assert_close(block.squares(), J.square().sum((0, 1)), "squares")
    assert_close(block.variance(w), (J.square() * w).sum(-1), "variance")
    assert_close(block.covariance(w), weighed @ weighed.mT, "covariance")
    assert_close(block.kernel(w), weighed.flatten(0, 1) @ weighed.flatten(0, 1).T, "kernel")
    assert_close(block.apply(v), torch.einsum("qbp,sp->sqb", J, v), "apply")
    weights = normal(4, Q, B, seed=7)
    assert_close(block.apply_transposed(weights), torch.einsum("sqb,qbp->sp", weights, J), "apply transposed")
    chosen = torch.randperm(p, generator=generator(8))[: p - 2]
    assert_close(block.entries(slice(1, 3), chosen), J[:, 1:3][..., chosen], "entries")
    assert_close(block.mix(weights[0].T[:, :Q]).dense(), torch.einsum("mq,qbp->mbp", weights[0].T[:, :Q], J), "mix")
    assert_close(block.cross(block), torch.einsum("qbp,kzp->qbkz", J, J), "cross")
    assert_close(block.compact().dense(), J, "compact")
    turns = [orthogonal(n, 20 + n) for n in sides(shapes[index])]
    for left, right in ((turns[0], turns[-1]), (None, turns[-1]), (turns[0], None)):
        kept = [left, right] if len(turns) == 2 else [turns[0]]
        eyes = [
            torch.eye(n, dtype=F64) if side is None else side
            for side, n in zip(kept, sides(shapes[index]), strict=True)
        ]
        turned = block.rotate(kept, sides(shapes[index]))
        whole = torch.kron(*eyes) if len(eyes) == 2 else eyes[0]
        assert_close(turned.dense(), J @ whole, "in other coordinates")
        assert_close(turned.variance(w), ((J @ whole).square() * w).sum(-1), "variance in other coordinates")
        assert_close(
            turned.mix(weights[0].T[:, :Q]).dense(), torch.einsum("mq,qbp->mbp", weights[0].T[:, :Q], J @ whole)
        )


# -- by hand ----------------------------------------------------------------------------------------------------------


def as_it_is(name: str, value: Any) -> Tensor:
    """What an estimator does with tensors that users assign: a copy."""
    return value.clone()


@every_structure
def test_what_is_handed_out_and_assigned_again_is_the_same_curvature(name):
    row = ROWS[name](SHAPES)
    kind, handed = type(row.curvature), independent(row.curvature.public)
    for now in (None, row.curvature, zero_curvature(kind, SHAPES, torch.zeros(0, dtype=F64))):
        again = assigned_curvature(kind, handed, SHAPES, as_it_is, now)
        assert type(again) is kind
        assert_close(again.to_dense(), row.dense)
        over = prior(uniform(2), SIZES)
        assert_close(again.posterior(over).to_dense(), row.dense + over.diagonal().diag())


@every_structure
def test_copies_share_no_memory(name):
    row = ROWS[name](SHAPES)

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            return [found for item in value for found in tensors(item)]
        return tensors(vars(value)) if hasattr(value, "__dict__") else []

    theirs = tensors(independent(row.curvature.public))
    assert {t.data_ptr() for t in theirs}.isdisjoint(t.data_ptr() for t in tensors(row.curvature.public))
    for tensor in theirs:
        tensor.fill_(9.0)
    assert_close(row.curvature.to_dense(), row.dense)


@every_structure
def test_no_data_are_no_curvature(name):
    structure: type[AbstractCurvature] = {s.value: c for s, c in STRUCTURES.items()}[name]
    shapes = [*SHAPES, (), (2, 3, 2)]
    zero = zero_curvature(structure, shapes, torch.zeros(0, dtype=F64))
    P = 15 + 1 + 12
    assert zero.n_params == P
    assert_close(zero.to_dense(), torch.zeros(P, P, dtype=F64))
    over = prior(uniform(4), (12, 3, 1, 12))
    assert_close(zero.posterior(over).to_dense(), over.diagonal().diag())
    form = zero_form(zero)
    if name == "kron":
        assert [[list(side.shape) for side in block] for block in form.kfacs] == [
            [[3, 3], [4, 4]], [[3, 3]], [[1, 1]], [[2, 2], [6, 6]],
        ]  # fmt: skip
    if name != "ekfac" and structure not in (KronCurvature, LowRankCurvature):
        ROW = ROWS[name](shapes)
        assert_close(zero.merge(ROW.curvature).to_dense(), ROW.dense)
