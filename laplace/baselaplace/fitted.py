"""``FittedLaplace``: what every estimator does with what ``fit`` learned: posterior, evidence, tuning, states.

The work is done by functions of values: ``fitting.py``, ``states.py``, ``tuning/methods.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import checks, linalg, processes, tuning
from laplace.baselaplace import explained, exported, merging, plan, statefile, states, tuned
from laplace.baselaplace.base import BaseLaplace
from laplace.baselaplace.described import described
from laplace.baselaplace.keywords import Average, Limits, ScoreLike
from laplace.baselaplace.statefile import SCHEMA_VERSION, fingerprint, move, signed, warn_without_digest
from laplace.curvature import CurvatureInterface
from laplace.enums import LinkApprox, PredType, PriorStructure, TuningMethod, choose
from laplace.errors import refuse_before_fit
from laplace.fit import Fit
from laplace.likelihoods import AbstractLikelihood, L_co, chosen
from laplace.network import Batch, full_precision, iterate, shards
from laplace.predictive import Linearization
from laplace.prior import GaussianPrior
from laplace.schema import Known, Table, check_entries, nested
from laplace.structures import AbstractCurvature, AbstractPrecision
from laplace.structures.by_hand import independent
from laplace.tuning import Noise, methods
from laplace.types import Inputs, LinkApproxLike, PredTypeLike, PriorStructureLike, Scalar

Own = TypeVar("Own", bound="FittedLaplace")


@described
class FittedLaplace(BaseLaplace[L_co]):
    """A posterior that was fitted, tuned and saved in the same way whatever it is over."""

    curvature_type: ClassVar[type[AbstractCurvature]]
    """How the curvature is stored: the structure."""
    tuning_: tuning.Tuning | None = None
    """What the last tuning found: choice, score and curve; print it, or draw it with ``plot()``."""
    _fit: Fit
    """There once it was fitted."""
    _posterior_cache: dict[str, AbstractPrecision]

    predict, predict_std, plan = explained.predict, explained.predict_std, plan.plan
    merge, subtract, export_module = merging.merge, merging.subtract, exported.export_module

    def _check_prior(self, precision: Tensor, mean: Tensor) -> None:
        subset = self._random_weights.subset
        if subset is not None:
            self._fits_structure(GaussianPrior(mean, precision, subset.sizes))

    def _fits_structure(self, prior: GaussianPrior) -> None:
        """Raise if the structure cannot take a prior; structure classes use it."""

    def _make_backend(self) -> CurvatureInterface:
        self._random_weights.check_unchanged()
        keys: dict[str, Any] = {"dict_key_x": self.dict_key_x, "dict_key_y": self.dict_key_y}
        dtype = {} if self._curvature_dtype is None else {"curvature_dtype": self._curvature_dtype}
        options: dict[str, Any] = {**dtype, **self._backend_kwargs, **keys, **self._random_weights.backend_options()}
        backend = self._backend_cls(self.model, self.likelihood, **options)
        self._random_weights.tell(backend)
        self._check_backend(backend)
        return backend

    def _check_backend(self, backend: CurvatureInterface) -> None:
        """Raise if the back end does not provide what is needed."""
        if not backend.provides(self.curvature_type.name):
            raise backend.cannot(self.curvature_type.name)

    def _linearize(self, x: Inputs, pred_type: PredType = PredType.GLM, **model_kwargs: Any) -> Linearization:
        """Outputs at ``x`` and how they depend on the random weights, around those of the fit if there is one."""
        fit, weights = self.__dict__.get("_fit"), self._random_weights
        if fit is not None:
            weights.warn_if_moved(fit.mean if fit.trained is None else fit.trained)
        graph = torch.is_grad_enabled() and self.enable_backprop
        center = None if fit is None else fit.mean
        inputs = weights.linearize(x, center, lambda: self.backend, pred_type, differentiable=graph, **model_kwargs)
        return inputs if fit is None or fit.trained is None else inputs.with_weights(fit.mean)

    def _iterate(
        self, loader: Iterable[Any], progress_bar: bool = False, description: str = "[Fitting]"
    ) -> Iterator[Batch]:
        """Batches of a user's loader, on the device of the model."""
        told = {name: getattr(self, name) for name in ("dict_key_x", "dict_key_y", "shift_labels")}
        batches = iterate(loader, **told, device=self._device, progress_bar=progress_bar, description=description)
        return map(self._random_weights.aligned, shards.without_padding(loader, batches))

    def _checked_jacobians(self, jacobians: Any) -> Tensor:
        """Jacobians of a user in the precision of the posterior; their shape is checked where they are used."""
        return checks.tensor("Jacobians", jacobians, "a tensor [batch, outputs, P]").to(self._device, self._dtype)

    def _posterior_options(self) -> dict[str, Any]:
        """Options of the structure's ``posterior``."""
        return {}

    # -- what was learned ---------------------------------------------------------------------------------------------

    @property
    @linalg.lasting
    def _fitted(self) -> Fit:
        fit: Fit | None = self.__dict__.get("_fit")
        if fit is None:
            refuse_before_fit("This attribute or call")
        if (fit.mean.device, fit.mean.dtype) != self._place:  # the model was moved
            self._follow_model()
        return self._fit

    @property
    def mean(self) -> Float[Tensor, " params"]:
        """The weights at which the curvature was taken, ``[P]``; a copy."""
        return self._fitted.mean.clone()

    @property
    def H(self) -> Any:
        """Curvature of the data term at unit noise and temperature, in the form of the structure; a copy."""
        return independent(self._fitted.curvature.public)

    @property
    def loss(self) -> Scalar:
        """Negative log-likelihood of the training data at σ = T = 1, without constants, in nats."""
        return self._fitted.known_nll.clone()

    @property
    def n_data(self) -> int:
        """Number of rows that the training loaders yielded, or of them that were used."""
        return self._fitted.n_data

    @property
    def n_outputs(self) -> int:
        """C."""
        n_outputs = self._fitted.n_outputs
        if not n_outputs:
            refuse_before_fit("n_outputs")
        return n_outputs

    # -- posterior ----------------------------------------------------------------------------------------------------

    def _hyperparameters_changed(self) -> None:
        # Replaced, not emptied: a thread that is just making one for what was before puts it where nobody looks.
        self._posterior_cache = {}

    def _scaled(self, likelihood: AbstractLikelihood) -> AbstractCurvature:
        """The curvature at noise and temperature."""
        return self._fitted.scaled(likelihood.curvature_scale(self.backend.kind))

    @property
    @linalg.lasting
    def _posterior(self) -> AbstractPrecision:
        """Factorized posterior precision; the cached one unless hyperparameters are being differentiated."""
        scale = self._output_likelihood.curvature_scale(self.backend.kind)
        if not (torch.is_grad_enabled() and (scale.requires_grad or self._prior_precision.requires_grad)):
            return self._frozen_posterior
        return self._fitted.scaled(scale).posterior(self._prior, **self._posterior_options())

    @property
    @linalg.lasting
    def _frozen_posterior(self) -> AbstractPrecision:
        """The same, never on a graph and always cached: predictions are differentiated in their inputs alone."""
        fit, cache = self._fitted, self._posterior_cache
        if "posterior" not in cache:
            with torch.no_grad(), full_precision(self._device):
                scale = self._output_likelihood.curvature_scale(self.backend.kind)
                cache["posterior"] = fit.scaled(scale).posterior(self._prior, **self._posterior_options())
        return cache["posterior"]

    @property
    def posterior_precision(self) -> Any:
        """Posterior precision in the form of the structure; of ELLA and VaLLA over the weights of features. A copy."""
        return independent(self._posterior.public)

    # -- evidence -----------------------------------------------------------------------------------------------------

    @property
    def log_likelihood(self) -> Scalar:
        """Log p(D | θ*) at the present noise and temperature, in nats."""
        return tuning.log_likelihood(self._fitted, self._output_likelihood)

    @property
    def scatter(self) -> Scalar:
        """(θ* − μ₀)ᵀ P₀ (θ* − μ₀).

        Kept for code written for laplace-torch, as a part of the evidence.
        """
        return self._prior.scatter(self._fitted.mean)

    @property
    def log_det_prior_precision(self) -> Scalar:
        """Log |P₀|.

        Kept for code written for laplace-torch, as a part of the evidence.
        """
        return self._prior.logdet()

    @property
    def log_det_posterior_precision(self) -> Scalar:
        """Log |s·H + P₀|.

        Kept for code written for laplace-torch, as a part of the evidence.
        """
        return self._scaled(self._output_likelihood).posterior_logdet(self._prior, **self._posterior_options())

    @property
    def log_det_ratio(self) -> Scalar:
        """Log |s·H + P₀| − log |P₀|.

        Kept for code written for laplace-torch, as a part of the evidence.
        """
        return self._scaled(self._output_likelihood).log_det_ratio(self._prior, **self._posterior_options())

    def log_marginal_likelihood(
        self, prior_precision: float | Tensor | None = None, sigma_noise: float | Tensor | None = None
    ) -> Scalar:
        """Laplace approximation of log p(D), in nats; differentiable in prior precision and noise.

        ``log p(D|θ*) − ½ [log|A| − log|P₀| + (θ* − μ₀)ᵀ P₀ (θ* − μ₀)]`` with A = s·H + P₀.

        Parameters
        ----------
        prior_precision
            Assigned first when given, and kept, with its gradient.
        sigma_noise
            Assigned first when given, and kept, with its gradient.

        Returns
        -------
        ``[]``, in nats, summed over the data.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        InputError
            If a value is not positive or not finite.
        UnsupportedError
            If ``sigma_noise`` has no meaning for the likelihood.

        Notes
        -----
        Exact for a Gaussian likelihood with the full structure, given the features, if the weights are the
        posterior mode. With known eigenvalues O(P) per call (Kronecker, diagonal, and full with a scalar prior);
        else O(P³).

        References
        ----------
        Immer, Bauer, Fortuin, Rätsch & Khan (2021), "Scalable marginal likelihood estimation for model selection in
        deep learning". arXiv:2104.04975
        """
        fit = self._fitted
        # Both are checked before either is assigned.
        sigma = None if sigma_noise is None else self._checked_sigma_noise(sigma_noise)
        if prior_precision is not None:
            self.prior_precision = prior_precision
        if sigma is not None:
            self.sigma_noise = sigma
        likelihood, kind = self._output_likelihood, self.backend.kind
        return tuning.log_marginal_likelihood(fit, self._prior, likelihood, kind, **self._posterior_options())

    # -- tuning -------------------------------------------------------------------------------------------------------

    @linalg.lasting
    def tune(
        self,
        val_loader: Iterable[Any],
        train_loader: Iterable[Any] | None = None,
        *,
        refit: bool | None = None,
        average: Average = "parameters",
        distance_aware: bool | None = None,
        max_rows: int | None = None,
        score: ScoreLike = "nll",
        prior_structure: PriorStructureLike = PriorStructure.SCALAR,
        noise: Noise | None = None,
        output_temperature: bool | None = None,
        pred_type: PredTypeLike = PredType.GLM,
        link_approx: LinkApproxLike = LinkApprox.PROBIT,
        n_samples: int = 100,
        limits: Limits | None = None,
        n_steps: int = 50,
        generator: torch.Generator | None = None,
        verbose: bool = False,
        progress_bar: bool = False,
    ) -> tuning.Tuning:
        """Choose head, temperature (regression: noise) and width at foreign inputs on validation data, and assign them.

        The last layer is fitted again under nine prior precisions, on the features that ``fit`` kept; the head of the
        model is a candidate, too. Every head is combined with its best output temperature T, or noise σ, and with
        several sizes s² of the variance that foreign inputs get. All are weighed by how well they predict the
        validation data, and their parameters are averaged, so that there is one head (``mean``, ``head_``), one T or σ,
        one precision and one s² (``distance_scale``). The model of the user is not changed.

        Where the head is not fitted again, as where all weights are random, the weights stay those of the model, and
        prior precision, T or σ, and s² are chosen. Processes (``hessian_structure="gp"``) and reward modeling choose
        precision and noise or temperature alone.

        Parameters
        ----------
        val_loader
            Batches that the network was not trained on.
        train_loader
            The loader that ``fit`` had, with the same data: no augmentation, no ``drop_last``. Needed only where their
            features are not there: more than 2²⁷ numbers, an object that was loaded or copied, ``forget_data``.
        refit
            Fit the last layer again; ``None``: where that is possible. ``False`` keeps the head of the model, ``True``
            raises where it cannot be fitted again.
        average
            ``"parameters"``: one averaged head, T and s². ``"mixture"``: predictions are averaged, over at most 32
            choices (classification; a prediction then takes as many links). ``False``: the best choice alone.
        distance_aware
            Widen predictions where features lie farther from the training data than those of validation data; ``None``:
            where features have a density. ``True`` raises where they have none.
        max_rows
            Refit heads on so many rows of the training data, drawn at random, each of which then stands for several;
            ``None``: on all. Curvature and density are those of all data in any case.
        score
            A proper and differentiable score to minimize: ``"nll"``, ``"brier"`` (classification), ``"crps"``
            (regression), or a function as for ``loss`` of ``optimize_prior_precision``. Another one than ``"nll"``
            chooses prior precision and T or σ alone.
        prior_structure
            ``"scalar"``, or ``"layerwise"``: a precision for each parameter group, refined once the head is chosen.
        noise
            Regression: ``"scalar"`` (the default), ``"per_output"`` (last layer, except ``LLELLA``) or
            ``"keep"``.
        output_temperature
            Classification and preferences: choose it (the default) or leave it as it is.
        pred_type, link_approx, n_samples
            How predictions will be made: what is best for one way need not be for another.
        limits
            Least and largest values, by name: ``output_temperature``, ``sigma_noise`` (this one in units of the
            residuals), and, where the head is not fitted again, ``prior_precision``. Without one T is between 0.05 and
            20. While a precision is chosen around the weights of the model, T is also at least that which is best
            without weight uncertainty, or 1: uncertain weights widen predictions, which lower temperatures would undo.
        n_steps
            The most iterations of L-BFGS after the grid, where the head is not fitted again.
        generator
            Source of randomness of sampled predictions, which are the same for every evaluation; a fixed seed when
            ``None``.
        verbose
            Print the result in one line.
        progress_bar
            Show a progress bar.

        Returns
        -------
        What was found; also kept as ``tuning_``. Its ``notes`` say what was done and what was left out, and why.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If options do not exist or have no meaning for the likelihood, or ``refit=True`` or ``distance_aware=True``
            is not possible; the message says why.
        InputError
            If validation data are missing or empty, ``train_loader`` yields other data than ``fit`` had, limits are
            reversed, or the score is finite nowhere.

        Warns
        -----
        UserWarning
            If the features of the training data are not there, so that the head of the model is kept; if a class of the
            validation data has no row in the training data; if there are fewer validation rows than classes. Where the
            head is not fitted again: if the best value of a hyperparameter stays at a limit, or no temperature is best
            for the network, as where it classifies every validation row right: then none below 1 is tried.

        Notes
        -----
        Minimized is ``L = Σ −log p(y | x) + ½ log² T``, the sum over validation targets. Its second term is a standard
        normal prior on log T; without one T would run to its limit where no validation row is wrong. (A noise has
        none.) For each head and each s² in {0, 1, 3, 10, 30} (from 50 rows on; else up to 10) T is the best one. Their
        shares are ``w ∝ √v exp(−L)``, v the variance of log T at its optimum. Assigned are ``log T̄ = Σ w log T``,
        ``θ = T̄ Σ w θ E[1/T]`` (1/T averaged over that variance) and ``s² = Σ w s²``; ``prior_precision`` is the
        geometric mean of those of the refitted heads. A regression has σ for T, averages θ itself, and its posterior's
        variance counts.

        After a refit of a classifier predictions are made without the posterior's variance (``weight_uncertainty`` is
        ``False``; it may be assigned). Samples, covariances and the evidence are those of the Laplace approximation at
        the chosen head in any case. ``optimize_prior_precision`` afterwards moves none of this but the precision (of a
        regression also the noise); another ``tune`` starts from the model again.

        One pass over the validation data, and one over a ``train_loader``. Heads are then convex problems in the
        features: Newton's method up to 512 weights, beyond them L-BFGS in the eigenbasis of their second moments,
        O(rows · D² + D³) once and O(rows · C · D) for each step. Where that takes more than ten seconds, it is printed
        before. Each choice is a few evaluations of the link. If tuning fails, this object is what it was.

        Heads under stronger priors forget wrong labels that the trained head knew by heart. Where the features
        themselves have memorized them, no choice of these helps.

        References
        ----------
        Jordahn & Olmos (2024), "Decoupling feature extraction and classification layers for calibrated neural
        networks", arXiv:2405.01196, for heads that are trained again; Kristiadi, Hein & Hennig (2021), "An
        infinite-feature extension for Bayesian ReLU nets that fixes their asymptotic overconfidence", arXiv:2010.02709,
        for a variance that grows away from the data; Chen, Wiesel, Eldar & Hero (2010), "Shrinkage algorithms for MMSE
        covariance estimation", for the covariances of the density.
        """
        with states.all_or_nothing(self), processes.agreed():
            verbose, n_steps, _ = methods.checked_steps(verbose, progress_bar, n_steps)
            structure = methods.not_diagonal(choose(PriorStructure, prior_structure, "prior_structure"))
            self._fitted  # noqa: B018 - raises before anything else is looked at
            options = self._tuning_options(pred_type, link_approx, n_samples, generator)
            asked = tuning.Settings(options, structure, n_steps, score, noise, val_loader, progress_bar)
            wanted = tuning.checked_recipe(train_loader, refit, average, distance_aware, max_rows)
            further = output_temperature, methods.checked_limits_by_name(limits)
            return self._tuned_by_validation(asked, wanted, *further, verbose=verbose)

    def _tuned_by_validation(
        self, asked: tuning.Settings, wanted: tuning.Recipe, *further: Any, verbose: bool
    ) -> tuning.Tuning:
        """Choose by validation data: the hyperparameters alone, for what is no posterior over weights."""
        wanted.check_alone(type(self).__name__)
        return self._tuned(None, asked, *further, verbose=verbose)

    def _tuned(
        self, method: TuningMethod | None, asked: tuning.Settings, *further: Any, verbose: bool
    ) -> tuning.Tuning:
        """Choose by a method, or by ``tune``, and assign what was found: all of it or nothing."""
        return tuned.by_method(self, method, asked, *further, verbose=verbose)

    def _problem(self) -> tuning.Problem:
        """What was learned and is not chosen, cut off the graph of hyperparameters."""
        temperature = linalg.number(self._temperature, *self._place).detach()
        return tuning.Problem(
            self._fitted,
            self._prior_mean.detach().to(self._dtype),
            self._prior.sizes,
            self.backend.kind,
            lambda sigma, output_temperature: self._unit_likelihood.at(sigma, temperature, output_temperature),
            self._sigma_noise.detach().to(self._dtype),
            self._output_temperature,
            self._posterior_options(),
            self._refitted_type,
            self._fits_structure,
        )

    @property
    def _refitted_type(self) -> type[AbstractCurvature]:
        """The structure, with the choices of this object, as tuning fits it again."""
        return self.curvature_type

    def _for_tuning(self, pred_type: PredType, x: Inputs) -> Linearization:
        """Inputs as predictions see them."""
        return self._linearize(x, pred_type)

    # -- saving and moving --------------------------------------------------------------------------------------------

    state_entries: ClassVar[Table] = states.HEADER
    """What the entries of a state must be; a class adds those that it has beside them."""
    _saved: ClassVar[tuple[str, ...]] = ("temperature", "output_temperature", "enable_backprop")
    """Attributes that a state carries and restores."""
    _curvature_entry: ClassVar[str] = "H"
    """Under which name a state holds the curvature."""

    def _entries(self) -> Table:
        """A check for every entry of a state."""
        own = states.tables_of(type(self))
        return {**self._random_weights.entries, **own, self._curvature_entry: nested(self._curvature_entries)}

    @property
    def _curvature_entries(self) -> Table:
        """What the entries of a saved curvature must be."""
        return self.curvature_type.entries

    def _identity(self) -> dict[str, Any]:
        """What a state and the object that loads it must agree on."""
        return {
            "cls_name": type(self).__name__,
            "likelihood": self._unit_likelihood.described,
            "curvature_kind": self._backend_cls.kind.value,
            "fingerprint": fingerprint(self._network),
            **self._random_weights.identity(),
        }

    def _choices(self) -> dict[str, Any]:
        """Plain settings that a state carries."""
        own = {name: getattr(self, name) for name in self._saved}
        return {**own, "temperature": float(self.temperature), **self._random_weights.choices()}

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Assign the settings of ``_choices``."""
        for name in self._saved:
            setattr(self, name, state[name])
        self._random_weights.restore(state)

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``fit`` learned and the hyperparameters: tensors and plain values, no data.

        Returns
        -------
        A dictionary that ``torch.save`` writes and ``torch.load(..., weights_only=True)`` reads. All in it are copies;
        its ``"digest"`` tells whether an entry was changed afterwards.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        """
        fit = self._fitted
        found = {
            "schema_version": SCHEMA_VERSION,
            **self._identity(),
            **self._choices(),
            "prior_precision": self.prior_precision.detach(),
            "prior_mean": self.prior_mean.detach(),
            "sigma_noise": self.sigma_noise.detach(),
            **states.of_fit(fit, self._curvature_entry),
        }
        return signed({name: found[name] for name in self._entries()})

    @linalg.lasting
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what another object learned about the same model.

        Parameters
        ----------
        state_dict
            Made by ``state_dict``, here or of a parametric class of laplace-torch 0.2.2 or 0.3 (``full``, ``kron``,
            ``diag``); its tensors may be on any device.

        Raises
        ------
        StateError
            If it is no state, of another schema, class, likelihood or curvature, an entry is not what it must be or
            not what was saved, or the weights of the model differ. This object is then what it was.

        Warns
        -----
        UserWarning
            If the state has no digest, as those of earlier releases.
        """
        with states.blamed(), states.all_or_nothing(self, *self._random_weights.holders):
            own, entries, weights = {**self._identity(), **self._choices()}, self._entries(), self._random_weights
            state = states.readable(state_dict, entries, own, weights, self.curvature_type.name.value, self._prior_mean)
            sizes = weights.sizes_in(state)
            known: Known = {"dtype": self._dtype, "sizes": tuple(sizes), "P": sum(sizes), "L": len(sizes)}
            known.update(weights.known(state))
            check_entries(state, entries, known)
            if "fingerprint" in state_dict:
                warn_without_digest(state_dict)
            self._take(move(state, self._device), sizes)
            self._check_taken(known)

    def _take(self, state: Mapping[str, Any], sizes: Sequence[int]) -> None:
        """Assign everything in a state, on the right device."""
        self._restore(state)
        curvature = self._curvature_from(state[self._curvature_entry])
        self.sigma_noise = state["sigma_noise"]
        mean = self._checked("prior_mean", state["prior_mean"])
        precision = self._checked("prior_precision", state["prior_precision"], positive=True)
        prior = GaussianPrior(mean, precision, tuple(sizes))
        self._fits_structure(prior)
        self._prior_mean, self._prior_precision = prior.mean, prior.precision
        self._fit = states.fit_from(state, curvature, self._head_shapes, self._dtype)
        self._hyperparameters_changed()

    def _curvature_from(self, state: Mapping[str, Any]) -> AbstractCurvature:
        """The curvature that a state describes."""
        return self.curvature_type.from_state(state, self._dtype)

    def _moved(self, curvature: AbstractCurvature) -> AbstractCurvature:
        """A curvature on the device of the model, in its precision."""
        return self._curvature_from(move(curvature.state(), self._device))

    @property
    def _head_shapes(self) -> list[tuple[int, ...]] | None:
        """Shapes of the parameter groups of a head whose outputs can be scaled one by one."""
        return self._random_weights.head

    def _check_taken(self, known: Known) -> None:
        """Raise if what was assigned cannot be used."""
        usable = self._scaled(self._output_likelihood).is_finite
        usable = usable and (self._fitted.is_unknown or bool(torch.isfinite(self.log_likelihood)))
        states.check_usable(usable, (lambda: self._frozen_posterior) if known.get("negative") else None)

    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write ``state_dict()`` to a file, atomically.

        Parameters
        ----------
        path
            Path of the file, which is replaced. A file that is open for writing is written to as it is.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        StateError
            If the folder does not exist (then it is a ``FileNotFoundError``, too), or the path is a folder.
        """
        statefile.save(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str] | IO[bytes], map_location: Any = None) -> None:
        """Read a file written by ``save`` and take over what it holds; nothing in it is executed.

        Parameters
        ----------
        path
            Path of the file, or a file that is open.
        map_location
            Where ``torch.load`` puts tensors first: the model's device when ``None``. They end there in any case.

        Raises
        ------
        StateError
            If the file cannot be read (a ``FileNotFoundError``, too, where there is none), and as in
            ``load_state_dict``.
        """
        self.load_state_dict(statefile.read(path, self._device if map_location is None else map_location))

    @linalg.lasting
    def to(self: Own, device: torch.device | str) -> Own:
        """Move the model, what was learned and the hyperparameters to a device.

        Parameters
        ----------
        device
            Where to.

        Returns
        -------
        This object.

        Raises
        ------
        InputError
            If there is no such device; nothing is moved then.
        """
        self.model.to(checks.device("device", device))
        self._follow_model()
        return self

    def _follow_model(self) -> None:
        """Bring what was learned, and the hyperparameters, to where the model is, and to its precision."""
        self._backend, is_untuned = None, self._is_untuned
        self.prior_mean, self.sigma_noise, self.temperature = self._prior_mean, self._sigma_noise, self._temperature
        self.prior_precision, self._is_untuned = self._prior_precision, is_untuned
        fit: Fit | None = self.__dict__.get("_fit")
        if fit is not None:
            self._fit = states.moved(fit, self._moved(fit.curvature), self._prior_mean)

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying take along: not the back end, the cache, or the graph of a hyperparameter."""
        state = {key: value.detach() if isinstance(value, Tensor) else value for key, value in self.__dict__.items()}
        return {**state, "_backend": None, "_posterior_cache": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled, by earlier releases as well: the cache was ``None`` there."""
        vars(self).update({"_unit_likelihood": chosen(state["likelihood"]), **state, "_posterior_cache": {}})


__all__ = ["FittedLaplace"]
