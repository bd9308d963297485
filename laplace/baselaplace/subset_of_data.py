"""``FunctionalLaplace``: the posterior of a subset of the data as a Gaussian process; formulas are in ``gp/``."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import checks
from laplace.baselaplace.subset_posterior import SubsetPosterior
from laplace.curvature import CurvatureInterface
from laplace.enums import Likelihood, PredType
from laplace.gp.subset_curvature import SubsetCurvature


class FunctionalLaplace(SubsetPosterior):
    """A Gaussian process around the outputs of a network: the Laplace approximation in function space.

    Its kernel is that of the linearized network, its data a random subset of the training data. With all data it is the
    posterior of ``FullLaplace``, at a cost that depends on data and outputs instead of weights. With M of N data the
    prior precision is multiplied by N/M.

    Parameters
    ----------
    model
        The trained network; read, never written. All weights that require a gradient are random.
    likelihood
        ``"classification"``, ``"regression"`` or ``"reward_modeling"``.
    n_subset
        M, how many data to use: ``numpy.random.default_rng(seed).choice(N, M, replace=False)``, in the order in which
        the loader yields them.
    sigma_noise
        Standard deviation of the observation noise, in target units; regression only.
    prior_precision
        Of the isotropic Gaussian prior, in 1/weight²: one number.
    prior_mean
        Of the Gaussian prior: a scalar, or one value per weight.
    temperature
        T of the tempered likelihood ``p(y|f)^(1/T)``; below 1 it concentrates the posterior.
    enable_backprop
        Keep predictions differentiable with respect to the inputs.
    dict_key_x, dict_key_y
        Entries of mapping batches that hold the main input and the targets.
    backend
        Class that provides derivatives, of a GGN; ``AutogradGGN`` when ``None``. Of an object its class and options are
        taken.
    backend_kwargs
        Passed to the back end on construction.
    independent_outputs
        Leave out what outputs have in common: one process an output, C matrices of M² instead of one of (M C)².
    seed
        Of the choice of data.
    diagonal_hessian
        Use the diagonals of the likelihood's Hessians alone, as laplace-torch does for classification; by default they
        are whole.
    curvature_dtype
        Precision of kernels, factorizations and evidence; that of the model by default, at least float32.

    Raises
    ------
    UnsupportedError
        If an option does not exist or does not fit another.
    InputError
        If a hyperparameter is not finite or not positive, or ``n_subset`` no positive whole number.

    Notes
    -----
    With C outputs the factorization takes O((M C)³) time and O((M C)²) memory, once; O(C M³) and O(C M²) where outputs
    do not meet: with ``independent_outputs``, and for a last layer with a Gaussian likelihood or ``diagonal_hessian``.

    References
    ----------
    Khan, Immer, Abedi & Korzepa (2019), "Approximate inference turns deep networks into Gaussian processes".
    arXiv:1906.01930; Immer, Korzepa & Bauer (2021), "Improving predictions of Bayesian neural nets via local
    linearization", section 3.3. arXiv:2008.08400
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        n_subset: int,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        independent_outputs: bool = False,
        seed: int = 0,
        *,
        diagonal_hessian: bool = False,
        curvature_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            enable_backprop,
            dict_key_x,
            dict_key_y,
            backend,
            backend_kwargs,
            curvature_dtype=curvature_dtype,
        )
        self.independent_outputs = checks.flag("independent_outputs", independent_outputs)
        self.diagonal_hessian = checks.flag("diagonal_hessian", diagonal_hessian)
        if self.diagonal_hessian:
            self._unit_likelihood.check_diagonal_hessian()
        self.n_subset, self.seed = checks.whole("n_subset", n_subset), checks.whole("seed", seed, 0)

    @property
    def gp_kernel_prior_variance(self) -> Tensor:
        """Prior variance of each weight in the kernel, ``M / (N δ)``, ``[1]``, in weight²."""
        curvature = self._fitted.curvature
        assert isinstance(curvature, SubsetCurvature), "declared above"
        return 1 / (self._prior_precision.to(self._dtype) * curvature.ratio)

    def functional_variance(self, Js_star: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """Covariance of the outputs at each input, in output units squared, without observation noise.

        Parameters
        ----------
        Js_star
            Jacobians, ``[batch, outputs, P]``.

        Returns
        -------
        ``[batch, outputs, outputs]``.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ShapeError
            If P differs from the number of random weights.

        Notes
        -----
        The Jacobian dominates time and memory; calling the object never builds it.
        """
        return self._frozen_posterior.functional_variance(self._checked_jacobians(Js_star))

    def functional_covariance(self, Js_star: Tensor) -> Float[Tensor, "joint joint"]:
        """Covariance of the outputs across inputs, ``[batch·outputs, batch·outputs]``, input by input.

        Parameters
        ----------
        Js_star
            Jacobians, ``[batch, outputs, P]``.

        Returns
        -------
        In output units squared, without observation noise.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        ShapeError
            If P differs from the number of random weights.
        UnsupportedError
            With ``independent_outputs`` of a whole network: its outputs have no weights in common.
        """
        return self._frozen_posterior.functional_covariance(self._checked_jacobians(Js_star))

    def sample(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Draw weights whose linearized network is a draw from the process.

        Parameters
        ----------
        n_samples
            How many.
        generator
            Source of randomness, on the model's device.

        Returns
        -------
        ``[n_samples, P]``, in public order.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            With ``independent_outputs`` of a whole network, which is over no weights.
        InputError
            If ``n_samples`` is not positive, or the generator is on another device.

        Notes
        -----
        Exact: draws from the prior are corrected by what they miss at the data (Matheron's rule). O(n_samples · P).
        """
        self._options(PredType.NN, n_samples=n_samples, generator=generator)
        with torch.no_grad():
            return self._mean + self._frozen_posterior.sample(n_samples, generator)


__all__ = ["FunctionalLaplace"]
