"""What users hold of a curvature: copies going out, checked values coming in, and the zero before any data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.structures.base import AbstractCurvature
from laplace.structures.blockdiag import BlockDiagCurvature
from laplace.structures.diag import DiagCurvature
from laplace.structures.ekfac import EKFACCurvature, EKFACPrecision
from laplace.structures.full import FullCurvature
from laplace.structures.kron import Kron, KronCurvature, densify
from laplace.structures.kron_decomposed import KronDecomposed
from laplace.structures.lowrank import LowRankCurvature
from laplace.structures.wide_kron import WIDE, WideKron, WideKronCurvature, WidePrecision, is_wide

Shapes: TypeAlias = "Sequence[tuple[int, ...]]"
"""Shapes of the parameter groups."""
Check: TypeAlias = "Callable[[str, Any], Tensor]"
"""From a name and what a user passed to a finite tensor of the right precision and device, which is a copy."""


def independent(value: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy of tensors, nested lists and matrices that shares no memory; what occurs twice in it stays one."""
    known = {} if known is None else known
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.clone()
        return known[id(value)]
    if isinstance(value, (list, tuple)):
        return type(value)([independent(item, known) for item in cast("Sequence[Any]", value)])
    if isinstance(value, Kron):
        return Kron(independent(value.kfacs, known), value.counts, value.resolution)
    if isinstance(value, (KronDecomposed, EKFACPrecision, WideKron, WidePrecision)):
        return replace(value, **{each.name: independent(getattr(value, each.name), known) for each in fields(value)})
    return value


# -- before any data --------------------------------------------------------------------------------------------------


def zero_curvature(kind: type[AbstractCurvature], shapes: Shapes, like: Tensor) -> AbstractCurvature:
    """The curvature of no data."""
    sizes = [math.prod(shape) for shape in shapes]
    n_params = sum(sizes)
    if kind is KronCurvature:
        # The zero as a diagonal: nothing has to be decomposed.
        sums = Kron([[like.new_zeros(side) for side in sides] for sides in map(sides_of, shapes)])
        return KronCurvature(sums, (0,) * len(shapes), dtype=like.dtype)
    if kind is EKFACCurvature:
        sides = list(map(sides_of, shapes))
        return EKFACCurvature([[None] * len(block) for block in sides], [like.new_zeros(block) for block in sides])
    if kind is LowRankCurvature:
        return LowRankCurvature(like.new_zeros(n_params, 0), like.new_zeros(0))
    if kind is BlockDiagCurvature:
        return BlockDiagCurvature([FullCurvature(like.new_zeros(size, size)) for size in sizes])
    if kind is FullCurvature:
        return FullCurvature(like.new_zeros(n_params, n_params))
    assert kind is DiagCurvature, "the caller looks into BY_HAND"
    return DiagCurvature(like.new_zeros(n_params))


def zero_form(curvature: AbstractCurvature) -> Any:
    """What users find under ``H`` before any data: of a Kronecker structure its factors, as matrices."""
    if isinstance(curvature, KronCurvature):
        return Kron(
            [[side if is_wide(len(side)) else densify(side) for side in block] for block in curvature.sums.kfacs]
        )
    return curvature.public


def sides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the Kronecker factors of a parameter: of outputs and inputs, or of itself."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape),)


# -- assigned by hand -------------------------------------------------------------------------------------------------


def _matrix(name: str, value: Any, size: int, check: Check) -> Tensor:
    """A symmetric matrix."""
    matrix = _shaped(name, value, (size, size), check)
    largest = float(matrix.abs().max())
    if not torch.allclose(matrix, matrix.mT, rtol=0.0, atol=1e-4 * largest):
        off = float((matrix - matrix.mT).abs().max())
        msg = f"{name} must be symmetric; entries differ from those of its transpose by up to {off:.3g}."
        raise InputError(msg)
    return (matrix + matrix.mT) / 2


def _shaped(name: str, value: Any, shape: tuple[int, ...], check: Check) -> Tensor:
    tensor = check(name, value).detach()
    if tensor.shape != shape:
        msg = f"{name} must have the shape {list(shape)}; got {list(tensor.shape)}."
        raise ShapeError(msg)
    return tensor


def _listed(name: str, value: Any, length: int, what: str) -> Sequence[Any]:
    """A list of some length."""
    if not isinstance(value, (list, tuple)):
        msg = f"{name} must be a list of {length}: {what}; got {type(value).__name__}."
        raise InputError(msg)
    items = cast("Sequence[Any]", value)
    if len(items) != length:
        msg = f"{name} must be a list of {length}: {what}; got {len(items)}."
        raise ShapeError(msg)
    return items


def _full(value: Any, shapes: Shapes, check: Check, now: AbstractCurvature | None) -> FullCurvature:
    del now
    return FullCurvature(_matrix("H", value, sum(map(math.prod, shapes)), check))


def _diag(value: Any, shapes: Shapes, check: Check, now: AbstractCurvature | None) -> DiagCurvature:
    del now
    return DiagCurvature(_shaped("H", value, (sum(map(math.prod, shapes)),), check))


def _blockdiag(value: Any, shapes: Shapes, check: Check, now: AbstractCurvature | None) -> BlockDiagCurvature:
    del now
    blocks = _listed("H", value, len(shapes), "a matrix for each parameter group")
    sized = enumerate(zip(blocks, shapes, strict=True))
    return BlockDiagCurvature([FullCurvature(_matrix(f"H[{i}]", b, math.prod(s), check)) for i, (b, s) in sized])


def _kron(value: Any, shapes: Shapes, check: Check, now: AbstractCurvature | None) -> KronCurvature:
    """Raw sums of given factors: counts are those of the data that were fitted."""
    if isinstance(value, WideKron) or isinstance(now, WideKronCurvature):
        msg = (
            f"H of a last layer of more than {WIDE} outputs is diagonal plus low rank, and cannot be assigned: call "
            "fit, load a state, or use hessian_structure='diag'."
        )
        raise UnsupportedError(msg)
    if not isinstance(value, (Kron, KronDecomposed)):
        msg = (
            "H must be a laplace.utils.Kron of factors, such as la.H_facs, or a KronDecomposed, such as la.H; got "
            f"{type(value).__name__}."
        )
        raise InputError(msg)
    if isinstance(value, KronDecomposed) and value.deltas is not None and bool((value.deltas != 0).any()):
        msg = (
            "H is the curvature of the data alone, and this KronDecomposed holds a prior precision (its deltas are not "
            "0), as la.posterior_precision does. Assign one like la.H; the prior is la.prior_precision."
        )
        raise InputError(msg)
    known: dict[int, Tensor] = {}
    counts = now.counts if isinstance(now, KronCurvature) else (0,) * len(shapes)
    wanted = list(map(sides_of, shapes))
    if isinstance(now, KronCurvature):
        wanted = [tuple(len(side) for side in block) for block in now.sums.kfacs]
    kfacs = value.kfacs if isinstance(value, Kron) else _factors(value)
    blocks: list[list[Tensor]] = []
    for i, (block, sizes, count) in enumerate(
        zip(_listed("H", kfacs, len(shapes), "one block for each parameter group"), wanted, counts, strict=True)
    ):
        sides = _listed(f"The block H[{i}]", block, len(sizes), f"factors of the sizes {list(sizes)}")
        for j, (side, size) in enumerate(zip(sides, sizes, strict=True)):
            name = f"H[{i}][{j}]"
            if id(side) not in known:  # a factor that weight and bias share is decomposed once
                known[id(side)] = (
                    _shaped(name, side, (size,), check)
                    if isinstance(side, Tensor) and side.dim() == 1
                    else _matrix(name, side, size, check)
                )
            elif len(known[id(side)]) != size:
                _shaped(name, side, (size, size), check)
        checked = [known[id(side)] for side in sides]
        blocks.append([checked[0], *(side * (count or 1) for side in checked[1:])])
    resolution = value.resolution if isinstance(value, Kron) else 0.0
    return KronCurvature(Kron(blocks, resolution=resolution), counts, dtype=blocks[0][0].dtype)


def _factors(value: KronDecomposed) -> list[list[Tensor]]:
    """Factors from their eigenvectors and eigenvalues."""
    known: dict[tuple[int, int], Tensor] = {}
    blocks: list[list[Tensor]] = []
    for vectors, values in zip(value.eigenvectors, value.eigenvalues, strict=True):
        for basis, spectrum in zip(vectors, values, strict=True):
            factor = spectrum if basis is None else (basis * spectrum) @ basis.mT
            known.setdefault((id(basis), id(spectrum)), factor)
        blocks.append([known[id(b), id(s)] for b, s in zip(vectors, values, strict=True)])
    return blocks


def _ekfac(value: Any, shapes: Shapes, check: Check, now: AbstractCurvature | None) -> EKFACCurvature:
    if not isinstance(value, EKFACPrecision):
        msg = f"H must be an EKFACPrecision (eigenvectors and eigenvalues), such as la.H; got {type(value).__name__}."
        raise InputError(msg)
    wanted = list(map(sides_of, shapes))
    if isinstance(now, EKFACCurvature):
        wanted = [tuple(diagonal.shape) for diagonal in now.diagonals]
    values = _listed("The eigenvalues of H", value.eigenvalues, len(wanted), "one tensor for each parameter group")
    named = enumerate(zip(values, wanted, strict=True))
    diagonals = [_shaped(f"eigenvalues[{i}] of H", each, shape, check) for i, (each, shape) in named]
    vectors: list[list[Tensor | None]] = []
    for i, (block, shape) in enumerate(zip(value.eigenvectors, wanted, strict=True)):
        name = f"eigenvectors[{i}] of H"
        sides = zip(_listed(name, block, len(shape), "matrices"), shape, strict=True)
        vectors.append([None if side is None else _shaped(name, side, (n, n), check) for side, n in sides])
    return EKFACCurvature(vectors, diagonals)


def _lowrank(value: Any, shapes: Shapes, check: Check, now: AbstractCurvature | None) -> LowRankCurvature:
    vectors, values = _listed("H", value, 2, "eigenvectors [P, r] and eigenvalues [r]")
    values = check("The eigenvalues of H", values).detach().reshape(-1)
    vectors = _shaped("The eigenvectors of H", vectors, (sum(map(math.prod, shapes)), len(values)), check)
    eye = torch.eye(len(values), dtype=values.dtype, device=values.device)
    if bool((values < 0).any()) or not torch.allclose(vectors.mT @ vectors, eye, atol=1e-3):
        msg = "H must hold orthonormal eigenvectors and eigenvalues that are not negative."
        raise InputError(msg)
    found = LowRankCurvature(vectors, values)
    if isinstance(now, LowRankCurvature):
        return replace(found, truncation=now.truncation, n_passes=now.n_passes)
    return found


BY_HAND: Mapping[type[AbstractCurvature], Callable[..., AbstractCurvature]] = {
    FullCurvature: _full,
    DiagCurvature: _diag,
    BlockDiagCurvature: _blockdiag,
    KronCurvature: _kron,
    EKFACCurvature: _ekfac,
    LowRankCurvature: _lowrank,
}
"""Structures that are a matrix over weights, which can be zero and can be assigned; each with how it is read."""


def assigned_curvature(
    kind: type[AbstractCurvature], value: Any, shapes: Shapes, check: Check, now: AbstractCurvature | None
) -> AbstractCurvature:
    """A curvature that a user assigned."""
    return BY_HAND[kind](value, shapes, check, now)


__all__ = ["BY_HAND", "assigned_curvature", "independent", "sides_of", "zero_curvature", "zero_form"]
