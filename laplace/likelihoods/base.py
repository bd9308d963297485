"""What every likelihood provides: p(y | f) in output space. No weights, no priors, no model.

Everything is computed at unit noise and temperature; ``scale`` and ``curvature_scale`` bring both in afterwards, so
that they stay differentiable and can change without refitting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace import linalg
from laplace.enums import CurvatureKind, Likelihood
from laplace.errors import ShapeError, UnsupportedError
from laplace.types import Outputs, Scalar, Targets

Link = Callable[[Tensor, Tensor], Tensor]
"""Mean ``[rows, outputs]`` and variance or covariance of the logits → log probabilities ``[rows, outputs]``."""


@dataclass(frozen=True)
class OutputHessian:
    """Hessians of −log p(y|f) in ``f``, one a row, kept as ``diag(d) ± r rᵀ``; C×C matrices are never built.

    Attributes
    ----------
    n_outputs
        C.
    diagonal
        ``d``: ``[rows, C]``, or ``[rows, 1]`` when all outputs share it, or ``None`` for zero.
    root
        ``r``: ``[rows, C, k]``, or ``None`` for zero.
    sign
        Of the product ``r rᵀ``: 1 or −1.
    total
        The diagonal of the whole, ``[rows, C]``, given where ``d − r²`` would cancel; it is then used instead.
    """

    n_outputs: int
    diagonal: Tensor | None = None
    root: Tensor | None = None
    sign: int = 1
    total: Tensor | None = None

    def diag(self) -> Float[Tensor, "rows outputs"]:
        """Diagonals, ``[rows, C]``."""
        if self.total is not None:
            return self.total
        total: Tensor | float = 0.0
        if self.root is not None:
            root = self.root.squeeze(-1)
            total = self.sign * (root.square() if root.dim() == 2 else root.square().sum(-1))
        if self.diagonal is not None:
            total = total + self.diagonal.expand(-1, self.n_outputs)
        assert isinstance(total, Tensor), "one of the two parts is there"
        return total

    def sum(self) -> Float[Tensor, "outputs outputs"]:
        """Sum over rows, ``[C, C]``: one product of a ``[rows·k, C]`` matrix with itself."""
        total: Tensor | float = 0.0
        if self.root is not None:
            flat = self.root.transpose(1, 2).reshape(-1, self.n_outputs)
            total = self.sign * (flat.T @ flat)
        if self.diagonal is not None:
            total = total + torch.diag(self.diagonal.sum(0).expand(self.n_outputs))
        assert isinstance(total, Tensor), "one of the two parts is there"
        if self.total is not None:
            total.diagonal().copy_(self.total.sum(0))
        return total

    def dense(self) -> Float[Tensor, "rows outputs outputs"]:
        """All of them, ``[rows, C, C]``: for small problems and tests."""
        total: Tensor | float = 0.0
        if self.root is not None:
            total = self.sign * (self.root @ self.root.transpose(1, 2))
        if self.diagonal is not None:
            total = total + torch.diag_embed(self.diagonal.expand(-1, self.n_outputs))
        assert isinstance(total, Tensor), "one of the two parts is there"
        if self.total is not None:
            total.diagonal(dim1=1, dim2=2).copy_(self.total)
        return total


@dataclass(frozen=True)
class Positions:
    """The unmasked positions of a batch, flattened to rows.

    Attributes
    ----------
    f
        Outputs, ``[rows, C]``.
    y
        Targets of the same rows.
    kept
        Indices of the rows among all ``batch × positions``, or ``None`` when all are kept.
    datum
        Which row of the loader each belongs to, ``[rows]``; ``None`` when every datum has one position.
    n_items
        How many scored items share a row, one after the other: 2 for pairs.
    """

    f: Outputs
    y: Targets
    kept: Int[Tensor, " rows"] | None = None
    datum: Int[Tensor, " rows"] | None = None
    n_items: int = 1

    def to(self, dtype: torch.dtype) -> Positions:
        """The same in another precision."""
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        return replace(self, f=self.f.to(dtype), y=y)

    def select(self, values: Tensor) -> Tensor:
        """Flatten ``[batch, *positions, k]`` and keep the same rows, ``[rows, n_items · k]``: items side by side."""
        flat = values.reshape(-1, self.n_items * values.shape[-1])
        return flat if self.kept is None else flat[self.kept]


class AbstractLikelihood(ABC):
    """p(y | f), with unit noise and temperature in all but the two scales.

    Outputs come flattened to ``[rows, C]`` (see ``flatten``). Subclasses are frozen dataclasses.
    """

    name: ClassVar[Likelihood]
    has_noise: ClassVar[bool] = False
    """Whether ``sigma_noise`` has a meaning."""
    has_link: ClassVar[bool] = False
    """Whether outputs pass a nonlinear link, so that ``link_approx`` has a meaning."""
    output_temperature: float | Tensor = 1.0
    """What logits are divided by before the link, when predicting: T > 1 softens, T < 1 sharpens."""
    n_items: ClassVar[int] = 1
    """How many inputs a target compares: 2 for preferences between pairs, whose probabilities ``fitting=True`` asks."""

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """Factor of the negative log-likelihood, ``1/(σ² T)``, ``[]`` or ``[C]`` by output; σ = 1 without noise."""

    @abstractmethod
    def curvature_scale(self, kind: CurvatureKind) -> Tensor:
        """Factor of the curvature: ``1/(σ² T)``, ``[]`` or ``[C]`` by output; for the empirical Fisher ``1/(σ⁴ T)``.

        Parameters
        ----------
        kind
            Which curvature it multiplies.
        """

    @abstractmethod
    def log_normalizer(self, n_positions: int, n_outputs: int) -> Scalar:
        """What is subtracted from ``−scale · nll`` to make it the log-likelihood, in nats; not tempered.

        Parameters
        ----------
        n_positions, n_outputs
            Numbers of unmasked positions and of outputs.
        """

    @abstractmethod
    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """Negative log-likelihood summed over rows, in nats, without constants.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        y
            Targets of the same rows.
        """

    @abstractmethod
    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """Gradient of the negative log-likelihood in ``f``, ``[rows, C]``.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        y
            Targets of the same rows.
        """

    @abstractmethod
    def hessian(self, f: Outputs) -> OutputHessian:
        """Hessian of the negative log-likelihood in ``f``; it does not depend on the targets.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        """

    @abstractmethod
    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """Roots ``r`` of the Hessians, ``r rᵀ = Λ``, with as few columns as the rank of Λ allows.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        """

    @abstractmethod
    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Gradients at targets drawn from the model, ``[samples, rows, C]``: ``E[g gᵀ]`` is the Hessian.

        Parameters
        ----------
        f
            Outputs, ``[rows, C]``.
        n_samples
            How many targets to draw for each row.
        generator
            Source of randomness.
        """

    @abstractmethod
    def expectation(self, f: Tensor) -> Tensor:
        """E[y | f], ``[..., C]``: the outputs themselves, or class probabilities.

        Parameters
        ----------
        f
            Outputs, ``[..., C]``.
        """

    @abstractmethod
    def predict(self, mean: Tensor, cov: Tensor, link: Link) -> Tensor | tuple[Tensor, Tensor]:
        """From a Gaussian over outputs to what the user gets.

        Parameters
        ----------
        mean
            Of the outputs, ``[rows, C]``.
        cov
            Their variance ``[rows, C]`` or covariance ``[rows, C, C]``.
        link
            From logits to log probabilities, where there is a link.

        Returns
        -------
        Class probabilities ``[rows, C]``; for regression mean and (co)variance, without observation noise.
        """

    @abstractmethod
    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:
        """Negative log predictive density of targets, summed over rows, in nats.

        Parameters
        ----------
        mean
            Of the outputs, ``[rows, C]``.
        cov
            Their variance ``[rows, C]`` or covariance ``[rows, C, C]``.
        y
            Targets of the same rows.
        link
            As in ``predict``.

        Notes
        -----
        Observation noise is included: the score is that of targets.
        """

    @abstractmethod
    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check targets and flatten ``[batch, *positions, C]`` to unmasked rows.

        Parameters
        ----------
        f
            Outputs, ``[batch, *positions, C]``.
        y
            Targets.
        """

    def check_head(self, n_outputs: int) -> None:
        """Raise unless a linear head with so many outputs fits the likelihood.

        Parameters
        ----------
        n_outputs
            C.

        Raises
        ------
        UnsupportedError
            If items are compared by one score each, and the head gives several.
        """
        if self.n_items > 1 and n_outputs != 1:
            msg = (
                f'likelihood="{self.name.value}" compares items by one score each; the last layer of the model has '
                f"{n_outputs} outputs. Give it one output and apply it to both items of a pair."
            )
            raise UnsupportedError(msg)

    @abstractmethod
    def torch_loss(self) -> tuple[nn.Module, float]:
        """A summed PyTorch loss and the factor that makes it ``nll``, for third-party packages."""

    @abstractmethod
    def count(self, y: Tensor, n_outputs: int) -> int:
        """Number of unmasked positions in a batch of targets.

        Parameters
        ----------
        y
            Targets of a batch.
        n_outputs
            C.
        """


def datum_index(batch_size: int, n_rows: int, device: torch.device) -> Tensor | None:
    """Which datum each of ``n_rows`` flattened positions belongs to; ``None`` when there is one a datum."""
    if n_rows == batch_size:
        return None
    return torch.arange(batch_size, device=device).repeat_interleave(n_rows // max(batch_size, 1))


def check_outputs(f: Tensor) -> None:
    """Raise unless outputs are finite."""
    linalg.check_finite(f, "The outputs of the model", "Look for NaN or infinite values in the inputs and weights.")


def check_same_shape(f: Tensor, y: Tensor, what: str) -> None:
    """Raise unless targets have the shape of the outputs.

    Parameters
    ----------
    f
        Outputs.
    y
        Targets.
    what
        What the targets are, for the message.

    Raises
    ------
    ShapeError
        If the shapes differ.
    """
    if f.shape != y.shape:
        msg = (
            f"{what} must have the shape of the model's outputs, {list(f.shape)}; got {list(y.shape)}. Reshape the "
            "targets in the dataset."
        )
        raise ShapeError(msg)
