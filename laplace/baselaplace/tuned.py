"""``TunedPosterior``: choosing hyperparameters, by delegation to ``tuning/``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace import checks, linalg, tuning
from laplace.baselaplace.tunable import (
    Noise,
    TunablePosterior,
    checked_grid,
    checked_limits,
    checked_steps,
    chosen_method,
)
from laplace.enums import LinkApprox, PredType, PriorStructure, TuningMethod, choose
from laplace.errors import UnsupportedError
from laplace.network import full_precision


class TunedPosterior(TunablePosterior):
    """A posterior whose hyperparameters can be chosen."""

    @linalg.lasting
    def optimize_prior_precision(
        self,
        pred_type: PredType | str = PredType.GLM,
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
        temperature: bool = False,
        train_loader: Iterable[Any] | None = None,
        n_folds: int = 5,
    ) -> None:
        """Choose the prior precision, by evidence or by a score over a grid, and assign it.

        Parameters
        ----------
        pred_type, link_approx, n_samples
            How the predictions that are scored are made.
        method
            ``"marglik"``: the log marginal likelihood. ``"gridsearch"``: the loss on validation data. ``"loo"``: the
            leave-one-out loss of the training data, in closed form (``full`` and ``diag``). ``"cv"``: that of k folds.
            The last two need a last layer, whose weights are then those that are best under each prior (and for each
            fold), with features that have seen all the data: optimistic, and never the default.
        n_steps, lr
            The most iterations of L-BFGS on log precisions, which ends before where it converges, and the size of its
            first trial step (``"marglik"``). 0 steps assign the start.
        init_prior_prec
            Where to start (``"marglik"``): a scalar, or one value for each precision. Values for each parameter group,
            or for each weight, bring their structure with them.
        prior_structure
            ``"scalar"``, ``"layerwise"`` (a parameter group each; of a last layer weight and bias) or ``"diag"`` (a
            weight each). A grid gives all the same value.
        val_loader
            Validation batches (``"gridsearch"``).
        loss
            To minimize: ``"nll"`` (the default: negative log predictive density, noise included), ``"brier"`` or
            ``"ece"`` (classification), ``"crps"`` (regression), a metric of torchmetrics or one like it, or a function
            ``loss(probabilities, targets)``, for regression ``loss(means, covariances, targets)`` without noise.
        log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base
            The grid: ``base^min … base^max``, evenly spaced in the exponent.
        verbose
            Print the result in one line.
        progress_bar
            Show a progress bar.
        generator
            Source of randomness of sampled predictions (``"gridsearch"``), on the model's device; a fixed seed when
            ``None``. Every point of the grid sees the same random numbers.
        noise
            Choose the noise of a regression together with the prior (``"marglik"``): ``"scalar"``, or ``"per_output"``
            with a last layer. It starts at the residuals of the training data.
        bounds
            Least and largest prior precision (``"marglik"``).
        temperature
            Refused: no temperature is best by evidence.
        train_loader
            The training batches that ``fit`` had (``"loo"``, ``"cv"``).
        n_folds
            Of ``"cv"``; data are dealt out at random with a fixed seed, or by ``generator``.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If names are unknown, or the structure takes no such prior.
        InputError
            If validation data are missing or empty, the grid is no grid, or the objective is finite nowhere.

        Notes
        -----
        When something is raised, hyperparameters are what they were; what was found is kept in ``tuning_``. Evidence:
        O(P) per step once eigenvalues are known; one precision per weight of a diagonal curvature is closed-form. Grid
        search runs the model over the validation data once; each point then costs matrix products.
        """
        verbose, n_steps, lr = checked_steps(verbose, progress_bar, n_steps, lr)
        grid = checked_grid(log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base)
        start = self._checked("init_prior_prec", init_prior_prec, positive=True)
        bounds, n_folds = checked_limits("bounds", bounds), checks.whole("n_folds", n_folds, 2)
        if checks.flag("temperature", temperature):
            msg = (
                "The evidence grows without end with the temperature of the likelihood, which is not normalized: no "
                "value is best. Choose the output temperature on validation data instead: tune(val_loader)."
            )
            raise UnsupportedError(msg)
        how = chosen_method(method)
        structure = choose(PriorStructure, prior_structure, "prior_structure")
        options = self._tuning_options(pred_type, link_approx, n_samples, generator)
        problem = self._problem()
        if how is not TuningMethod.MARGLIK and noise != "keep":
            msg = f"noise={noise!r} goes with method='marglik'; by validation tune(val_loader) chooses it, too."
            raise UnsupportedError(msg)
        if how is TuningMethod.MARGLIK:
            start = self._spread(self._structure_of(structure, start), start)
            self._fits_structure(problem.prior(start))
            best, sigma, value, n_clipped = tuning.maximize_evidence(
                problem,
                start,
                self._initial_noise(problem, noise),
                n_steps=n_steps,
                lr=lr,
                bounds=bounds,
                progress_bar=progress_bar,
            )
            chosen = {"prior_precision": best} if sigma is None else {"prior_precision": best, "sigma_noise": sigma}
            curve = best.reshape(-1)[:1].cpu(), torch.tensor([value])
            found = tuning.Tuning("marglik", "log marginal likelihood", value, chosen, *curve, n_clipped=n_clipped)
        else:
            score = tuning.choose_score(loss, problem.likelihood(), options.pred_type)
            grid, spread = grid.to(self._device, self._dtype), partial(self._spread, structure)
            self._fits_structure(problem.prior(spread(grid[:1])))
            loader = val_loader if how is TuningMethod.GRIDSEARCH else train_loader
            data = self._cached(loader, options.pred_type, how, progress_bar)
            with torch.no_grad(), full_precision(self._device):
                scored = self._scored(how, problem, data, score, options, grid, n_folds, generator)
                point, scores = tuning.search(scored, grid, progress_bar=progress_bar)
            value = float(scores[torch.isfinite(scores)].min())
            chosen = {"prior_precision": spread(point.reshape(1))}
            found = tuning.Tuning(how.value, score.name, value, chosen, grid.cpu(), scores)
        self._take_over(found, verbose)

    @linalg.lasting
    def tune(
        self,
        val_loader: Iterable[Any],
        *,
        score: str | tuning.Loss = "nll",
        prior_structure: PriorStructure | str = PriorStructure.SCALAR,
        noise: Noise | None = None,
        output_temperature: bool | None = None,
        pred_type: PredType | str = PredType.GLM,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        limits: Mapping[str, tuple[float, float]] | None = None,
        n_steps: int = 50,
        generator: torch.Generator | None = None,
        verbose: bool = False,
        progress_bar: bool = False,
    ) -> tuning.Tuning:
        """Choose prior precision and noise, or output temperature, together on validation data, and assign them.

        The network itself, at its best output temperature or noise, is a candidate: on these data the result is never
        worse than MAP or temperature scaling.

        Parameters
        ----------
        val_loader
            Batches that the network was not trained on.
        score
            A proper and differentiable score to minimize: ``"nll"``, ``"brier"`` (classification), ``"crps"``
            (regression), or a function as for ``loss`` of ``optimize_prior_precision``.
        prior_structure
            ``"scalar"`` or ``"layerwise"``.
        noise
            Regression: ``"scalar"`` (the default), ``"per_output"`` (last layer) or ``"keep"``.
        output_temperature
            Classification and preferences: choose it (the default) or leave it as it is.
        pred_type, link_approx, n_samples
            How predictions will be made: what is best for one way need not be for another.
        limits
            Least and largest values, by name: ``prior_precision``, ``output_temperature``, ``sigma_noise`` (this one in
            units of the residuals). Brackets start inside and extend to these. Without one, the least temperature is
            that which is best for the network without weight uncertainty, and at most 1: uncertain weights widen
            predictions, which lower temperatures would undo.
        n_steps
            The most iterations of L-BFGS after the grid.
        generator
            Source of randomness of sampled predictions, which are the same for every evaluation; a fixed seed when
            ``None``.
        verbose
            Print the result in one line.
        progress_bar
            Show a progress bar.

        Returns
        -------
        What was found; also kept as ``tuning_``.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If options do not exist or have no meaning for the likelihood.
        InputError
            If validation data are missing or empty, limits are reversed, or the score is finite nowhere.

        Warns
        -----
        UserWarning
            If the best value of a hyperparameter stays at a limit, or no temperature is best for the network, as where
            it classifies every validation row right: then none below 1 is tried.

        Notes
        -----
        One pass over the validation data; every evaluation then costs matrix products (a full structure with several
        prior precisions factorizes each time). When something is raised, hyperparameters are what they were.
        """
        verbose, n_steps, _ = checked_steps(verbose, progress_bar, n_steps)
        structure = choose(PriorStructure, prior_structure, "prior_structure")
        if structure is PriorStructure.DIAG:
            msg = (
                "A precision for each weight has as many values as validation data can never tell apart: choose it by "
                'evidence, optimize_prior_precision(method="marglik", prior_structure="diag").'
            )
            raise UnsupportedError(msg)
        problem = self._problem()
        second, n_values = self._second(noise, output_temperature)
        options = self._tuning_options(pred_type, link_approx, n_samples, generator)
        measure = tuning.choose_score(score, problem.likelihood(), options.pred_type, keyword="score")
        if measure.name == "ece":
            msg = (
                "tune needs a proper score; the calibration error is best for a network that predicts shares of "
                'classes. Use score="nll" or "brier", or optimize_prior_precision(method="gridsearch", loss="ece").'
            )
            raise UnsupportedError(msg)
        given = {}
        for name, edges in checks.keywords("limits", limits).items():
            if name not in tuning.LIMITS:
                msg = f"limits has no hyperparameter {name!r}; it may hold {', '.join(map(repr, tuning.LIMITS))}."
                raise UnsupportedError(msg)
            given[name] = checked_limits(f"limits[{name!r}]", edges)
        n_precisions = 1 if structure is PriorStructure.SCALAR else len(problem.sizes)
        self._fits_structure(problem.prior(problem.fit.mean.new_ones(n_precisions)))
        data = self._cached(val_loader, options.pred_type, None, progress_bar)
        if n_values > 1:
            n_values = problem.fit.n_outputs
        with torch.no_grad(), full_precision(self._device):
            fresh = self._repeated(options)
            joint = tuning.Joint(problem, data, measure, fresh, self._dtype, second, n_values)
            found = tuning.tune(joint, n_precisions, given, n_steps=n_steps, progress_bar=progress_bar)
        return self._take_over(found, verbose)


__all__ = ["TunedPosterior"]
