"""``TunedPosterior``: choosing hyperparameters, by delegation to ``tuning/``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from laplace import linalg, tuning
from laplace.baselaplace.checkpoint import CheckpointedPosterior
from laplace.enums import LinkApprox, PredType, PriorStructure, TuningMethod, choose
from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods import LIKELIHOODS, resolve
from laplace.network import evaluating, full_precision, iterate
from laplace.network.parameters import expand_groups
from laplace.predictive import Linearization, Options
from laplace.prior import fix_prior_prec_structure
from laplace.types import Inputs

Noise = Literal["keep", "scalar", "per_output"]


class TunedPosterior(CheckpointedPosterior):
    """A posterior whose hyperparameters can be chosen."""

    tuning_: tuning.Tuning | None = None
    """What the last tuning found: choice, score and curve; print it, or draw it with ``plot()``."""

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
    ) -> None:
        """Choose the prior precision, by evidence or by validation over a grid, and assign it.

        Parameters
        ----------
        pred_type, link_approx, n_samples
            How the validation predictions are made (``"gridsearch"``).
        method
            ``"marglik"``: the log marginal likelihood. ``"gridsearch"``: the loss on validation data.
        n_steps, lr
            The most iterations of L-BFGS on log precisions, which ends before where it converges, and the first trial
            step of its line searches (``"marglik"``). 0 steps assign the start.
        init_prior_prec
            Where to start (``"marglik"``): a scalar, or one value a precision.
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
            Source of randomness of sampled predictions (``"gridsearch"``), on the model's device. Every point of the
            grid sees the same random numbers.
        noise
            Choose the noise of a regression together with the prior (``"marglik"``): ``"scalar"``, or ``"per_output"``
            with a last layer. It starts at the residuals of the training data.
        bounds
            Least and largest prior precision (``"marglik"``).
        temperature
            Refused: no temperature is best by evidence.

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
        O(P) a step once eigenvalues are known; one precision a weight of a diagonal curvature has a closed form. Grid
        search runs the model over the validation data once; each point then costs matrix products.
        """
        if temperature:
            msg = (
                "The evidence grows without end with the temperature of the likelihood, which is not normalized: no "
                "value is best. Choose the output temperature on validation data instead: tune(val_loader)."
            )
            raise UnsupportedError(msg)
        how = choose(TuningMethod, method, "method")
        structure = choose(PriorStructure, prior_structure, "prior_structure")
        options = self._tuning_options(pred_type, link_approx, n_samples, generator)
        problem, spread = self._problem(), partial(self._spread, structure)
        if how is not TuningMethod.MARGLIK and noise != "keep":
            msg = f"noise={noise!r} goes with method='marglik'; by validation tune(val_loader) chooses it, too."
            raise UnsupportedError(msg)
        if how is TuningMethod.MARGLIK:
            start = spread(self._checked("init_prior_prec", init_prior_prec, positive=True))
            self._fits_structure(problem.prior(start))
            best, sigma, value, n_clipped = tuning.maximize_evidence(
                problem,
                start,
                self._initial_noise(problem, noise),
                n_steps=n_steps,
                lr=lr,
                bounds=_checked_limits("bounds", bounds),
                progress_bar=progress_bar,
            )
            chosen = {"prior_precision": best} if sigma is None else {"prior_precision": best, "sigma_noise": sigma}
            curve = best.reshape(-1)[:1].cpu(), torch.tensor([value])
            found = tuning.Tuning("marglik", "log marginal likelihood", value, chosen, *curve, n_clipped=n_clipped)
        else:
            score = tuning.choose_score(loss, problem.likelihood(), options.pred_type)
            grid = tuning.log_grid(log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base)
            grid = grid.to(self._device, self._dtype)
            self._fits_structure(problem.prior(spread(grid[:1])))
            data = self._cached(val_loader, options.pred_type, 'method="gridsearch"')
            with torch.no_grad(), full_precision(self._device):
                point, scores = self._search(problem, data, score, options, grid, progress_bar)
            value = float(scores[torch.isfinite(scores)].min())
            chosen = {"prior_precision": spread(point.reshape(1))}
            found = tuning.Tuning("gridsearch", score.name, value, chosen, grid.cpu(), scores)
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
            units of the residuals). Brackets start inside and extend to these.
        n_steps
            The most iterations of L-BFGS after the grid.
        generator
            Source of randomness of sampled predictions; every evaluation sees the same random numbers.
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
            If the best value of a hyperparameter stays at a limit.

        Notes
        -----
        One pass over the validation data; every evaluation then costs matrix products (a full structure with several
        prior precisions factorizes each time). When something is raised, hyperparameters are what they were.
        """
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
        allowed = dict(tuning.LIMITS)
        for name, edges in (limits or {}).items():
            if name not in allowed:
                msg = f"limits has no hyperparameter {name!r}; it may hold {', '.join(map(repr, allowed))}."
                raise UnsupportedError(msg)
            allowed[name] = _checked_limits(f"limits[{name!r}]", edges)
        n_precisions = 1 if structure is PriorStructure.SCALAR else len(problem.sizes)
        self._fits_structure(problem.prior(problem.fit.mean.new_ones(n_precisions)))
        data = self._cached(val_loader, options.pred_type, "tune")
        if n_values > 1:
            n_values = problem.fit.n_outputs
        with torch.no_grad(), full_precision(self._device):
            fresh = self._repeated(options)
            joint = tuning.Joint(problem, data, measure, fresh, self._dtype, second, n_values, allowed)
            found = tuning.tune(joint, n_precisions, n_steps=n_steps, progress_bar=progress_bar)
        return self._take_over(found, verbose)

    # -- what both need -----------------------------------------------------------------------------------------------

    def _problem(self) -> tuning.Problem:
        """What was learned and is not chosen, cut off the graph of hyperparameters."""
        temperature = torch.as_tensor(self._temperature, dtype=self._dtype, device=self._device).detach()
        return tuning.Problem(
            self._fitted,
            self._prior_mean.detach().to(self._dtype),
            self._prior.sizes,
            self.backend.kind,
            lambda sigma, output_temperature: resolve(self.likelihood, sigma, temperature, output_temperature),
            self._sigma_noise.detach().to(self._dtype),
            self._output_temperature,
            self._posterior_options(),
        )

    def _spread(self, structure: PriorStructure, precision: Tensor) -> Tensor:
        """Precisions in the shape of the prior structure."""
        sizes = self._prior.sizes
        if structure is PriorStructure.DIAG and precision.numel() == len(sizes):
            precision = expand_groups(precision.reshape(-1), sizes)
        return fix_prior_prec_structure(precision, structure, len(sizes), sum(sizes), self._device, self._dtype)

    def _tuning_options(
        self,
        pred_type: PredType | str,
        link_approx: LinkApprox | str,
        n_samples: int,
        generator: torch.Generator | None,
    ) -> Options:
        pairs = self._output_likelihood.n_items > 1
        return self._options(pred_type, False, link_approx, n_samples, generator=generator, fitting=pairs)

    def _repeated(self, options: Options) -> Callable[[], Options]:
        """The same random numbers whenever asked: scores are then smooth functions of hyperparameters."""
        seed = int(torch.randint(2**62, (), generator=options.generator, device=self._device))
        return lambda: replace(options, generator=torch.Generator(self._device).manual_seed(seed))

    def _cached(self, loader: Iterable[Any] | None, pred_type: PredType, what: str) -> tuning.CachedData:
        """Validation data after their one pass."""
        if loader is None:
            msg = f"{what} scores hyperparameters on validation data: pass val_loader=."
            raise InputError(msg)
        with evaluating(self.model):
            batches = iterate(loader, dict_key_y=self.dict_key_y, device=self._device)
            linearize = partial(self._for_tuning, pred_type)
            return tuning.CachedData.collect(batches, linearize, self._frozen_likelihood)

    def _for_tuning(self, pred_type: PredType, x: Inputs) -> Linearization:
        """Inputs, linearized with the model in evaluation mode."""
        with evaluating(self.model):
            return self._linearize(x, pred_type)

    def _search(
        self,
        problem: tuning.Problem,
        data: tuning.CachedData,
        score: tuning.Score,
        options: Options,
        grid: Tensor,
        progress_bar: bool,
    ) -> tuple[Tensor, Tensor]:
        """Scores over a grid of scalar precisions, in the coordinates that their posteriors share."""
        basis = problem.basis(data, grid[:1]) if options.pred_type is PredType.GLM else None
        rotated, likelihood, fresh = data.rotated(basis, self._dtype), problem.likelihood(), self._repeated(options)

        def scores(points: Tensor) -> Tensor:
            posteriors = [problem.posterior(point, likelihood, basis) for point in points.split(1)]
            return rotated.scores(score, posteriors, [likelihood] * len(posteriors), fresh, self._dtype)

        return tuning.search(scores, grid, progress_bar=progress_bar)

    def _initial_noise(self, problem: tuning.Problem, noise: Noise) -> Tensor | None:
        """The residuals' size, if the noise is to be chosen."""
        if noise == "keep":
            return None
        self._second(noise, None)
        found = problem.residual_noise(per_output=noise == "per_output")
        if not bool((found > 0).all()):
            msg = (
                "The model fits every training target exactly: no observation noise is best. Keep a noise of your own."
            )
            raise InputError(msg)
        return found

    def _second(self, noise: Noise | None, output_temperature: bool | None) -> tuple[str | None, int]:
        """The hyperparameter that goes with the prior precision, and whether it has one value or several."""
        if noise not in (None, "keep", "scalar", "per_output"):
            msg = f"noise must be 'keep', 'scalar' or 'per_output'; got {noise!r}."
            raise UnsupportedError(msg)
        has_noise = LIKELIHOODS[self.likelihood].has_noise
        if not has_noise and noise not in (None, "keep"):
            msg = f"noise={noise!r} is the observation noise of regression; {self.likelihood.value} has none."
            raise UnsupportedError(msg)
        if has_noise and output_temperature:
            msg = "output_temperature divides logits; regression has none. Its noise is chosen instead: noise='scalar'."
            raise UnsupportedError(msg)
        if noise == "per_output" and not self._last_layer:
            msg = "noise='per_output' needs a last layer, whose weights belong to outputs; use noise='scalar'."
            raise UnsupportedError(msg)
        if has_noise:
            return (None, 0) if noise == "keep" else ("sigma_noise", 2 if noise == "per_output" else 1)
        return ("output_temperature", 1) if output_temperature in (None, True) else (None, 0)

    def _take_over(self, found: tuning.Tuning, verbose: bool) -> tuning.Tuning:
        """Assign what was found, all of it or nothing."""
        before = dict(vars(self))
        try:
            for name, value in found.hyperparameters.items():
                setattr(self, name, value.detach())
            self.tuning_ = found
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise
        if verbose:
            print(f"Optimized {found}")
        return found


def _checked_limits(name: str, edges: tuple[float, float]) -> tuple[float, float]:
    """Two positive finite numbers in order."""
    try:
        low, high = (float(edge) for edge in edges)
    except (TypeError, ValueError) as error:
        msg = f"{name} must be two numbers (low, high); got {edges!r}."
        raise InputError(msg) from error
    if not 0 < low < high < float("inf"):
        msg = f"{name} must be (low, high) with 0 < low < high, both finite; got ({low}, {high})."
        raise InputError(msg)
    return low, high


__all__ = ["TunedPosterior"]
