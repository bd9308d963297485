"""What a back end can do, as class data that is checked once; messages and documentation are made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import nn

from laplace.enums import CurvatureKind, HessianStructure, Likelihood, SubsetOfWeights
from laplace.errors import UnsupportedError

ANY = frozenset(Likelihood)
"""All likelihoods: those of the library, and those of users."""


class Capabilities:
    """Declarations of a back end; a user's own overrides what differs."""

    kind: ClassVar[CurvatureKind] = CurvatureKind.GGN
    """Kind of matrix, which decides how the curvature scales with the observation noise."""
    matrix: ClassVar[str] = "Hessian"
    """Name of the matrix; back ends with the same name can take each other's place."""
    structures: ClassVar[frozenset[HessianStructure]] = frozenset(
        {
            HessianStructure.FULL,
            HessianStructure.DIAG,
            HessianStructure.KRON,
            HessianStructure.BLOCKDIAG,
            HessianStructure.EKFAC,
            HessianStructure.LOWRANK,
        }
    )
    """Structures this back end can provide."""
    subsets: ClassVar[frozenset[SubsetOfWeights]] = frozenset({SubsetOfWeights.ALL, SubsetOfWeights.LAST_LAYER})
    """Choices of random weights it can provide them for; a subnetwork is stored full or diagonal in any case."""
    likelihoods: ClassVar[frozenset[Likelihood]] = ANY
    """Likelihoods it knows."""
    finds_last_layer: ClassVar[bool] = False
    """Whether its first forward pass may find the last layer; if not, one pass before finds it."""
    accepts_fisher_kwargs: ClassVar[bool] = False
    """Whether ``asdl_fisher_kwargs`` have a meaning; they are then passed to ``full``, ``diag`` and ``kron``."""
    takes_columns: ClassVar[bool] = False
    """Whether ``columns`` can say how many columns of the output Hessian's root are exact."""
    takes_positions: ClassVar[bool] = True
    """Whether outputs may have axes between batch and classes."""

    weighs_outputs: ClassVar[bool] = True
    """Whether outputs can have different weights in the loss, as a noise for each output gives them."""
    adds_over_positions: ClassVar[bool] = False
    """Whether gradients of the positions of a datum add up before they are squared."""
    is_sampled = False
    """Whether output Hessians are random, drawn anew in each call."""

    likelihood: str
    subset: SubsetOfWeights

    @classmethod
    def takes(cls, likelihood: str) -> bool:
        """Whether it computes curvatures of a likelihood; of a user's own only if it declares ``ANY``."""
        return likelihood in cls.likelihoods or cls.likelihoods is ANY

    def _check_capabilities(self) -> None:
        """Raise if this back end does not know the likelihood or the choice of weights."""
        for name, asked, known, can in (
            ("subset_of_weights", self.subset, self.subsets, lambda cls: self.subset in cls.subsets),
            ("likelihood", self.likelihood, self.likelihoods, lambda cls: cls.takes(self.likelihood)),
        ):
            if not can(type(self)):
                choices = ", ".join(sorted(repr(member.value) for member in known))
                wanted = getattr(asked, "value", asked)  # a user's likelihood is no member
                msg = (
                    f"{type(self).__name__} does not provide {name}={wanted!r}; it provides {choices}. "
                    f"{others(self, can)}"
                )
                raise UnsupportedError(msg)

    @classmethod
    def known_layers(cls, structure: HessianStructure | None) -> frozenset[type[nn.Module]] | None:  # noqa: ARG003
        """Layers whose weights it knows; ``None`` when any will do that autograd can differentiate.

        Parameters
        ----------
        structure
            For which structure; ``None`` for Jacobians and gradients.
        """
        return None

    @classmethod
    def can(cls, structure: HessianStructure, subset: SubsetOfWeights) -> bool:
        """Whether it provides a structure for a choice of random weights.

        Parameters
        ----------
        structure, subset
            Which ones.
        """
        whole_groups = subset is not SubsetOfWeights.SUBNETWORK
        needs_no_groups = structure in (HessianStructure.FULL, HessianStructure.DIAG)
        return structure in cls.structures and subset in cls.subsets and (whole_groups or needs_no_groups)

    def provides(self, structure: HessianStructure) -> bool:
        """Whether it provides a structure for the chosen weights.

        Parameters
        ----------
        structure
            Which one.
        """
        return self.can(structure, self.subset)

    def cannot(self, structure: HessianStructure) -> UnsupportedError:
        """The error of asking for a structure that is not provided; it lists those that are, and who provides it."""
        available = sorted(repr(other.value) for other in self.structures - {structure} if self.provides(other))
        able = others(self, lambda cls: cls.can(structure, self.subset))
        msg = (
            f"{type(self).__name__} does not provide hessian_structure={structure.value!r} for "
            f"subset_of_weights={self.subset.value!r}; it provides {', '.join(available) or 'none'}. {able}"
        )
        return UnsupportedError(msg)


def others(backend: Capabilities, can: Callable[[type[Capabilities]], bool]) -> str:
    """A sentence about the back ends that can do what one cannot."""
    names = alternatives(backend, can)
    return (
        f"Back ends of the {backend.matrix} that do: {names}."
        if names
        else f"No back end of the {backend.matrix} does."
    )


def alternatives(backend: Capabilities, can: Callable[[type[Capabilities]], bool]) -> str:
    """Names of the library's back ends that compute the same matrix and satisfy a condition."""
    from laplace.curvature import BACKENDS  # the table imports this module

    return ", ".join(cls.__name__ for cls in BACKENDS if cls.matrix == backend.matrix and can(cls))
