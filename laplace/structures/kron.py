"""``hessian_structure="kron"``: one Kronecker product per parameter group.

    weight of a layer:  G ⊗ A,  G = Σ Λ  (outputs),  A = Σ φ φᵀ / N  (inputs);     its bias:  G

``Kron`` holds factors, ``KronCurvature`` raw sums and a count around them; ``KronDecomposed`` (in
``structures/kron_decomposed.py``) is the eigenbasis with the prior added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import linalg
from laplace.attributes import check_attribute
from laplace.enums import HessianStructure
from laplace.errors import InputError, ShapeError
from laplace.prior import GaussianPrior
from laplace.schema import Known, Table, factor, finite, groups, indices, nested, refuse, symmetric, tensor, whole
from laplace.structures.base import AbstractCurvature, SupportsCurvature
from laplace.structures.basis import RotatedGroups
from laplace.structures.eigenbases import eigenbases
from laplace.structures.kron_decomposed import KronDecomposed
from laplace.structures.remainder import lost, remainder
from laplace.structures.rotated import apply_blocks
from laplace.structures.wide_kron import WideKron, WideKronCurvature, is_wide
from laplace.types import Scalar


def _length(value: Any, where: str, known: Known) -> int:
    """The size of a factor; that of very many outputs is a mapping."""
    if not isinstance(value, Mapping):
        return factor(value, where, known)
    sizes: Known = {**known, "negative": False}
    nested({"diagonal": tensor(("n",), low=0), "kept": indices("m"), "block": symmetric("m")})(value, where, sizes)
    length, kept = len(value["diagonal"]), value["kept"]
    if sizes["negative"] or not len(kept) or int(kept.max()) >= length or bool((kept.diff() <= 0).any()):
        refuse(where, "outputs in ascending order and a matrix without negative numbers on its diagonal", kept)
    return length


def _factors(value: Any, where: str, known: Known) -> None:
    """One or two sides of a saved block, whose sizes multiply to the number of weights."""
    if not isinstance(value, list) or len(value) not in (1, 2):
        refuse(where, "a list of one or two factors", value)
    lengths = [_length(part, f"{where}[{index}]", known) for index, part in enumerate(value)]
    if math.prod(lengths) != known["p"]:
        refuse(where, f"factors of {known['p']} weights", math.prod(lengths))


@dataclass(frozen=True)
class KronCurvature(AbstractCurvature):
    """Sums of outer products on both sides of each product, and how many there were.

    Sums add up over batches, workers and calls; the mean of the inputs is taken once, when it is needed, so that the
    result does not depend on how the data came.
    """

    sums: Kron
    """Raw sums: G and ``Σ φ φᵀ`` for each weight, G for each bias."""
    counts: tuple[int | Tensor, ...]
    """For each block the number of rows (unmasked positions) in the sum of its inputs."""
    scale: Scalar | float = 1.0
    """Factor of the whole matrix."""
    dtype: torch.dtype | None = None
    """Precision of what is made of the sums, which may be wider themselves; that of the sums when ``None``."""
    _cache: dict[str, KronDecomposed] = field(default_factory=dict, repr=False, compare=False)

    name: ClassVar[HessianStructure] = HessianStructure.KRON

    @classmethod
    def from_batch(
        cls, backend: SupportsCurvature, x: Any, y: Tensor, **options: Any
    ) -> tuple[Tensor, KronCurvature | WideKronCurvature]:
        """Ask the back end for its factors; ``N=1`` means raw sums in every back end."""
        nll, sums = backend.kron(x, y, N=1, **options)
        if isinstance(sums, WideKron):
            return nll, WideKronCurvature(sums, int(backend.count(y)), nll.dtype)
        counts = sums.counts or [backend.count(y)] * len(sums)
        return nll, cls(sums, tuple(counts), dtype=nll.dtype)

    @classmethod
    def accumulate(
        cls, backend: SupportsCurvature, batches: Iterable[tuple[Any, Tensor]], **options: Any
    ) -> tuple[Tensor, AbstractCurvature] | None:
        """With counts that are read once, at the end; of a last layer with very many outputs, say what is kept."""
        found = super().accumulate(backend, batches, **options)
        if found is None:
            return None
        nll, total = found
        if isinstance(total, WideKronCurvature):
            total.say_what_is_kept()
            return nll, total
        assert isinstance(total, KronCurvature), "made by itself"
        return nll, replace(total, counts=tuple(int(count) for count in total.counts), _cache={})

    @classmethod
    def of_head(cls, n_outputs: int) -> type[AbstractCurvature]:
        """With very many outputs another one."""
        return WideKronCurvature if is_wide(n_outputs) else cls

    @classmethod
    def bytes_needed(cls, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> int:
        """Three pairs of factors per weight tensor, summed in float64; one matrix for other groups."""
        sides = ((shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0) for shape in shapes)
        return 3 * max(dtype.itemsize, 8) * sum(first**2 + second**2 for first, second in sides)

    @property
    def n_params(self) -> int:
        """P."""
        return self.sums.n_params

    @property
    def is_finite(self) -> bool:
        """Whether the diagonal of the matrix is, in the precision it is used in."""
        return bool(torch.isfinite(self.factors.diag()).all())

    @property
    def factors(self) -> Kron:
        """The factors with the inputs' side divided by the count: what the matrix is made of."""
        factors = self.sums.divide_inputs(self.counts)
        return factors if self.dtype is None else factors.to(self.dtype)

    @property
    @linalg.lasting
    def decomposed(self) -> KronDecomposed:
        """The factors in their eigenbasis, unscaled; computed once, O(C³ + D³); of few rows N O(C³ + D² N)."""
        if "decomposed" not in self._cache:
            with torch.no_grad():
                found = eigenbases(self.sums.kfacs, self.sums.resolution, [int(n) for n in self.counts], self.dtype)
            self._cache["decomposed"] = KronDecomposed(*found)
        return self._cache["decomposed"]

    @property
    def public(self) -> KronDecomposed:
        """The matrix in its eigenbasis."""
        return self.decomposed

    entries: ClassVar[Table] = {"sums": groups(_factors), "counts": groups(whole(0)), "resolution": finite(low=0)}

    def state(self) -> dict[str, Any]:
        """Raw sums and their counts."""
        return {"sums": self.sums.kfacs, "counts": list(self.counts), "resolution": float(self.sums.resolution)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], dtype: torch.dtype) -> KronCurvature | WideKronCurvature:
        """From raw sums and their counts."""
        if isinstance(state["sums"][0][0], Mapping):
            return WideKronCurvature.from_state(state, dtype)
        return cls(Kron(state["sums"], resolution=state["resolution"]), tuple(state["counts"]), dtype=dtype)

    def merge(self, other: KronCurvature) -> KronCurvature:
        """Add sums and counts: not the sum of the two matrices."""
        assert isinstance(self.scale, float) and isinstance(other.scale, float), "curvatures are merged unscaled"
        counts = tuple(ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True))
        return replace(self, sums=self.sums + other.sums, counts=counts, _cache={})

    def summands(self) -> list[Tensor]:
        """Each factor once, and the counts."""
        return [*self.sums.sides.values(), torch.tensor(self.counts)]

    def with_summands(self, parts: Sequence[Tensor]) -> KronCurvature:
        """Of other sums."""
        *sides, counts = parts
        return replace(self, sums=self.sums.with_sides(sides), counts=tuple(counts.tolist()), _cache={})

    def subtract(self, other: KronCurvature, *, squares: bool = True) -> KronCurvature:
        """Subtract sums and counts."""
        assert isinstance(self.scale, float) and isinstance(other.scale, float), "curvatures are subtracted unscaled"
        counts = tuple(ours - theirs for ours, theirs in zip(self.counts, other.counts, strict=True))
        if min(counts, default=0) < 0:
            msg = (
                f"The Kronecker factors are sums over {list(self.counts)} rows, and {list(other.counts)} were to be "
                "removed: only data that were fitted can be."
            )
            raise InputError(msg)
        return replace(self, sums=self.sums.without(other.sums, squares=squares), counts=counts, _cache={})

    def absorbing(self, other: KronCurvature) -> KronCurvature:
        """The same, in place where the sums of batches allow it."""
        counts = tuple(ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True))
        return replace(self, sums=self.sums.absorbing(other.sums), counts=counts, _cache={})

    def __mul__(self, factor: float | Tensor) -> KronCurvature:
        """Scale the matrix; the eigenbasis is shared."""
        return replace(self, scale=self.scale * factor)

    def scale_weights(self, factors: Float[Tensor, " params"]) -> KronCurvature:
        """√f_c G_ck √f_k in the first factors; those of the inputs, and their eigenvectors, are shared."""
        scaled = self.decomposed
        vectors, values = [list(block) for block in scaled.eigenvectors], [list(block) for block in scaled.eigenvalues]
        done: dict[int, tuple[Tensor, Tensor | None]] = {}
        parts = factors.split([math.prod(shape) for shape in scaled.shapes])
        for index, (block, part) in enumerate(zip(self.sums.kfacs, parts, strict=True)):
            outer, root = block[0].to(factors), part.reshape(len(block[0]), -1)[:, 0].sqrt()
            if id(block[0]) not in done:
                dense = outer if outer.dim() == 2 else torch.diag(outer)
                if bool((dense == torch.diag(dense.diagonal())).all()):
                    # As of a Gaussian with independent noise: scaling leaves the eigenvectors alone.
                    done[id(block[0])] = dense.diagonal() * root.square(), None
                else:
                    done[id(block[0])] = linalg.eigh(root.unsqueeze(1) * dense * root)
            values[index][0], vectors[index][0] = done[id(block[0])]
        cache = {"decomposed": replace(scaled, eigenvectors=vectors, eigenvalues=values)}
        return replace(self, _cache=cache)

    def posterior(self, prior: GaussianPrior, **options: Any) -> KronDecomposed:
        """Add the prior in the eigenbasis: O(P) once that is known."""
        decomposed = replace(self.decomposed, **options)
        return decomposed * self.scale + prior.per_layer()

    def basis(self, prior: GaussianPrior) -> RotatedGroups:  # noqa: ARG002
        """The eigenvectors of the factors."""
        decomposed = self.decomposed
        return RotatedGroups.of(decomposed.eigenvectors, decomposed.shapes)

    def log_det_ratio(self, prior: GaussianPrior, **options: Any) -> Scalar:
        """Σ log(1 + γλ/δ) without damping, which is no sum."""
        if options.get("damping"):
            return super().log_det_ratio(prior, **options)
        groups = zip((self.decomposed * self.scale).spectrum, prior.per_layer(), strict=True)
        return torch.stack([torch.log1p(values / delta).sum() for values, delta in groups]).sum()

    def to_dense(self) -> Float[Tensor, "params params"]:
        """The block-diagonal matrix."""
        return self.factors.to_matrix() * self.scale


def _divisor(count: float | Tensor) -> float | Tensor:
    """What sums are divided by: their count, or 1 where there is nothing."""
    return count.clamp(min=1) if isinstance(count, Tensor) else count or 1


class Kron:
    """A block-diagonal matrix whose blocks are Kronecker products.

    Parameters
    ----------
    kfacs
        For each parameter group its factors: two matrices ``[G, A]`` for the block ``G ⊗ A``, or one for the block
        itself. A 1-D factor is a diagonal matrix.
    counts
        For raw sums: the number of rows in the inputs' side of each block, where blocks differ in it.
    resolution
        Relative precision that the factors were computed in, where it is coarser than their dtype: eigenvalues below it
        count as zero, for rounding must not count as curvature where the prior is weak.

    Raises
    ------
    ShapeError
        If a block has not one or two factors, or a factor is not square.
    """

    def __init__(
        self, kfacs: Sequence[Sequence[Tensor]], counts: Sequence[int | Tensor] | None = None, resolution: float = 0.0
    ) -> None:
        blocks = [list(block) for block in kfacs]
        self.kfacs = blocks
        self.counts = None if counts is None else list(counts)
        self.resolution = resolution
        for block in blocks:
            square = all(side.dim() == 1 or (side.dim() == 2 and side.shape[0] == side.shape[1]) for side in block)
            if len(block) not in (1, 2) or not square:
                shapes = [list(side.shape) for side in block]
                msg = f"Each block takes one or two factors, square matrices or diagonals; got the shapes {shapes}."
                raise ShapeError(msg)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute that a ``Kron`` has; others raise ``UnknownAttributeError``."""
        if name not in ("kfacs", "counts", "resolution"):
            check_attribute(self, name)
        super().__setattr__(name, value)

    @classmethod
    def init_from_model(
        cls, model: nn.Module | Iterable[Tensor], device: torch.device | str, dtype: torch.dtype
    ) -> Kron:
        """Zero factors for the parameters of a model: one block each.

        Parameters
        ----------
        model
            A module (its parameters that require a gradient) or an iterable of parameters.
        device, dtype
            Device and floating-point type of the factors.

        Returns
        -------
        A ``Kron`` of zeros; a parameter of one axis has one factor.
        """
        parameters = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else model
        blocks = []
        for parameter in parameters:
            sides = [parameter.shape[0]] if parameter.dim() > 0 else [1]
            if parameter.dim() > 1:
                sides.append(parameter[0].numel())
            blocks.append([torch.zeros(side, side, device=device, dtype=dtype) for side in sides])
        return cls(blocks)

    @property
    def n_params(self) -> int:
        """P, the size of the matrix."""
        return sum(math.prod(len(side) for side in block) for block in self.kfacs)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.kfacs)

    def __add__(self, other: Kron) -> Kron:
        """Add factor by factor: how sums over batches add up. It is not the sum of the matrices."""
        if not isinstance(other, Kron):
            msg = f"A Kron adds to another Kron, factor by factor; got {type(other).__name__}."
            raise TypeError(msg)
        counts = None
        if self.counts is not None and other.counts is not None:
            counts = [ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)]
        return Kron(self._with(other, torch.add), counts, max(self.resolution, other.resolution))

    @property
    def sides(self) -> dict[int, Tensor]:
        """Each factor once, by its identity; blocks may share one."""
        return {id(side): side for block in self.kfacs for side in block}

    def with_sides(self, sides: Sequence[Tensor]) -> Kron:
        """The same with other factors, in the order of ``sides``; shared ones stay shared.

        Parameters
        ----------
        sides
            The other factors.
        """
        new = dict(zip(self.sides, sides, strict=True))
        return Kron([[new[id(side)] for side in block] for block in self.kfacs], self.counts, self.resolution)

    def _with(self, other: Kron, combine: Callable[[Tensor, Tensor], Tensor]) -> list[list[Tensor]]:
        """Combine factor by factor. One that two blocks share (the bias has the weight's G) stays shared."""
        found: dict[tuple[int, int], Tensor] = {}
        blocks = []
        check_forms(self, other)
        for ours, theirs in zip(self.kfacs, other.kfacs, strict=True):
            pairs = list(zip(ours, theirs, strict=True))
            for a, b in pairs:
                if (id(a), id(b)) not in found:
                    found[id(a), id(b)] = combine(a, b)
            blocks.append([found[id(a), id(b)] for a, b in pairs])
        return blocks

    def without(self, other: Kron, *, squares: bool = True) -> Kron:
        """Raw sums less others that are part of them, which must leave no negative diagonal where they are squares.

        Parameters
        ----------
        other
            Sums over some of the rows.
        squares
            Whether they are sums of squares.

        Raises
        ------
        InputError
            If the others are not part of these.
        """
        rounding = max(self.resolution, other.resolution)
        larger = [1.0]

        def less(here: Tensor, there: Tensor) -> Tensor:
            left = remainder(here, there, squares=squares, resolution=rounding)
            larger.append(lost(here, left))
            return left

        blocks = self._with(other, less)
        level = max([rounding, *(torch.finfo(side.dtype).eps for block in blocks for side in block)])
        return Kron(blocks, resolution=level * max(larger))

    def absorbing(self, other: Kron) -> Kron:
        """The sum of both, after which this one must not be used: its factors may have become those of the sum.

        Parameters
        ----------
        other
            Factors of the same shapes, which stay as they are.
        """
        return self + other

    def __mul__(self, scalar: float | Tensor) -> Kron:
        """Multiply the matrix, spreading the scalar evenly over the factors of each block."""
        scaled = [[side * scalar ** (1 / len(block)) for side in block] for block in self.kfacs]
        return Kron(scaled, resolution=self.resolution)

    def to(self, dtype: torch.dtype) -> Kron:
        """The same in another precision; shared factors stay shared."""
        known = {id(side): side.to(dtype) for block in self.kfacs for side in block}
        return Kron([[known[id(side)] for side in block] for block in self.kfacs], self.counts, self.resolution)

    def divide_inputs(self, count: float | Sequence[float | Tensor]) -> Kron:
        """Divide each product by a count, in its second factor, the inputs' side: from sums to a mean.

        Parameters
        ----------
        count
            One number, or one per block.
        """
        counts = [count] * len(self) if isinstance(count, (int, float)) else count
        blocks = zip(self.kfacs, counts, strict=True)
        divided = [[*block[:1], *(side / _divisor(number) for side in block[1:])] for block, number in blocks]
        return Kron(divided, resolution=self.resolution)

    __radd__ = __add__
    __rmul__ = __mul__

    def decompose(self, damping: bool = False) -> KronDecomposed:
        """Eigendecompose every factor; one that occurs in several blocks is decomposed once.

        Parameters
        ----------
        damping
            Whether a prior is added to each side of a product (√δ) instead of to the product (δ).

        Returns
        -------
        The same matrix in its eigenbasis.

        Raises
        ------
        NotPositiveDefiniteError
            If a factor is not finite or not positive semi-definite.

        Notes
        -----
        O(n³) for a factor of size n.
        """
        return KronDecomposed(*eigenbases(self.kfacs, self.resolution), damping=damping)

    def bmm(self, W: Tensor, exponent: float = 1) -> Tensor:
        """Multiply rows by a power of the matrix.

        Parameters
        ----------
        W
            ``[..., P]``.
        exponent
            The power; 1 multiplies by the factors themselves, others go through the eigenbasis.

        Returns
        -------
        ``[..., P]``.
        """
        if exponent == 1:
            blocks = [[densify(side) for side in block] for block in self.kfacs]
            return apply_blocks(W, blocks, [[len(side) for side in block] for block in blocks])
        return self.decompose().bmm(W, exponent)

    def logdet(self) -> Scalar:
        """Log-determinant; −∞ when a factor is singular."""
        return self.decompose().logdet()

    def diag(self) -> Float[Tensor, " params"]:
        """Diagonal of the matrix, ``[P]``."""
        diagonals = [[side if side.dim() == 1 else side.diagonal() for side in block] for block in self.kfacs]
        return torch.cat([b[0] if len(b) == 1 else torch.outer(b[0], b[1]).flatten() for b in diagonals])

    def to_matrix(self) -> Float[Tensor, "params params"]:
        """The block-diagonal matrix, ``[P, P]``."""
        blocks = [[densify(side) for side in block] for block in self.kfacs]
        return torch.block_diag(*(b[0] if len(b) == 1 else torch.kron(b[0], b[1]) for b in blocks))


def check_forms(first: Kron, second: Kron) -> None:
    """Raise unless two matrices have the same factors, so that adding them factor by factor has a meaning."""
    forms = [[[list(side.shape) for side in block] for block in kron.kfacs] for kron in (first, second)]
    if len(first) != len(second):
        msg = f"Kronecker factors of {len(first)} and of {len(second)} parameters do not add up."
        raise ShapeError(msg)
    for number, (ours, theirs) in enumerate(zip(*forms, strict=True)):
        if ours != theirs:
            msg = (
                f"The factors of parameter {number} have the shapes {ours} and {theirs}, which do not add up. If both "
                "are of one model, a layer has Kronecker factors in some batches only, because its rows mix data in "
                'others, say: use hessian_structure="diag", or batches in which the layer is used alike.'
            )
            raise ShapeError(msg)


def densify(side: Tensor) -> Tensor:
    """A factor as a square matrix."""
    return torch.diag(side) if side.dim() == 1 else side
