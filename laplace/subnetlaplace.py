"""Subnetwork estimators (``subset_of_weights="subnetwork"``): chosen weights are random, the others stay as trained.

Which weights to choose is said by the masks of ``network/subnetmask.py``, or by any indices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from laplace import checks
from laplace.baselaplace import DiagLaplace, FullLaplace, ParametricLaplace
from laplace.baselaplace.described import described
from laplace.baselaplace.keywords import BackendKeywords
from laplace.baselaplace.random_weights import Subnetwork
from laplace.curvature import CurvatureInterface
from laplace.errors import InputError, ShapeError
from laplace.likelihoods import L_co
from laplace.network.batches import copied

ONE_A_WEIGHT = {"prior_precision", "prior_mean", "init_prior_prec", "mean"}
"""Options that may hold a value for each weight."""


@described
class SubnetLaplace(ParametricLaplace[L_co]):
    """Laplace approximation of a subnetwork of S weights; the other weights of the network are constants.

    Parameters
    ----------
    subnetwork_indices
        The random weights: a one-dimensional ``LongTensor`` of positions in
        ``torch.nn.utils.parameters_to_vector(model.parameters())``, which counts frozen weights, too. All different, in
        any order; ``H``, ``mean_subnet`` and all else of the size S has that order.
    prior_precision
        Precision of the Gaussian prior over the subnetwork, in 1/weight²: a scalar; one value for each parameter tensor
        that holds a chosen weight, in the order of their first index; one for each chosen weight; or one for each
        weight of the network, of which those of the subnetwork are kept.
    prior_mean
        Mean of the Gaussian prior: a scalar, one value for each chosen weight, or one for each weight of the network.

    Raises
    ------
    InputError
        If ``subnetwork_indices`` are not valid, or a hyperparameter is not finite or not positive.
    UnsupportedError
        If a chosen weight does not require a gradient, or an option does not exist or does not fit another.

    Notes
    -----
    Vectors over the network have P entries (``mean``, the rows of ``sample``), those over the subnetwork S (``H``,
    ``mean_subnet``, ``prior_precision_diag``, Jacobians). Only parameter tensors that hold a chosen weight are
    differentiated, and only the derivatives in chosen weights are formed. Where an output depends on no chosen weight
    its variance is 0; the Laplace bridge divides by variances and is no approximation then: use ``"probit"`` or
    ``"mc"``.

    References
    ----------
    Daxberger, Nalisnick, Allingham, Antorán & Hernández-Lobato (2021), "Bayesian deep learning via subnetwork
    inference". arXiv:2010.14689
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
        subnetwork_indices: Tensor,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: BackendKeywords | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        curvature_dtype: torch.dtype | None = None,
        output_key: str | int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        output_dim: int | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        if subnetwork_indices is None:  # pyright: ignore[reportUnnecessaryComparison] - what users pass
            msg = (
                "subnetwork_indices says which weights are random, and None says of none: pass a torch.LongTensor, or "
                "what mask.select() returns. All weights are subset_of_weights='all'."
            )
            raise InputError(msg)
        # A copy: changing the user's tensor must not change what is random. Checked as soon as the first prior is.
        self._indices = copied(subnetwork_indices)
        super().__init__(
            model,
            likelihood,
            sigma_noise=sigma_noise,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            temperature=temperature,
            enable_backprop=enable_backprop,
            dict_key_x=dict_key_x,
            dict_key_y=dict_key_y,
            backend=backend,
            backend_kwargs=backend_kwargs,
            asdl_fisher_kwargs=asdl_fisher_kwargs,
            curvature_dtype=curvature_dtype,
            output_key=output_key,
            output_fn=output_fn,
            output_dim=output_dim,
            shift_labels=shift_labels,
        )
        self._indices = self._indices.to(self._device)

    @cached_property
    def _random_weights(self) -> Subnetwork:
        return Subnetwork(self.model, self.dict_key_x, self.dict_key_y, self._reading, self._indices)

    def _checked(self, name: str, value: Any, *, positive: bool = False) -> Tensor:
        """As for all weights; of values for each weight of the network those of the subnetwork are kept."""
        checked = super()._checked(name, value, positive=positive)
        if name in ONE_A_WEIGHT and checked.shape == (self.n_params,) and self.n_params != self.n_params_subnet:
            return checked[self._indices.to(checked.device)]
        return checked

    # -- the network and its subnetwork -------------------------------------------------------------------------------

    @property
    def n_params(self) -> int:
        """P, the number of weights of the network."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def n_params_subnet(self) -> int:
        """S, the number of random weights."""
        return self._known("n_params_subnet").n_params

    @property
    def mean(self) -> Float[Tensor, " params"]:
        """The weights of the network, ``[P]``: random ones as they were in ``fit``, the others as they are. A copy.

        May be assigned, as in ``ParametricLaplace``: ``[P]``, of which the random ones are kept, or ``[S]``.
        """
        return self.assemble_full_samples(self._mean.unsqueeze(0)).squeeze(0)

    @mean.setter
    def mean(self, value: Tensor) -> None:
        ParametricLaplace.mean.__set__(self, value)

    @property
    def mean_subnet(self) -> Float[Tensor, " chosen"]:
        """The random weights at which the curvature was taken, ``[S]``; before ``fit`` the prior mean. A copy."""
        return self._mean.clone()

    @property
    def subnetwork_indices(self) -> Int[Tensor, " chosen"]:
        """Positions of the random weights among those of the network, ``[S]``; a copy."""
        return self._indices.clone()

    def assemble_full_samples(self, subnet_samples: Float[Tensor, "samples chosen"]) -> Float[Tensor, "samples params"]:
        """Put weights of the subnetwork among those of the network.

        Parameters
        ----------
        subnet_samples
            ``[n_samples, S]``, in the order of ``subnetwork_indices``.

        Returns
        -------
        ``[n_samples, P]``, in the order of ``parameters_to_vector``; the other weights are those of the model.

        Raises
        ------
        ShapeError
            If there are not S weights a sample.
        """
        checks.tensor("subnet_samples", subnet_samples, "weights of the subnetwork, a tensor [n_samples, S]")
        if subnet_samples.dim() != 2 or subnet_samples.shape[1] != self.n_params_subnet:
            msg = (
                f"Samples of the subnetwork have the shape [n_samples, {self.n_params_subnet}]; "
                f"got {list(subnet_samples.shape)}."
            )
            raise ShapeError(msg)
        weights = parameters_to_vector(self.model.parameters()).detach().to(subnet_samples)
        full = weights.expand(len(subnet_samples), -1)
        return full.index_copy(1, self._indices.to(full.device), subnet_samples)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Draw weights of the network, ``[n_samples, P]``; those outside the subnetwork are the same in all draws.

        Parameters
        ----------
        n_samples, generator
            As in ``ParametricLaplace.sample``.

        Returns
        -------
        In the order of ``parameters_to_vector``.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        InputError
            If ``n_samples`` is not positive, or the generator is on another device.
        """
        return self.assemble_full_samples(super().sample(n_samples, generator))

    def square_norm(self, value: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """(θ − θ*)ᵀ A (θ − θ*) over the subnetwork, with A its posterior precision; so ``log_prob`` is its density.

        Parameters
        ----------
        value
            Weights of the network, ``[..., P]``, or of the subnetwork, ``[..., S]``. Those outside the subnetwork are
            constants of the posterior and do not enter.

        Returns
        -------
        One number for each vector of weights; without unit.

        Raises
        ------
        ShapeError
            If there are neither P nor S weights.
        """
        value = checks.tensor("value", value, "weights, a tensor [..., P]")
        if value.shape[-1:] == (self.n_params,):
            return super().square_norm(value[..., self._indices.to(value.device)])
        if value.shape[-1:] != (self.n_params_subnet,):
            msg = (
                f"Expected weights of the network, [..., {self.n_params}], or of the subnetwork, "
                f"[..., {self.n_params_subnet}]; got {list(value.shape)}."
            )
            raise ShapeError(msg)
        return super().square_norm(value)

    # -- moving -------------------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> SubnetLaplace:
        """Move the model, what was learned and the hyperparameters to a device.

        Parameters
        ----------
        device
            Where to.

        Returns
        -------
        This object.
        """
        device = checks.device("device", device)
        vars(self).pop("_random_weights", None)  # it knows where on the device the chosen weights are
        super().to(device)
        self._indices = self._indices.to(self._device)
        return self


@described
class FullSubnetLaplace(SubnetLaplace[L_co], FullLaplace[L_co]):
    """Subnetwork with dense curvature: exact for these weights.

    O(S²) memory, O(S³) time to factorize, once.
    """


@described
class DiagSubnetLaplace(SubnetLaplace[L_co], DiagLaplace[L_co]):
    """Subnetwork with diagonal curvature: O(S) memory; its weights are independent."""
