"""``VaLLA`` and ``LLVaLLA``: variational inducing points (``functional_approximation="variational"``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from typing_extensions import Self

from laplace import checks, linalg, processes, tuning
from laplace.baselaplace import inducing
from laplace.baselaplace.described import described
from laplace.baselaplace.features import FeatureLaplace
from laplace.baselaplace.keywords import BackendKeywords
from laplace.baselaplace.variational import Source, scored
from laplace.curvature import CurvatureInterface
from laplace.enums import LinkApprox, PredType
from laplace.errors import InputError, UnsupportedError
from laplace.fit import Fit
from laplace.gp.feature_curvature import NO_EVIDENCE, InducingCurvature
from laplace.gp.posterior import FeatureMap, FunctionLinearization
from laplace.gp.training import Parameters, Validation, train
from laplace.gp.variational import InducingMap, Objective, kernel_factor, triangular_root
from laplace.likelihoods import AbstractLikelihood, L_co
from laplace.likelihoods.base import check_outputs
from laplace.network import evaluating, full_precision
from laplace.network.batches import copied, count_rows, to_device
from laplace.predictive import Linearization
from laplace.schema import Known, Table, finite, listed, real, refuse, whole
from laplace.structures import AbstractCurvature
from laplace.types import Inputs


@described
class VaLLA(FeatureLaplace[L_co]):
    """Variational linearized Laplace: a sparse Gaussian process around the outputs, with M inducing points.

    Parameters
    ----------
    inducing_locations
        Inputs of the inducing points, a batch of M; or ``"random"`` or ``"kmeans"``: chosen from the training data (the
        second are cluster centers of inputs that are one floating-point tensor).
    num_inducing
        M; needed when locations are chosen, else it must be their number.
    inducing_classes
        Output of each inducing point, ``[M]`` (with several positions: index of the flattened outputs); dealt in turn
        when ``None``.
    sigma_noise
        Observation noise from which training starts, in target units: one number for all outputs; regression only.
    prior_precision
        Precision of the isotropic Gaussian prior from which training starts, in 1/weight²: one number.
    temperature
        T of the tempered likelihood ``p(y|f)^(1/T)``; once fitted, another one needs a new object.
    seed
        Seed of chosen locations, and of ``mc_softmax_samples``.
    alpha
        Which divergence is minimized, in [0, 1]: 0 is that of variational inference, whose negative objective bounds
        the evidence from below; 1 fits the predictive density.
    mc_softmax_samples
        Samples of the logits in the objective of a classifier; 0 is a closed form.

    Raises
    ------
    UnsupportedError
        If an option does not exist or does not fit another.
    InputError
        If a hyperparameter is not finite or not positive, ``alpha`` is not in [0, 1], or locations, their number and
        classes do not fit.

    Notes
    -----
    The mean is the network; away from inducing points the posterior is the prior. Inducing inputs stay where they are,
    so that kernels with the data are computed once. With all outputs of all data as inducing points, α = 0 and a
    Gaussian likelihood it is the posterior of ``FullLaplace``.

    References
    ----------
    Ortega, Rodríguez Santana & Hernández-Lobato (2024), "Variational linearized Laplace approximation for Bayesian deep
    learning". arXiv:2302.12565
    """

    curvature_type: ClassVar[type[AbstractCurvature]] = InducingCurvature
    num_inducing: int
    seed: int
    alpha: float
    mc_softmax_samples: int
    _asked_locations: Inputs
    _asked_classes: Tensor | None
    _map_cache: tuple[InducingCurvature, InducingMap] | None = None
    """Derivatives at the inducing points, and of which curvature they are."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
        inducing_locations: Inputs,
        num_inducing: int | None = None,
        inducing_classes: Tensor | Sequence[int] | None = None,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: BackendKeywords | None = None,
        seed: int = 0,
        alpha: float = 1.0,
        mc_softmax_samples: int = 0,
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
        self.num_inducing = inducing.count_inducing(inducing_locations, num_inducing)
        self._asked_locations = copied(inducing_locations)
        self._asked_classes = inducing.checked_classes(inducing_classes, self.num_inducing)
        self.seed = checks.whole("seed", seed, 0)
        self.alpha = inducing.checked_alpha(alpha)
        self.mc_softmax_samples = checks.whole("mc_softmax_samples", mc_softmax_samples, 0)
        if mc_softmax_samples:
            self._unit_likelihood.check_sampled_energy()

    @property
    def inducing_locations(self) -> Inputs:
        """Inputs of the inducing points; before ``fit`` what was asked for."""
        found = self._trained
        return copied(self._asked_locations if found is None else found.inducing_locations)

    @property
    def inducing_classes(self) -> Tensor | None:
        """Output of each inducing point, ``[M]``; before ``fit`` what was asked for."""
        found = self._trained
        return copied(self._asked_classes if found is None else found.inducing_classes)

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
    ) -> Self:
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

        Returns
        -------
        This object.

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
        estimated from the batch) and ``val_nll``. The model is left as it was found; if fitting fails, so is this
        object.
        """
        checks.loader("train_loader", train_loader)
        processes.refuse(type(self).__name__)
        iterations = checks.whole("iterations", iterations)
        lr = checks.number("lr", lr, positive=True)
        override = checks.flag("override", override)
        checks.flags(train_hyperparameters=train_hyperparameters, progress_bar=progress_bar)
        if val_steps is not None and val_loader is None:
            msg = "val_steps says how often to look at validation data: pass val_loader= with it."
            raise InputError(msg)
        every = iterations if val_steps is None else checks.whole("val_steps", val_steps)
        previous = None if override else self._trained
        with self._fitting():
            z, classes, features = self._inducing(train_loader, previous)
            likelihood, alpha, n_samples = self._frozen_likelihood, self.alpha, self.mc_softmax_samples
            read = partial(self._iterate, train_loader)
            source = Source(read, self._jacobian_at, features, likelihood, alpha, n_samples)
            sums = source.sums(self._iterate(train_loader, progress_bar))
            start = self._start(sums.gram, previous)
            batches = itertools.cycle(sums.kept) if sums.kept else source.again_and_again()
            mean = self._known("fit").vector().to(self._dtype)
            shift = (mean - self._prior_mean.detach().to(self._dtype)).square().sum()
            noise = torch.Generator(self._device).manual_seed(self.seed)
            objective = Objective(alpha, sums.n_positions, shift, n_samples, noise)
            watch = None if val_loader is None else Validation(self._score(val_loader, features), every)
            found, values, scores = train(
                objective,
                batches,
                start,
                self._likelihood_of,
                iterations=iterations,
                lr=lr,
                hyperparameters=train_hyperparameters,
                monotone=len(sums.kept) == 1 and not n_samples,
                validation=watch,
                progress_bar=progress_bar,
            )
        learned = InducingCurvature(z, classes, features.kernel_root, found.root, len(mean))
        counts = sums.n_data, sums.n_positions, self._random_weights.n_outputs(self.backend)
        history: dict[str, list[Any]] = {"objective": values, "val_nll": scores}
        if previous is not None:
            history = {name: [*self.fit_history_[name], *new] for name, new in history.items()}
        if train_hyperparameters:
            delta = found.log_delta.exp()
            sigma = self._sigma_noise if found.log_sigma is None else found.log_sigma.exp()
            # Both are checked before either is assigned.
            delta, sigma = self._checked_prior_precision(delta), self._checked_sigma_noise(sigma)
            self._prior_precision, self._sigma_noise = delta, sigma
        self._fit = Fit(mean, learned, sums.nll.to(self._dtype), *counts)
        self.fit_history_ = history
        self._hyperparameters_changed()
        return self

    @property
    def _trained(self) -> InducingCurvature | None:
        """What was trained, if something was."""
        found = self._fit.curvature if "_fit" in vars(self) else None
        assert found is None or isinstance(found, InducingCurvature), "made by this class"
        return found

    def _inducing(
        self, loader: Iterable[Any], previous: InducingCurvature | None
    ) -> tuple[Inputs, Tensor, InducingMap]:
        """The inducing points: inputs, outputs, and features with their kernel."""
        if previous is not None:
            # Their kernel is made again: the model may have been trained, and R must be that of the derivatives.
            return self._with_kernel(previous.inducing_locations, previous.inducing_classes)
        z = self._asked_locations
        if isinstance(z, str):
            z = inducing.drawn(z, self.num_inducing, loader, self._iterate, self.seed)
        z = to_device(z, self._device)
        f = inducing.outputs_at(lambda: self._linearize(z, PredType.NN).f, self.num_inducing)
        self._check_prior(self._prior_precision, self._prior_mean)
        return self._with_kernel(z, inducing.classes_of(self._asked_classes, f))

    def _with_kernel(self, z: Inputs, classes: Tensor) -> tuple[Inputs, Tensor, InducingMap]:
        points = self._points([(z, classes)])
        return z, classes, InducingMap(points, kernel_factor(points))

    def _start(self, gram: Tensor, previous: InducingCurvature | None) -> Parameters:
        """Where training starts."""
        likelihood, delta, sigma = self._frozen_likelihood, self._prior_precision.squeeze(0), self._sigma_noise
        root = triangular_root(gram * likelihood.scale) if previous is None else previous.root
        log_delta, log_sigma = (value.detach().to(self._dtype).log() for value in (delta, sigma))
        return Parameters(root, log_delta, log_sigma if "sigma_noise" in likelihood.hyperparameters else None)

    def _likelihood_of(self, sigma: Tensor | None) -> AbstractLikelihood:
        """The likelihood at a noise."""
        if sigma is None:
            return self._frozen_likelihood
        temperature = linalg.number(self._temperature, *self._place).detach()
        return self._unit_likelihood.at(sigma, temperature, 1.0)

    def _score(self, loader: Iterable[Any], features: InducingMap) -> Any:
        """The mean negative log predictive density of validation data, as a function of parameters."""

        def linearize(x: Inputs) -> Linearization:
            return FunctionLinearization.of(self._linearize(x), features, self._dtype)

        data = tuning.CachedData.collect(self._iterate(loader), linearize, self._frozen_likelihood)
        options = self._tuning_options(PredType.GP, LinkApprox.PROBIT, 1, None)
        return scored(data, self._likelihood_of, options, self._dtype)

    # -- posterior ----------------------------------------------------------------------------------------------------

    @linalg.lasting
    def _feature_map(self) -> FeatureMap:
        self._fitted  # noqa: B018 - follows the model, which may have been moved
        curvature, kept = self._trained, self._map_cache
        assert curvature is not None, "it is fitted"
        if kept is None or kept[0] is not curvature:
            with evaluating(self.model), torch.no_grad(), full_precision(self._device):
                points = self._points([(curvature.inducing_locations, curvature.inducing_classes)])
            self._map_cache = kept = curvature, InducingMap(points, curvature.kernel_root)
        return kept[1]

    def log_marginal_likelihood(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        """Not available: what is trained is a bound or a divergence, and is found in ``fit_history_["objective"]``.

        Parameters
        ----------
        *args, **kwargs
            Unused.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise UnsupportedError(NO_EVIDENCE)

    def optimize_prior_precision(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        """Not available: ``fit`` trains the prior precision together with what the data say.

        Parameters
        ----------
        *args, **kwargs
            Unused.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise UnsupportedError(inducing.NO_TUNING)

    def tune(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG002
        """Not available, as ``optimize_prior_precision``.

        Parameters
        ----------
        *args, **kwargs
            Unused.

        Raises
        ------
        UnsupportedError
            Always.
        """
        self.optimize_prior_precision()

    # -- saving -------------------------------------------------------------------------------------------------------

    state_entries: ClassVar[Table] = {
        "num_inducing": whole(1, "points"),
        "alpha": finite(low=0, high=1),
        "seed": whole(0),
        "mc_softmax_samples": whole(0),
    }
    _saved: ClassVar[tuple[str, ...]] = (*FeatureLaplace._saved, "num_inducing", "alpha", "seed", "mc_softmax_samples")
    _history_entries: ClassVar[Table] = {"objective": listed(real), "val_nll": listed(real)}

    def _check_taken(self, known: Known) -> None:
        learned = self._fitted.curvature
        assert isinstance(learned, InducingCurvature), "made by this class"
        if count_rows(learned.inducing_locations) != known["points"]:
            refuse("'learned'['inducing_locations']", f"{known['points']} inputs", learned.inducing_locations)
        if not bool((learned.kernel_root.diagonal() > 0).all()):
            refuse("'learned'['kernel_root']", "a triangular root with a positive diagonal", learned.kernel_root)
        self._feature_map()
        with evaluating(self.model), torch.no_grad():
            check_outputs(self._linearize(learned.inducing_locations).f)
        super()._check_taken(known)

    def _take(self, state: Mapping[str, Any], sizes: Sequence[int]) -> None:
        # The temperature of a state comes with what was trained at it; when loading fails all comes back.
        vars(self).pop("_fit", None)
        super()._take(state, sizes)

    def _curvature_from(self, state: Mapping[str, Any]) -> AbstractCurvature:
        return InducingCurvature.from_state(state, self._dtype, self._known("load_state_dict").n_params)

    def _moved(self, curvature: AbstractCurvature) -> AbstractCurvature:
        assert isinstance(curvature, InducingCurvature), "made by this class"
        return curvature.moved(self._device, self._dtype)

    def __getstate__(self) -> dict[str, Any]:
        """What pickling takes along: not the derivatives of the inducing points."""
        return {**super().__getstate__(), "_map_cache": None}


__all__ = ["VaLLA"]
