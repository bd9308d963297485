"""``hessian_structure="lowrank"``: the leading eigenpairs of the curvature, found without forming it.

H ≈ U diag(λ) Uᵀ,   A = s·U diag(λ) Uᵀ + diag(δ),   |A| = |diag(δ)| · |I + Wᵀ W|   with W = diag(δ)^(−½) U (s λ)^(½)

Where many directions are needed the curvature itself is cheaper than its products (``pays_as_matrix``): it is then
formed in one pass, and its eigenpairs are found without reading the data again. Else products of the curvature with a
block of directions, summed over the data, are all that is asked of a back end. The directions start at random and are
replaced by the products, made orthonormal, pass by pass; eigenpairs are those of the curvature within their span
(Rayleigh and Ritz). No eigenvalue found exceeds the true one of its rank. Of an indefinite matrix the directions of all
passes are kept, for those of large negative eigenvalues use up the last ones. A sampled one is another matrix in each
pass: its eigenpairs are those of the last products alone (Nyström).

References
----------
Those of ``subspace``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import linalg, processes
from laplace.enums import HessianStructure
from laplace.errors import NumericalWarning, UnsupportedError, warn
from laplace.prior import GaussianPrior
from laplace.schema import Known, Table, finite, optional, refuse, tensor, whole
from laplace.structures.accumulate import add_up, check_same_data, require_finite
from laplace.structures.base import AbstractCurvature, SupportsCurvature
from laplace.structures.lowrank_precision import LowRankPrecision
from laplace.structures.subspace import check_directions, extended, nystrom, pays_as_matrix, ritz
from laplace.types import Scalar

N_PASSES = 3
"""Passes over the data when a rank is asked for; one where the directions span all weights."""
MOST_PASSES = 2 * N_PASSES
"""For an indefinite curvature, until as many positive eigenvalues are found as are asked for."""
OVERSAMPLING = 10
"""Directions beyond the rank, without which the last eigenpairs would be poor."""
FIRST_DIRECTIONS = 32
"""Directions in the first pass when a share of the trace is asked for; twice as many in each next one."""

TIE = 1e-3
"""Eigenvalues that differ by less, relatively, are equal."""
DEFAULT_SHARE = 0.95
"""Share of the trace that the eigenpairs hold, if nothing else is asked for."""


@dataclass(frozen=True)
class Truncation:
    """How many eigenpairs are kept."""

    rank: int | None = None
    """So many (fewer where the curvature has no more); ``None`` to go by the trace."""
    captured_trace: float | None = None
    """As many as hold this share of the trace of the curvature; ``DEFAULT_SHARE`` when both are ``None``."""

    @property
    def share(self) -> float:
        """Which share of the trace is asked for."""
        return DEFAULT_SHARE if self.captured_trace is None else self.captured_trace

    def n_first(self, n_params: int) -> int:
        """Number of directions in the first pass."""
        return min(n_params, FIRST_DIRECTIONS if self.rank is None else self.rank + OVERSAMPLING)

    def done(self, n_passes: int, n_kept: int | None, trace: Tensor | None) -> bool:
        """Whether a rank has had its passes."""
        if trace is None and n_kept != self.rank:
            return n_passes >= MOST_PASSES
        return n_passes >= N_PASSES

    def n_kept(self, values: Float[Tensor, " found"], trace: Tensor | None) -> int | None:
        """How many of the eigenvalues, largest first, are kept; ``None`` if more have to be found."""
        # Below this a value cannot be told from zero.
        level = 10 * torch.finfo(values.dtype).eps * values.abs().max()
        n_positive = max(1, int((values > level).sum()))
        if self.rank is not None:
            return min(self.rank, n_positive)
        assert trace is not None, "refused before"
        share = self.share * (1 - 100 * torch.finfo(trace.dtype).eps)
        enough = values[:n_positive].cumsum(0) >= share * trace.to(values)
        if not bool(enough.any()):
            return None
        # Equal eigenvalues (as of outputs that share their curvature) have no order: all of them or none.
        last = values[int(enough.int().argmax())]
        return min(n_positive, int((values >= last * (1 - TIE)).sum()))


def _vectors(value: Any, where: str, known: Known) -> None:
    """Saved eigenvectors, whose lengths are finite."""
    tensor(("P", "rank"))(value, where, known)
    if not bool(torch.isfinite(value.square().sum())):
        refuse(where, "vectors of finite length", value)


@dataclass(frozen=True)
class LowRankCurvature(AbstractCurvature):
    """Leading eigenpairs of the curvature.

    Attributes
    ----------
    vectors
        U, ``[P, r]``.
    values
        λ, ``[r]``, descending, unscaled.
    trace
        Trace of the whole curvature, unscaled, ``[]``; ``None`` where it is not known.
    truncation
        How many are kept.
    n_passes
        How often the data were read.
    scale
        Factor of the matrix.
    orthonormal
        Whether U has orthonormal columns (not after weights were scaled).
    """

    vectors: Float[Tensor, "params rank"]
    values: Float[Tensor, " rank"]
    trace: Tensor | None = None
    truncation: Truncation = Truncation()
    n_passes: int = 0
    scale: Scalar | float = 1.0
    orthonormal: bool = True

    name: ClassVar[HessianStructure] = HessianStructure.LOWRANK
    default: ClassVar[Truncation] = Truncation()
    """How many eigenpairs are kept where nothing is said."""

    @classmethod
    def choosing(cls, truncation: Truncation) -> type[LowRankCurvature]:
        """The same structure with another default."""

        class Chosen(cls):
            default: ClassVar[Truncation] = truncation

        return Chosen

    @classmethod
    def from_batch(
        cls, backend: SupportsCurvature, x: Any, y: Tensor, **options: Any
    ) -> tuple[Tensor, LowRankCurvature]:
        """That of one batch."""
        found = cls.accumulate(backend, [(x, y)], **options)
        assert found is not None, "there is a batch"
        return found

    @classmethod
    def accumulate(
        cls,
        backend: SupportsCurvature,
        batches: Iterable[tuple[Any, Tensor]],
        truncation: Truncation | None = None,
        **options: Any,
    ) -> tuple[Tensor, LowRankCurvature] | None:
        """Leading eigenpairs, in several passes over the data.

        With a rank r: ``N_PASSES`` passes with r + ``OVERSAMPLING`` directions; where the curvature may be indefinite
        up to ``MOST_PASSES``, with the directions of all of them in memory. With a share of the trace: as many as
        it takes, with twice as many directions in each, and one more. One pass is exact where the directions span all
        weights. Where the matrix costs less than the directions it is formed in one pass, the last one. The random
        numbers are the same in every call, and no generator of the user moves.
        """
        chosen = truncation or cls.default
        data = backend.repeatable(batches, cls.name)
        noise = torch.Generator().manual_seed(0)
        basis: Tensor | None = None
        matrix: Tensor | None = None
        first_nll: Tensor | None = None
        as_matrix = False

        def of_batch(x: Any, y: Tensor) -> tuple[Tensor, list[Tensor]]:
            nonlocal basis, as_matrix
            if basis is None:
                like = backend.zeros()
                n_first = chosen.n_first(len(like))
                # A share of the trace may turn out to be held by few directions; a rank says how many there are.
                as_matrix = chosen.rank is not None and pays_as_matrix(backend, like, n_first, small=False)
                if chosen.rank is None and n_first < len(like):
                    check_directions(min(2 * n_first, len(like)), like)  # as a rule the first are too few
                basis = extended(None, 0 if as_matrix else n_first, like, noise)
            if as_matrix:
                nll, whole_matrix = backend.full(x, y, **options)
                return nll, [whole_matrix]
            nll, products, trace = backend.lowrank(x, y, basis, **options)
            if trace is None and chosen.rank is None:
                msg = (
                    "This curvature may be indefinite, so that no share of its trace can be asked for: pass rank=, the "
                    "number of eigenpairs to keep."
                )
                raise UnsupportedError(msg)
            return nll, [products] if trace is None else [products, trace]

        products, trace = torch.empty(0), None
        n_passes, enough = 0, False
        seen: list[tuple[Tensor, Tensor]] = []
        while True:
            if matrix is None:
                n_passes += 1
                total = add_up(data, of_batch, lambda old, new: [a + b for a, b in zip(old, new, strict=True)])
                if total is None:
                    return None
                nll, (products, *traces) = total
                first_nll = nll if first_nll is None else first_nll
                check_same_data(first_nll, nll)
                require_finite(bool(torch.isfinite(products).all()))
                trace = traces[0] if traces else None
                if as_matrix:
                    matrix, trace = products, products.trace()
            assert basis is not None and first_nll is not None, "there were data"
            if matrix is not None:
                if not 0 < 4 * basis.shape[1] <= len(matrix):
                    values, vectors, trace = _eigenpairs(matrix)
                    values, vectors = processes.shared([values, vectors])
                    n_kept, n_found = chosen.n_kept(values, trace), len(matrix)
                    break
                products = matrix @ basis
            seen = [*(seen if trace is None else []), (basis, products)]
            directions = torch.cat([part for part, _ in seen], 1)
            n_params, n_found = directions.shape
            if backend.is_sampled and trace is not None and matrix is None and n_found < n_params:
                values, vectors = nystrom(basis, products)
            else:
                values, vectors = ritz(directions, torch.cat([part for _, part in seen], 1))
            values, vectors = processes.shared([values, vectors])
            n_kept = chosen.n_kept(values, trace)
            # Once a share is found one more pass sharpens the eigenpairs that hold it.
            if n_found == n_params or (enough if chosen.rank is None else chosen.done(n_passes, n_kept, trace)):
                break
            enough = n_kept is not None
            block = basis.shape[1]
            if trace is None:
                wanted = min(block, n_params - n_found)
                basis = extended(products[:, :wanted], wanted, products[:, 0], noise, directions)
            else:
                wanted = block if enough else min(n_params, 2 * block)
                basis = extended(products, wanted, products[:, 0], noise)
                # The matrix may be another sample, whose share is looked for anew.
                as_matrix = chosen.rank is None and not enough
                as_matrix = as_matrix and pays_as_matrix(backend, products[:, 0], wanted, small=True)
        n_params = len(vectors)
        if chosen.rank is not None and trace is None and n_found < n_params and n_kept != chosen.rank:
            msg = (
                f"{n_kept} positive eigenvalues were found in {n_passes} passes, fewer than rank={chosen.rank}: this "
                "Hessian has no more of them, or larger negative ones hide them. Ask for a higher rank, or use a GGN "
                "back end, whose curvature has no negative ones."
            )
            warn(msg, NumericalWarning)
        kept = slice(0, truncation_or_all(n_kept, values))
        values, vectors = in_order(values, vectors, kept.stop)
        # The largest may be zero where the data say nothing; none is negative.
        found = LowRankCurvature(vectors[:, kept].contiguous(), values[kept].clamp(min=0), trace, chosen, n_passes)
        return first_nll, found

    @classmethod
    def check_exact(cls) -> None:
        """What was dropped of one is not there to be added to what the other kept: raises."""
        msg = (
            'hessian_structure="lowrank" keeps the leading eigenpairs of a fit and drops the rest, so that no sum or '
            "difference of two is that of their data. Fit all data at once, add data with fit(loader, override=False), "
            'which compresses again and warns, or use "kron", "diag", "blockdiag" or "full", whose sums are exact.'
        )
        raise UnsupportedError(msg)

    @classmethod
    def bytes_needed(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
        """Four matrices of the fewest directions; when more are asked for the memory is checked again."""
        n_params = sum(torch.Size(shape).numel() for shape in shapes)
        return 4 * dtype.itemsize * n_params * min(n_params, 1 + OVERSAMPLING)

    @property
    def n_params(self) -> int:
        """P."""
        return len(self.vectors)

    @property
    def is_finite(self) -> bool:
        """Whether the eigenpairs are."""
        return bool(torch.isfinite(self.values).all()) and bool(torch.isfinite(self.vectors).all())

    @property
    def public(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors ``[P, r]`` and eigenvalues ``[r]``."""
        return self.vectors, self.values

    @property
    def captured(self) -> float | None:
        """Share of the trace of the curvature that is kept; ``None`` where the trace is not known."""
        if self.trace is None:
            return None
        return float(self.values.sum() / self.trace) if float(self.trace) > 0 else 1.0

    entries: ClassVar[Table] = {
        "vectors": _vectors,
        "values": tensor(("rank",), low=0),
        "trace": optional(tensor((), low=0)),
        "rank": optional(whole(1)),
        "captured_trace": optional(finite(above=0, high=1)),
        "n_passes": whole(0),
    }

    def state(self) -> dict[str, Any]:
        """Eigenpairs, and how they were chosen."""
        return {
            "vectors": self.vectors,
            "values": self.values,
            "trace": self.trace,
            "rank": self.truncation.rank,
            "captured_trace": self.truncation.captured_trace,
            "n_passes": self.n_passes,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype) -> LowRankCurvature:
        """From eigenpairs."""
        trace = None if state["trace"] is None else state["trace"].to(dtype)
        truncation = Truncation(state["rank"], state["captured_trace"])
        return cls(state["vectors"].to(dtype), state["values"].to(dtype), trace, truncation, state["n_passes"])

    def merge(self, other: LowRankCurvature) -> LowRankCurvature:
        """Leading eigenpairs of the sum, which is not that of all their data once something was dropped."""
        assert isinstance(self.scale, float) and isinstance(other.scale, float), "curvatures are merged unscaled"
        roots = torch.cat([self.vectors * self.values.sqrt(), other.vectors * other.values.sqrt()], 1)
        vectors, singular, _ = torch.linalg.svd(roots, full_matrices=False)
        values = singular.square()
        trace = None if self.trace is None or other.trace is None else self.trace + other.trace
        kept = slice(0, truncation_or_all(other.truncation.n_kept(values, trace), values))
        values, vectors = in_order(values, vectors, kept.stop)
        merged = LowRankCurvature(
            vectors[:, kept].contiguous(), values[kept], trace, other.truncation, self.n_passes + other.n_passes
        )
        if merged.captured is None or merged.captured < 1 - 1e3 * torch.finfo(values.dtype).eps:
            share = "an unknown share" if merged.captured is None else f"{merged.captured:.1%}"
            msg = (
                f"Two low-rank curvatures were added and compressed to rank {len(merged.values)}, which holds {share} "
                "of the trace. What each of them had dropped stays dropped: fit all data at once for the leading "
                "eigenpairs of the whole."
            )
            warn(msg, NumericalWarning)
        return merged

    def __mul__(self, factor: float | Tensor) -> LowRankCurvature:
        """Scale the eigenvalues."""
        return replace(self, scale=self.scale * factor)

    def scale_weights(self, factors: Float[Tensor, " params"]) -> LowRankCurvature:
        """√f U; its columns are no longer orthonormal."""
        return replace(self, vectors=factors.sqrt().unsqueeze(1) * self.vectors, orthonormal=False)

    def posterior(self, prior: GaussianPrior, **options: Any) -> LowRankPrecision:
        """Add the prior; any prior fits, at O(P r²) for all but a scalar one."""
        assert not options, "the low-rank structure has no options"
        isotropic = self.orthonormal and prior.precision.numel() == 1
        # A copy: a view would bring the graph of the prior along even where none is built.
        return LowRankPrecision(self.vectors, self.values, self.scale, prior.diagonal().clone(), isotropic)

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """The determinant lemma: nothing is subtracted."""
        return self.posterior(prior, **options).log_det_ratio()

    def to_dense(self) -> Float[Tensor, "params params"]:
        """U diag(s λ) Uᵀ."""
        return (self.vectors * (self.values * self.scale)) @ self.vectors.T


def _eigenpairs(matrix: Float[Tensor, "params params"]) -> tuple[Tensor, Tensor, Tensor | None]:
    """All eigenpairs, largest first, and the trace; ``None`` of an indefinite matrix, whose trace says little."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    level = 1e3 * torch.finfo(values.dtype).eps * values.abs().max()
    return values, vectors, None if bool((values < -level).any()) else matrix.trace()


def in_order(
    values: Float[Tensor, " found"], vectors: Float[Tensor, "params found"], n_kept: int
) -> tuple[Float[Tensor, " found"], Float[Tensor, "params found"]]:
    """The same eigenpairs, equal ones that a cut divides in an order that rounding does not decide.

    Eigenvectors of equal eigenvalues (as of outputs that share their curvature) are any basis of what they span. Those
    taken here lie in the first weights as far as that is possible: the eigenvectors, within the span, of the matrix
    that has the places of the weights on its diagonal.
    """
    if not 0 < n_kept < len(values):
        return values, vectors
    last, following = values[n_kept - 1 : n_kept + 1].tolist()
    if last <= 0 or following < last * (1 - TIE):
        return values, vectors
    tied = (values - last).abs() <= TIE * last
    some = vectors[:, tied].to(linalg.wide_dtype(vectors))
    places = torch.linspace(0, 1, len(vectors), dtype=some.dtype, device=some.device)
    turn = torch.linalg.eigh((some * places.unsqueeze(1)).mT @ some)[1]
    values, vectors = values.clone(), vectors.clone()
    values[tied] = turn.square().mT.to(values) @ values[tied]
    vectors[:, tied] = (some @ turn).to(vectors)
    return values, vectors


def truncation_or_all(n_kept: int | None, values: Tensor) -> int:
    """How many eigenpairs are kept where no more can be found: those that are positive."""
    return max(1, int((values > 0).sum())) if n_kept is None else n_kept
