"""What a density of features is made of: counts, sums and second moments of features, for each class.

n_c = Σ w_c,   s_c = Σ w_c φ,   M_c = Σ w_c φ φᵀ

over rows, with w_c = 1 for the class of a row and 0 for the others, or the probabilities of a soft label. Such sums add
over batches, data sets and processes, and subtract. They are kept in float64, as covariances are small differences of
them. With many classes of many features only the sum of the M_c is kept: the tied form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import pending
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.linalg import lasting, wide_dtype
from laplace.processes import Team
from laplace.schema import Check, Known, Table, flag, refuse, tensor
from laplace.types import Features

MAX_MOMENTS = 2**24
"""How many numbers the second moments of all classes may have; beyond, all classes share one matrix."""
MAX_FEATURES = 8192
"""Number of features beyond which there is no density: even one matrix would take more than half a gigabyte."""
BUFFERED_ROWS = 1024
"""Rows that are kept, at least, until their products are computed: many small products are slow."""
BLOCK = 128
"""Columns of second moments that are computed at a time, without those below the diagonal."""
ROUNDING = 1e-9
"""Of counts of soft labels after a subtraction, relative to what there was."""


def is_tied(n_classes: int, n_features: int) -> bool:
    """Whether all classes share one covariance, as C·D² numbers are too many."""
    return n_classes * n_features**2 > MAX_MOMENTS


def reason_against(n_features: int) -> str | None:
    """Why features cannot have a density, in words; ``None`` if they can."""
    if n_features <= MAX_FEATURES:
        return None
    return (
        f"The last layer has {n_features} features, and a covariance of more than {MAX_FEATURES} does not fit: there "
        "is no feature density. Use the scores 'max_prob' or 'entropy', or a model with a smaller last hidden layer."
    )


def normalized(phi: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows features"]:
    """Features divided by their Euclidean norm (Mahalanobis++, arXiv:2505.18032); rows of zeros stay."""
    return phi / phi.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(phi.dtype).tiny)


# -- entries of states ------------------------------------------------------------------------------------------------


def wide(inner: Check) -> Check:
    """A check of numbers that must be finite in float64, whatever the dtype of the model."""

    def check(value: Any, where: str, known: Known) -> None:
        within: Known = {**known, "dtype": torch.float64}
        inner(value, where, within)
        known.update({name: size for name, size in within.items() if name != "dtype"})

    return check


def _moments(value: Any, where: str, known: Known) -> None:
    """One second moment for each class, or one for all; symmetric, without negative numbers on the diagonal."""
    n_classes, n_features = known["classes"], known["features"]
    parts = 1 if is_tied(n_classes, n_features) else n_classes
    wide(tensor((parts, n_features, n_features)))(value, where, known)
    for part in value:
        largest = float(part.abs().max()) if part.numel() else 0.0
        if largest and (float((part - part.mT).abs().max()) > 1e-6 * largest or bool((part.diagonal() < 0).any())):
            refuse(where, "symmetric matrices without negative numbers on their diagonals", value)


# -- the value --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassSums:
    """Counts, sums and second moments of the features of each class."""

    counts: Float[Tensor, " classes"]
    """n_c, ``[C]``: numbers of rows, or sums of soft labels."""
    sums: Float[Tensor, "classes features"]
    """s_c, ``[C, D]``."""
    moments: Float[Tensor, "parts features features"]
    """M_c, ``[C, D, D]``; in the tied form their sum, ``[1, D, D]``."""
    normalized: bool = False
    """Whether rows were divided by their norm."""

    entries: ClassVar[Table] = {
        "counts": wide(tensor(("classes",), low=0)),
        "sums": wide(tensor(("classes", "features"))),
        "moments": _moments,
        "normalized": flag,
    }
    """Checks of a state; ``"classes"`` and ``"features"`` may be known before."""

    @classmethod
    @lasting
    def zeros(cls, n_classes: int, like: Features, *, normalized: bool = False) -> ClassSums:
        """Of no rows, with the width and on the device of some features.

        Raises
        ------
        UnsupportedError
            If there are too many features.
        """
        n_features = like.shape[-1]
        reason = reason_against(n_features)
        if reason is not None:
            raise UnsupportedError(reason)
        parts = 1 if is_tied(n_classes, n_features) else n_classes
        shapes = ((n_classes,), (n_classes, n_features), (parts, n_features, n_features))
        zeros = (torch.zeros(shape, dtype=wide_dtype(like), device=like.device) for shape in shapes)
        return cls(*zeros, normalized=normalized)

    @staticmethod
    def bytes_needed(n_classes: int, n_features: int) -> int:
        """How much memory they take."""
        parts = 1 if is_tied(n_classes, n_features) else n_classes
        return 8 * (n_classes * (1 + n_features) + parts * n_features**2)

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.counts)

    @property
    def n_features(self) -> int:
        """D."""
        return self.sums.shape[1]

    @property
    def tied(self) -> bool:
        """Whether there is one second moment for all classes, as theirs would be too many numbers."""
        return is_tied(self.n_classes, self.n_features)

    @property
    def nbytes(self) -> int:
        """Memory of the three tensors."""
        return sum(part.numel() * part.element_size() for part in self._tensors)

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.counts, self.sums, self.moments

    def _alike(self, other: ClassSums) -> None:
        """Raise unless both are of the same classes and features."""
        if self.sums.shape != other.sums.shape:
            msg = (
                f"Expected sums of {self.n_classes} classes of {self.n_features} features; got {other.n_classes} "
                f"classes of {other.n_features} features. Only sums of one model and its classes go together."
            )
            raise ShapeError(msg)
        if self.normalized is not other.normalized:
            msg = "Sums of features that were normalized and of ones that were not do not go together: fit both alike."
            raise InputError(msg)

    @lasting
    def merge(self, other: ClassSums) -> ClassSums:
        """The sums over the rows of both.

        Raises
        ------
        ShapeError
            If they are of other classes or features.
        InputError
            If one is of normalized features and the other is not.
        """
        self._alike(other)
        pairs = zip(self._tensors, other._tensors, strict=True)
        return ClassSums(*(here + there.to(here) for here, there in pairs), normalized=self.normalized)

    @lasting
    def subtract(self, other: ClassSums) -> ClassSums:
        """The sums over the rows that are not among the other ones, which must be part of these.

        Raises
        ------
        ShapeError
            If they are of other classes or features.
        InputError
            If the rows to remove cannot be part of these, or one is of normalized features and the other is not.
        """
        self._alike(other)
        counts, sums, moments = (
            here - there.to(here) for here, there in zip(self._tensors, other._tensors, strict=True)
        )
        short = counts < -ROUNDING * self.counts.clamp(min=1)
        if bool(short.any()):
            c = int(short.nonzero()[0])
            msg = (
                f"There are {float(self.counts[c]):g} rows of class {c}, and {float(other.counts[c]):g} were to be "
                "removed: only rows that were fitted can be."
            )
            raise InputError(msg)
        diagonal, before = (part.diagonal(dim1=-2, dim2=-1) for part in (moments, self.moments))
        if bool((diagonal < -ROUNDING * before).any()):
            msg = "The rows to remove have larger features than those that were fitted: they are not part of them."
            raise InputError(msg)
        kept = counts > ROUNDING * self.counts  # what is left of a class without rows is rounding
        parts = kept.any().view(1) if self.tied else kept
        return ClassSums(
            counts * kept, sums * kept.unsqueeze(1), moments * parts.view(-1, 1, 1), normalized=self.normalized
        )

    def summed(self, team: Team) -> ClassSums:
        """The sums over the rows of all processes."""
        return ClassSums(*team.summed(self._tensors, "density"), normalized=self.normalized)

    @lasting
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ClassSums:
        """On another device or in another dtype; nothing is copied that is already there."""
        return ClassSums(*(part.to(device=device, dtype=dtype) for part in self._tensors), normalized=self.normalized)

    def state(self) -> dict[str, Any]:
        """The tensors and the flag."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> ClassSums:
        """From a state that passed the checks of ``entries``.

        Raises
        ------
        StateError
            If no rows can have such sums.
        """
        counts, sums, moments = (state[name].to(dtype) for name in ("counts", "sums", "moments"))
        means = sums / counts.clamp(min=torch.finfo(dtype).tiny).unsqueeze(1)
        raw = moments.diagonal(dim1=-2, dim2=-1).sum(0)
        if not bool((raw - (sums * means).sum(0) >= -1e-6 * raw).all()):  # Cauchy and Schwarz; false for NaN, too
            refuse("'sums'", "sums of rows with the second moments and counts beside them", sums)
        return cls(counts, sums, moments, normalized=bool(state["normalized"]))


class Accumulator:
    """Adds batches of features up.

    Rows are kept until there are ``BUFFERED_ROWS`` or more, then sorted by class, so that each class takes one product;
    only then the computer waits for its accelerator.

    Parameters
    ----------
    n_classes
        C; 1 for regression.
    normalize_features
        Divide rows by their Euclidean norm first (Mahalanobis++, arXiv:2505.18032).

    Examples
    --------
    >>> accumulator = Accumulator(3)
    >>> accumulator.add(torch.randn(5, 2), torch.tensor([0, 2, 2, 1, 0]))
    >>> accumulator.finish().counts
    tensor([2., 1., 2.], dtype=torch.float64)
    """

    def __init__(self, n_classes: int, *, normalize_features: bool = False) -> None:
        self.n_classes, self.normalize_features = n_classes, normalize_features
        self._total: ClassSums | None = None
        self._rows: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._counted: list[Tensor] = []
        self._waiting = 0

    @lasting
    @torch.no_grad()
    def add(self, phi: Features, labels: Tensor | None = None, counted: Tensor | None = None) -> None:
        """Add rows with their classes ``[rows]`` or soft labels ``[rows, C]``; without labels all are of class 0.

        Rows that are not ``counted`` ``[rows]`` must be zeros, of whatever class.

        Raises
        ------
        ShapeError
            If there is not one label for each row, or rows have another number of features than those before.
        InputError
            If a label is no class (which may be seen some batches later).
        UnsupportedError
            If there are too many features.
        """
        if labels is None:
            labels = torch.zeros(len(phi), dtype=torch.int64, device=phi.device)
        expected = [len(phi)] if labels.dim() == 1 else [len(phi), self.n_classes]
        if list(labels.shape) != expected:
            msg = f"Expected labels of the shape {expected} for {len(phi)} rows; got {list(labels.shape)}."
            raise ShapeError(msg)
        if self._total is None:
            self._total = ClassSums.zeros(self.n_classes, phi, normalized=self.normalize_features)
        if phi.shape[1] != self._total.n_features:
            msg = f"Expected {self._total.n_features} features, as in the batches before; got {phi.shape[1]}."
            raise ShapeError(msg)
        if self._labels and self._labels[-1].dim() != labels.dim():
            self._flush(self._total)
        # A copy: what comes after may write into the features.
        self._rows.append(phi.detach().to(self._total.sums, copy=True))
        self._labels.append(labels.detach().to(self._total.counts if labels.dim() == 2 else torch.int64, copy=True))
        ones = torch.ones(len(phi), dtype=self._total.counts.dtype, device=phi.device)
        self._counted.append(ones if counted is None else ones * counted)
        self._waiting += len(phi)
        if self._waiting >= self._enough(phi.shape[1]):
            self._flush(self._total)

    def _enough(self, n_features: int) -> int:
        """Rows that are worth a product: many classes need more, for each to have some, as far as memory allows."""
        return max(BUFFERED_ROWS, min(32 * self.n_classes, MAX_MOMENTS // 8 // n_features))

    @lasting
    @torch.no_grad()
    def finish(self) -> ClassSums:
        """All sums; the accumulator is empty afterwards.

        Raises
        ------
        InputError
            If nothing was added, or a label is no class.
        """
        if self._total is None:
            msg = "Expected features of at least one batch; got none. Check that the loader yields batches."
            raise InputError(msg)
        self._flush(self._total)
        total, self._total = self._total, None
        for moment in total.moments:
            moment.copy_(moment.triu() + moment.triu(1).mT)
        return total

    def _flush(self, total: ClassSums) -> None:
        """Add the rows that wait."""
        if self._waiting:
            rows, labels, counted = torch.cat(self._rows), torch.cat(self._labels), torch.cat(self._counted)
            rows = normalized(rows) if self.normalize_features else rows
            (_add_soft if labels.dim() == 2 else _add_hard)(total, rows, labels, counted)
        self._rows, self._labels, self._counted, self._waiting = [], [], [], 0


def _add_products(moment: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right, which is symmetric, on and above the diagonal, and in parts of what is below."""
    for start in range(0, len(moment), BLOCK):
        moment[start : start + BLOCK, start:].addmm_(left[:, start : start + BLOCK].mT, right[:, start:])


def _add_hard(total: ClassSums, rows: Tensor, labels: Tensor, counted: Tensor) -> None:
    """Rows with one class each: sorted by class, each class is a slice."""
    if total.tied:
        _check_classes(total, labels)
        labels = labels.clamp(0, total.n_classes - 1)
        total.counts.index_add_(0, labels, counted)
        total.sums.index_add_(0, labels, rows)
        _add_products(total.moments[0], rows, rows)
        return
    ordered, order = labels.sort(stable=True)
    edges = torch.searchsorted(ordered, torch.arange(total.n_classes + 1, device=labels.device))
    starts: list[int] = edges.tolist()
    if starts[0] != 0 or starts[-1] != len(labels):
        _check_classes(total, labels)
    rows = rows[order]
    total.counts.index_add_(0, labels, counted)
    total.sums.index_add_(0, ordered, rows)
    for moment, start, end in zip(total.moments, starts[:-1], starts[1:], strict=True):
        if end > start:
            _add_products(moment, rows[start:end], rows[start:end])


def _check_classes(total: ClassSums, labels: Tensor) -> None:
    """Raise if a label is no class."""
    pending.refuse(
        ((labels < 0) | (labels >= total.n_classes)).any(),
        InputError,
        lambda least, most: (
            f"Expected classes from 0 to {total.n_classes - 1}; got {int(least if least < 0 else most)}. Leave masked "
            "rows out."
        ),
        lambda: [labels.min(), labels.max()],
    )


def _add_soft(total: ClassSums, rows: Tensor, weights: Tensor, counted: Tensor) -> None:  # noqa: ARG001 - all do
    """Rows with a share in each class: one product for each class, or one for all in the tied form."""
    pending.refuse(
        ~((weights >= 0) & torch.isfinite(weights)).all(),
        InputError,
        lambda: "Soft labels must be finite and not negative; give the probabilities of classes.",
    )
    total.counts.add_(weights.sum(0))
    total.sums.addmm_(weights.mT, rows)
    shares = weights.sum(1, keepdim=True) if total.tied else weights
    for moment, share in zip(total.moments, shares.T, strict=True):
        _add_products(moment, rows * share.unsqueeze(1), rows)


__all__ = [
    "MAX_FEATURES",
    "MAX_MOMENTS",
    "Accumulator",
    "ClassSums",
    "is_tied",
    "normalized",
    "reason_against",
    "wide",
]
