"""What single data added to a posterior, and the posterior without them (``method="loo"``).

    A₋ₙ = A − (what the structure kept of s Jᵀ Λ J),    V₋ₙ = J A₋ₙ⁻¹ Jᵀ,    f₋ₙ = f + s V₋ₙ g

A datum is a row of the loader: all its positions go together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.enums import CurvatureKind
from laplace.errors import NotPositiveDefiniteError, UnsupportedError
from laplace.likelihoods import AbstractLikelihood, Positions
from laplace.linalg import chunk_elements
from laplace.predictive import Linearization, NetworkLinearization
from laplace.predictive.pairs import Pairs
from laplace.structures import AbstractPrecision, DiagPrecision
from laplace.structures.head_block import HeadBlock, head_of
from laplace.structures.jacobian import JacobianBlock


@dataclass(frozen=True)
class Terms:
    """What the data of a batch added to the posterior, in the outputs; zero at masked positions."""

    gradient: Float[Tensor, "batch positions outputs"]
    """``s g``, ``[batch, positions, C]``."""
    rows: Positions
    """Unmasked outputs and targets."""
    likelihood: AbstractLikelihood
    """What the outputs mean."""
    kind: CurvatureKind
    """The generalized Gauss–Newton matrix adds up over positions, the empirical Fisher squares the sum of gradients."""

    @classmethod
    def of(cls, inputs: Linearization, rows: Positions, likelihood: AbstractLikelihood, kind: CurvatureKind) -> Terms:
        """The terms of a batch."""
        gradient = likelihood.scale.to(rows.f) * likelihood.gradient(rows.f, rows.y)
        everywhere = _spread(gradient, rows, inputs.f.numel() // inputs.n_outputs)
        return cls(everywhere.view(len(inputs.f), -1, inputs.n_outputs), rows, likelihood, kind)

    @property
    def sums_first(self) -> bool:
        """Whether the positions of a datum are summed before they are squared."""
        return self.kind is CurvatureKind.EF

    @property
    def _scale(self) -> Tensor:
        return self.likelihood.curvature_scale(self.kind).to(self.rows.f)

    @property
    def _observed(self) -> Tensor:
        return self.likelihood.observed(self.rows.f, self.rows.y)

    def _shaped(self, values: Tensor) -> Tensor:
        """From unmasked rows to ``[batch, positions, …]``."""
        n_data, n_positions, _ = self.gradient.shape
        return _spread(values, self.rows, n_data * n_positions).unflatten(0, (n_data, n_positions))

    def strength(self) -> Float[Tensor, "batch positions outputs"]:
        """What multiplies φ² in the diagonal, ``s Λ_cc``; what multiplies φ before it is squared, if ``sums_first``."""
        if self.sums_first:
            return self._shaped(self._scale.sqrt() * self.likelihood.gradient(self.rows.f, self.rows.y))
        return self._shaped(self._scale * self.likelihood.hessian(self._observed).diag())

    def roots(self) -> Float[Tensor, "batch positions outputs columns"]:
        """``r`` with ``r rᵀ = s Λ`` for each position; all those of a datum make one column each if ``sums_first``."""
        if self.sums_first:
            return self.strength().unsqueeze(-1)
        return self._shaped(self._scale.sqrt().reshape(-1, 1) * self.likelihood.hessian_root(self._observed))

    def joint_roots(
        self, roots: Float[Tensor, "data positions outputs columns"]
    ) -> Float[Tensor, "data joint all_columns"]:
        """Roots of all outputs of a datum at once, ``[data, positions · C, …]``: ``r rᵀ`` is what the datum added."""
        if self.sums_first or roots.shape[1] == 1:
            return roots.flatten(1, 2)
        diagonal = torch.diag_embed(roots.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2)
        return diagonal.flatten(3, 4).flatten(1, 2)


def _spread(values: Tensor, rows: Positions, n_rows: int) -> Tensor:
    """From unmasked rows to all rows, zero where masked."""
    if rows.kept is None:
        return values
    return values.new_zeros(n_rows, *values.shape[1:]).index_copy(0, rows.kept, values)


# -- full: a downdate of the covariance of the datum's own outputs -----------------------------------------------------


def from_dense(
    inputs: Linearization, terms: Terms, precision: AbstractPrecision, dtype: torch.dtype
) -> tuple[Float[Tensor, "batch positions outputs"], Float[Tensor, "rows outputs outputs"]]:
    """Shift of the means and covariances without each datum, where the precision is a dense sum over data.

    Exact. Beside the covariances of a datum's outputs O((T C)³) per datum of T positions; memory O((T C)²) for a few
    data at a time, for a whole network with T > 1 for all of the batch.
    """
    roots, (n_data, n_positions, n_outputs) = terms.roots(), terms.gradient.shape
    shift, moment = torch.empty_like(terms.gradient), []
    for part, cov in _joint_covariances(inputs, precision, n_data, n_positions, dtype):
        without = _downdate(cov, terms.joint_roots(roots[part]))
        shift[part] = (without @ terms.gradient[part].flatten(1).unsqueeze(-1)).view_as(shift[part])
        moment.append(_own_blocks(without, n_positions, n_outputs))
    return shift, torch.cat(moment)


def _joint_covariances(
    inputs: Linearization, precision: AbstractPrecision, n_data: int, n_positions: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "data joint joint"]]]:
    """Covariance of all outputs of each datum, at all of its positions."""
    if n_positions == 1:
        yield slice(None), inputs.covariance(precision, dtype)
    elif inputs.is_linear:
        blocks = _blocks(inputs, dtype)
        step = max(1, chunk_elements(inputs.f.device) // (n_positions * inputs.n_outputs) ** 2)
        rows = torch.arange(n_data * n_positions, device=inputs.f.device).view(n_data, n_positions)
        for start in range(0, n_data, step):
            part = slice(start, start + step)
            head = head_of(blocks)
            assert head is not None, "outputs are linear"
            yield part, torch.stack([precision.block_kernel([head.select(datum)]) for datum in rows[part]])
    else:
        yield slice(None), precision.block_covariance(_blocks(inputs, dtype))


def _downdate(
    cov: Float[Tensor, "data joint joint"], root: Float[Tensor, "data joint columns"]
) -> Float[Tensor, "data joint joint"]:
    """``V (I − Λ V)⁻¹ = V + V r (I − rᵀ V r)⁻¹ rᵀ V`` with ``Λ = r rᵀ``: symmetric, and Λ may be singular."""
    half = root.mT @ cov
    gap = torch.eye(root.shape[-1], dtype=cov.dtype, device=cov.device) - half @ root
    factor, info = torch.linalg.cholesky_ex(0.5 * (gap + gap.mT))
    bad = (info != 0) | ~torch.isfinite(factor).flatten(1).all(1)
    if bool(bad.any()):
        raise _no_posterior(int(bad.sum()), len(cov))
    half = torch.linalg.solve_triangular(factor, half, upper=False)
    return 0.5 * (cov + cov.mT) + half.mT @ half


def _own_blocks(
    cov: Float[Tensor, "data joint joint"], n_positions: int, n_outputs: int
) -> Float[Tensor, "rows outputs outputs"]:
    """Covariance of the outputs of each position, from that of all positions of a datum."""
    blocks = cov.unflatten(2, (n_positions, n_outputs)).unflatten(1, (n_positions, n_outputs))
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(0, 1)


def _no_posterior(n_bad: int, n_data: int) -> NotPositiveDefiniteError:
    return NotPositiveDefiniteError(
        f"The posterior precision without one datum must be positive definite; for {n_bad} of the {n_data} data in a "
        "batch it is not. Likely causes, in order: other data, noise or temperature than the posterior was fitted "
        "with; a prior precision that is lost in rounding (use a larger one, or curvature_dtype=torch.float64); a "
        "sampled Fisher or true Hessian (use a GGN back end)."
    )


# -- diag: the diagonal of what the datum added, weight by weight ------------------------------------------------------


def from_diagonal(
    inputs: Linearization, terms: Terms, precision: DiagPrecision, dtype: torch.dtype
) -> tuple[Float[Tensor, "batch positions outputs"], Tensor]:
    """The same where the precision is a diagonal: the diagonal of what a datum added is subtracted weight by weight.

    Exact for the structure. No matrix of outputs does it, as with a dense precision: the diagonal of ``Jᵀ Λ J`` has the
    rank of the weights. O(T C D) per datum for a last layer, without a Jacobian; else O((T C)² P).
    """
    head = head_of(_blocks(inputs, dtype)) if inputs.is_linear else None
    if head is not None:
        # Of pairs the logits (Δ, 0): one output of the differences of features, and a constant.
        n, gradient, strength = head.n_outputs, terms.gradient, terms.strength()
        found = _head_without(head, precision.vector.to(dtype), gradient[..., :n], strength[..., :n], terms)
        shift, moment = (torch.nn.functional.pad(part, (0, gradient.shape[-1] - n)) for part in found)
        return shift, moment
    n_data, n_positions, n_outputs = terms.gradient.shape
    root = terms.joint_roots(terms.roots())
    without = _blocks_without(_blocks(inputs, dtype), precision.vector.to(dtype), root)
    shift = (without @ terms.gradient.flatten(1).unsqueeze(-1)).view(n_data, n_positions, n_outputs)
    return shift, _own_blocks(without, n_positions, n_outputs)


def _head_without(
    head: HeadBlock,
    vector: Float[Tensor, " params"],
    gradient: Float[Tensor, "batch positions outputs"],
    strength: Float[Tensor, "batch positions outputs"],
    terms: Terms,
) -> tuple[Float[Tensor, "batch positions outputs"], Float[Tensor, "rows outputs"]]:
    """Shift and variances of a last layer; one precision per weight ``[chunk, C, D]`` for each datum, no Jacobian."""
    a, augmented = vector[head.order], head.augmented.view(*gradient.shape[:2], -1)
    shift, variance = torch.empty_like(gradient), torch.empty_like(gradient)
    step = max(1, chunk_elements(a.device) // a.numel())
    for start in range(0, len(augmented), step):
        part = slice(start, start + step)
        features = augmented[part]
        added = (strength[part].mT @ features).square() if terms.sums_first else strength[part].mT @ features.square()
        without = _positive(a - added)
        shift[part] = features @ ((gradient[part].mT @ features) / without).mT
        variance[part] = features.square() @ without.reciprocal().mT
    return shift, variance.flatten(0, 1)


def _blocks_without(
    blocks: list[JacobianBlock], vector: Float[Tensor, " params"], root: Float[Tensor, "batch joint columns"]
) -> Float[Tensor, "batch joint joint"]:
    """Covariance of all outputs of each datum, ``Σ_p J_p J_pᵀ / (a_p − ‖rᵀ J_p‖²)``, group by group."""
    n_data, n_joint, _ = root.shape
    total = root.new_zeros(n_data, n_joint, n_joint)
    for block, a in zip(blocks, vector.split([block.n_params for block in blocks]), strict=True):
        step = max(1, chunk_elements(root.device) // (n_joint * block.n_params))
        for start in range(0, n_data, step):
            part = slice(start, start + step)
            J = block.dense(part).transpose(0, 1)
            without = _positive(a - (root[part].mT @ J).square().sum(1))
            total[part] += (J / without.unsqueeze(1)) @ J.mT
    return total


def _positive(precisions: Tensor) -> Tensor:
    """Precisions ``[data, …]`` of the weights without a datum, checked."""
    good = (precisions > 0).flatten(1).all(1)
    if not bool(good.all()):
        raise _no_posterior(int((~good).sum()), len(good))
    return precisions


def _blocks(inputs: Linearization, dtype: torch.dtype) -> list[JacobianBlock]:
    """Derivatives of all outputs of each datum at all of its positions, in factors."""
    network = inputs.scores if isinstance(inputs, Pairs) else inputs
    if not isinstance(network, NetworkLinearization) or network.derivatives is None:
        msg = (
            "Leaving a datum out needs the features of a last layer or the derivatives of a whole network; got "
            f"{type(network).__name__} without them. Linearize the training data with pred_type='glm'."
        )
        raise UnsupportedError(msg)
    if not isinstance(inputs, Pairs):
        return network.blocks(dtype)
    if network.is_linear:
        return network.differences(dtype)
    # The logits (Δ, 0).
    mix = torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=dtype, device=network.f.device)
    return network.derivatives.columns(mix)
