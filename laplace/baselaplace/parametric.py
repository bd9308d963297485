"""``ParametricLaplace``: a Gaussian over weights; predictions are delegated to ``predictive/``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from laplace import checks, linalg, pending, processes, tuning
from laplace.baselaplace import calling, compiled, fitting, foreign, properties, recipe, recorded, states, tuned
from laplace.baselaplace.adjustments import Adjustments
from laplace.baselaplace.described import described
from laplace.baselaplace.fitted import FittedLaplace
from laplace.baselaplace.observed import Observed
from laplace.baselaplace.options import check_marginals, check_model_keywords, checked_weights
from laplace.enums import LinkApprox, PredType
from laplace.errors import ShapeError, UnsupportedError
from laplace.fit import FIT_ENTRIES, HEAD_ENTRIES, Fit
from laplace.free_memory import explained_predictions
from laplace.likelihoods import L_co
from laplace.likelihoods.base import check_outputs
from laplace.network import evaluating, full_precision
from laplace.network.batches import require_rows
from laplace.predictive import Linearization, Options, compare, functional_samples
from laplace.predictive.adjusted import NO_POSTERIOR
from laplace.schema import Table, nested
from laplace.structures import AbstractCurvature, AbstractPrecision, DiagPrecision
from laplace.structures.by_hand import assigned_curvature, independent, zero_curvature, zero_form
from laplace.tuning import HeadData, fit_at
from laplace.types import ForeignScoreLike, Inputs, LinkApproxLike, ModelKeyword, PredTypeLike, Scalar

FROM_STATE = "The state that was loaded holds none: fit again."
"""Why there is no density, and why there are no features, after loading."""


@described
class ParametricLaplace(FittedLaplace[L_co]):
    """A Gaussian posterior over weights, N(θ*, (s·H + P₀)⁻¹)."""

    state_entries: ClassVar[Table] = {**FIT_ENTRIES, **HEAD_ENTRIES, "adjustments": nested(Adjustments.entries)}
    _adjustments: Adjustments = Adjustments()
    _kept: HeadData | None = None
    """Features and targets of the training data, for ``tune``."""
    _why_not: tuple[str, str] = ("Call fit(train_loader).", "Call fit(train_loader).")
    """Why there is no density, and why no features were kept."""
    _mean_by_hand: Tensor | None = None
    """Assigned before there is a curvature."""

    # -- fit ----------------------------------------------------------------------------------------------------------

    @linalg.lasting
    def fit(self, train_loader: Iterable[Any], override: bool = True, progress_bar: bool = False) -> Self:
        """Learn the curvature at the weights the model has.

        Parameters
        ----------
        train_loader
            Yields ``(x, y)``, ``(x1, …, xk, y)`` or mappings: a ``DataLoader``, a list, any iterable of batches, which
            needs no length. Rows are counted as they come.
        override
            Start again; ``False`` adds the new data to what was learned before, exactly.
        progress_bar
            Show a progress bar.

        Returns
        -------
        This object.

        Raises
        ------
        InputError
            If the loader is empty, yields something else than batches or valid targets, or cannot be read as often as
            the structure needs.
        UnsupportedError
            If model, likelihood and structure do not fit together, or ``override=False`` has no meaning for the
            structure.
        ShapeError
            If outputs, targets or the prior have shapes that do not fit.

        Notes
        -----
        The model is left as it was found, and if fitting fails, this object as well.
        Last layer: one forward pass over the data and no backward pass. All weights: also one backward pass per batch
        for each output (a GGN), or one in all (empirical or sampled Fisher). The first use factorizes.
        Structures that need several passes over the data (``"ekfac"``, ``"lowrank"``) say so; all weights then need a
        loader that can be read again, with the same data each time.
        """
        observed = Observed(self._frozen_likelihood)
        with processes.agreed() as team:
            checks.loader("train_loader", train_loader)
            override, progress_bar = checks.flag("override", override), checks.flag("progress_bar", progress_bar)
            previous: Fit | None = None if override or self.__dict__.get("_fit") is None else self._fitted
            fitting.check_previous(team, previous)
            fit, kept = self._training(progress_bar, observed).fit(train_loader), observed.kept
            if previous is not None and previous.trained is not None:
                fit = self._at_head(fit, kept, previous.mean)
            fit = fit if previous is None else previous.merge(fit)
        with states.all_or_nothing(self):
            fitting.take_fit(self, fit, again=previous is None)
            if previous is not None and kept is not None:
                kept = None if self._kept is None else self._kept.followed_by(kept)
            self._kept, self._why_not = kept, observed.reasons(previous is not None)
            self._hyperparameters_changed()
        return self

    def _fit_options(self) -> dict[str, Any]:
        """Options of the structure's ``accumulate``."""
        return dict(self._asdl_fisher_kwargs)

    def _training(self, progress_bar: bool, observed: Observed | None = None) -> fitting.Training:
        """What a fit needs to know of this object."""
        backend, options = self.backend, self._fit_options()
        return fitting.Training(
            self._random_weights,
            backend,
            lambda batches: self.curvature_type.accumulate(backend, batches, **options),
            partial(self._iterate, progress_bar=progress_bar),
            self._check_memory,
            lambda: self._check_prior(self._prior_precision, self._prior_mean),
            self._sigma_noise,
            lambda: self._dtype,
            observed,
        )

    def _at_head(self, fit: Fit, data: HeadData | None, theta: Tensor) -> Fit:
        """A fit as it would be at another head."""
        if data is None:
            msg = (
                "The curvature at the head that tune chose needs the features of these data, which were not kept. "
                f"{self._why_not[1]} Fit all data with override=True, and tune again with train_loader=."
            )
            raise UnsupportedError(msg)
        with torch.no_grad(), full_precision(self._device):
            return fit_at(fit, data, theta, self._unit_likelihood, self._refitted_type)

    # -- tuning -------------------------------------------------------------------------------------------------------

    def _tuned_by_validation(
        self, asked: tuning.Settings, wanted: tuning.Recipe, *further: Any, verbose: bool
    ) -> tuning.Tuning:
        """Choose head, hyperparameters and width by validation data, and assign all of it or nothing."""
        outcome = recipe.tune(self, asked, wanted, *further)
        with states.all_or_nothing(self):
            self._fit, self._adjustments = outcome.fit, outcome.adjustments
            return tuned.assign(self, outcome.tuning, verbose=verbose)

    def forget_data(self) -> None:
        """Drop the features of the training data that ``fit`` kept for ``tune``; states and copies never hold them."""
        self._kept, self._why_not = None, (self._why_not[0], "forget_data() dropped them.")

    _check_memory = fitting.check_memory

    # -- saving -------------------------------------------------------------------------------------------------------

    def _choices(self) -> dict[str, Any]:
        """With the settings of predictions."""
        return {**super()._choices(), "adjustments": self._adjustments.state()}

    def _restore(self, state: Mapping[str, Any]) -> None:
        """With the settings of predictions; data that were kept are those of another fit."""
        super()._restore(state)
        self._adjustments = Adjustments.from_state(state["adjustments"])
        self.forget_data()
        self._why_not = (FROM_STATE, FROM_STATE)

    def __getstate__(self) -> dict[str, Any]:
        """Without the data that ``fit`` kept."""
        why_not = self._why_not if self._kept is None else (self._why_not[0], "Copies have none.")
        return {**super().__getstate__(), "_kept": None, "_why_not": why_not, "_predictors": {}}

    # -- without a fit, and by hand -----------------------------------------------------------------------------------

    @property
    def _is_prior(self) -> bool:
        """Whether there was no fit, and the object is the prior over its weights."""
        return "_fit" not in self.__dict__

    @property
    def _mean(self) -> Float[Tensor, " params"]:
        """The mean of the weights, in our memory."""
        if not self._is_prior:
            return self._fitted.mean
        prior, by_hand = self._prior, self._mean_by_hand
        return prior.mean.expand(prior.n_params) if by_hand is None else by_hand.to(self._device)

    @property
    def mean(self) -> Float[Tensor, " params"]:
        """The weights at which the curvature was taken, ``[P]``; before ``fit`` the prior mean. A copy.

        May be assigned: the posterior is then one around these weights. Before ``fit`` assign ``H`` with it. The
        evidence needs the loss at the mean, which is known for the weights of ``fit`` alone. An assigned value must be
        finite (``InputError``) and hold a number for each random weight (``ShapeError``).
        """
        return self._mean.clone()

    @mean.setter
    @linalg.lasting
    def mean(self, value: Tensor) -> None:
        n_params = self._known("The mean").n_params
        mean = self._checked("mean", value).detach()
        if mean.shape != (n_params,):
            msg = f"mean must hold the {n_params} random weights, [{n_params}]; got {list(mean.shape)}."
            raise ShapeError(msg)
        if self._is_prior:
            self._mean_by_hand = mean
        else:
            self._fit = self._fitted.at(mean)
            self._adjustments = replace(self._adjustments, mixture=None, reference=None)
        self._hyperparameters_changed()

    @property
    def H(self) -> Any:
        """Curvature of the data term at unit noise and temperature, in the form of the structure; a copy.

        Before ``fit`` it is zero. May be assigned, after a fit and without one: posterior, predictions, samples and
        evidence are then those of the given curvature. An assigned value must have the form that is read here (of a
        Kronecker structure also ``H_facs``), fit the weights (``ShapeError``), be finite, symmetric (``InputError``).
        """
        if self._is_prior:
            return zero_form(self._zero_curvature)
        return independent(self._fitted.curvature.public)

    @H.setter
    @linalg.lasting
    def H(self, value: Any) -> None:
        subset, known = self._known("H"), None if self._is_prior else self._fitted
        now = None if known is None else known.curvature
        check = partial(checks.numbers, dtype=self._dtype, device=self._device)
        curvature = assigned_curvature(self.curvature_type, value, subset.shapes, check, now)
        if known is None:
            mean = subset.vector().to(self._dtype) if self._mean_by_hand is None else self._mean_by_hand
            self._fit = Fit.by_hand(mean, curvature, self._sigma_noise, self._head_shapes)
            self._mean_by_hand = None
        else:
            self._fit = replace(known, curvature=curvature, averaged=False)
        self._hyperparameters_changed()

    @property
    def _zero_curvature(self) -> AbstractCurvature:
        """The curvature of no data."""
        subset = self._known("H")
        self._check_memory()
        like = torch.zeros((), dtype=self._dtype, device=self._device)
        return zero_curvature(self.curvature_type, subset.shapes, like)

    @property
    def loss(self) -> Scalar:
        """Negative log-likelihood of the training data at σ = T = 1, without constants, in nats; 0 before ``fit``."""
        return self._prior.precision.new_zeros(()) if self._is_prior else self._fitted.known_nll.clone()

    @property
    def n_data(self) -> int:
        """Number of rows that the training loaders yielded."""
        return 0 if self._is_prior else self._fitted.n_data

    # -- posterior ----------------------------------------------------------------------------------------------------

    @property
    def _posterior(self) -> AbstractPrecision:
        """Before ``fit`` the prior."""
        return DiagPrecision(self._prior.diagonal()) if self._is_prior else super()._posterior

    @property
    def _gaussian(self) -> AbstractPrecision:
        """What is known of the weights, on no graph of hyperparameters: the posterior, or before ``fit`` the prior."""
        return DiagPrecision(self._prior.diagonal().detach()) if self._is_prior else self._frozen_posterior

    @property
    def _in_form(self) -> AbstractPrecision:
        """The posterior precision, or before ``fit`` that of the prior, as the structure keeps it."""
        if not self._is_prior:
            return self._posterior
        return self._zero_curvature.posterior(self._prior, **self._posterior_options())

    @property
    def posterior_precision(self) -> Any:
        """Posterior precision in the form of the structure; before ``fit`` that of the prior. A copy."""
        return independent(self._in_form.public)

    def log_prob(self, value: Float[Tensor, "*batch params"], normalized: bool = True) -> Float[Tensor, "*batch"]:
        """Log density of weights under the posterior, ``−½ (θ − θ*)ᵀ A (θ − θ*) + ½ log|A| − ½ P log 2π``, in nats.

        Parameters
        ----------
        value
            Weights, ``[..., P]``.
        normalized
            Include the normalizer ``½ (log|A| − P log 2π)``.

        Returns
        -------
        One number for each vector of weights.

        Raises
        ------
        ShapeError
            If P differs from the number of random weights.
        """
        normalized, quadratic = checks.flag("normalized", normalized), -0.5 * self.square_norm(value)
        if not normalized:
            return quadratic
        return quadratic + 0.5 * (self.log_det_posterior_precision - len(self._mean) * math.log(2 * math.pi))

    def square_norm(self, value: Float[Tensor, "*batch params"]) -> Float[Tensor, "*batch"]:
        """(θ − θ*)ᵀ A (θ − θ*) with A the posterior precision.

        Parameters
        ----------
        value
            Weights, ``[..., P]``.

        Returns
        -------
        One number for each vector of weights; without unit.

        Raises
        ------
        ShapeError
            If P differs from the number of random weights.
        """
        return self._posterior.quadratic(checked_weights(value, self._mean) - self._mean)

    @property
    def scatter(self) -> Scalar:
        """(θ* − μ₀)ᵀ P₀ (θ* − μ₀).

        Kept for code written for laplace-torch, as a part of the evidence.
        """
        return self._prior.scatter(self._mean)

    @property
    def log_det_posterior_precision(self) -> Scalar:
        """Log |s·H + P₀|.

        Kept for code written for laplace-torch, as a part of the evidence.
        """
        return self._prior.logdet() if self._is_prior else super().log_det_posterior_precision

    @property
    def log_det_ratio(self) -> Scalar:
        """Log |s·H + P₀| − log |P₀|.

        Kept for code written for laplace-torch, as a part of the evidence.
        """
        return torch.zeros_like(self._prior.logdet()) if self._is_prior else super().log_det_ratio

    # -- samples and functions -----------------------------------------------------------------------------------------

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "samples params"]:
        """Draw weights from the posterior, ``θ* + A^(−½) ε`` with standard normal ε; before ``fit`` from the prior.

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
            Before ``fit``, where the last layer is not known yet.
        InputError
            If ``n_samples`` is not positive, or the generator is on another device.

        Notes
        -----
        Exact for the structure. Time a draw: O(P²) dense, O(C D (C + D)) Kronecker, O(P) diagonal.
        """
        self._options(PredType.NN, n_samples=n_samples, generator=generator)
        with torch.no_grad():
            return self._mean + self._gaussian.sample(n_samples, generator)

    def functional_variance(self, Js: Tensor) -> Float[Tensor, "batch outputs outputs"]:
        """Covariance of the linearized outputs at each input, ``J Σ Jᵀ``, in output units squared.

        Parameters
        ----------
        Js
            Jacobians, ``[batch, outputs, P]``.

        Returns
        -------
        ``[batch, outputs, outputs]``; observation noise is not included.

        Raises
        ------
        ShapeError
            If P differs from the number of random weights.

        Notes
        -----
        The Jacobian dominates time and memory; calling the object never builds it.
        """
        return self._gaussian.functional_variance(self._checked_jacobians(Js))

    def functional_covariance(self, Js: Tensor) -> Float[Tensor, "joint joint"]:
        """Covariance of the linearized outputs across inputs, ``[batch·outputs, batch·outputs]``.

        Parameters
        ----------
        Js
            Jacobians, ``[batch, outputs, P]``.

        Returns
        -------
        In output units squared, input by input; observation noise is not included.

        Raises
        ------
        ShapeError
            If P differs from the number of random weights.

        Notes
        -----
        Memory O((batch · outputs)²) beside the Jacobians.
        """
        return self._gaussian.functional_covariance(self._checked_jacobians(Js))

    @pending.gathers
    def functional_variance_fast(self, X: Inputs) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
        """Outputs (logits, of a classifier) and their variances, without covariances and without a Jacobian.

        Kept for code written for laplace-torch; a call of the object needs no Jacobian either.

        Parameters
        ----------
        X
            A batch of inputs.

        Returns
        -------
        Outputs and variances, ``[batch, *positions, C]`` each; output units and their square.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        InputError
            If the model's outputs are not finite.

        Notes
        -----
        Exact for the structure; the first call factorizes. For probabilities call the object.
        """
        posterior = self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_linearization(X)
            with full_precision(self._device):
                return inputs.f, inputs.restore(inputs.variance(posterior, self._dtype))

    # -- prediction ---------------------------------------------------------------------------------------------------

    @calling.typed
    def __call__(
        self: Self,  # annotated: from its cache mypy would otherwise take the first overload
        x: Inputs,
        pred_type: PredTypeLike = PredType.GLM,
        joint: bool = False,
        link_approx: LinkApproxLike = LinkApprox.PROBIT,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: ModelKeyword,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict at a batch of inputs.

        Parameters
        ----------
        x
            A batch of inputs: a tensor or any nesting of tensors.
        pred_type
            ``"glm"``: a Gaussian over the outputs of the linearized network, in closed form. ``"nn"``: the network at
            sampled weights, averaged (after the link: ``link_approx`` is not used).
        joint
            Regression: covariance across inputs. Classification, with ``link_approx="mc"``: average over functions.
        link_approx
            From logits to probabilities: ``"probit"``, ``"mf1"``, ``"mf2"``, ``"mc"``, ``"bridge"``, ``"bridge_norm"``.
        n_samples
            For ``"mc"`` and ``"nn"``.
        diagonal_output
            Use and return variances instead of covariances.
        generator
            Source of randomness, on the model's device.
        fitting
            Reward modeling: ``x`` are pairs, ``[batch, 2, ...]``; predict which item is preferred. Others raise.
        **model_kwargs
            Passed to the model's ``forward``.

        Returns
        -------
        Classification: probabilities ``[batch, *positions, C]``; of pairs, with ``fitting``, ``[batch, 2]``. Regression
        and scores (C = 1): mean ``[batch, *positions, C]`` and covariance ``[…, C, C]``, or variance ``[…, C]`` with
        ``diagonal_output`` or ``"nn"``, or ``[batch·C]`` and ``[batch·C, batch·C]`` with ``joint``; in target units,
        without observation noise.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If options do not exist or do not go together, or a keyword for the model is a misspelt option.
        InputError
            If a flag is neither ``True`` nor ``False``, or the model's outputs are not finite, or those of pairs have
            another shape.

        Notes
        -----
        Mean and covariance of the outputs are ``f*`` and ``J A⁻¹ Jᵀ``, A the posterior precision: exact for a last
        layer, else for the linearized network. Regression returns them; links approximate the average softmax (``"mc"``
        converges to it). One forward pass (all weights: and one backward pass per output). Then, for B inputs of a last
        layer, variances take O(B (D² + D C + C²)) with the Kronecker structure, O(B C D) diagonal, O(B C D²) full, and
        memory O(B C D) at most; covariances at most another factor C. The first call factorizes.

        References
        ----------
        Immer, Korzepa & Bauer (2021), "Improving predictions of Bayesian neural nets via local linearization".
        arXiv:2008.08400
        """
        if torch.compiler.is_compiling() and self._weights_type.of_head and generator is None:
            how = pred_type, joint, link_approx, n_samples, diagonal_output, fitting
            return compiled.predict(self, x, how, model_kwargs)
        options = self._options(pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting)
        check_model_keywords(self._network, type(self).__call__, model_kwargs)
        return self._reading.returned(self._predicted(x, options, **model_kwargs))

    _prepare = compiled.prepare

    @pending.gathers
    def _predicted(self, x: Inputs, options: Options, **model_kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """A prediction with C last."""
        with explained_predictions(), evaluating(self.model, enable_backprop=self.enable_backprop):
            posterior, likelihood = self._predicting_posterior, self._frozen_likelihood
            inputs = self._checked_linearization(x, options.pred_type, **model_kwargs)
            with full_precision(self._device):
                found = self._adjustments.predict(inputs, self._fitted, posterior, likelihood, options, self._dtype)
        return self._compared((compare(inputs) if options.fitting else inputs).f, found, likelihood)

    @property
    def _predicting_posterior(self) -> AbstractPrecision:
        """The posterior, where predictions use its variance."""
        return self._frozen_posterior if self._adjustments.weight_uncertainty else NO_POSTERIOR

    def _adjusted(self, inputs: Linearization) -> Linearization:
        """Inputs as predictions see them: with or without the posterior's variance, wider where they are foreign."""
        adjustments, likelihood = self._adjustments, self._frozen_likelihood
        e = adjustments.excess_of(inputs, self._fitted, likelihood)
        return adjustments.applied(inputs, e, likelihood)

    weight_uncertainty = properties.weight_uncertainty
    distance_scale = properties.distance_scale

    def ood_score(
        self,
        x: Inputs,
        kind: ForeignScoreLike | None = None,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """How foreign inputs are; more is more foreign.

        Do not use predictive variances for this: the posterior holds the second moment of all features about zero, so
        that what lies between the classes, or has small features, looks familiar to it. On inputs of classes that were
        held out the variance of the largest logit ranks worse than chance (AUROC below 0.4).

        Parameters
        ----------
        x
            A batch of inputs.
        kind
            ``"fisher"``: the doubt of the classifier and the density of the features together, each as the share of
            reference rows beyond (the default of classifiers). ``"density"``: minus the log density of the features, a
            Gaussian for each class; of a regression the Mahalanobis distance (its default). ``"relative"``: the
            relative Mahalanobis distance. ``"max_prob"``: one minus the largest predicted probability. ``"entropy"`` of
            the prediction. ``"mutual_information"`` of prediction and weights, from samples.
        n_samples, generator
            For ``"mutual_information"``.

        Returns
        -------
        ``[batch, *positions]``; ``"fisher"``, ``"density"``, ``"entropy"`` and ``"mutual_information"`` in nats.

        Raises
        ------
        NotFittedError
            Before ``fit``; ``"fisher"`` also where there are no reference rows.
        UnsupportedError
            If there is no such kind, no density of features, or no classes; the message says why.

        Warns
        -----
        UserWarning
            If ``"fisher"`` compares with training rows, since ``tune`` has not looked at validation rows.

        Notes
        -----
        One forward pass, then O(batch · C · D²) for the density (O(batch · D²) where classes share a covariance).

        References
        ----------
        Lee, Lee, Lee & Shin (2018), "A simple unified framework for detecting out-of-distribution samples and
        adversarial attacks", arXiv:1807.03888; Ren et al. (2021), "A simple fix to Mahalanobis distance for improving
        near-OOD detection", arXiv:2106.09022; Fisher (1925), "Statistical methods for research workers", for the sum of
        log tails.
        """
        options = self._options(PredType.GLM, n_samples=n_samples, generator=generator)
        return foreign.score(self, x, kind, options)

    def _checked_linearization(
        self, x: Inputs, pred_type: PredType = PredType.GLM, **model_kwargs: Any
    ) -> Linearization:
        """Outputs at inputs of a user: some, and finite."""
        require_rows(x)
        inputs = self._linearize(x, pred_type, **model_kwargs)
        check_outputs(inputs.f)
        return inputs

    def functional_samples(
        self,
        x: Inputs,
        pred_type: PredTypeLike = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "samples batch ..."]:
        """Samples of the outputs (before any link), ``[n_samples, batch, *positions, C]``.

        Whole functions, coherent over the inputs of a call. For a linear last layer ``"glm"`` and ``"nn"`` have the
        same distribution.

        Parameters
        ----------
        x
            A batch of inputs.
        pred_type
            ``"glm"`` or ``"nn"``.
        n_samples
            How many.
        diagonal_output
            Draw each output from its own marginal instead (``"glm"``): cheaper, without correlations.
        generator
            Source of randomness, on the model's device.

        Returns
        -------
        In output units; without observation noise.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If options do not exist or do not go together.
        InputError
            If the model's outputs are not finite.

        Notes
        -----
        Exact for the structure. Time O(n_samples · batch · C · D) beside the draws of the weights.
        """
        options = self._sampling_options(pred_type, n_samples, diagonal_output, generator)
        return self._reading.returned(self._functions(x, options), 1)

    def _sampling_options(self, pred_type: Any, n_samples: Any, diagonal_output: Any, generator: Any) -> Options:
        """How to draw samples of outputs, checked."""
        options = self._options(pred_type, n_samples=n_samples, diagonal_output=diagonal_output, generator=generator)
        check_marginals(options)
        return options

    @pending.gathers
    def _functions(
        self, x: Inputs, options: Options, *, adjusted: bool = False, **model_kwargs: Any
    ) -> Float[Tensor, "samples batch ..."]:
        """Samples of the outputs, of the posterior or as predictions see them."""
        posterior = self._predicting_posterior if adjusted else self._frozen_posterior
        with evaluating(self.model, enable_backprop=self.enable_backprop):
            inputs = self._checked_linearization(x, options.pred_type, **model_kwargs)
            with full_precision(self._device):
                return self._samples_at(self._adjusted(inputs) if adjusted else inputs, posterior, options)

    def _samples_at(self, inputs: Linearization, posterior: AbstractPrecision, options: Options) -> Tensor:
        """Samples of the outputs at inputs."""
        return functional_samples(inputs, posterior, options, self._dtype)

    def predictive_samples(
        self,
        x: Inputs,
        pred_type: PredTypeLike = PredType.GLM,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "samples batch ..."]:
        """Samples of the predictions: ``functional_samples`` after the link (class probabilities; regression: means).

        Parameters
        ----------
        x, pred_type, n_samples, diagonal_output, generator
            As in ``functional_samples``.

        Returns
        -------
        ``[n_samples, batch, *positions, C]``: probabilities, or means in target units without observation noise.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If options do not exist or do not go together.
        """
        options = self._sampling_options(pred_type, n_samples, diagonal_output, generator)
        return self._reading.returned(
            self._output_likelihood.expectation(self._functions(x, options, adjusted=True)), 1
        )

    # -- names that code written for laplace-torch calls --------------------------------------------------------------

    _nn_functional_samples = recorded.nn_functional_samples
    _nn_predictive_samples = recorded.nn_predictive_samples
    _glm_predictive_distribution = recorded.glm_predictive_distribution
    _glm_functional_samples = recorded.glm_functional_samples
    _glm_predictive_samples = recorded.glm_predictive_samples
