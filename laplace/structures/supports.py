"""What a structure asks of a curvature back end, which it never imports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class SupportsCurvature(Protocol):
    """What a structure asks of a curvature back end."""

    full: Callable[..., tuple[Tensor, Tensor]]
    diag: Callable[..., tuple[Tensor, Tensor]]
    kron: Callable[..., tuple[Tensor, Any]]

    def count(self, y: Tensor) -> int:
        """Number of unmasked positions among targets.

        Parameters
        ----------
        y
            Targets of a batch.
        """
        ...
