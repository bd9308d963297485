"""The roles a parameter plays in a call: from gradients at the output of the call to derivatives in the parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from laplace.curvature.layouts import Layout
from laplace.structures.gather import GatherBlock
from laplace.structures.jacobian import DenseBlock, JacobianBlock, SumBlock
from laplace.structures.product import ProductBlock

Places: TypeAlias = "tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, int]"
"""Which positions count, the pair of datum and token each belongs to, its token; datum and token of a pair; B."""


class Kept:
    """What columns of one pass share: inputs of layers as blocks use them, and products of inputs with matrices.

    Parameters
    ----------
    limit
        How many numbers may be kept.
    """

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.inputs: dict[int, Tensor] = {}
        self.places: dict[int, Places] = {}
        self.rotations: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def get(self, role: Role, make: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """The inputs of a role and whether they are kept."""
        if id(role) in self.inputs:
            return self.inputs[id(role)], True
        inputs = make()
        fits = inputs.numel() <= self.left
        if fits:
            self.left -= inputs.numel()
            self.inputs[id(role)] = inputs
        return inputs, fits


def wide(values: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(values.dtype, torch.float32)


class Role(ABC):
    """How one argument of one call acts on its output.

    Attributes
    ----------
    n_lead
        Number of leading axes of ``rows(g)``, those over data and positions.
    """

    n_lead: int

    @abstractmethod
    def rows(self, g: Tensor) -> Tensor:
        """Gradients at the output ``[columns, *output]`` as ``[columns, *lead, *rest]``."""

    @abstractmethod
    def scale(self, g: Tensor) -> Tensor:
        """Norm ``[]`` of the terms that the derivative is a sum of: what its rounding is relative to."""

    @abstractmethod
    def block(
        self, g: Tensor, layout: Layout, kept: Kept, dtype: torch.dtype, counted: Bool[Tensor, "batch positions"] | None
    ) -> JacobianBlock:
        """Derivatives in the argument.

        Parameters
        ----------
        g
            Gradients at the output, ``[columns, *output]``.
        layout
            Which datum each row belongs to.
        kept
            What was made for other columns of the same pass.
        dtype
            To compute in.
        counted
            Rows that are not masked; the gradients of others are zero. All when ``None``.
        """


@dataclass(frozen=True)
class Product(Role):
    """A weight that multiplies inputs, ``Σ_t g_t ⊗ a_t``.

    Attributes
    ----------
    inputs
        Makes a, ``[*lead, groups, i]``; not called before it is needed.
    outputs
        Makes g, ``[columns, *lead, groups, o]``.
    n_lead
        Number of leading axes.
    transposed
        The weight is stored inputs first.
    """

    inputs: Callable[[], Tensor]
    outputs: Callable[[Tensor], Tensor]
    n_lead: int
    transposed: bool = False

    def rows(self, g: Tensor) -> Tensor:
        """By ``outputs``."""
        return self.outputs(g)

    def scale(self, g: Tensor) -> Tensor:
        """√Σ |g_t|² |a_t|²."""
        left, right = (torch.linalg.vector_norm(v, dim=-1, dtype=wide(v)) for v in (self.outputs(g), self.inputs()))
        return torch.linalg.vector_norm(left * right)

    def block(self, g: Tensor, layout: Layout, kept: Kept, dtype: torch.dtype, counted: Tensor | None) -> ProductBlock:
        """Gradients and inputs."""
        left = layout.apply(self.outputs(g), self.n_lead, 1).to(dtype)

        def make() -> Tensor:
            inputs = self.inputs()
            right = layout.apply(inputs if torch.is_grad_enabled() else inputs.detach(), self.n_lead).to(dtype)
            return (right if counted is None else right * counted[:, :, None, None]).transpose(1, 2)

        right, is_kept = kept.get(self, make)
        rotations = kept.rotations if is_kept else None
        return ProductBlock(left.transpose(2, 3), right, self.transposed, counted, rotations=rotations)


@dataclass(frozen=True)
class Sum(Role):
    """The bias of such a layer, ``Σ_t g_t``.

    Attributes
    ----------
    outputs
        Makes g, ``[columns, *lead, o]``.
    n_lead
        Number of leading axes.
    """

    outputs: Callable[[Tensor], Tensor]
    n_lead: int

    def rows(self, g: Tensor) -> Tensor:
        """By ``outputs``."""
        return self.outputs(g)

    def scale(self, g: Tensor) -> Tensor:
        """That of the gradients."""
        return torch.linalg.vector_norm(g, dtype=wide(g))

    def block(self, g: Tensor, layout: Layout, kept: Kept, dtype: torch.dtype, counted: Tensor | None) -> SumBlock:
        """Gradients, and their sum."""
        left = layout.apply(self.outputs(g), self.n_lead, 1).to(dtype)
        return SumBlock(left.sum(2), left)


@dataclass(frozen=True)
class Gather(Role):
    """Rows of a table, looked up by token.

    Attributes
    ----------
    tokens
        ``[*lead]``.
    n_tokens
        Number of rows of the table.
    ignored
        A token whose row is not trained.
    """

    tokens: Tensor
    n_tokens: int
    ignored: int | None

    @property
    def n_lead(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All axes but the features."""
        return self.tokens.dim()

    def rows(self, g: Tensor) -> Tensor:
        """As they are."""
        return g

    def scale(self, g: Tensor) -> Tensor:
        """That of the gradients."""
        return torch.linalg.vector_norm(g, dtype=wide(g))

    def block(self, g: Tensor, layout: Layout, kept: Kept, dtype: torch.dtype, counted: Tensor | None) -> GatherBlock:
        """Gradients, summed over the positions of a datum that hold the same token."""
        if id(self) not in kept.places:
            kept.places[id(self)] = self._places(layout, counted)
        rows, place, row_token, datum, token, batch_size = kept.places[id(self)]
        gradients = layout.apply(g, self.n_lead, 1).to(dtype).flatten(1, 2)
        gradients = gradients if rows is None else gradients[:, rows]
        values = gradients.new_zeros(len(gradients), len(token), gradients.shape[-1]).index_add_(1, place, gradients)
        return GatherBlock(values, datum, token, batch_size, self.n_tokens, gradients, row_token)

    def _places(self, layout: Layout, counted: Tensor | None) -> Places:
        """Where the gradient of each position goes."""
        # Rows that fill up have no gradient; −1 marks them, what is masked and what is not trained.
        marks = layout.apply(self.tokens + 1, self.n_lead) - 1
        if counted is not None:
            marks = marks.masked_fill(~counted, -1)
        if self.ignored is not None:
            marks = marks.masked_fill(marks == self.ignored % self.n_tokens, -1)
        real = (marks >= 0).flatten()
        datum = torch.arange(len(marks), device=marks.device).repeat_interleave(marks.shape[1])[real]
        row_token = marks.flatten()[real]
        pairs, place = torch.unique(datum * self.n_tokens + row_token, return_inverse=True)
        rows = None if bool(real.all()) else real.nonzero().flatten()
        return rows, place, row_token, pairs // self.n_tokens, pairs % self.n_tokens, len(marks)


@dataclass(frozen=True)
class Elementwise(Role):
    """Numbers that multiply (by ``factor``) or are added, broadcast to the output.

    Attributes
    ----------
    target
        Shape of the argument, as many axes as the output.
    factor
        What the argument multiplies, broadcast to the output; ``None`` when it is added.
    sign
        Of the derivative.
    """

    target: tuple[int, ...]
    factor: Callable[[], Tensor] | None = None
    sign: float = 1.0

    @property
    def n_lead(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Axes over which the argument is shared."""
        return sum(size == 1 for size in self.target)

    def _factor(self) -> Tensor:
        assert self.factor is not None, "asked for where there is one"
        return self.factor() if torch.is_grad_enabled() else self.factor().detach()

    def rows(self, g: Tensor) -> Tensor:
        """Axes over which the argument is shared come first."""
        shared = [axis + 1 for axis, size in enumerate(self.target) if size == 1]
        own = [axis + 1 for axis, size in enumerate(self.target) if size != 1]
        return g.permute(0, *shared, *own)

    def scale(self, g: Tensor) -> Tensor:
        """That of the gradients times what the argument multiplies."""
        values = g.to(wide(g))
        return torch.linalg.vector_norm(values if self.factor is None else values * self._factor())

    def block(self, g: Tensor, layout: Layout, kept: Kept, dtype: torch.dtype, counted: Tensor | None) -> DenseBlock:
        """Written out: as many numbers as the argument has, for each column and datum."""
        values = g.to(dtype)
        if self.factor is not None:
            values = values * kept.get(self, lambda: self._factor().to(dtype))[0]
        values = layout.apply(self.rows(self.sign * values), self.n_lead, 1).sum(2)
        return DenseBlock(values.flatten(2) if values.dim() > 2 else values.unsqueeze(2))
