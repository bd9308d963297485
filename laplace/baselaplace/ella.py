"""``ELLA`` and ``LLELLA``: Nyström features (``functional_approximation="nystrom"``); their formulas are in ``gp/``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from laplace import checks, linalg, processes, tuning
from laplace.baselaplace.described import described
from laplace.baselaplace.features import FeatureLaplace
from laplace.baselaplace.keywords import BackendKeywords, FurtherKeywords, LossLike
from laplace.baselaplace.tuned import collected
from laplace.curvature import CurvatureInterface
from laplace.enums import LinkApprox, PredType, PriorStructure, TuningMethod
from laplace.errors import InputError, numbered
from laplace.fit import Fit
from laplace.gp.feature_curvature import NystromCurvature
from laplace.gp.nystrom import NystromMap, feature_gram, leading_directions
from laplace.gp.posterior import FeatureMap, FunctionLinearization
from laplace.gp.subsample import Drawn, Reservoir, choose_columns
from laplace.likelihoods import L_co
from laplace.network import Batch, full_precision
from laplace.predictive import Linearization
from laplace.prior import GaussianPrior
from laplace.schema import Table, finite, listed, nested, real, whole
from laplace.structures import AbstractCurvature
from laplace.tuning import methods
from laplace.types import Inputs, LinkApproxLike, PredTypeLike, PriorStructureLike, TuningMethodLike


@described
class ELLA(FeatureLaplace[L_co]):
    """Accelerated linearized Laplace: the kernel of the network is replaced by K Nyström features.

    Parameters
    ----------
    subsample_size
        M, how many training examples the features are made of, one output each.
    n_eigenvalues
        K, how many features; at most M.
    seed
        Seed of the choice of the subsample and its outputs.

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
    the prior allows outside them is left out. ``fit`` goes over the data twice and costs one backward pass per output;
    memory is K vectors of weights.

    References
    ----------
    Deng, Zhou & Zhu (2022), "Accelerated linearized Laplace approximation for Bayesian deep learning". arXiv:2210.12642
    """

    curvature_type: ClassVar[type[AbstractCurvature]] = NystromCurvature

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
        subsample_size: int,
        n_eigenvalues: int,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: BackendKeywords | None = None,
        seed: int = 1234,
        *,
        curvature_dtype: torch.dtype | None = None,
        output_key: str | int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        output_dim: int | None = None,
        shift_labels: bool | None = None,
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
            output_key=output_key,
            output_fn=output_fn,
            output_dim=output_dim,
            shift_labels=shift_labels,
        )
        self._check_kind()
        self.subsample_size = checks.whole("subsample_size", subsample_size)
        self.n_eigenvalues = checks.whole("n_eigenvalues", n_eigenvalues)
        if self.n_eigenvalues > self.subsample_size:
            msg = (
                f"A kernel of subsample_size={subsample_size} data has as many eigenvalues; n_eigenvalues="
                f"{n_eigenvalues} is above. Lower it, or take a larger subsample."
            )
            raise InputError(msg)
        self.seed = checks.whole("seed", seed, 0)

    # -- fit ----------------------------------------------------------------------------------------------------------

    @linalg.lasting
    def fit(
        self,
        train_loader: Iterable[Any],
        *,
        val_loader: Iterable[Any] | None = None,
        val_steps: int | None = None,
        balanced: bool = False,
        progress_bar: bool = False,
    ) -> Self:
        """Choose features, and learn what the data say about them.

        Parameters
        ----------
        train_loader
            Yields batches; it is gone over twice, so an iterator that can be used once is refused.
        val_loader
            Validation batches: adding training data, which narrows the posterior, ends as soon as the negative log
            predictive density on these rises; the best posterior is kept (section 4.3 of the paper).
        val_steps
            How many training batches there are between two looks at the validation data; 1 when ``None``. The last look
            is at the end of the data.
        balanced
            Draw the subsample with equal numbers of each class, and deal outputs to it in turn; else both at random.
            Rows whose target is masked belong to no class and are not drawn.
        progress_bar
            Show a progress bar.

        Returns
        -------
        This object.

        Raises
        ------
        InputError
            If a loader is empty or can be used once only, yields something else than batches or valid targets, has
            fewer data than the subsample needs, or ``val_steps`` comes without ``val_loader``.
        UnsupportedError
            If model and likelihood do not fit together.

        Warns
        -----
        NumericalWarning
            If the kernel of the subsample has fewer eigenvalues than are asked for.

        Notes
        -----
        ``fit_history_`` holds the numbers of ``processed_examples`` after each batch, and of each look at validation
        data ``val_examples`` and ``val_nll`` (mean, in nats). The model is left as it was found, and if
        fitting fails, this object as well.
        """
        checks.loader("train_loader", train_loader)
        processes.refuse(type(self).__name__)
        if isinstance(train_loader, Iterator):
            msg = (
                "fit goes over the training data twice, and this loader can be used once only. Pass a DataLoader or a "
                "list of batches."
            )
            raise InputError(msg)
        if val_steps is not None and val_loader is None:
            msg = "val_steps says how often to look at validation data: pass val_loader= with it."
            raise InputError(msg)
        every = 1 if val_steps is None else checks.whole("val_steps", val_steps)
        checks.flags(balanced=balanced, progress_bar=progress_bar)
        if balanced:
            self._unit_likelihood.check_balanced()
        with self._fitting():
            directions = self._directions(train_loader, balanced)
            batches = self._iterate(train_loader, progress_bar)
            data = None if val_loader is None else self._validation(val_loader, directions)
            fit, history = self._accumulate(batches, directions, data, every)
        self._fit, self.fit_history_ = fit, history
        self._hyperparameters_changed()
        return self

    def _directions(self, train_loader: Iterable[Any], balanced: bool) -> Tensor:
        """Vᵀ, ``[K, P]``, from a subsample of the data."""
        reservoir = Reservoir(self.subsample_size, self.seed, balanced=balanced)
        n_rows = 0
        for batch in self._iterate(train_loader):
            reservoir.add(batch.x, batch.y)
            n_rows += len(batch.y)
        if not reservoir.n_seen:
            what = f"All {n_rows} rows of training data are masked" if n_rows else "The training loader is empty"
            msg = f"{what}: there is nothing to make features of."
            raise InputError(msg)
        parts: list[tuple[Inputs, Tensor]] = []
        start = 0
        for some in reservoir.batches():
            turns = range(start, start + some.n_rows) if balanced else None
            parts.append((some.x, self._columns(some, turns)))
            start += some.n_rows
        return leading_directions(self._points(parts), self.n_eigenvalues)

    def _columns(self, some: Drawn, turns: Sequence[int] | None) -> Tensor:
        """One output of each datum, at an unmasked position if it has one."""
        f = self._linearize(some.x, PredType.NN).f
        n_outputs, n_positions = f.shape[-1], f[0].numel() // f.shape[-1]
        kept: list[list[int]] = [[] for _ in range(some.n_rows)]
        found = self._frozen_likelihood.flatten(f, some.y).kept
        if found is not None:
            for row in found.tolist():
                kept[row // n_positions].append(row % n_positions)
        unmasked = [rows or list(range(n_positions)) for rows in kept]
        return choose_columns(some.noise, unmasked, n_outputs, turns).to(f.device)

    def _validation(self, loader: Iterable[Any], directions: Tensor) -> tuning.CachedData:
        """Features of validation data, after their one pass."""

        def linearize(x: Inputs) -> Linearization:
            return FunctionLinearization.of(self._linearize(x), NystromMap(directions), self._dtype)

        return tuning.CachedData.collect(self._iterate(loader), linearize, self._frozen_likelihood)

    def _accumulate(
        self, batches: Iterator[Batch], directions: Tensor, data: tuning.CachedData | None, every: int
    ) -> tuple[Fit, dict[str, list[Any]]]:
        """Add up what the data say about the features, until validation data stop it."""
        features, likelihood = NystromMap(directions), self._frozen_likelihood
        gram = directions.new_zeros(len(directions), len(directions), dtype=torch.float64)
        nll, counts, best = torch.zeros_like(gram[0, 0]), (0, 0), math.inf
        history: dict[str, list[Any]] = {"processed_examples": [], "val_examples": [], "val_nll": [], "tuning": []}
        kept: Fit | None = None

        def now() -> Fit:
            mean = self._known("fit").vector().to(self._dtype)
            learned = NystromCurvature(directions, gram.to(self._dtype))
            return Fit(mean, learned, nll.to(self._dtype), *counts, self._random_weights.n_outputs(self.backend))

        def rises(data: tuning.CachedData) -> bool:
            """Look at the validation data; what is there now is kept unless the score got worse."""
            nonlocal best, kept
            score = self._score(data, NystromCurvature(directions, gram.to(self._dtype)))
            history["val_examples"].append(counts[0])
            history["val_nll"].append(score)
            if score > best:
                return True
            best, kept = score, now()
            return False

        for count, batch in enumerate(batches, 1):
            with numbered(count - 1, batch.x):
                at, positions = self._jacobian_at(batch.x, batch.y)
            phi = features.features(at)
            phi = phi if positions.kept is None else phi[positions.kept]
            gram = gram + feature_gram(phi, likelihood.observed(positions.f, positions.y), likelihood)
            nll = nll + likelihood.nll(positions.f, positions.y)
            counts = counts[0] + len(batch.y), counts[1] + len(positions.f)
            history["processed_examples"].append(counts[0])
            if data is not None and count % every == 0 and rises(data):
                break
        if not counts[1]:
            msg = f"All {counts[0]} rows of training data are masked: there is nothing to learn from."
            raise InputError(msg)
        if data is not None and history["val_examples"][-1:] != [counts[0]]:
            # The batches after the last look: without another one they would be left out unseen.
            rises(data)
        return now() if kept is None else kept, history

    def _score(self, data: tuning.CachedData, learned: NystromCurvature) -> float:
        """Mean negative log predictive density at the present hyperparameters."""
        likelihood, options = self._frozen_likelihood, self._tuning_options(PredType.GP, LinkApprox.PROBIT, 1, None)
        prior = GaussianPrior(
            self._prior_mean.detach(), self._prior_precision.detach().to(self._dtype), self._prior.sizes
        )
        posterior = (learned * likelihood.scale).posterior(prior)
        measure = tuning.choose_score(None, likelihood, options.pred_type)
        return float(data.scores(measure, [posterior], [likelihood], lambda: options, self._dtype)[0])

    def _feature_map(self) -> FeatureMap:
        curvature = self._fitted.curvature
        assert isinstance(curvature, NystromCurvature), "made by this class"
        return NystromMap(curvature.directions)

    # -- tuning -------------------------------------------------------------------------------------------------------

    def optimize_prior_precision(
        self,
        pred_type: PredTypeLike = PredType.GP,
        method: TuningMethodLike = TuningMethod.GRIDSEARCH,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: PriorStructureLike = PriorStructure.SCALAR,
        val_loader: Iterable[Any] | None = None,
        loss: LossLike | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: LinkApproxLike = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        **further: Unpack[FurtherKeywords],
    ) -> None:
        """Choose the prior precision and assign it; the features stay.

        Parameters
        ----------
        pred_type
            ``"gp"`` or ``"glm"``, which are the same.
        method
            ``"gridsearch"``: the loss on validation data. ``"marglik"``: ``log_marginal_likelihood``.
        n_steps, lr, init_prior_prec
            For ``"marglik"``: the most iterations, the first trial step, and where to start.
        prior_structure
            ``"scalar"``.
        val_loader, loss, log_prior_prec_min, log_prior_prec_max, grid_size, link_approx, n_samples, log_prior_prec_base
            For ``"gridsearch"``, as in ``ParametricLaplace.optimize_prior_precision``.
        verbose
            Print the result in one line.
        progress_bar
            Show a progress bar.
        **further
            The keyword arguments that follow in ``ParametricLaplace.optimize_prior_precision``: ``generator``,
            ``noise``, ``bounds``.

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
        One pass over the validation data, whatever the size of the grid. If tuning fails the prior precision is what it
        was.
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
            **further,
        )

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
        problem, points = self._problem(), self._checked("grid", grid, positive=True).detach().reshape(-1)
        options = self._tuning_options(PredType.GP, LinkApprox.PROBIT, 1, None)
        asked = tuning.Settings(options, PriorStructure.SCALAR, 0, None, "keep", val_loader, progress_bar=False)
        data, score = (
            collected(self, asked, val_loader, "validation"),
            tuning.choose_score(None, problem.likelihood(), options.pred_type),
        )
        with torch.no_grad(), full_precision(self._device):
            values = methods.SCORES[TuningMethod.GRIDSEARCH](problem, asked, data, score, points)(points)
        if not bool(torch.isfinite(values).any()):
            msg = "The validation loss is finite at none of the prior precisions; the prior precision was not changed."
            raise InputError(msg)
        best = int(torch.where(torch.isfinite(values), values, torch.inf).argmin())
        self.prior_precision = points[best]
        tried = [{"prior_precision": float(p), "val_nll": float(v)} for p, v in zip(points, values, strict=True)]
        self.fit_history_ = {**self.fit_history_, "tuning": [*self.fit_history_["tuning"], *tried]}

    # -- saving -------------------------------------------------------------------------------------------------------

    state_entries: ClassVar[Table] = {"subsample_size": whole(1), "n_eigenvalues": whole(1), "seed": whole(0)}
    _saved: ClassVar[tuple[str, ...]] = (*FeatureLaplace._saved, "subsample_size", "n_eigenvalues", "seed")
    _history_entries: ClassVar[Table] = {
        "processed_examples": listed(whole(0)),
        "val_examples": listed(whole(0)),
        "val_nll": listed(real),
        "tuning": listed(nested({"prior_precision": finite(above=0), "val_nll": real})),
    }


__all__ = ["ELLA"]
