"""``WeightPosterior``: the fit loop, the posterior over weights and its evidence.

Subclasses declare two independent things: a structure (``curvature_type``) and which weights are random
(``baselaplace/weights.py``). The curvature comes from the back end, formulas from the structure and from ``tuning/``;
this class wires them.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace import checks, linalg, tuning
from laplace.baselaplace.weights import RandomWeights
from laplace.curvature import CurvatureInterface
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.fit import Fit
from laplace.network import Batch, Passes, evaluating, full_precision, iterate
from laplace.structures import AbstractCurvature, AbstractPrecision, DiagPrecision
from laplace.structures.by_hand import BY_HAND, assigned_curvature, independent, zero_curvature, zero_form
from laplace.types import Scalar


class WeightPosterior(RandomWeights):
    """A Gaussian posterior over weights, N(θ*, (s·H + P₀)⁻¹): what ``fit`` learns, and its evidence."""

    curvature_type: ClassVar[type[AbstractCurvature]]
    """Declared by a structure class."""
    _fit: Fit
    """There once it was fitted."""
    _posterior_cache: dict[str, AbstractPrecision]
    _mean_by_hand: Tensor | None = None
    """Assigned before there is a curvature."""

    def _posterior_options(self) -> dict[str, Any]:
        """Options of the structure's ``posterior``."""
        return {}

    def _fit_options(self) -> dict[str, Any]:
        """Options of the structure's ``accumulate``."""
        return dict(self._asdl_fisher_kwargs)

    @property
    def _refitted_type(self) -> type[AbstractCurvature]:
        """The structure, with the choices of this object, as tuning fits it again."""
        return self.curvature_type

    # -- fit ----------------------------------------------------------------------------------------------------------

    @linalg.lasting
    def fit(self, train_loader: Iterable[Any], override: bool = True, progress_bar: bool = False) -> None:
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
        The model is left as it was found. When something is raised, so is this object.
        Last layer: one forward pass over the data and no backward pass. All weights: also one backward pass a batch for
        each output (a GGN), or one in all (empirical or sampled Fisher). The factorization is left to the first use.
        Structures that need several passes over the data (``"ekfac"``, ``"lowrank"``) say so; all weights then need a
        loader that can be read again, with the same data each time.
        """
        checks.loader("train_loader", train_loader)
        override, progress_bar = checks.flag("override", override), checks.flag("progress_bar", progress_bar)
        counts: dict[str, int] = {}
        keys: dict[str, Any] = {"dict_key_x": self.dict_key_x, "dict_key_y": self.dict_key_y, "device": self._device}
        previous: Fit | None = None if override or self.__dict__.get("_fit") is None else self._fitted
        if previous is not None:
            previous.check_merge()

        def read() -> Iterator[Batch]:
            counts.update(data=0, positions=0)
            batches = iterate(train_loader, **keys, progress_bar=progress_bar, description="[Fitting]")
            return self._counted(batches, counts)

        with evaluating(self.model), self._with_noise_by_output() as shape:
            learned = self._accumulate(train_loader, Passes(train_loader, read))
        if learned is None:
            msg = "The training loader is empty: there is nothing to learn the curvature from."
            if isinstance(train_loader, Iterator):
                msg += " It is an iterator, such as a generator, and may have been read before: pass a new one."
            raise InputError(msg)
        if not counts["positions"]:
            msg = (
                f"All {counts['data']} rows of training data are masked: there is nothing to learn the curvature from."
            )
            raise InputError(msg)
        nll, curvature = learned[0].detach(), learned[1]
        subset = self._known_parameters("fit")
        mean = subset.vector().to(self._dtype)
        by_output = nll if nll.dim() else None
        numbers = counts["data"], counts["positions"], self._count_outputs()
        if self._sigma_noise.numel() not in (1, numbers[2]):
            msg = (
                f"sigma_noise has {self._sigma_noise.numel()} values, one for each output; the model has {numbers[2]}."
            )
            raise ShapeError(msg)
        fit = Fit(mean, curvature, nll.sum(), *numbers, by_output, self._head_bias, shape)
        self._fit = fit if previous is None else previous.merge(fit)
        self._hyperparameters_changed()

    def _accumulate(
        self,
        train_loader: Iterable[Any],  # noqa: ARG002 - structures that choose data look at its length
        batches: Iterable[Batch],
    ) -> tuple[Tensor, AbstractCurvature] | None:
        """Negative log-likelihood and curvature of the training data; ``None`` when there are none."""
        return self.curvature_type.accumulate(self.backend, batches, **self._fit_options())

    @contextmanager
    def _with_noise_by_output(self) -> Generator[Tensor | None]:
        """What fitting a regression of several outputs needs to know of their noise; yields what became part of sums.

        A last layer scales afterwards, and keeps the loss of each output for that; shared weights are summed with the
        noise that outputs have relative to the first.

        Raises
        ------
        UnsupportedError
            If the back end computes with one noise for all outputs.
        """
        backend = self.backend
        before, shape = backend.output_likelihood, None
        if not self._last_layer and self._sigma_noise.dim():
            if not backend.weighs_outputs:
                msg = (
                    f"{type(backend).__name__} computes with one noise for all outputs; sigma_noise has one for each. "
                    "Use a built-in back end (backend=None)."
                )
                raise UnsupportedError(msg)
            shape = (self._sigma_noise / self._sigma_noise[0]).detach()
            backend.output_likelihood = before.weighing(shape**-2)
        backend.loss_by_output = self._last_layer
        try:
            yield shape
        finally:
            backend.output_likelihood, backend.loss_by_output = before, False

    def _counted(self, batches: Iterator[Batch], counts: dict[str, int]) -> Iterator[Batch]:
        """Pass batches on; count rows and positions; check the prior as soon as the weights are known."""
        for batch in batches:
            if not counts["data"]:
                self._before_first(batch)
            yield batch
            if not counts["data"]:
                self._check_prior(self._prior_precision, self._prior_mean)
            counts["data"] += len(batch.y)
            counts["positions"] += self.backend.count(batch.y)

    def _before_first(self, batch: Batch) -> None:
        """Prepare for the first batch of a fit."""
        self._check_memory()
        if not self._backend_cls.finds_last_layer:
            # A back end that computes outputs in its own way may not tell how many there are.
            self.backend.outputs(batch.x)

    def _check_memory(self) -> None:
        """Raise if the curvature cannot fit the memory of the device, as soon as the weights are known."""
        subset = self._select_parameters()
        if subset is not None:
            tensors = subset.parameters if subset.choice is None else [subset.vector()]
            self.curvature_type.check_memory(tensors, self._dtype)

    @property
    def _head_bias(self) -> bool | None:
        """Whether the random weights are those of a linear head with a bias; ``None`` if they are not of a head."""
        return len(self._known_parameters("fit").parameters) == 2 if self._last_layer else None

    def _check_backend(self, backend: CurvatureInterface) -> None:
        if not backend.provides(self.curvature_type.name):
            raise backend.cannot(self.curvature_type.name)

    @property
    @linalg.lasting
    def _fitted(self) -> Fit:
        fit: Fit | None = self.__dict__.get("_fit")
        if fit is None:
            message = "This attribute or call"
            raise self._not_fitted(message)
        if self._left_behind(fit.mean):
            self._follow_model()
        return self._fit

    @property
    def _is_prior(self) -> bool:
        """Whether there was no fit, and the object is the prior over its weights."""
        return "_fit" not in self.__dict__ and self.curvature_type in BY_HAND

    # -- what was learned ---------------------------------------------------------------------------------------------

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
    def mean(self, value: Tensor) -> None:
        self._assign_mean(value)

    @linalg.lasting
    def _assign_mean(self, value: Tensor) -> None:
        """Put the posterior around given weights."""
        self._check_by_hand("mean")
        n_params = self._known_parameters("The mean").n_params
        mean = self._checked("mean", value).detach()
        if mean.shape != (n_params,):
            msg = f"mean must hold the {n_params} random weights, [{n_params}]; got {list(mean.shape)}."
            raise ShapeError(msg)
        if self._is_prior:
            self._mean_by_hand = mean
        else:
            self._fit = self._fitted.at(mean)
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
        self._check_by_hand("H")
        subset, known = self._known_parameters("H"), None if self._is_prior else self._fitted
        now = None if known is None else known.curvature
        check = partial(checks.numbers, dtype=self._dtype, device=self._device)
        curvature = assigned_curvature(self.curvature_type, value, subset.shapes, check, now)
        if known is None:
            mean = subset.vector().to(self._dtype) if self._mean_by_hand is None else self._mean_by_hand
            n_outputs = self._count_outputs() if self._last_layer else None
            self._fit = Fit.by_hand(mean, curvature, self._sigma_noise, n_outputs, self._head_bias)
            self._mean_by_hand = None
        else:
            self._fit = replace(known, curvature=curvature)
        self._hyperparameters_changed()

    def _check_by_hand(self, name: str) -> None:
        if self.curvature_type not in BY_HAND:
            msg = (
                f"{type(self).__name__} is made of data, and its {name} cannot be assigned: call fit(train_loader). "
                "Posteriors over weights (hessian_structure='full', 'diag', 'kron', ...) take one."
            )
            raise UnsupportedError(msg)

    @property
    def _zero_curvature(self) -> AbstractCurvature:
        """The curvature of no data."""
        subset = self._known_parameters("H")
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

    @property
    def n_outputs(self) -> int:
        """C."""
        n_outputs = self._fitted.n_outputs
        if not n_outputs:
            message = "n_outputs"
            raise self._not_fitted(message)
        return n_outputs

    # -- posterior ----------------------------------------------------------------------------------------------------

    def _hyperparameters_changed(self) -> None:
        # Replaced, not emptied: a thread that is just making one for what was before puts it where nobody looks.
        self._posterior_cache = {}

    @property
    @linalg.lasting
    def _posterior(self) -> AbstractPrecision:
        """Factorized posterior precision; the cached one unless hyperparameters are being differentiated."""
        if self._is_prior:
            return DiagPrecision(self._prior.diagonal())
        fit = self._fitted
        scale = self._output_likelihood.curvature_scale(self.backend.kind)
        if not (torch.is_grad_enabled() and (scale.requires_grad or self._prior_precision.requires_grad)):
            return self._frozen_posterior
        return fit.scaled(scale).posterior(self._prior, **self._posterior_options())

    @property
    @linalg.lasting
    def _frozen_posterior(self) -> AbstractPrecision:
        """The same, never on a graph and always cached: predictions are differentiated in their inputs alone."""
        fit = self._fitted
        cache = self._posterior_cache
        if "posterior" not in cache:
            with torch.no_grad(), full_precision(self._device):
                scale = self._output_likelihood.curvature_scale(self.backend.kind)
                curvature = fit.scaled(scale)
                cache["posterior"] = curvature.posterior(self._prior, **self._posterior_options())
        return cache["posterior"]

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
        mean = self._mean
        value = checks.tensor("value", value, "weights, a tensor [..., P]").to(mean)
        if value.shape[-1:] != mean.shape:
            msg = f"Expected weights of shape [..., {len(mean)}]; got {list(value.shape)}."
            raise ShapeError(msg)
        return self._posterior.quadratic(value - mean)

    # -- evidence -----------------------------------------------------------------------------------------------------

    @property
    def log_likelihood(self) -> Scalar:
        """Log p(D | θ*) at the present noise and temperature, in nats."""
        return tuning.log_likelihood(self._fitted, self._output_likelihood)

    @property
    def scatter(self) -> Scalar:
        """(θ* − μ₀)ᵀ P₀ (θ* − μ₀)."""
        return self._prior.scatter(self._mean)

    @property
    def log_det_prior_precision(self) -> Scalar:
        """Log |P₀|."""
        return self._prior.logdet()

    @property
    def log_det_posterior_precision(self) -> Scalar:
        """Log |s·H + P₀|."""
        if self._is_prior:
            return self._prior.logdet()
        scale = self._output_likelihood.curvature_scale(self.backend.kind)
        return self._fitted.scaled(scale).posterior_logdet(self._prior, **self._posterior_options())

    @property
    def log_det_ratio(self) -> Scalar:
        """Log |s·H + P₀| − log |P₀|."""
        if self._is_prior:
            return torch.zeros_like(self._prior.logdet())
        curvature = self._fitted.scaled(self._output_likelihood.curvature_scale(self.backend.kind))
        return curvature.log_det_ratio(self._prior, **self._posterior_options())

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
        posterior mode. With known eigenvalues O(P) a call (Kronecker, diagonal, and full with a scalar prior);
        else O(P³).

        References
        ----------
        Immer, Bauer, Fortuin, Rätsch & Khan (2021), "Scalable marginal likelihood estimation for model selection in
        deep learning". arXiv:2104.04975
        """
        fit = self._fitted
        # Both are checked before either is assigned.
        sigma_noise = self._sigma_noise if sigma_noise is None else self._checked_sigma_noise(sigma_noise)
        if prior_precision is not None:
            self.prior_precision = prior_precision
        self.sigma_noise = sigma_noise
        likelihood, kind = self._output_likelihood, self.backend.kind
        return tuning.log_marginal_likelihood(fit, self._prior, likelihood, kind, **self._posterior_options())
