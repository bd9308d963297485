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
from laplace.structures.product import ProductBlock, Shared

Places: TypeAlias = "tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, int]"
"""Mask of the positions that count; pair of datum and token, and token, of each; datum and token of each pair; B."""


class Kept:
    """What the ``n_columns`` columns of one pass share: inputs of layers, up to ``limit`` numbers of them, and more."""

    def __init__(self, limit: int, n_columns: int = 1) -> None:
        self.left = limit
        self.inputs: dict[int, Tensor] = {}
        self.places: dict[int, Places] = {}
        self.rows: dict[int, Tensor] = {}
        """Gradients at the rows of the present call, by the function that makes them."""
        self.shared = Shared(n_columns)

    def get(self, role: Role, make: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """The inputs of a role, and whether they are kept."""
        if id(role) in self.inputs:
            return self.inputs[id(role)], True
        inputs = make()
        fits = inputs.numel() <= self.left
        if fits:
            self.left -= inputs.numel()
            self.inputs[id(role)] = inputs
        return inputs, fits

    def gradients(self, role: Product | Sum, g: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        """Gradients ``[columns, batch, positions, outputs]``, the same for all roles of a call that see the same."""
        key = id(role.outputs)
        if key not in self.rows:
            self.rows[key] = layout.apply(role.outputs(g), role.n_lead, 1).to(dtype)
        return self.rows[key]


def wide(values: Tensor) -> torch.dtype:
    """The dtype of values, but at least float32."""
    return torch.promote_types(values.dtype, torch.float32)


class Role(ABC):
    """How one argument of a call acts on its output."""

    n_lead: int
    """Number of leading axes of ``rows(g)``, those over data and positions."""

    @abstractmethod
    def rows(self, g: Tensor) -> Tensor:
        """Gradients at the output ``[columns, *output]`` as ``[columns, *lead, *rest]``."""

    @abstractmethod
    def scale(self, g: Tensor) -> Tensor:
        """Norm ``[]`` of the terms that the derivative is a sum of, which its rounding is relative to."""

    @abstractmethod
    def block(
        self, g: Tensor, layout: Layout, kept: Kept, dtype: torch.dtype, counted: Bool[Tensor, "batch positions"] | None
    ) -> JacobianBlock:
        """Derivatives in the argument, from gradients ``[columns, *output]`` that are zero at rows not ``counted``."""


@dataclass(frozen=True)
class Product(Role):
    """A weight that multiplies inputs, ``Σ_t g_t ⊗ a_t``."""

    inputs: Callable[[], Tensor]
    """Makes a, ``[*lead, groups, i]``; not called before it is needed."""
    outputs: Callable[[Tensor], Tensor]
    """Makes g, ``[columns, *lead, groups · o]``; roles of a call that have the same function share what it makes."""
    n_lead: int
    """Number of leading axes."""
    groups: int = 1
    """Number of groups of channels."""
    transposed: bool = False
    """Whether the weight is stored inputs first."""

    def rows(self, g: Tensor) -> Tensor:
        """Gradients in the form that ``outputs`` makes."""
        return self.outputs(g)

    def scale(self, g: Tensor) -> Tensor:
        """√Σ |g_t|² |a_t|²."""
        g = self.outputs(g).unflatten(-1, (self.groups, -1))
        left, right = (torch.linalg.vector_norm(v, dim=-1, dtype=wide(v)) for v in (g, self.inputs()))
        return torch.linalg.vector_norm(left * right)

    def block(self, g: Tensor, layout: Layout, kept: Kept, dtype: torch.dtype, counted: Tensor | None) -> ProductBlock:
        """Gradients and inputs."""
        left = kept.gradients(self, g, layout, dtype)

        def make() -> Tensor:
            inputs = self.inputs()
            right = layout.apply(inputs if torch.is_grad_enabled() else inputs.detach(), self.n_lead).to(dtype)
            return (right if counted is None else right * counted[:, :, None, None]).transpose(1, 2)

        right, is_kept = kept.get(self, make)
        left = left.unsqueeze(2) if self.groups == 1 else left.unflatten(3, (self.groups, -1)).transpose(2, 3)
        return ProductBlock(left, right, self.transposed, counted, shared=kept.shared, is_kept=is_kept)


@dataclass(frozen=True)
class Sum(Role):
    """A bias that is added at every position, ``Σ_t g_t``."""

    outputs: Callable[[Tensor], Tensor]
    """Makes g, ``[columns, *lead, o]``."""
    n_lead: int
    """Number of leading axes."""

    def rows(self, g: Tensor) -> Tensor:
        """Gradients in the form that ``outputs`` makes."""
        return self.outputs(g)

    def scale(self, g: Tensor) -> Tensor:
        """Norm of the gradients."""
        return torch.linalg.vector_norm(g, dtype=wide(g))

    def block(self, g: Tensor, layout: Layout, kept: Kept, dtype: torch.dtype, counted: Tensor | None) -> SumBlock:
        """Gradients, to be summed over positions."""
        return SumBlock(kept.gradients(self, g, layout, dtype))


@dataclass(frozen=True)
class Gather(Role):
    """A table whose rows are looked up by token."""

    tokens: Tensor
    """The tokens, ``[*lead]``."""
    n_tokens: int
    """Number of rows of the table."""
    ignored: int | None
    """A token whose row is not trained."""

    @property
    def n_lead(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Number of all axes but the features."""
        return self.tokens.dim()

    def rows(self, g: Tensor) -> Tensor:
        """Gradients as they are."""
        return g

    def scale(self, g: Tensor) -> Tensor:
        """Norm of the gradients."""
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
        """The place that the gradient of each position goes to."""
        # −1 marks rows that have no gradient (padding), are masked, or belong to a token that is not trained.
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
    """Numbers that multiply ``factor`` or are added, broadcast to the output."""

    target: tuple[int, ...]
    """Shape of the argument, with as many axes as the output."""
    factor: Callable[[], Tensor] | None = None
    """What the argument multiplies, broadcast to the output; ``None`` when it is added."""
    sign: float = 1.0
    """Sign of the derivative."""

    @property
    def n_lead(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Number of axes over which the argument is shared."""
        return sum(size == 1 for size in self.target)

    def _factor(self) -> Tensor:
        assert self.factor is not None, "asked for where there is one"
        return self.factor() if torch.is_grad_enabled() else self.factor().detach()

    def rows(self, g: Tensor) -> Tensor:
        """Gradients with the axes first over which the argument is shared."""
        shared = [axis + 1 for axis, size in enumerate(self.target) if size == 1]
        own = [axis + 1 for axis, size in enumerate(self.target) if size != 1]
        return g.permute(0, *shared, *own)

    def scale(self, g: Tensor) -> Tensor:
        """Norm of the gradients times what the argument multiplies."""
        values = g.to(wide(g))
        return torch.linalg.vector_norm(values if self.factor is None else values * self._factor())

    def block(self, g: Tensor, layout: Layout, kept: Kept, dtype: torch.dtype, counted: Tensor | None) -> DenseBlock:
        """Derivatives that are written out: as many numbers as the argument has, for each column and datum."""
        values = g.to(dtype)
        if self.factor is not None:
            values = values * kept.get(self, lambda: self._factor().to(dtype))[0]
        values = layout.apply(self.rows(values), self.n_lead, 1).sum(2)
        values = values if self.sign == 1 else self.sign * values
        return DenseBlock(values.flatten(2) if values.dim() > 2 else values.unsqueeze(2))
