"""``BaseLaplace``: hyperparameters and their setters, argument checks, and the contract of the call.

Estimators wire the other packages together and hold no formulas.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar, Generic

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Self

from laplace import checks, linalg, processes, tuning
from laplace.attributes import check_attribute
from laplace.baselaplace import calling, card, options, properties, states, untuned
from laplace.baselaplace.described import described
from laplace.baselaplace.keywords import BackendKeywords, LossLike
from laplace.baselaplace.random_weights import AllWeights
from laplace.curvature import CurvatureInterface
from laplace.enums import LinkApprox, PredType, PriorStructure, TuningMethod, choose
from laplace.fit import Fit
from laplace.likelihoods import AbstractLikelihood, L_co, chosen
from laplace.network import ParameterSubset
from laplace.network.outputs import Reading
from laplace.predictive import Options
from laplace.prior import GaussianPrior
from laplace.tuning import Noise, methods
from laplace.types import Inputs, LinkApproxLike, PredTypeLike, PriorStructureLike, Scalar, TuningMethodLike


@described
class BaseLaplace(ABC, Generic[L_co]):
    """A network whose weights, after training, have a Gaussian posterior.

    Parameters
    ----------
    model
        The trained network; it is read, never written.
    likelihood
        ``"classification"``, ``"regression"``, ``"reward_modeling"``, ``"binary"`` (one logit), ``"multilabel"`` (a
        logit for each label), ``"poisson"`` or ``"negative_binomial"`` (log rates of counts), or
        ``"heteroscedastic_regression"`` (means, and then logs of variances); or an object of ``laplace.likelihoods``
        with numbers of its own (exposures, a noise covariance), such as one of your own.
    sigma_noise
        Standard deviation of the observation noise, in target units, of all outputs or of each; regression only.
    prior_precision
        Precision of the Gaussian prior, in 1/weight²: a scalar, one value per parameter group (weight and bias of a
        layer are two) or, except with Kronecker factors, one per weight.
    prior_mean
        Mean of the Gaussian prior: a scalar, or one value per weight.
    temperature
        T of the tempered likelihood ``p(y|f)^(1/T)``; below 1 it concentrates the posterior.
    enable_backprop
        Keep predictions differentiable with respect to the inputs.
    dict_key_x, dict_key_y
        Entries of mapping batches that hold the main input and the targets. Where ``dict_key_x`` is left at its default
        and a batch has no such entry, it is the ``main_input_name`` that models of Hugging Face have, the first
        parameter of ``forward`` that is an entry, or the only entry beside the targets.
    backend
        Class that computes the curvature; ``AutogradGGN`` when ``None``. Of an object its class and options are taken.
    backend_kwargs
        Options of the back end, passed to it on construction.
    asdl_fisher_kwargs
        Options passed to the methods of an ASDL back end; any other back end raises.
    curvature_dtype
        Precision of curvature or kernels, factorizations and evidence; that of the model by default, at least float32.
    output_key
        Where the outputs are in what the model returns, if that is no tensor: the key of a mapping (``"logits"`` by
        default), the index in a tuple, or the name of an attribute.
    output_fn
        The same as a function from what the model returns to its outputs. States do not hold it.
    output_dim
        The axis of the outputs that holds classes, or outputs of a regression: 1 for ``[batch, C, H, W]``. By default
        it is found by the first pass (a convolution puts channels after the batch), and refused where nothing tells.
        Predictions have the layout of the model; covariances have both axes of C where the outputs have one,
        ``[batch, C, C, H, W]``, and joint ones are matrices over positions, C innermost.
    shift_labels
        Causal language models: whether labels ``[batch, positions]`` belong to the outputs one position before, as in
        the loss of the model. By default those are shifted that are the tokens of the inputs, with a warning.

    Raises
    ------
    UnsupportedError
        If an option does not exist or does not fit another.
    InputError
        If a hyperparameter is not finite or not positive.
    """

    backend_kwargs = properties.backend_kwargs
    asdl_fisher_kwargs = properties.asdl_fisher_kwargs
    curvature_dtype = properties.curvature_dtype
    output_key = properties.output_key
    output_fn = properties.output_fn
    output_dim = properties.output_dim
    shift_labels = properties.shift_labels
    _reading: Reading
    """What the outputs are in what the model returns, and where predictions put them."""
    _unit_likelihood: AbstractLikelihood
    _prior_precision: Tensor
    _prior_mean: Tensor
    _sigma_noise: Tensor
    _temperature: float | Tensor
    _output_temperature: float = 1.0
    _predictors: Mapping[tuple[Any, ...], Any] = {}
    """What compiled predictions run, by their options; none are left when an attribute was assigned."""
    _is_untuned: bool = False
    """Whether hyperparameters are still the defaults, and no prediction was compared with the network's."""
    _weights_type: ClassVar[type[AllWeights]] = AllWeights
    """Which weights are random."""

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: BackendKeywords | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        curvature_dtype: torch.dtype | None = None,
        output_key: str | int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        output_dim: int | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        self._reading = properties.reading_of(model, output_key, output_fn, output_dim, shift_labels)
        self.model = model
        self._unit_likelihood = chosen(likelihood)
        self.likelihood = self._unit_likelihood.name
        self._curvature_dtype = options.checked_curvature_dtype(curvature_dtype)
        self._backend_cls, self._backend_kwargs = options.chosen_backend(backend, backend_kwargs, self.likelihood)
        self._asdl_fisher_kwargs = options.checked_fisher_kwargs(asdl_fisher_kwargs, self._backend_cls)
        self._backend: CurvatureInterface | None = None
        self.enable_backprop = enable_backprop
        self.dict_key_x = dict_key_x
        self.dict_key_y = dict_key_y
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.sigma_noise = options.said_once(self._unit_likelihood, "sigma_noise", sigma_noise)
        self.temperature = options.said_once(self._unit_likelihood, "temperature", temperature)
        self.output_temperature = options.said_once(self._unit_likelihood, "output_temperature", 1.0)
        self._is_untuned = untuned.seems(self)

    @property
    def likelihood_(self) -> AbstractLikelihood:
        """The likelihood at the present noise and temperatures; a copy."""
        return copy.deepcopy(self._frozen_likelihood)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute that the class knows; what it does not know would have no effect.

        Raises
        ------
        UnknownAttributeError
            If it does not know the name, or computes its value.
        """
        check_attribute(self, name)
        if name in options.CHECKED:
            value = options.CHECKED[name](value)
            if name in vars(self) and "_backend" in vars(self) and value is not vars(self)[name]:
                value = self._replaced(name, value)
        super().__setattr__(name, value)
        vars(self)["_predictors"] = {}
        if name in untuned.HYPERPARAMETERS:
            vars(self)["_is_untuned"] = False

    __dir__, __repr__, _repr_html_ = card.names, card.text, card.html

    def accept_untuned(self) -> None:
        """Keep hyperparameters as they are: no prediction is compared with the network's (``UntunedWarning``)."""
        self._is_untuned = False

    def _compared(self, outputs: Tensor, predicted: Any, likelihood: AbstractLikelihood) -> Any:
        """Predictions, whose first of an untuned object are compared with what the network alone predicts."""
        if self._is_untuned:
            self._is_untuned = False
            untuned.compare(outputs, predicted, likelihood.for_targets())
        return predicted

    def _replaced(self, name: str, value: Any) -> Any:
        """What an option becomes when it is assigned again: what was made with the former value is forgotten."""
        if name == "enable_backprop" or value == vars(self)[name]:
            return value
        value = options.replaced(self._random_weights, name, vars(self)[name], value)
        self._reading.seen.clear()
        self._backend = None
        vars(self).pop("_random_weights", None)
        self._hyperparameters_changed()
        return value

    @cached_property
    def _random_weights(self) -> AllWeights:
        """The random weights; made again where the model is replaced."""
        return self._weights_type(self.model, self.dict_key_x, self.dict_key_y, self._reading)

    # -- where and in which precision ---------------------------------------------------------------------------------

    @property
    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Where and in which precision curvature, factorizations and hyperparameters are."""
        first = self._random_weights.first
        return first.device, self._curvature_dtype or torch.promote_types(first.dtype, torch.float32)

    @property
    def _device(self) -> torch.device:
        return self._place[0]

    @property
    def _dtype(self) -> torch.dtype:
        """What curvature, factorizations and hyperparameters are computed in."""
        return self._place[1]

    # -- hyperparameters ----------------------------------------------------------------------------------------------

    @property
    def prior_precision(self) -> Tensor:
        """Prior precision, ``[1]``, ``[n_layers]`` or ``[P]``, in 1/weight²; assign a float or a tensor.

        An assigned value must be positive and finite (``InputError``), fit the weights (``ShapeError``) and the
        structure: a Kronecker structure takes no precision for each weight (``UnsupportedError``).
        """
        return self._handed_out(self._prior_precision)

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        self._prior_precision = self._checked_prior_precision(value)
        self._hyperparameters_changed()

    def _checked_prior_precision(self, value: Any) -> Tensor:
        precision = self._checked("prior_precision", value, positive=True).reshape(-1)
        self._check_prior(precision, getattr(self, "_prior_mean", precision.new_zeros(())))
        return precision

    @property
    def prior_mean(self) -> Tensor:
        """Prior mean, ``[]`` or ``[P]``; assign a float or a tensor.

        An assigned value must be finite (``InputError``) and fit the weights (``ShapeError``).
        """
        return self._handed_out(self._prior_mean)

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        mean = self._checked("prior_mean", value)
        self._check_prior(self._prior_precision, mean)
        self._prior_mean = mean
        self._hyperparameters_changed()

    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise, ``[]`` or ``[C]``, in target units; assign a float or a tensor.

        One number for all outputs, or one for each. A last layer is not fitted again; other weights are shared by
        outputs, so that changes relative to each other need a new ``fit`` (an error says so). Assigned values must be
        positive and finite (``InputError``), and 1 for classification (``UnsupportedError``).
        """
        return self._handed_out(self._sigma_noise)

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        self._sigma_noise = self._checked_sigma_noise(value)
        self._hyperparameters_changed()

    def _checked_sigma_noise(self, value: Any) -> Tensor:
        """A valid observation noise, ``[]`` or ``[C]``."""
        sigma = self._checked("sigma_noise", value, positive=True)
        self._unit_likelihood.check_noise(sigma)
        fit: Fit | None = self.__dict__.get("_fit")
        return options.by_output(sigma, None if fit is None else fit.n_outputs)

    @property
    def temperature(self) -> float | Tensor:
        """T of the tempered likelihood; assign a float.

        An assigned value must be one positive and finite number (``InputError``). It tempers the likelihood and
        so widens (T > 1) or narrows the posterior; temperature scaling of predictions is ``output_temperature``.
        """
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        checked = self._checked_temperature(value)
        # What is no tensor keeps its digits.
        self._temperature = checked.reshape(()) if isinstance(value, Tensor) else checks.as_float(value)
        self._hyperparameters_changed()

    def _checked_temperature(self, value: Any) -> Tensor:
        return options.one_number("temperature", self._checked("temperature", value, positive=True))

    @property
    def output_temperature(self) -> float:
        """What logits are divided by before the link, when predicting: above 1 it softens, below 1 it sharpens.

        It is what temperature scaling chooses; ``tune`` chooses it together with the prior precision. The posterior
        does not depend on it. An assigned value must be one positive and finite number (``InputError``), and 1 for
        regression (``UnsupportedError``).
        """
        return self._output_temperature

    @output_temperature.setter
    def output_temperature(self, value: float | Tensor) -> None:
        checked = options.one_number("output_temperature", self._checked("output_temperature", value, positive=True))
        self._unit_likelihood.check_output_temperature(float(checked))
        self._output_temperature = checks.as_float(value)

    @staticmethod
    def _handed_out(value: Tensor) -> Tensor:
        """What a getter returns: a copy, unless a gradient is asked of it."""
        return value if value.requires_grad else value.clone()

    @linalg.lasting
    def _checked(self, name: str, value: Any, *, positive: bool = False) -> Tensor:
        """A hyperparameter as a tensor on the model's device, finite and, if asked, positive."""
        return checks.hyperparameter(name, value, self._dtype, self._device, positive=positive)

    @abstractmethod
    def _hyperparameters_changed(self) -> None:
        """Forget what depends on hyperparameters."""

    def _likelihood(self, *, graph: bool) -> AbstractLikelihood:
        """The likelihood with its present noise and temperatures, in the precision of the evidence."""
        temperature, sigma_noise = linalg.number(self._temperature, *self._place), self._sigma_noise
        if not graph:
            temperature, sigma_noise = temperature.detach(), sigma_noise.detach()
        return self._unit_likelihood.at(sigma_noise.to(temperature), temperature, self._output_temperature)

    @property
    def _output_likelihood(self) -> AbstractLikelihood:
        """On the graph of those that have one."""
        return self._likelihood(graph=True)

    @property
    def _frozen_likelihood(self) -> AbstractLikelihood:
        """Cut off that graph."""
        return self._likelihood(graph=False)

    # -- the random weights -------------------------------------------------------------------------------------------

    @property
    def _network(self) -> nn.Module:
        """The user's model."""
        return self._random_weights.network

    def _known(self, what: str) -> ParameterSubset:
        """The random weights, for something that needs them."""
        return options.known(self._random_weights.subset, what)

    @property
    def params(self) -> list[Tensor]:
        """The random parameters.

        Kept for code written for laplace-torch.
        """
        return list(self._known("params").parameters)

    @property
    def n_params(self) -> int:
        """P, the number of random weights."""
        return self._known("n_params").n_params

    @property
    def n_layers(self) -> int:
        """Number of parameter groups.

        Kept for code written for laplace-torch.
        """
        return self._known("n_layers").n_layers

    @abstractmethod
    def _check_prior(self, precision: Tensor, mean: Tensor) -> None:
        """Raise if a prior does not fit the weights or the structure, as far as they are known."""

    @property
    def _prior(self) -> GaussianPrior:
        sizes = self._known("The prior").sizes
        mean, precision = (number.to(*self._place) for number in (self._prior_mean, self._prior_precision))
        return GaussianPrior(mean, precision, sizes)

    @property
    def prior_precision_diag(self) -> Float[Tensor, " params"]:
        """Prior precision of each weight, ``[P]``.

        Kept for code written for laplace-torch.
        """
        return self._prior.diagonal().clone()

    # -- back end -----------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> CurvatureInterface:
        """The object that computes the curvature; constructed on first use."""
        if self._backend is None:
            unit = self._unit_likelihood.at(torch.ones(()), 1.0, 1.0)
            self._backend = self._make_backend().with_likelihood(unit)
        return self._backend

    @abstractmethod
    def _make_backend(self) -> CurvatureInterface:
        """Construct the back end."""

    # -- the call -----------------------------------------------------------------------------------------------------

    def _options(self, pred_type: PredTypeLike, *arguments: Any, **keywords: Any) -> Options:
        """How to predict, checked; further arguments as in ``prediction_options``."""
        return options.prediction_options(self._unit_likelihood, self._device, pred_type, *arguments, **keywords)

    __call__, predictive = calling.call, calling.predictive

    @abstractmethod
    def fit(self, train_loader: Iterable[Any]) -> Self:
        """Learn from a loader of training batches."""

    @abstractmethod
    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Scalar:
        """Laplace approximation of log p(D), in nats."""

    @property
    @abstractmethod
    def log_likelihood(self) -> Scalar:
        """Log p(D | θ*), in nats."""

    @abstractmethod
    def sample(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw weights from the posterior."""

    @abstractmethod
    def functional_samples(
        self,
        x: Inputs,
        pred_type: PredTypeLike = PredType.GLM,
        n_samples: int = 1,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of the outputs."""

    @linalg.lasting
    def optimize_prior_precision(
        self,
        pred_type: PredTypeLike = PredType.GLM,
        method: TuningMethodLike = TuningMethod.MARGLIK,
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
        *,
        generator: torch.Generator | None = None,
        noise: Noise = "keep",
        bounds: tuple[float, float] = tuning.BOUNDS,
        temperature: bool = False,
        train_loader: Iterable[Any] | None = None,
        n_folds: int = 5,
        refit: bool | None = None,
    ) -> None:
        """Choose the prior precision, by evidence or by a score over a grid, and assign it.

        Parameters
        ----------
        pred_type, link_approx, n_samples
            How the predictions that are scored are made.
        method
            ``"marglik"``: the log marginal likelihood. ``"gridsearch"``: the loss on validation data. ``"loo"``: the
            leave-one-out loss of the training data, in closed form (``full`` and ``diag``). ``"cv"``: that of k folds.
            Those two need a last layer, whose weights are then those that are best under each prior (and for each
            fold), with features that have seen all the data: optimistic, and never the default. ``"elbo"``: the
            evidence lower bound of a Gaussian that is fitted to the posterior of a classifier's last layer (``full`` up
            to 1,024 weights, ``kron``, ``diag``; up to 100 classes). Its mean and covariance become those of this
            object: better than the evidence where features separate the classes.
        n_steps, lr
            The most iterations of L-BFGS on log precisions, which ends before where it converges, and the size of its
            first trial step (``"marglik"``). 0 steps assign the start.
        init_prior_prec
            Where to start (``"marglik"``): a scalar, or one value for each precision. Values for each parameter group,
            or for each weight, bring their structure with them.
        prior_structure
            ``"scalar"``, ``"layerwise"`` (one per parameter group; of a last layer weight and bias) or ``"diag"`` (one
            per weight). A grid gives all the same value.
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
            with a last layer (except ``LLELLA``). It starts at the residuals of the training data: where the network
            interpolates them it is far too small, and a warning says so.
        bounds
            Least and largest prior precision (``"marglik"``).
        temperature
            Refused: no temperature is best by evidence.
        train_loader
            The training batches that ``fit`` had (``"loo"``, ``"cv"``; ``"elbo"``, if ``fit`` kept no features).
        n_folds
            Number of folds of ``"cv"``; the training data are split at random with a fixed seed, or by ``generator``.
        refit
            Predict with the head that is best under the prior that was chosen (``"loo"``: the default), or with that of
            the model (``False``). Every call starts from the head of the model, which itself never changes.

        Raises
        ------
        NotFittedError
            Before ``fit``.
        UnsupportedError
            If names are unknown, or the structure takes no such prior.
        InputError
            If validation data are missing or empty, the grid is no grid, or the objective is finite nowhere.

        Warns
        -----
        UserWarning
            If the best value is at an end of the grid; if the noise that the evidence chose is that of a network which
            interpolates its data: the effective number of parameters γ = P − tr(δ Σ) exceeds half the number of
            targets, or (a last layer, whose targets ``fit`` keeps) the noise is below 5 % of their standard deviation.

        Notes
        -----
        If tuning fails, hyperparameters are what they were; what was found is kept in ``tuning_``. Evidence:
        O(P) per step once eigenvalues are known; one precision per weight of a diagonal curvature is closed-form. Grid
        search runs the model over the validation data once; each point then costs matrix products. ``"elbo"`` takes
        about a hundred averages over 32 points for each row, none of them a pass of the model. ``tuning_.value`` is the
        bound; the evidence of this object, with a curvature that is averaged over the posterior, is not. ``"loo"`` and
        ``"elbo"`` undo what ``tune`` chose beside the temperature.

        References
        ----------
        Opper & Archambeau (2009), "The variational Gaussian approximation revisited"; Khan & Lin (2017),
        "Conjugate-computation variational inference", arXiv:1703.04265; Nickisch & Rasmussen (2008), "Approximations
        for binary Gaussian process classification".
        """
        # Of several processes all read data, or none does; the evidence is that of each.
        alone = val_loader is None and train_loader is None
        with states.all_or_nothing(self), nullcontext() if alone else processes.agreed():
            verbose, n_steps, lr = methods.checked_steps(verbose, progress_bar, n_steps, lr)
            grid = methods.checked_grid(log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base)
            start = self._checked("init_prior_prec", init_prior_prec, positive=True)
            bounds, n_folds = methods.checked_limits("bounds", bounds), checks.whole("n_folds", n_folds, 2)
            methods.refuse_temperature(temperature)
            how, structure = self._checked_method(method), choose(PriorStructure, prior_structure, "prior_structure")
            predicted = self._tuning_options(pred_type, link_approx, n_samples, generator)
            asked = (predicted, structure, n_steps, loss, noise, val_loader, progress_bar, train_loader)
            asked = tuning.Settings(*asked, start, grid, bounds, lr, n_folds, refit)
            self._tuned(how, asked, verbose=verbose)

    def _checked_method(self, method: Any) -> TuningMethod:
        """A method of tuning that has a meaning for the posterior."""
        return methods.chosen_method(method)

    def _tuning_options(
        self, pred_type: PredTypeLike, link_approx: LinkApproxLike, n_samples: int, generator: Any
    ) -> Options:
        """How the predictions that are scored are made, checked."""
        return self._options(pred_type, False, link_approx, n_samples, generator=generator, for_targets=True)

    @abstractmethod
    def _tuned(self, method: TuningMethod, asked: tuning.Settings, *, verbose: bool) -> tuning.Tuning:
        """Choose by a method and assign what was found."""


__all__ = ["BaseLaplace"]
