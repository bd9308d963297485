"""Masks that select the weights with the highest scores: random, magnitudes, or variances.

To write one, derive from ``ScoreBasedSubnetMask`` and return one score per weight, ``[P]``, from
``compute_param_scores``.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from laplace.enums import Likelihood, choose
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods import LIKELIHOODS, chosen
from laplace.network.subnetmask import SubnetMask
from laplace.network.swag import fit_diagonal_swag_var


class ScoreBasedSubnetMask(SubnetMask):
    """The weights with the highest scores.

    Parameters
    ----------
    model
        The trained network.
    n_params_subnet
        How many weights to select.

    Raises
    ------
    InputError
        If this is no number between 1 and that of the weights that require a gradient.
    """

    def __init__(self, model: nn.Module, n_params_subnet: Any) -> None:
        super().__init__(model)
        n_trainable = int(self.trainable.sum())
        if isinstance(n_params_subnet, bool) or not isinstance(n_params_subnet, Integral):
            msg = f"n_params_subnet must be a whole number; got {n_params_subnet!r}."
            raise InputError(msg)
        if not 1 <= int(n_params_subnet) <= n_trainable:
            msg = (
                f"n_params_subnet must lie between 1 and {n_trainable}, the number of weights that require a gradient; "
                f"got {n_params_subnet}."
            )
            raise InputError(msg)
        self._n_params_subnet = int(n_params_subnet)

    @property
    def n_params_subnet(self) -> int:
        """How many weights are selected."""
        return self._n_params_subnet

    @abstractmethod
    def compute_param_scores(self, train_loader: Iterable[Any] | None) -> Float[Tensor, " params"]:
        """One score per weight of the model, ``[P]``; those of frozen weights do not count.

        Parameters
        ----------
        train_loader
            Training batches, for scores that depend on data.
        """

    def get_subnet_mask(self, train_loader: Iterable[Any] | None) -> Bool[Tensor, " params"]:
        """The weights with the highest scores; of equal ones the first.

        Parameters
        ----------
        train_loader
            Training batches, for scores that depend on data.

        Raises
        ------
        ShapeError
            If there is not one score per weight.
        InputError
            If a score is NaN, or weights were frozen so that there are too few.
        """
        trainable, scores = self.trainable, self.compute_param_scores(train_loader)
        if scores.shape != trainable.shape:
            msg = f"Scores are one per weight of the model, [{len(trainable)}]; got {list(scores.shape)}."
            raise ShapeError(msg)
        candidates = trainable.nonzero().flatten()
        if len(candidates) < self._n_params_subnet:
            msg = (
                f"{self._n_params_subnet} weights are to be selected, and {len(candidates)} require a gradient: some "
                "were frozen after the mask was made."
            )
            raise InputError(msg)
        scores = scores.detach().to(candidates.device)[candidates]
        if bool(scores.isnan().any()):
            msg = f"{int(scores.isnan().sum())} scores are NaN: are there NaN among the weights or the training data?"
            raise InputError(msg)
        best = scores.argsort(descending=True, stable=True)[: self._n_params_subnet]
        mask = torch.zeros_like(trainable)
        mask[candidates[best]] = True
        return mask


class RandomSubnetMask(ScoreBasedSubnetMask):
    """Weights drawn at random, without replacement.

    Parameters
    ----------
    model, n_params_subnet
        As in ``ScoreBasedSubnetMask``.
    generator
        Source of randomness, on the model's device; PyTorch's global one when ``None``.
    """

    def __init__(self, model: nn.Module, n_params_subnet: Any, *, generator: torch.Generator | None = None) -> None:
        super().__init__(model, n_params_subnet)
        self._generator = generator

    def compute_param_scores(self, train_loader: Iterable[Any] | None) -> Float[Tensor, " params"]:  # noqa: ARG002
        """Uniform random numbers."""
        weights = self.parameter_vector
        # In float64, so that no two of them are equal, of which the first would be preferred.
        return torch.rand(len(weights), dtype=torch.float64, generator=self._generator, device=weights.device)


class LargestMagnitudeSubnetMask(ScoreBasedSubnetMask):
    """The weights that are largest in absolute value.

    Parameters
    ----------
    model, n_params_subnet
        As in ``ScoreBasedSubnetMask``.
    """

    def compute_param_scores(self, train_loader: Iterable[Any] | None) -> Float[Tensor, " params"]:  # noqa: ARG002
        """Absolute values."""
        return self.parameter_vector.abs()


class LargestVarianceDiagLaplaceSubnetMask(ScoreBasedSubnetMask):
    """The weights with the largest variance under a diagonal Laplace approximation.

    Parameters
    ----------
    model, n_params_subnet
        As in ``ScoreBasedSubnetMask``.
    diag_laplace_model
        A ``DiagLaplace`` of the same model, or another object with ``fit(train_loader)`` and then a
        ``posterior_variance`` for each weight that requires a gradient; ``select`` fits it.

    Raises
    ------
    UnsupportedError
        If it has no ``fit`` or no ``posterior_variance``.

    References
    ----------
    Daxberger, Nalisnick, Allingham, Antorán & Hernández-Lobato (2021), "Bayesian deep learning via subnetwork
    inference", section 5. arXiv:2010.14689
    """

    def __init__(self, model: nn.Module, n_params_subnet: Any, diag_laplace_model: Any) -> None:
        super().__init__(model, n_params_subnet)
        for name in ("fit", "posterior_variance"):
            if inspect.getattr_static(diag_laplace_model, name, None) is None:
                msg = (
                    "diag_laplace_model must be a DiagLaplace of the same model; a "
                    f"{type(diag_laplace_model).__name__} has no {name}."
                )
                raise UnsupportedError(msg)
        self.diag_laplace_model = diag_laplace_model

    def compute_param_scores(self, train_loader: Iterable[Any] | None) -> Float[Tensor, " params"]:
        """Posterior variances, after a fit; 0 for frozen weights.

        Parameters
        ----------
        train_loader
            Training batches.

        Raises
        ------
        InputError
            If there are none.
        ShapeError
            If the posterior is one over other weights.
        """
        self.diag_laplace_model.fit(self._needed(train_loader))
        trainable, variance = self.trainable, self.diag_laplace_model.posterior_variance.detach()
        if variance.shape != (int(trainable.sum()),):
            msg = (
                f"diag_laplace_model has variances {list(variance.shape)}; the model has {int(trainable.sum())} "
                "weights that require a gradient. Make it of the same model, with subset_of_weights='all'."
            )
            raise ShapeError(msg)
        return variance.new_zeros(len(trainable)).masked_scatter(trainable.to(variance.device), variance)


class LargestVarianceSWAGSubnetMask(ScoreBasedSubnetMask):
    """The weights that move most when training goes on (SWAG-Diag).

    Parameters
    ----------
    model, n_params_subnet
        As in ``ScoreBasedSubnetMask``.
    likelihood
        ``"classification"`` (cross-entropy) or ``"regression"`` (squared error).
    swag_n_snapshots, swag_snapshot_freq, swag_lr
        As ``n_snapshots_total``, ``snapshot_freq`` and ``lr`` of ``fit_diagonal_swag_var``.
    dict_key_x, dict_key_y
        Entries of mapping batches that hold the main input and the targets.

    Raises
    ------
    UnsupportedError
        If the likelihood is another one.

    References
    ----------
    Maddox et al. (2019), arXiv:1902.02476; as a score of weights Daxberger et al. (2021), arXiv:2010.14689.
    """

    def __init__(
        self,
        model: nn.Module,
        n_params_subnet: Any,
        likelihood: Likelihood | str = Likelihood.CLASSIFICATION,
        swag_n_snapshots: int = 40,
        swag_snapshot_freq: int = 1,
        swag_lr: float = 0.01,
        *,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
    ) -> None:
        super().__init__(model, n_params_subnet)
        self.likelihood = choose(Likelihood, likelihood, "likelihood")
        if chosen(self.likelihood).training_loss() is None:
            names = " or ".join(repr(name.value) for name in sorted(LIKELIHOODS) if chosen(name).training_loss())
            msg = (
                f"LargestVarianceSWAGSubnetMask trains with the loss of {names}. For {self.likelihood.value!r} call "
                "fit_diagonal_swag_var with its loss, and return the result from a ScoreBasedSubnetMask of your own."
            )
            raise UnsupportedError(msg)
        self.swag_n_snapshots, self.swag_snapshot_freq, self.swag_lr = swag_n_snapshots, swag_snapshot_freq, swag_lr
        self.dict_key_x, self.dict_key_y = dict_key_x, dict_key_y

    def compute_param_scores(self, train_loader: Iterable[Any] | None) -> Float[Tensor, " params"]:
        """Variances by ``fit_diagonal_swag_var``.

        Parameters
        ----------
        train_loader
            Training batches.

        Raises
        ------
        InputError
            If there are none, or as in ``fit_diagonal_swag_var``.
        """
        criterion = chosen(self.likelihood).training_loss()
        assert criterion is not None, "the constructor checks it"
        return fit_diagonal_swag_var(
            self.model,
            self._needed(train_loader),
            criterion,
            self.swag_n_snapshots,
            self.swag_snapshot_freq,
            self.swag_lr,
            dict_key_x=self.dict_key_x,
            dict_key_y=self.dict_key_y,
        )
