"""``NystromPosterior``: what ``fit`` of ELLA learns, and its evidence; the formulas are in ``gp/nystrom.py``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laplace import checks, linalg, tuning
from laplace.baselaplace.features import FeatureFit, FeatureLaplace
from laplace.curvature import CurvatureInterface
from laplace.enums import Likelihood, LinkApprox, PredType
from laplace.errors import InputError, numbered
from laplace.gp.nystrom import NystromMap, feature_gram, leading_directions, log_det_ratio
from laplace.gp.posterior import FeatureMap, FeaturePrecision, FunctionLinearization
from laplace.gp.subsample import Piece, Reservoir, choose_columns
from laplace.network import Batch, iterate
from laplace.predictive import Linearization, Options
from laplace.schema import Table, finite, listed, nested, real, symmetric, tensor, whole
from laplace.types import Inputs, Scalar


class NystromPosterior(FeatureLaplace):
    """A posterior over the weights of Nyström features. See ``ELLA`` for the parameters."""

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
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        seed: int = 1234,
        *,
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
    ) -> None:
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
        data ``val_examples`` and ``val_nll`` (mean, in nats). The model is left as it was found. When something is
        raised, so is this object.
        """
        checks.loader("train_loader", train_loader)
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
        self._fit_changed()

    def _iterate(self, loader: Iterable[Any], progress_bar: bool = False) -> Iterator[Batch]:
        return iterate(
            loader,
            dict_key_x=self.dict_key_x,
            dict_key_y=self.dict_key_y,
            device=self._device,
            progress_bar=progress_bar,
            description="[Fitting]",
        )

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
        for piece in reservoir.pieces():
            turns = range(start, start + piece.n_rows) if balanced else None
            parts.append((piece.x, self._columns(piece, turns)))
            start += piece.n_rows
        return leading_directions(self._points(parts), self.n_eigenvalues)

    def _columns(self, piece: Piece, turns: Sequence[int] | None) -> Tensor:
        """One output of each datum, at an unmasked position if it has one."""
        f = self._linearize(piece.x, PredType.NN).f
        n_outputs, n_positions = f.shape[-1], f[0].numel() // f.shape[-1]
        kept: list[list[int]] = [[] for _ in range(piece.n_rows)]
        found = self._frozen_likelihood.flatten(f, piece.y).kept
        if found is not None:
            for row in found.tolist():
                kept[row // n_positions].append(row % n_positions)
        unmasked = [rows or list(range(n_positions)) for rows in kept]
        return choose_columns(piece.noise, unmasked, n_outputs, turns).to(f.device)

    def _validation(self, loader: Iterable[Any], directions: Tensor) -> tuning.CachedData:
        """Features of validation data, after their one pass."""

        def linearize(x: Inputs) -> Linearization:
            return FunctionLinearization.of(self._linearize(x), NystromMap(directions), self._dtype)

        return tuning.CachedData.collect(self._iterate(loader), linearize, self._frozen_likelihood)

    def _accumulate(
        self, batches: Iterator[Batch], directions: Tensor, data: tuning.CachedData | None, every: int
    ) -> tuple[FeatureFit, dict[str, list[Any]]]:
        """Add up what the data say about the features, until validation data stop it."""
        features, likelihood = NystromMap(directions), self._frozen_likelihood
        gram = directions.new_zeros(len(directions), len(directions), dtype=torch.float64)
        nll, counts, best = torch.zeros_like(gram[0, 0]), (0, 0), math.inf
        history: dict[str, list[Any]] = {"processed_examples": [], "val_examples": [], "val_nll": [], "tuning": []}
        kept: FeatureFit | None = None

        def now() -> FeatureFit:
            learned = {"directions": directions, "gram": gram.to(self._dtype)}
            return FeatureFit(
                self._center.to(self._dtype), learned, nll.to(self._dtype), *counts, self._count_outputs()
            )

        def rises(data: tuning.CachedData) -> bool:
            """Look at the validation data; what is there now is kept unless the score got worse."""
            nonlocal best, kept
            score = self._score(data, gram)
            history["val_examples"].append(counts[0])
            history["val_nll"].append(score)
            if score > best:
                return True
            best, kept = score, now()
            return False

        for count, batch in enumerate(batches, 1):
            with numbered(count - 1, batch.x):
                at, positions = self._tangents_at(batch.x, batch.y)
            phi = features.features(at)
            phi = phi if positions.kept is None else phi[positions.kept]
            gram = gram + feature_gram(phi, positions.f, likelihood)
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

    # -- posterior ----------------------------------------------------------------------------------------------------

    def _feature_map(self) -> FeatureMap:
        return NystromMap(self._fitted.tensors["directions"])

    def _learned(self) -> Tensor:
        return self._fitted.tensors["gram"] * self._output_likelihood.scale

    @property
    def log_det_ratio(self) -> Scalar:
        """``log |A + δ I| − K log δ``: of all weights it is at least that."""
        return log_det_ratio(self._posterior)

    def log_marginal_likelihood(
        self, prior_precision: float | Tensor | None = None, sigma_noise: float | Tensor | None = None
    ) -> Scalar:
        """Laplace approximation of log p(D) with the features' log-determinant, in nats; differentiable in both.

        Parameters
        ----------
        prior_precision, sigma_noise
            Assigned first when given, and kept, with their gradients.

        Returns
        -------
        ``[]``, in nats, summed over the data that were used: at least that of ``FullLaplace``, and equal to it where
        the features span the derivatives at the training data.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        InputError
            If a value is not positive or not finite.
        """
        self._fitted  # noqa: B018 - raises before anything is assigned
        sigma_noise = self._sigma_noise if sigma_noise is None else self._checked_sigma_noise(sigma_noise)
        if prior_precision is not None:
            self.prior_precision = prior_precision
        self.sigma_noise = sigma_noise
        return self.log_likelihood - 0.5 * (self.log_det_ratio + self.scatter)

    # -- validation scores ------------------------------------------------------------------------------------------

    def _score(self, data: tuning.CachedData, gram: Tensor) -> float:
        """Mean negative log predictive density at the present hyperparameters."""
        precision = self._prior_precision.detach().to(self._dtype)
        return float(self._scores(data, gram, precision, None, self._grid_options(LinkApprox.PROBIT, 1, None)))

    def _grid_options(
        self, link_approx: LinkApprox | str, n_samples: int, generator: torch.Generator | None
    ) -> Options:
        return self._function_options(PredType.GP, False, link_approx, n_samples, generator=generator, for_targets=True)

    def _scores(self, data: tuning.CachedData, gram: Tensor, points: Tensor, loss: Any, options: Options) -> Tensor:
        """A validation score at several prior precisions, ``[points]``."""
        likelihood = self._frozen_likelihood
        learned = (gram * likelihood.scale).to(self._dtype)
        precisions = [FeaturePrecision.of(learned, point) for point in points]
        score = tuning.choose_score(loss, likelihood, options.pred_type)
        seed = tuning.seed_of(options.generator)

        def fresh() -> Options:
            # The same random numbers at each point: the loss is then a smooth function of the prior.
            return replace(options, generator=torch.Generator(self._device).manual_seed(seed))

        return data.scores(score, precisions, [likelihood] * len(precisions), fresh, self._dtype)

    # -- saving -------------------------------------------------------------------------------------------------------

    state_entries: ClassVar[Table] = {"subsample_size": whole(1), "n_eigenvalues": whole(1), "seed": whole(0)}
    _learned_entries: ClassVar[Table] = {"directions": tensor(("features", "P")), "gram": symmetric("features")}
    _history_entries: ClassVar[Table] = {
        "processed_examples": listed(whole(0)),
        "val_examples": listed(whole(0)),
        "val_nll": listed(real),
        "tuning": listed(nested({"prior_precision": finite(above=0), "val_nll": real})),
    }

    def _choices(self) -> dict[str, Any]:
        sizes = {"subsample_size": self.subsample_size, "n_eigenvalues": self.n_eigenvalues, "seed": self.seed}
        return {**super()._choices(), **sizes}

    def _restore(self, state: Any) -> None:
        super()._restore(state)
        self.subsample_size = checks.whole("subsample_size", state["subsample_size"])
        self.n_eigenvalues = checks.whole("n_eigenvalues", state["n_eigenvalues"])
        self.seed = state["seed"]


__all__ = ["NystromPosterior"]
