"""``FunctionalLaplace``: the posterior of a subset of the data as a Gaussian process; formulas are in ``gp/``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import tuning
from laplace.baselaplace.functional import BaseFunctionalLaplace
from laplace.baselaplace.tuned import Noise, TunedPosterior
from laplace.curvature import CurvatureInterface
from laplace.enums import Likelihood, LinkApprox, PredType, PriorStructure, TuningMethod
from laplace.errors import InputError, UnsupportedError
from laplace.gp.network_kernel import NetworkKernel
from laplace.gp.process import ProcessLinearization
from laplace.gp.subset import Subset, expected_rows
from laplace.gp.subset_curvature import SubsetCurvature
from laplace.network import Batch, evaluating
from laplace.predictive import Linearization, Options
from laplace.prior import GaussianPrior
from laplace.structures import AbstractCurvature
from laplace.types import Inputs


class FunctionalLaplace(TunedPosterior, BaseFunctionalLaplace):
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
        M, how many data to use: ``numpy.random.default_rng(seed).choice(N, M, replace=False)`` in the order in which the
        loader yields them.
    sigma_noise
        Standard deviation of the observation noise, in target units; regression only.
    prior_precision
        Of the isotropic Gaussian prior, in 1/weight²: one number.
    prior_mean
        Of the Gaussian prior: a scalar, or one value a weight.
    temperature
        T of the tempered likelihood ``p(y|f)^(1/T)``; below 1 it concentrates the posterior.
    enable_backprop
        Keep predictions differentiable with respect to the inputs.
    dict_key_x, dict_key_y
        Entries of mapping batches that hold the main input and the targets.
    backend
        Class that provides derivatives, of a GGN; ``AutogradGGN`` when ``None``.
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

    curvature_type: ClassVar[type[AbstractCurvature]] = SubsetCurvature

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
        backend: type[CurvatureInterface] | None = None,
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
        if isinstance(n_subset, bool) or not isinstance(n_subset, Integral) or n_subset < 1:
            msg = f"n_subset must be a positive whole number, how many data to use; got {n_subset!r}."
            raise InputError(msg)
        if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
            msg = f"seed must be a whole number that is not negative; got {seed!r}."
            raise InputError(msg)
        self.n_subset, self.seed = int(n_subset), int(seed)
        self.independent_outputs, self.diagonal_hessian = bool(independent_outputs), bool(diagonal_hessian)

    # -- fit ----------------------------------------------------------------------------------------------------------

    def fit(self, train_loader: Iterable[Any], progress_bar: bool = False) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Choose the subset, and learn what its kernel is made of.

        Parameters
        ----------
        train_loader
            Yields ``(x, y)``, ``(x1, …, xk, y)`` or mappings: a ``DataLoader``, a list, any iterable of batches. One
            that has no length needs memory for all data until the subset is drawn.
        progress_bar
            Show a progress bar.

        Raises
        ------
        InputError
            If there are fewer data than ``n_subset``, or the loader yields something else than batches or valid targets.
        UnsupportedError
            If model, likelihood and back end do not fit together, or matrices of the subset cannot fit the device.
        ShapeError
            If outputs, targets or the prior have shapes that do not fit.

        Notes
        -----
        One forward pass over the data and no backward pass; kernels and their factorization are left to the first use.
        The model is left as it was found. When something is raised, so is this object.
        """
        super().fit(train_loader, True, progress_bar)

    def _accumulate(
        self, train_loader: Iterable[Any], batches: Iterator[Batch]
    ) -> tuple[Tensor, AbstractCurvature] | None:
        subset = Subset(
            self.n_subset,
            self.seed,
            expected_rows(train_loader, self.dict_key_y),
            diagonal=self.diagonal_hessian,
            independent=self.independent_outputs,
            linearize=self._derive,
        )
        learned = self.curvature_type.accumulate(self.backend, batches, subset=subset)
        if learned is None or not bool(torch.isfinite(learned[0]).all()):
            return learned
        nll, curvature = learned
        assert isinstance(curvature, SubsetCurvature), "declared above"
        kernel, root, ratio = subset.finish(curvature.kernel, curvature.root)
        return nll, SubsetCurvature(kernel, root, ratio)

    def _derive(self, x: Inputs) -> Linearization:
        """Derivatives at data of the subset."""
        with evaluating(self.model), torch.no_grad():
            return self._linearize(x)

    def _check_backend(self, backend: CurvatureInterface) -> None:
        if backend.matrix != "GGN":
            msg = (
                f"A Gaussian process is the posterior of a generalized Gauss-Newton matrix; {type(backend).__name__} "
                f"computes an {backend.matrix}. Pass a GGN back end, or backend=None."
            )
            raise UnsupportedError(msg)

    def _checked_prior_precision(self, value: Any) -> Tensor:
        precision = super()._checked_prior_precision(value)
        self._fits_structure(GaussianPrior(precision.new_zeros(()), precision, (precision.numel(),)))
        return precision

    def _fits_structure(self, prior: GaussianPrior) -> None:
        if prior.precision.numel() > 1:
            msg = (
                f"{type(self).__name__} has an isotropic prior over the weights, so that its kernel scales with it: "
                f"prior_precision must be one number; got {prior.precision.numel()}. Others take hessian_structure="
                "'diag', 'kron' or 'full'."
            )
            raise UnsupportedError(msg)

    # -- predictions --------------------------------------------------------------------------------------------------

    def _functions_at(self, x: Inputs, **model_kwargs: Any) -> Linearization:
        curvature = self._fitted.curvature
        assert isinstance(curvature, SubsetCurvature), "declared above"
        return ProcessLinearization(self._linearize(x, **model_kwargs), curvature.kernel, self._dtype)

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
        return self._frozen_posterior.functional_variance(Js_star)

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
        return self._frozen_posterior.functional_covariance(Js_star)

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
            return self.mean + self._frozen_posterior.sample(n_samples, generator)

    # -- tuning -------------------------------------------------------------------------------------------------------

    def _tuning_options(
        self,
        pred_type: PredType | str,
        link_approx: LinkApprox | str,
        n_samples: int,
        generator: torch.Generator | None,
    ) -> Options:
        pairs = self._output_likelihood.n_items > 1
        return self._function_options(pred_type, False, link_approx, n_samples, generator=generator, fitting=pairs)

    def _for_tuning(self, pred_type: PredType, x: Inputs) -> Linearization:  # noqa: ARG002
        with evaluating(self.model):
            return self._functions_at(x)

    def optimize_prior_precision(
        self,
        pred_type: PredType | str = PredType.GP,
        method: TuningMethod | str = TuningMethod.MARGLIK,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: PriorStructure | str = PriorStructure.SCALAR,
        val_loader: Iterable[Any] | None = None,
        loss: str | tuning.Loss | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        *,
        generator: torch.Generator | None = None,
        noise: Noise = "keep",
        bounds: tuple[float, float] = tuning.BOUNDS,
    ) -> None:
        """Choose the prior precision, by evidence or by validation over a grid, and assign it.

        Parameters
        ----------
        pred_type
            ``"gp"`` or ``"glm"``: the same.
        prior_structure
            ``"scalar"``; others raise.
        method, n_steps, lr, init_prior_prec, val_loader, loss, log_prior_prec_min, log_prior_prec_max, grid_size
            As in ``ParametricLaplace.optimize_prior_precision``.
        link_approx, n_samples, verbose, progress_bar, log_prior_prec_base, generator, noise, bounds
            As there.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If names are unknown, or the prior structure is not ``"scalar"``.
        InputError
            If validation data are missing or empty, the grid is no grid, or the objective is finite nowhere.

        Notes
        -----
        One eigendecomposition of the Gram matrix of the subset serves all precisions. Evidence then takes O(M C) a step;
        a grid one pass over the validation data, and products with their kernels.
        """
        super().optimize_prior_precision(
            pred_type,
            method,
            n_steps,
            lr,
            init_prior_prec,
            prior_structure,
            val_loader,
            loss,
            log_prior_prec_min,
            log_prior_prec_max,
            grid_size,
            link_approx,
            n_samples,
            verbose,
            progress_bar,
            log_prior_prec_base,
            generator=generator,
            noise=noise,
            bounds=bounds,
        )

    # -- saving -------------------------------------------------------------------------------------------------------

    def _choices(self) -> dict[str, Any]:
        own = ("n_subset", "seed", "independent_outputs", "diagonal_hessian")
        return {**super()._choices(), **{name: getattr(self, name) for name in own}}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self.n_subset, self.seed = int(state["n_subset"]), int(state["seed"])
        self.independent_outputs = bool(state["independent_outputs"])
        self.diagonal_hessian = bool(state["diagonal_hessian"])

    def _curvature_from(self, state: Mapping[str, Any]) -> AbstractCurvature:
        if self._last_layer:
            return super()._curvature_from(state)
        kernel = NetworkKernel.from_state(state["kernel"], self._dtype, self._derive)
        return SubsetCurvature(kernel, state["root"].to(self._dtype), float(state["ratio"]))

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying take along: not what was made of the subset, which is made again."""
        state = super().__getstate__()
        fit = state.get("_fit")
        if fit is not None:
            state["_fit"] = replace(fit, curvature=replace(fit.curvature, _cache={}))
        return state


__all__ = ["FunctionalLaplace"]
