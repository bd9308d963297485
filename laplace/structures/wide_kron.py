"""``hessian_structure="kron"`` of a last layer with very many outputs: an output factor that is diagonal plus low rank.

    G ≈ diag(g) + E (G_SS − diag(g_S)) Eᵀ,   g the diagonal of G = Σ Λ,   E the columns of the identity for outputs S

G itself is C×C, and its eigendecomposition takes time O(C³). Here its diagonal is exact, and so is its block of the
outputs S that have most of it. What is dropped are products Σ p_c p_k with one of the outputs outside S. The matrix is
positive semi-definite whatever S is, since it has blocks of Σ Λ on its diagonal; of likelihoods whose Λ is diagonal
nothing is dropped.

G is block-diagonal, so that the posterior is that of two heads which share their inputs: the outputs S, with
eigenvectors, and all others, each by itself. All that a Kronecker posterior can do is done in these two parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace import linalg, processes
from laplace.enums import HessianStructure
from laplace.errors import NumericalWarning, UnsupportedError, warn
from laplace.prior import GaussianPrior
from laplace.schema import Table
from laplace.structures.base import AbstractCurvature, AbstractPrecision, SupportsCurvature
from laplace.structures.dense_jacobian import check_covariances
from laplace.structures.eigenbases import eigenbases
from laplace.structures.head_block import HeadBlock
from laplace.structures.jacobian import JacobianBlock
from laplace.structures.kron_decomposed import KronDecomposed
from laplace.types import Scalar

WIDE = 4096
"""Number of outputs of a last layer beyond which its output factor is diagonal plus low rank."""
KEPT = 2048
"""Number of outputs whose correlations are then kept."""


def is_wide(n_outputs: int) -> bool:
    """Whether the output factor of a last layer is kept as diagonal plus low rank."""
    return n_outputs > WIDE


def refuse_wide(n_outputs: int, what: str) -> None:
    """Raise if something needs the C×C matrix of a last layer that is too wide for it."""
    if is_wide(n_outputs):
        msg = (
            f"{what} needs a matrix of {n_outputs}×{n_outputs} numbers, and its eigendecomposition, for a last layer "
            f"of {n_outputs} outputs; up to {WIDE} are taken. What works for any number of outputs: hessian_structure="
            "'kron', which keeps the covariances of those with most curvature alone, or 'diag'."
        )
        raise UnsupportedError(msg)


@dataclass(frozen=True)
class WideKron:
    """Raw sums over data: the output factor as a diagonal and a block of it, and ``Σ φφᵀ``.

    Attributes
    ----------
    diagonal
        g, that of Σ Λ, ``[C]``, exact.
    kept
        S, the outputs of which the block is known, ``[m]``, ascending.
    block
        The block of Σ Λ of these outputs, ``[m, m]``.
    inputs
        Σ φφᵀ, ``[D, D]``; ``None`` where only a bias is random.
    shapes
        Of the parameter groups: ``(C, D)`` of a weight, ``(C,)`` of a bias.
    resolution
        As of ``Kron``.
    """

    diagonal: Float[Tensor, " outputs"]
    kept: Int[Tensor, " kept"]
    block: Float[Tensor, "kept kept"]
    inputs: Float[Tensor, "features features"] | None
    shapes: Sequence[tuple[int, ...]]
    resolution: float = 0.0

    counts: ClassVar[None] = None

    @classmethod
    def of(
        cls,
        diagonal: Float[Tensor, " outputs"],
        block_of: Callable[[Tensor], Tensor],
        inputs: Float[Tensor, "features features"] | None,
        shapes: Sequence[tuple[int, ...]],
        resolution: float,
    ) -> WideKron:
        """Keep the outputs with most curvature, of which ``block_of`` gives the block."""
        kept = diagonal.topk(min(KEPT, len(diagonal))).indices.sort().values
        block = block_of(kept)
        block.diagonal().copy_(diagonal[kept])
        return cls(diagonal, kept, block, inputs, shapes, resolution)

    @property
    def rest(self) -> Int[Tensor, " others"]:
        """The outputs that are not kept."""
        others = torch.ones_like(self.diagonal, dtype=torch.bool)
        others[self.kept] = False
        return others.nonzero().squeeze(1)

    def __len__(self) -> int:
        """Number of parameter groups."""
        return len(self.shapes)

    def __add__(self, other: WideKron) -> WideKron:
        """Add factor by factor; of more outputs than are kept those with most curvature stay.

        The diagonal is that of all data, and a covariance is added over the data in which both of its outputs were
        kept: what is missing makes the block more diagonal, and leaves it positive semi-definite.
        """
        diagonal = self.diagonal + other.diagonal
        kept = _most([self.kept, other.kept], diagonal)
        block = self._block_of(kept) + other._block_of(kept)
        block.diagonal().copy_(diagonal[kept])
        inputs = None if self.inputs is None or other.inputs is None else self.inputs + other.inputs
        return WideKron(diagonal, kept, block, inputs, self.shapes, max(self.resolution, other.resolution))

    def _block_of(self, kept: Int[Tensor, " kept"]) -> Float[Tensor, "kept kept"]:
        """The block of these outputs, zero where it is not known."""
        block = self.diagonal.new_zeros(len(kept), len(kept))
        place = torch.searchsorted(self.kept, kept).clamp(max=len(self.kept) - 1)
        known = (self.kept[place] == kept).nonzero().squeeze(1)
        block[known.unsqueeze(1), known] = self.block[place[known].unsqueeze(1), place[known]]
        return block

    def shared(self, team: processes.Team | None) -> WideKron:
        """The same with the outputs that have most curvature in the sum over all processes, which all keep."""
        if team is None:
            return self
        (total,) = team.summed([self.diagonal], "diagonal")
        found = [record["kept"] for record in team.exchange("outputs", kept=None if team.is_ghost else self.kept)]
        kept = _most([each.to(total.device) for each in found if each is not None], total)
        return replace(self, kept=kept, block=self._block_of(kept))

    def divide_inputs(self, count: float | Sequence[float]) -> WideKron:
        """Divide the inputs' side by a count: from sums to a mean."""
        number = count if isinstance(count, (int, float)) else count[0]
        return replace(self, inputs=None if self.inputs is None else self.inputs / (number or 1))

    def scale_outputs(self, factors: Float[Tensor, " outputs"]) -> WideKron:
        """√f_c G_ck √f_k."""
        factors = factors.to(self.diagonal)
        root = factors[self.kept].sqrt()
        return replace(self, diagonal=self.diagonal * factors, block=root.unsqueeze(1) * self.block * root)

    def decompose(self, count: int, dtype: torch.dtype) -> tuple[KronDecomposed, KronDecomposed]:
        """The heads of the kept outputs and of all others, in their eigenbases."""
        others, sides = self.diagonal[self.rest], [] if self.inputs is None else [self.inputs]
        # Probabilities have the digits of the outputs; sums of features are as exact as for few outputs.
        ((outer,),), ((spread,),) = eigenbases([[self.block]], self.resolution, dtype=dtype)
        ((_, *inner),), ((alone, *moments),) = eigenbases([[others, *sides]], counts=[count], dtype=dtype)

        def head(vectors: Tensor | None, values: Tensor) -> KronDecomposed:
            of_group = {2: ([vectors, *inner], [values, *moments]), 1: ([vectors], [values])}
            groups = [of_group[len(shape)] for shape in self.shapes]
            return KronDecomposed([first for first, _ in groups], [second for _, second in groups])

        return head(outer, spread), head(None, alone)


def _most(kept: Sequence[Tensor], diagonal: Float[Tensor, " outputs"]) -> Int[Tensor, " kept"]:
    """Of outputs that were kept in several parts those with most curvature, ascending."""
    every = torch.cat(list(kept)).unique()
    return every if len(every) <= KEPT else every[diagonal[every].topk(KEPT).indices].sort().values


@dataclass(frozen=True)
class WideKronCurvature(AbstractCurvature):
    """The same as a curvature: raw sums, and how many rows there were."""

    sums: WideKron
    """Raw sums."""
    count: int
    """Number of rows (unmasked positions)."""
    dtype: torch.dtype
    """Precision of what is made of the sums."""
    scale: Scalar | float = 1.0
    """Factor of the whole matrix."""
    _cache: dict[str, tuple[KronDecomposed, KronDecomposed]] = field(default_factory=dict, repr=False, compare=False)

    name: ClassVar[HessianStructure] = HessianStructure.KRON
    entries: ClassVar[Table] = {}

    @classmethod
    def from_batch(
        cls, backend: SupportsCurvature, x: Any, y: Tensor, **options: Any
    ) -> tuple[Tensor, WideKronCurvature]:
        """Ask the back end for its factors."""
        nll, sums = backend.kron(x, y, N=1, **options)
        assert isinstance(sums, WideKron), "of a wide head"
        return nll, cls(sums, int(backend.count(y)), nll.dtype)

    @classmethod
    def bytes_needed(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
        """Three pairs of factors in float64, the spectrum of the posterior, its inverse, and one more copy."""
        n_outputs, n_features = shapes[0][0], shapes[0][1] if len(shapes[0]) > 1 else 0
        kept = min(KEPT, n_outputs)
        factors = n_outputs + kept**2 + n_features**2
        return 3 * 8 * factors + 3 * dtype.itemsize * sum(torch.Size(shape).numel() for shape in shapes)

    @property
    def n_params(self) -> int:
        """P."""
        return sum(torch.Size(shape).numel() for shape in self.sums.shapes)

    @property
    def is_finite(self) -> bool:
        """Whether both factors are."""
        inputs = self.sums.inputs
        return all(bool(torch.isfinite(each.sum())) for each in (self.sums.diagonal, inputs) if each is not None)

    @property
    def public(self) -> WideKron:
        """The factors, with the mean of the inputs."""
        return self.sums.divide_inputs(self.count)

    @property
    def share(self) -> float:
        """Share of the trace of the output factor that the outputs have whose correlations are kept."""
        return float(self.sums.diagonal[self.sums.kept].sum() / self.sums.diagonal.sum().clamp(min=1e-300))

    def say_what_is_kept(self) -> None:
        """Say what is kept."""
        n, m = len(self.sums.diagonal), len(self.sums.kept)
        msg = (
            f"hessian_structure='kron' for {n} outputs: a factor of {n}×{n} numbers would take {8 * n**2 / 1e9:.1f} GB "
            f"and its eigendecomposition O({n}³), so that of its covariances those among the {m} outputs with most "
            f"curvature are kept ({self.share:.0%} of the trace), and all of its diagonal (see docs/structures.md)."
        )
        warn(msg, NumericalWarning)

    def state(self) -> dict[str, Any]:
        """As of a Kronecker curvature, with a mapping for the output factor."""
        sums = self.sums
        outer = {"diagonal": sums.diagonal, "kept": sums.kept, "block": sums.block}
        groups = [[outer] if len(shape) == 1 else [outer, sums.inputs] for shape in sums.shapes]
        return {"sums": groups, "counts": [self.count] * len(sums), "resolution": float(sums.resolution)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype) -> WideKronCurvature:
        """From the same."""
        groups = state["sums"]
        outer, inputs = groups[0][0], next((block[1] for block in groups if len(block) > 1), None)
        shapes = [(len(outer["diagonal"]), *(len(side) for side in block[1:])) for block in groups]
        sums = WideKron(outer["diagonal"], outer["kept"], outer["block"], inputs, shapes, state["resolution"])
        return cls(sums, state["counts"][0], dtype)

    @classmethod
    def check_exact(cls) -> None:
        """Which covariances were kept depends on the data of each: raises."""
        msg = (
            "The Kronecker factor of so many outputs keeps covariances of those with most curvature, which may be "
            'others in each fit, so that sums and differences are not exactly those of the data. Use "diag", whose '
            "sums are exact, or add data with fit(loader, override=False)."
        )
        raise UnsupportedError(msg)

    def summands(self) -> list[Tensor]:
        """Diagonal, block of the outputs that all processes keep, inputs and the count."""
        sums = self.sums.shared(processes.summed_over())
        inputs = [] if sums.inputs is None else [sums.inputs]
        return [sums.diagonal, sums.block, *inputs, torch.tensor(self.count)]

    def with_summands(self, parts: Sequence[Tensor]) -> WideKronCurvature:
        """Of other sums, with the outputs that ``summands`` chose."""
        diagonal, block, *inputs, count = parts
        kept = self.sums.shared(processes.summed_over()).kept
        block.diagonal().copy_(diagonal[kept])
        sums = replace(self.sums, diagonal=diagonal, kept=kept, block=block, inputs=inputs[0] if inputs else None)
        return replace(self, sums=sums, count=int(count), _cache={})

    def merge(self, other: WideKronCurvature) -> WideKronCurvature:
        """Add sums and counts; see ``WideKron.__add__``."""
        assert isinstance(self.scale, float) and isinstance(other.scale, float), "curvatures are merged unscaled"
        return replace(self, sums=self.sums + other.sums, count=self.count + other.count, _cache={})

    def __mul__(self, factor: float | Tensor) -> WideKronCurvature:
        """Scale the matrix; the eigenbasis is shared."""
        return replace(self, scale=self.scale * factor)

    def scale_weights(self, factors: Float[Tensor, " params"]) -> WideKronCurvature:
        """√f_c G_ck √f_k in the output factor."""
        each = factors[: torch.Size(self.sums.shapes[0]).numel()].view(len(self.sums.diagonal), -1)[:, 0]
        return replace(self, sums=self.sums.scale_outputs(each), _cache={})

    @property
    @linalg.lasting
    def decomposed(self) -> tuple[KronDecomposed, KronDecomposed]:
        """Both heads in their eigenbases, unscaled; computed once, O(m³ + D³)."""
        if "decomposed" not in self._cache:
            with torch.no_grad():
                self._cache["decomposed"] = self.sums.decompose(self.count, self.dtype)
        return self._cache["decomposed"]

    def posterior(self, prior: GaussianPrior, **options: Any) -> WidePrecision:
        """Add the prior in the eigenbases: O(P) once these are known."""
        heads = zip(self.decomposed, (self.sums.kept, self.sums.rest), strict=True)
        there = [
            (replace(part, **options) * self.scale + prior.per_layer(), which) for part, which in heads if len(which)
        ]
        return WidePrecision([part for part, _ in there], [which for _, which in there], self.sums.shapes)

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """Σ log(1 + γλ/δ) without damping, which is no sum."""
        if options.get("damping"):
            return super().log_det_ratio(prior, **options)
        each = prior.per_layer()
        spectra = [zip((part * self.scale).spectrum, each, strict=True) for part in self.decomposed]
        return torch.stack([torch.log1p(values / delta).sum() for part in spectra for values, delta in part]).sum()

    def to_dense(self) -> Float[Tensor, "params params"]:
        """The block-diagonal matrix: for small problems and tests."""
        mean = self.public
        outer = torch.diag(mean.diagonal)
        outer[mean.kept.unsqueeze(1), mean.kept] = mean.block
        groups = [outer if len(s) == 1 or mean.inputs is None else torch.kron(outer, mean.inputs) for s in mean.shapes]
        return torch.block_diag(*groups).to(self.dtype) * self.scale


@dataclass(frozen=True)
class WidePrecision(AbstractPrecision):
    """The precisions of two heads with the same inputs, whose outputs are independent of each other's.

    Attributes
    ----------
    parts
        Those of the kept outputs and of all others.
    outputs
        Which outputs these are.
    shapes
        Of the parameter groups of the whole head.
    """

    parts: Sequence[KronDecomposed]
    outputs: Sequence[Int[Tensor, " _"]]
    shapes: Sequence[tuple[int, ...]]

    @property
    def n_params(self) -> int:
        """P."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def public(self) -> WidePrecision:
        """Itself."""
        return self

    def split(self, v: Float[Tensor, "*batch params"]) -> list[Tensor]:
        """The weights of each part."""
        groups = self._groups(v)
        return [torch.cat([group[..., index, :].flatten(-2) for group in groups], -1) for index in self.outputs]

    def _groups(self, v: Tensor) -> list[Tensor]:
        """Weights as matrices ``[..., C, D]``, one for each group."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = torch.split_with_sizes(v, sizes, -1)
        return [part.unflatten(-1, (shape[0], -1)) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """All weights, in public order, from those of each part."""
        back = torch.cat(list(self.outputs)).argsort()
        each = []
        for part, precision in zip(parts, self.parts, strict=True):
            sizes = [torch.Size(shape).numel() for shape in precision.shapes]
            pieces = zip(torch.split_with_sizes(part, sizes, -1), precision.shapes, strict=True)
            each.append([piece.unflatten(-1, (shape[0], -1)) for piece, shape in pieces])
        groups = [torch.cat(pieces, -2)[..., back, :].flatten(-2) for pieces in zip(*each, strict=True)]
        return torch.cat(groups, -1)

    def _each(self, function: Callable[[KronDecomposed, Tensor], Tensor], v: Tensor) -> list[Tensor]:
        return [function(part, own) for part, own in zip(self.parts, self.split(v), strict=True)]

    def solve(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch params"]:
        """Part by part."""
        return self.join(self._each(lambda part, own: part.solve(own), v))

    def quadratic(self, v: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """The sum of both."""
        return torch.stack(self._each(lambda part, own: part.quadratic(own), v)).sum(0)

    def logdet(self) -> Scalar:
        """The sum of both."""
        return torch.stack([part.logdet() for part in self.parts]).sum()

    def diagonal_of_inverse(self) -> Float[Tensor, " params"]:
        """Part by part."""
        return self.join([part.diagonal_of_inverse() for part in self.parts])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Part by part."""
        return self.join([part.sample(n, generator) for part in self.parts])

    def to_dense(self) -> Float[Tensor, "params params"]:
        """The matrix, ``[P, P]``: for small problems and tests."""
        first = self.parts[0].spectrum[0]
        eye = torch.eye(self.n_params, dtype=first.dtype, device=first.device)
        return self.join(self._each(lambda part, own: part.bmm(own, 1), eye))

    def functional_variance(self, J: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """The sum of both."""
        return torch.stack(self._each(lambda part, own: part.functional_variance(own), J)).sum(0)

    # -- heads --------------------------------------------------------------------------------------------------------

    def _heads(self, blocks: Sequence[JacobianBlock]) -> list[list[HeadBlock]] | None:
        """Derivatives of a head as those of two, or ``None`` if they are not of a head."""
        heads = [block for block in blocks if isinstance(block, HeadBlock)]
        if len(heads) != len(blocks):
            return None
        return [[_outputs_of(head, index) for head in heads] for index in self.outputs]

    def block_variance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "columns batch"]:
        """Of the outputs of each part, ``O(rows · (D² + C D + m²))``; of mixtures of outputs the sum."""
        heads = self._heads(blocks)
        if heads is None:
            return super().block_variance(blocks)
        found = [part.block_variance(own) for part, own in zip(self.parts, heads, strict=True)]
        if _mixed(blocks):
            return torch.stack(found).sum(0)
        whole = found[0].new_empty(self.shapes[0][0], found[0].shape[1])
        for part, index in zip(found, self.outputs, strict=True):
            whole[index] = part
        return whole

    def block_covariance(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "batch columns columns"]:
        """The same between columns, written out if they are not too many."""
        n_rows, n_columns = blocks[0].n_rows, blocks[0].n_columns
        check_covariances(n_rows * n_columns**2, n_columns)
        heads = self._heads(blocks)
        if heads is None:
            return super().block_covariance(blocks)
        found = [part.block_covariance(own) for part, own in zip(self.parts, heads, strict=True)]
        if _mixed(blocks):
            return torch.stack(found).sum(0)
        whole = found[0].new_zeros(n_rows, n_columns, n_columns)
        for part, index in zip(found, self.outputs, strict=True):
            whole[:, index.unsqueeze(1), index] = part
        return whole

    def block_kernel(self, blocks: Sequence[JacobianBlock]) -> Float[Tensor, "joint joint"]:
        """The same across data."""
        n_rows, n_columns = blocks[0].n_rows, blocks[0].n_columns
        check_covariances((n_rows * n_columns) ** 2, n_columns)
        heads = self._heads(blocks)
        if heads is None:
            return super().block_kernel(blocks)
        found = [part.block_kernel(own) for part, own in zip(self.parts, heads, strict=True)]
        if _mixed(blocks):
            return torch.stack(found).sum(0)
        whole = found[0].new_zeros(n_rows, n_columns, n_rows, n_columns)
        for part, index in zip(found, self.outputs, strict=True):
            rows = torch.arange(n_rows, device=index.device)
            whole[rows.view(-1, 1, 1, 1), index.view(1, -1, 1, 1), rows.view(1, 1, -1, 1), index] = part.view(
                n_rows, len(index), n_rows, len(index)
            )
        return whole.view(n_rows * n_columns, -1)


def _outputs_of(head: HeadBlock, index: Int[Tensor, " part"]) -> HeadBlock:
    """The head of some of the outputs, with the same inputs."""
    groups = tuple((len(index), *shape[1:]) for shape in head.groups)
    return HeadBlock(head.phis, groups, None if head.outer is None else head.outer[:, index])


def _mixed(blocks: Sequence[JacobianBlock]) -> bool:
    """Whether columns are mixtures of outputs."""
    return any(isinstance(block, HeadBlock) and block.outer is not None for block in blocks)
