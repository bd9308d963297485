"""What a structure asks of a curvature back end, which it never imports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from laplace.enums import HessianStructure


@runtime_checkable
class SupportsCurvature(Protocol):
    """What a structure asks of a curvature back end."""

    full: Callable[..., tuple[Tensor, Tensor]]
    diag: Callable[..., tuple[Tensor, Tensor]]
    kron: Callable[..., tuple[Tensor, Any]]
    blockdiag: Callable[..., tuple[Tensor, list[Tensor]]]
    ekfac: Callable[..., tuple[Tensor, list[Tensor]]]
    lowrank: Callable[..., tuple[Tensor, Tensor, Tensor | None]]

    @property
    def is_sampled(self) -> bool:
        """Whether the curvature is drawn at random, anew in each call."""
        ...

    def zeros(self) -> Tensor:
        """As many zeros as there are random weights, ``[P]``, where curvature is computed and in its precision."""
        ...

    def repeatable(
        self, batches: Iterable[tuple[Any, Tensor]], structure: HessianStructure
    ) -> Iterable[tuple[Any, Tensor]]:
        """The same data in a form that can be read several times."""
        ...

    def count(self, y: Tensor) -> int | Tensor:
        """Number of unmasked positions among targets."""
        ...
