"""``VariationalPosterior``: how VaLLA is trained and what it learns; the formulas are in ``gp/variational.py``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from laplace import checks, linalg, tuning
from laplace.baselaplace.features import KEPT_ELEMENTS, FeatureFit, FeatureLaplace
from laplace.baselaplace.inducing import choose_inducing
from laplace.enums import LinkApprox, PredType
from laplace.errors import InputError, UnsupportedError, numbered
from laplace.gp.nystrom import feature_gram
from laplace.gp.posterior import FeatureMap, FeaturePrecision, FunctionLinearization, Rest
from laplace.gp.training import Parameters, Validation, train
from laplace.gp.variational import InducingMap, Objective, Statistics, kernel_factor, needs_covariance, triangular_root
from laplace.likelihoods import AbstractLikelihood
from laplace.likelihoods.base import check_outputs
from laplace.network import Batch, evaluating, full_precision, iterate
from laplace.network.batches import copied, count_rows, to_device
from laplace.predictive import Linearization
from laplace.schema import Known, Table, anything, finite, indices, listed, real, refuse, tensor, whole
from laplace.types import Inputs


class VariationalPosterior(FeatureLaplace):
    """A sparse Gaussian process around the outputs of a network. See ``VaLLA`` for the parameters."""

    num_inducing: int
    seed: int
    alpha: float
    mc_softmax_samples: int
    _asked_locations: Inputs
    _asked_classes: Tensor | None
    _map_cache: dict[str, InducingMap]

    @property
    def inducing_locations(self) -> Inputs:
        """Inputs of the inducing points; before ``fit`` what was asked for."""
        fit: FeatureFit | None = self.__dict__.get("_fit")
        return copied(self._asked_locations if fit is None else fit.tensors["inducing_locations"])

    @property
    def inducing_classes(self) -> Tensor | None:
        """Output of each inducing point, ``[M]``; before ``fit`` what was asked for."""
        fit: FeatureFit | None = self.__dict__.get("_fit")
        return copied(self._asked_classes if fit is None else fit.tensors["inducing_classes"])

    def _checked_temperature(self, value: Any) -> Tensor:
        checked = super()._checked_temperature(value)
        if "_fit" in self.__dict__ and float(checked) != float(self._temperature):
            msg = (
                f"What was trained at the inducing points belongs to temperature={float(self._temperature):.4g} and "
                f"does not scale: an assigned one would have no effect. Construct with temperature="
                f"{float(checked):.4g}, and fit. To soften predictions alone, assign output_temperature."
            )
            raise UnsupportedError(msg)
        return checked

    # -- fit ----------------------------------------------------------------------------------------------------------

    @linalg.lasting
    def fit(
        self,
        train_loader: Iterable[Any],
        *,
        iterations: int = 100,
        lr: float = 0.001,
        val_loader: Iterable[Any] | None = None,
        val_steps: int | None = None,
        progress_bar: bool = False,
        override: bool = True,
        train_hyperparameters: bool = True,
    ) -> None:
        """Train what the data say at the inducing points, with prior precision and noise.

        Parameters
        ----------
        train_loader
            Yields batches.
        iterations
            Steps of Adam, one batch each, in turn.
        lr
            Their size, in the entries of L and the logarithms of hyperparameters.
        val_loader
            Validation batches; the parameters with the best negative log predictive density on these are kept.
        val_steps
            Iterations between two looks at the validation data; only one at the end when ``None``.
        progress_bar
            Show a progress bar.
        override
            Start again; ``False`` goes on from what was trained, with the inducing points it has. If the weights of the
            model have changed since, that is where training starts, and all else is of the new weights.
        train_hyperparameters
            Train prior precision (and the noise of regression); ``False`` leaves them as they are.

        Raises
        ------
        InputError
            If a loader is empty or yields something else than batches or valid targets, numbers are not positive,
            classes of inducing points are no outputs, or the objective is not finite.
        UnsupportedError
            If model and likelihood do not fit together.
        NotPositiveDefiniteError
            If the kernel of the inducing points cannot be factorized.

        Warns
        -----
        NumericalWarning
            If a jitter was added to the kernel of the inducing points, with its size.

        Notes
        -----
        One pass over the data computes their kernels with the inducing points, which are kept while memory allows (else
        computed again each iteration), and the best A at the start, ``Σ φᵀ Λ φ / (σ² T)``: the optimum of a Gaussian
        likelihood at α = 0, and a good start elsewhere. Where the loader yields one batch and nothing is sampled, steps
        that would raise the objective are taken back and the step size halved, so that it never rises.

        ``fit_history_`` holds the ``objective`` before each step (in nats; at α = 0 the negative evidence lower bound,
        estimated from the batch) and ``val_nll``. The model is left as it was found. When something is raised, so is
        this object.
        """
        checks.loader("train_loader", train_loader)
        iterations = checks.whole("iterations", iterations)
        lr = checks.number("lr", lr, positive=True)
        override = checks.flag("override", override)
        checks.flags(train_hyperparameters=train_hyperparameters, progress_bar=progress_bar)
        if val_steps is not None and val_loader is None:
            msg = "val_steps says how often to look at validation data: pass val_loader= with it."
            raise InputError(msg)
        every = iterations if val_steps is None else checks.whole("val_steps", val_steps)
        previous: FeatureFit | None = None if override else self.__dict__.get("_fit")
        with self._fitting():
            z, features = self._inducing(train_loader, previous)
            kept, gram, fit = self._collect(train_loader, features, z, progress_bar)
            start = self._start(gram, previous)
            batches = itertools.cycle(kept) if kept else self._again_and_again(train_loader, features)
            shift = (fit.mean - self._prior_mean.detach().to(self._dtype)).square().sum()
            noise = torch.Generator(self._device).manual_seed(self.seed)
            objective = Objective(self.alpha, fit.n_positions, shift, self.mc_softmax_samples, noise)
            watch = None
            if val_loader is not None:
                watch = Validation(self._score(val_loader, features), every)
            found, values, scores = train(
                objective,
                batches,
                start,
                self._likelihood_of,
                iterations=iterations,
                lr=lr,
                hyperparameters=train_hyperparameters,
                monotone=len(kept) == 1 and not self.mc_softmax_samples,
                validation=watch,
                progress_bar=progress_bar,
            )
        self._accept(fit, found, values, scores, previous, trained=train_hyperparameters)

    def _iterate(self, loader: Iterable[Any], progress_bar: bool = False) -> Iterator[Batch]:
        return iterate(
            loader,
            dict_key_x=self.dict_key_x,
            dict_key_y=self.dict_key_y,
            device=self._device,
            progress_bar=progress_bar,
            description="[Fitting]",
        )

    def _inducing(self, loader: Iterable[Any], previous: FeatureFit | None) -> tuple[dict[str, Any], InducingMap]:
        """The inducing points and their kernel, as state and as features."""
        if previous is not None:
            # Their kernel is made again: the model may have been trained, and R must be that of the derivatives.
            return self._with_kernel(previous.tensors["inducing_locations"], previous.tensors["inducing_classes"])
        z = self._asked_locations
        if isinstance(z, str):
            if isinstance(loader, Iterator):
                msg = (
                    f"inducing_locations={z!r} goes over the training data once more than training, and this loader "
                    "can be used once only. Pass a DataLoader or a list of batches."
                )
                raise InputError(msg)
            z = choose_inducing(z, self.num_inducing, self._iterate(loader), self.seed)
        z = to_device(z, self._device)
        try:
            f = self._linearize(z, PredType.NN).f
        except RuntimeError as error:
            msg = (
                f"The model cannot run on the inducing inputs: {str(error).rstrip('.')}. inducing_locations must be a "
                "batch such as the training loader yields, without targets."
            )
            raise InputError(msg) from error
        check_outputs(f)
        self._check_prior(self._prior_precision, self._prior_mean)
        if len(f) != self.num_inducing:
            msg = (
                f"The model gives {len(f)} rows of outputs for {self.num_inducing} inducing inputs; one each is needed."
            )
            raise InputError(msg)
        n_columns = f[0].numel()
        classes = self._asked_classes
        if classes is None:
            classes = torch.arange(self.num_inducing) % n_columns
        elif bool((classes >= n_columns).any()):
            msg = (
                f"inducing_classes are indices of the {n_columns} outputs of an input, 0..{n_columns - 1}; got "
                f"{int(classes.max())}."
            )
            raise InputError(msg)
        return self._with_kernel(z, classes.to(self._device))

    def _with_kernel(self, z: Inputs, classes: Tensor) -> tuple[dict[str, Any], InducingMap]:
        points = self._points([(z, classes)])
        kernel_root = kernel_factor(points)
        learned = {"inducing_locations": z, "inducing_classes": classes, "kernel_root": kernel_root}
        return learned, InducingMap(points, kernel_root)

    def _statistics(self, batch: Batch, features: InducingMap) -> Statistics:
        """What training needs of a batch."""
        at, positions = self._tangents_at(batch.x, batch.y)
        phi = features.features(at)
        rest = Rest(at, phi)
        whole = needs_covariance(self._frozen_likelihood, self.alpha, self.mc_softmax_samples)
        left = rest.covariance if whole else rest.variance
        if positions.kept is not None:
            phi, left = phi[positions.kept], left[positions.kept]
        # Targets are copied, since batches are kept and loaders may fill the same tensor again.
        return Statistics(positions.f, positions.y.clone(), phi, left)

    def _collect(
        self, loader: Iterable[Any], features: InducingMap, z: dict[str, Any], progress_bar: bool
    ) -> tuple[list[Statistics], Tensor, FeatureFit]:
        """One pass: what training needs, if memory allows; ``Σ φᵀ Λ φ``; and what a fit counts."""
        kept: list[Statistics] | None = []
        likelihood, left = self._frozen_likelihood, KEPT_ELEMENTS
        n = len(features.kernel_root)
        gram = features.kernel_root.new_zeros(n, n, dtype=torch.float64)
        nll, n_data, n_positions = torch.zeros_like(gram[0, 0]), 0, 0
        for index, batch in enumerate(self._iterate(loader, progress_bar)):
            with numbered(index, batch.x):
                some = self._statistics(batch, features)
            n_data, n_positions = n_data + len(batch.y), n_positions + len(some.f)
            if not len(some.f):
                continue
            gram = gram + feature_gram(some.phi, some.f, likelihood)
            nll = nll + likelihood.nll(some.f, some.y)
            left -= some.size
            kept = None if kept is None or left < 0 else [*kept, some]
        if not n_positions:
            what = f"all {n_data} rows of training data are masked" if n_data else "the training loader is empty"
            msg = f"There is nothing to learn from: {what}."
            raise InputError(msg)
        mean, nll = self._known_parameters("fit").vector().to(self._dtype), nll.to(self._dtype)
        fit = FeatureFit(mean, z, nll, n_data, n_positions, self._count_outputs())
        return kept or [], gram.to(self._dtype), fit

    def _again_and_again(self, loader: Iterable[Any], features: InducingMap) -> Iterator[Statistics]:
        """Batches without end, made again each time."""
        while True:
            empty = True
            for batch in self._iterate(loader):
                some = self._statistics(batch, features)
                if len(some.f):
                    empty = False
                    yield some
            if empty:
                msg = "Training goes over the loader more than once, and it yields nothing any more. Pass a DataLoader."
                raise InputError(msg)

    def _start(self, gram: Tensor, previous: FeatureFit | None) -> Parameters:
        """Where training starts."""
        likelihood = self._frozen_likelihood
        root = triangular_root(gram * likelihood.scale) if previous is None else previous.tensors["root"]
        log_delta = self._prior_precision.detach().to(self._dtype).squeeze(0).log()
        log_sigma = (
            self._sigma_noise.detach().to(self._dtype).log() if "sigma_noise" in likelihood.hyperparameters else None
        )
        return Parameters(root, log_delta, log_sigma)

    def _likelihood_of(self, sigma: Tensor | None) -> AbstractLikelihood:
        """The likelihood at a noise."""
        if sigma is None:
            return self._frozen_likelihood
        temperature = torch.as_tensor(self._temperature, dtype=self._dtype, device=self._device).detach()
        return self._unit_likelihood.at(sigma, temperature, 1.0)

    def _score(self, loader: Iterable[Any], features: InducingMap) -> Any:
        """The mean negative log predictive density of validation data, as a function of parameters."""

        def linearize(x: Inputs) -> Linearization:
            return FunctionLinearization.of(self._linearize(x), features, self._dtype)

        data = tuning.CachedData.collect(self._iterate(loader), linearize, self._frozen_likelihood)
        options = self._function_options(PredType.GP, False, LinkApprox.PROBIT, 1, for_targets=True)

        def score(now: Parameters) -> float:
            likelihood = self._likelihood_of(None if now.log_sigma is None else now.log_sigma.exp())
            precision = FeaturePrecision.of(now.root @ now.root.T, now.log_delta.exp())
            measure = tuning.choose_score(None, likelihood, options.pred_type)
            return float(data.scores(measure, [precision], [likelihood], lambda: options, self._dtype)[0])

        return score

    def _accept(
        self,
        fit: FeatureFit,
        found: Parameters,
        values: list[float],
        scores: list[float],
        previous: FeatureFit | None,
        *,
        trained: bool,
    ) -> None:
        """Assign what was trained."""
        tensors = {**fit.tensors, "root": found.root}
        history: dict[str, list[Any]] = {"objective": values, "val_nll": scores}
        if previous is not None:
            history = {name: [*self.fit_history_[name], *new] for name, new in history.items()}
        if trained:
            delta = found.log_delta.exp()
            sigma = self._sigma_noise if found.log_sigma is None else found.log_sigma.exp()
            # Both are checked before either is assigned.
            delta, sigma = self._checked_prior_precision(delta), self._checked_sigma_noise(sigma)
            self._prior_precision, self._sigma_noise = delta, sigma
        self._fit = FeatureFit(fit.mean, tensors, fit.nll, fit.n_data, fit.n_positions, fit.n_outputs)
        self.fit_history_ = history
        self._fit_changed()

    # -- posterior ----------------------------------------------------------------------------------------------------

    def _map_of(self, learned: Any) -> InducingMap:
        with evaluating(self.model), torch.no_grad(), full_precision(self._device):
            points = self._points([(learned["inducing_locations"], learned["inducing_classes"])])
        return InducingMap(points, learned["kernel_root"])

    @linalg.lasting
    def _feature_map(self) -> FeatureMap:
        cache = self._map_cache
        if "map" not in cache:
            cache["map"] = self._map_of(self._fitted.tensors)
        return cache["map"]

    def _fit_changed(self) -> None:
        super()._fit_changed()
        self._map_cache = {}

    def _learned(self) -> Tensor:
        root = self._fitted.tensors["root"]
        return root @ root.T

    # -- saving -------------------------------------------------------------------------------------------------------

    state_entries: ClassVar[Table] = {
        "num_inducing": whole(1, "points"),
        "alpha": finite(low=0, high=1),
        "seed": whole(0),
        "mc_softmax_samples": whole(0),
    }
    _learned_entries: ClassVar[Table] = {
        "inducing_locations": anything,
        "inducing_classes": indices("points"),
        "kernel_root": tensor(("points", "points")),
        "root": tensor(("points", "points")),
    }
    _history_entries: ClassVar[Table] = {"objective": listed(real), "val_nll": listed(real)}

    def _check_taken(self, known: Known) -> None:
        learned = self._fitted.tensors
        if count_rows(learned["inducing_locations"]) != known["points"]:
            refuse("'learned'['inducing_locations']", f"{known['points']} inputs", learned["inducing_locations"])
        if not bool((learned["kernel_root"].diagonal() > 0).all()):
            refuse("'learned'['kernel_root']", "a triangular root with a positive diagonal", learned["kernel_root"])
        self._feature_map()
        with evaluating(self.model), torch.no_grad():
            check_outputs(self._linearize(learned["inducing_locations"]).f)
        super()._check_taken(known)

    def _choices(self) -> dict[str, Any]:
        own = {"num_inducing": self.num_inducing, "alpha": self.alpha, "seed": self.seed}
        return {**super()._choices(), **own, "mc_softmax_samples": self.mc_softmax_samples}

    def _take(self, state: Mapping[str, Any]) -> None:
        # The temperature of a state comes with what was trained at it; when loading fails all comes back.
        if "_fit" in self.__dict__:
            del self._fit
        super()._take(state)

    def _restore(self, state: Any) -> None:
        super()._restore(state)
        for name in ("num_inducing", "alpha", "seed", "mc_softmax_samples"):
            setattr(self, name, state[name])

    def __getstate__(self) -> dict[str, Any]:
        """What pickling takes along: not the derivatives of the inducing points."""
        return {**super().__getstate__(), "_map_cache": {}}


__all__ = ["VariationalPosterior"]
