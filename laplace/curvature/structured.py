"""What a back end computes, structure by structure: each method only raises until a back end overrides it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

from torch import Tensor

from laplace.curvature.capabilities import Capabilities
from laplace.curvature.replay import check_repeatable
from laplace.enums import HessianStructure, SubsetOfWeights
from laplace.errors import InputError
from laplace.structures import Kron
from laplace.structures.wide_kron import WideKron
from laplace.types import Inputs

Basis: TypeAlias = "Sequence[Sequence[Tensor | None]]"
"""For each parameter group one or two orthogonal matrices; ``None`` is the identity."""


def without_count(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the number of training data ``N``, which is checked and has no effect on a sum over a batch."""
    if "N" in options:
        check_count(options["N"])
    return {name: value for name, value in options.items() if name != "N"}


def check_count(N: Any) -> None:
    """Raise unless ``N`` is a positive whole number."""
    if isinstance(N, bool) or not isinstance(N, Integral) or N < 1:
        msg = f"N is the number of training data, a positive whole number; got {N!r}."
        raise InputError(msg)


class StructuredInterface(Capabilities):
    """The methods that structures call; each is named after its structure."""

    @classmethod
    def can(cls, structure: HessianStructure, subset: SubsetOfWeights) -> bool:
        """Whether it provides a structure for a choice of random weights.

        Parameters
        ----------
        structure, subset
            Which ones.
        """
        # A method that is not overridden only raises.
        missing = getattr(cls, structure.value, None) is vars(StructuredInterface).get(structure.value)
        if structure is HessianStructure.EKFAC:
            missing |= not cls.can(HessianStructure.KRON, subset)
        return super().can(structure, subset) and not missing

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and dense curvature ``[P, P]`` of a batch; ``N`` may be given, and divides nothing."""
        raise self.cannot(HessianStructure.FULL)

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss ``[]`` and diagonal of the curvature ``[P]`` of a batch; ``N`` as for ``full``."""
        raise self.cannot(HessianStructure.DIAG)

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron | WideKron]:
        """Loss ``[]`` and Kronecker factors of a batch; the inputs' side is divided by ``N`` (1 for raw sums)."""
        raise self.cannot(HessianStructure.KRON)

    def blockdiag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and the diagonal block of each parameter group, ``[p, p]``, of a batch."""
        raise self.cannot(HessianStructure.BLOCKDIAG)

    def ekfac(
        self, x: Inputs, y: Tensor, basis: Basis, shapes: Sequence[tuple[int, ...]], **kwargs: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss ``[]`` and, group by group, the diagonal of the curvature in a basis of one or two matrices."""
        raise self.cannot(HessianStructure.EKFAC)

    def lowrank(self, x: Inputs, y: Tensor, directions: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss ``[]``, products of the curvature with directions ``[P, k]``, and its trace ``[]`` where it is known."""
        raise self.cannot(HessianStructure.LOWRANK)

    def repeatable(
        self, batches: Iterable[tuple[Inputs, Tensor]], structure: HessianStructure
    ) -> Iterable[tuple[Inputs, Tensor]]:
        """The same data in a form that can be read several times.

        Parameters
        ----------
        batches
            Inputs and targets.
        structure
            The structure that needs it, for messages.

        Raises
        ------
        InputError
            If they can be read only once.
        """
        check_repeatable(batches, structure)
        return batches
