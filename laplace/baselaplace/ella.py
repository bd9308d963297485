"""``ELLA`` and ``LLELLA``: Nyström features (``functional_approximation="nystrom"``); their formulas are in ``gp/``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace import linalg, tuning
from laplace.baselaplace.last_layer import LastLayer, as_extractor
from laplace.baselaplace.nystrom import NystromPosterior
from laplace.baselaplace.tunable import checked_grid, checked_steps, chosen_method
from laplace.curvature import CurvatureInterface
from laplace.enums import FeatureReduction, Likelihood, LinkApprox, PredType, PriorStructure, TuningMethod, choose
from laplace.errors import InputError, UnsupportedError
from laplace.gp.nystrom import log_det_ratio
from laplace.gp.posterior import FeaturePrecision
from laplace.network import evaluating, full_precision
from laplace.predictive import Options
from laplace.types import Scalar


class ELLA(NystromPosterior):
    """Accelerated linearized Laplace: the kernel of the network is replaced by K Nyström features.

    Parameters
    ----------
    model, likelihood
        As in ``BaseLaplace``.
    subsample_size
        M, how many training data the features are made of, one output each.
    n_eigenvalues
        K, how many features; at most M.
    sigma_noise, prior_precision, prior_mean, temperature, enable_backprop, dict_key_x, dict_key_y, backend
        As in ``BaseLaplace``; the prior precision is one number.
    backend_kwargs
        Passed to the back end on construction.
    seed
        Of the subsample and its outputs.
    curvature_dtype
        As in ``BaseLaplace``.

    Raises
    ------
    UnsupportedError
        If an option does not exist or does not fit another.
    InputError
        If a hyperparameter is not finite or not positive, or ``n_eigenvalues`` is above ``subsample_size``.

    Notes
    -----
    The posterior is that of a network whose weights move along K directions only: exact where they span the derivatives
    (for one output and M = K = N at the training data), and nowhere more uncertain than that of all weights, since what
    the prior allows outside them is left out. ``fit`` goes over the data twice and costs one backward pass an output;
    memory is K vectors of weights.

    References
    ----------
    Deng, Zhou & Zhu (2022), "Accelerated linearized Laplace approximation for Bayesian deep learning". arXiv:2210.12642
    """

    @linalg.lasting
    def optimize_prior_precision(
        self,
        pred_type: PredType | str = PredType.GP,
        method: TuningMethod | str = TuningMethod.GRIDSEARCH,
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
    ) -> None:
        """Choose the prior precision and assign it; the features stay.

        Parameters
        ----------
        pred_type
            ``"gp"`` or ``"glm"``, which are the same.
        method
            ``"gridsearch"``: the loss on validation data. ``"marglik"``: ``log_marginal_likelihood``.
        n_steps, lr, init_prior_prec
            Of ``"marglik"``: the most iterations, the first trial step, and where to start.
        prior_structure
            ``"scalar"``.
        val_loader, loss, log_prior_prec_min, log_prior_prec_max, grid_size, link_approx, n_samples, log_prior_prec_base
            Of ``"gridsearch"``, as in ``ParametricLaplace.optimize_prior_precision``.
        verbose
            Print the result in one line.
        progress_bar
            Show a progress bar.
        generator
            Source of randomness of sampled predictions, on the model's device.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If names are unknown, or another structure than a scalar is asked for.
        InputError
            If validation data are missing or empty, the grid is no grid, or the objective is finite nowhere.

        Notes
        -----
        One pass over the validation data, whatever the size of the grid. When something is raised the prior precision
        is what it was.
        """
        verbose, n_steps, lr = checked_steps(verbose, progress_bar, n_steps, lr)
        grid = checked_grid(log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base)
        start = self._checked_prior_precision(init_prior_prec).detach()
        how = chosen_method(method)
        fit = self._fitted
        if choose(PriorStructure, prior_structure, "prior_structure") is not PriorStructure.SCALAR:
            msg = f'{type(self).__name__} has an isotropic prior over the weights: prior_structure must be "scalar".'
            raise UnsupportedError(msg)
        self._function_options(pred_type)
        options = self._grid_options(link_approx, n_samples, generator)
        if how is TuningMethod.MARGLIK:
            best, value = tuning.optimize(
                self._evidence, start, n_steps=n_steps, lr=lr, bounds=tuning.BOUNDS, progress_bar=progress_bar
            )
            found = f"log marginal likelihood {value:.4f}"
        elif how is TuningMethod.GRIDSEARCH:
            if val_loader is None:
                msg = 'method="gridsearch" scores prior precisions on validation data: pass val_loader=.'
                raise InputError(msg)
            grid = grid.to(self._device, self._dtype)
            with evaluating(self.model), torch.no_grad(), full_precision(self._device):
                data = self._validation(val_loader, fit.tensors["directions"])
                score = partial(self._grid_scores, data, loss, options)
                best, values = tuning.search(score, grid, progress_bar=progress_bar)
            found = f"validation loss {float(values[torch.isfinite(values)].min()):.4f}"
        else:
            msg = f'{type(self).__name__} has no method={how.value!r}; use "gridsearch" or "marglik".'
            raise UnsupportedError(msg)
        self.prior_precision = best.detach()
        if verbose:
            print(f"Optimized prior precision: {float(best):.4g} ({found})")

    def _grid_scores(self, data: tuning.CachedData, loss: Any, options: Options, points: Tensor) -> Tensor:
        return self._scores(data, self._fitted.tensors["gram"], points, loss, options)

    def _evidence(self, precision: Tensor) -> Scalar:
        """The log marginal likelihood at a prior precision ``[1]``; nothing is assigned."""
        gram, shift = self._fitted.tensors["gram"], self._fitted.mean - self._prior_mean.detach().to(self._dtype)
        likelihood = self._frozen_likelihood
        posterior = FeaturePrecision.of(gram * likelihood.scale, precision.squeeze(0))
        penalty = log_det_ratio(posterior) + precision.squeeze(0) * shift.square().sum()
        return self.log_likelihood.detach() - 0.5 * penalty

    @linalg.lasting
    def optimize_hyperparameters(self, val_loader: Iterable[Any], grid: Sequence[float] | Tensor) -> None:
        """Choose the prior precision with the lowest negative log predictive density on validation data; assign it.

        Parameters
        ----------
        val_loader
            Validation batches.
        grid
            Prior precisions to try, in 1/weight².

        Raises
        ------
        NotFittedError
            Before ``fit``.
        InputError
            If the grid is empty or holds something else than positive finite numbers, validation data are empty, or the
            score is finite nowhere.

        Notes
        -----
        What was tried is added to ``fit_history_["tuning"]``.
        """
        directions = self._fitted.tensors["directions"]
        points = self._checked("grid", grid, positive=True).detach().reshape(-1)
        with evaluating(self.model), torch.no_grad(), full_precision(self._device):
            data = self._validation(val_loader, directions)
            options = self._grid_options(LinkApprox.PROBIT, 1, None)
            values = self._grid_scores(data, None, options, points)
        if not bool(torch.isfinite(values).any()):
            msg = "The validation loss is finite at none of the prior precisions; the prior precision was not changed."
            raise InputError(msg)
        best = int(torch.where(torch.isfinite(values), values, torch.inf).argmin())
        self.prior_precision = points[best]
        tried = [{"prior_precision": float(p), "val_nll": float(v)} for p, v in zip(points, values, strict=True)]
        self.fit_history_ = {**self.fit_history_, "tuning": [*self.fit_history_["tuning"], *tried]}


class LLELLA(LastLayer, ELLA):
    """ELLA of a last layer: from features alone, without a Jacobian and without a backward pass.

    Parameters
    ----------
    model, likelihood, subsample_size, n_eigenvalues, sigma_noise, prior_precision, prior_mean, temperature
        As in ``ELLA``.
    enable_backprop, feature_reduction, dict_key_x, dict_key_y, last_layer_name
        As in ``LLLaplace``.
    backend, backend_kwargs, seed, curvature_dtype
        As in ``ELLA``.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        subsample_size: int,
        n_eigenvalues: int,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        last_layer_name: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        seed: int = 1234,
        *,
        curvature_dtype: torch.dtype | None = None,
    ) -> None:
        extractor = as_extractor(model, last_layer_name, enable_backprop, feature_reduction, dict_key_x, dict_key_y)
        super().__init__(
            extractor,
            likelihood,
            subsample_size,
            n_eigenvalues,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            extractor.enable_backprop,
            extractor.dict_key_x,
            extractor.dict_key_y,
            backend,
            backend_kwargs,
            seed,
            curvature_dtype=curvature_dtype,
        )


__all__ = ["ELLA", "LLELLA"]
