"""Reward modeling: the Bradley–Terry model of preferences, fitted on pairs; scores of single inputs are predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from laplace import pending
from laplace.enums import Likelihood, LinkApprox, PredType
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods import softmax
from laplace.likelihoods.base import Link, Positions, check_outputs
from laplace.likelihoods.categorical import CategoricalLikelihood
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.predictions import PredictsMoments
from laplace.types import Outputs, Scalar, Targets


@dataclass(frozen=True)
class PairProbabilities(CategoricalLikelihood):
    """Which item of a pair is preferred: two classes with the logits (f₀ − f₁, 0), the second without variance."""

    name: ClassVar[str] = Likelihood.REWARD_MODELING.value
    links: ClassVar[Mapping[LinkApprox, Callable[..., Tensor]]] = {
        LinkApprox.PROBIT: softmax.probit,
        LinkApprox.MC: softmax.mc,
    }
    variance_links: ClassVar[frozenset[LinkApprox]] = frozenset(links)
    unlinked: ClassVar[str] = 'is made for several classes; for pairs use "probit" or "mc".'

    @classmethod
    def _problem_with(cls, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool) -> str:
        if link in cls.links and diagonal_output:
            return "Probabilities of pairs need the covariance of both scores: leave out diagonal_output=True."
        return super()._problem_with(kind, link, joint=joint, diagonal_output=diagonal_output)


@dataclass(frozen=True)
class BradleyTerryLikelihood(PredictsMoments):
    """−log p(y|f) = softplus(−(f_y − f_{1−y})), tempered by 1/T; y is the index of the preferred item of a pair.

    A row holds the two scores of a pair. No probability is computed as ``1 − p``: confident ones lose no digits.

    Attributes
    ----------
    temperature
        T.
    output_temperature
        What logits are divided by before the link, when predicting.

    References
    ----------
    Bradley & Terry (1952), "Rank analysis of incomplete block designs: I. The method of paired comparisons".
    """

    temperature: float | Tensor = 1.0
    output_temperature: float | Tensor = 1.0

    name: ClassVar[str] = Likelihood.REWARD_MODELING.value
    hyperparameters: ClassVar[tuple[str, ...]] = ("output_temperature",)
    compares: ClassVar[bool] = True

    @classmethod
    def check_prediction(
        cls, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool, fitting: bool | None
    ) -> None:
        """Scores of items, or the probabilities of pairs."""
        chosen = super() if fitting is False else PairProbabilities
        chosen.check_prediction(kind, link, joint=joint, diagonal_output=diagonal_output, fitting=False)

    def for_targets(self) -> PairProbabilities:
        """The probabilities of pairs."""
        return PairProbabilities(self.temperature, self.output_temperature)

    def arranged(self, inputs: Any, compare: Callable[[Any], Any]) -> Any:
        """Targets are preferences between items."""
        return compare(inputs)

    def check_rows(self) -> None:
        """Raise: a target belongs to two rows of features."""
        msg = (
            "The last layer is trained again on one row a target; targets of reward modeling compare two inputs. Use "
            'method="marglik", or validation data (method="gridsearch").'
        )
        raise UnsupportedError(msg)

    @classmethod
    def check_diagonal_hessian(cls) -> None:
        """Raise."""
        msg = (
            f"The Hessian of {cls.name} acts on the difference of two scores, and its diagonal means nothing: leave "
            "out diagonal_hessian=True."
        )
        raise UnsupportedError(msg)

    def independent(self, wanted: bool) -> bool:  # noqa: ARG002
        """No: the two scores of a pair are one function at two inputs."""
        return False

    def check_head(self, n_outputs: int) -> None:
        """Raise unless there is one score for each item."""
        if n_outputs != 1:
            msg = (
                f'likelihood="{self.name}" compares items by one score each; the last layer of the model has '
                f"{n_outputs} outputs. Give it one output and apply it to both items of a pair."
            )
            raise UnsupportedError(msg)

    def head_rows(self, positions: Positions, phi: Tensor) -> tuple[Float[Tensor, "pairs features"], float]:
        """φ₀ − φ₁ and 0: a pair is seen by the difference of its scores, ``w · (φ₀ − φ₁)``, where the bias cancels."""
        first, second = positions.select(phi).chunk(2, dim=-1)
        return first - second, 0.0

    def head_hessian(self, hessian: OutputHessian) -> OutputHessian:
        """Of the difference: ``r rᵀ`` with ``r = ρ [1, −1]ᵀ`` is ``ρ²`` there."""
        assert hessian.root is not None, "the likelihood and both Fishers give roots"
        assert hessian.diagonal is None, "and nothing else: it would not be a multiple of [1, −1]"
        return OutputHessian(1, root=hessian.root[:, :1])

    def of_head(self, outputs: Float[Tensor, "pairs 1"]) -> Outputs:
        """The scores (Δ, 0)."""
        return torch.cat([outputs, torch.zeros_like(outputs)], -1)

    @classmethod
    def check_sampled_energy(cls) -> None:
        """Logits of pairs are drawn."""

    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """−log sigmoid of the margin of the preferred item, summed over pairs."""
        return -F.logsigmoid(_margin(f, y)).sum()

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """Softmax(f) minus the label, ``[pairs, 2]``."""
        return _contrast((2 * y - 1) * torch.sigmoid(-_margin(f, y)))

    def hessian(self, f: Outputs) -> OutputHessian:
        """``p₀ p₁ [1, −1]ᵀ[1, −1]``, of rank one."""
        return OutputHessian(f.shape[-1], root=self.hessian_root(f))

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """``√(p₀ p₁) [1, −1]ᵀ``, ``[pairs, 2, 1]``."""
        gap = (f[:, 0] - f[:, 1]).abs()
        return _contrast((-gap / 2).exp() / (1 + (-gap).exp())).unsqueeze(-1)

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Gradients at preferences drawn from the pair's probabilities, ``[samples, pairs, 2]``."""
        y = torch.multinomial(f.softmax(-1), n_samples, replacement=True, generator=generator).T
        return self.gradient(f.expand(n_samples, *f.shape).flatten(0, 1), y.flatten()).unflatten(0, y.shape)

    def noise_variance(self, mean: Outputs, variance: Outputs) -> None:
        """None: targets are no scores."""

    def expectation(self, f: Tensor) -> Tensor:
        """The scores themselves."""
        return f

    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> NoReturn:  # noqa: ARG002
        """Not of scores: ``for_targets``."""
        return self._refuse("density of scores")

    def scores(self) -> dict[str, None]:
        """None of scores: ``for_targets``."""
        return {}

    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check targets, the index of the preferred item ``[batch]``, and put both scores of a pair into one row."""
        if y.is_floating_point() or y.is_complex() or y.dtype is torch.bool:
            msg = f"Preferences must be integers, 0 or 1; got {y.dtype}. Convert them with y.long()."
            raise InputError(msg)
        n_pairs = y.numel()
        if y.dim() != 1 or f.shape not in ((n_pairs, 2, 1), (n_pairs, 2), (2 * n_pairs, 1)):
            msg = (
                "Reward modeling is fitted on pairs: inputs [batch, 2, ...] with one score per item, [batch, 2, 1], "
                f"and the index of the preferred item as target, [batch]; got scores {list(f.shape)} and targets "
                f"{list(y.shape)}. Stack the two items of each pair along the second axis of the inputs."
            )
            raise ShapeError(msg)
        pending.refuse(
            ((y != 0) & (y != 1)).any(),
            InputError,
            lambda least, most: (
                f"Preferences must be 0 or 1, the index of the preferred item; got {int(least)}..{int(most)}."
            ),
            lambda: [y.min(), y.max()],
        )
        check_outputs(f)
        return Positions(f.reshape(n_pairs, 2), y.long().clamp(0, 1), n_items=2)

    def check_axes(self, shape: Sequence[int], axis: int | None) -> None:
        """Scores have no axis of classes."""

    def count_outputs(self, shape: Sequence[int]) -> int:  # noqa: ARG002
        """One score for each item, in whatever shape."""
        return 1

    def torch_loss(self) -> tuple[nn.Module, float]:
        """``CrossEntropyLoss`` of the two scores, and 1."""
        return nn.CrossEntropyLoss(reduction="sum"), 1.0

    def count(self, y: Tensor, n_outputs: int) -> int:  # noqa: ARG002
        """Number of pairs."""
        return y.numel()


def _margin(f: Outputs, y: Targets) -> Float[Tensor, " rows"]:
    """``f_y − f_{1−y}``, by how much the preferred item is ahead."""
    return (1 - 2 * y) * (f[:, 0] - f[:, 1])


def _contrast(value: Float[Tensor, " rows"]) -> Outputs:
    """``value · [1, −1]``: what only the difference of the scores has."""
    return torch.stack([value, -value], -1)
