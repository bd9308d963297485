"""``BaseLaplace``: hyperparameters and their setters, argument checks, and the contract of the call.

Estimators wire the other rooms together and hold no formulas.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laplace import checks, linalg
from laplace.attributes import check_attribute
from laplace.baselaplace.options import chosen_backend, prediction_options
from laplace.curvature import CurvatureInterface
from laplace.enums import Likelihood, LinkApprox, PredType, PriorStructure, TuningMethod
from laplace.errors import InputError, NotFittedError, UnsupportedError
from laplace.fit import Fit
from laplace.likelihoods import AbstractLikelihood, chosen, name_of
from laplace.network.failures import check_model
from laplace.predictive import Options
from laplace.types import Inputs, Scalar


def _checked_model(model: Any) -> nn.Module:
    check_model(model)
    return model


def _as_float(value: Any) -> float:
    """One number, maybe in a list, an array or a tensor, with all its digits."""
    return float(torch.as_tensor(value.item() if isinstance(value, Tensor) else value, dtype=torch.float64))


CHECKED: dict[str, Callable[[Any], Any]] = {
    "model": _checked_model,
    "likelihood": name_of,
    "enable_backprop": partial(checks.flag, "enable_backprop"),
    "dict_key_x": partial(checks.key, "dict_key_x"),
    "dict_key_y": partial(checks.key, "dict_key_y"),
}
"""Checks of options that are plain attributes, whenever they are assigned."""


class BaseLaplace(ABC):
    """A network whose weights, after training, have a Gaussian posterior.

    Parameters
    ----------
    model
        The trained network; it is read, never written.
    likelihood
        ``"classification"``, ``"regression"``, ``"reward_modeling"``, ``"binary"`` (one logit) or ``"poisson"`` (log
        rates of counts); or an object of ``laplace.likelihoods``, such as one of your own.
    sigma_noise
        Standard deviation of the observation noise, in target units, of all outputs or of each; regression only.
    prior_precision
        Of the Gaussian prior, in 1/weight²: a scalar, one value a parameter group, or one a weight.
    prior_mean
        Of the Gaussian prior: a scalar, or one value per weight.
    temperature
        T of the tempered likelihood ``p(y|f)^(1/T)``; below 1 it concentrates the posterior.
    enable_backprop
        Keep predictions differentiable with respect to the inputs.
    dict_key_x, dict_key_y
        Entries of mapping batches that hold the main input and the targets.
    backend
        Class that computes the curvature; ``AutogradGGN`` when ``None``. Of an object its class and options are taken.
    backend_kwargs
        Passed to it on construction.
    asdl_fisher_kwargs
        Passed to the methods of an ASDL back end; any other raises.
    curvature_dtype
        Precision of curvature, factorizations and evidence; that of the model by default, at least float32.

    Raises
    ------
    UnsupportedError
        If an option does not exist or does not fit another.
    InputError
        If a hyperparameter is not finite or not positive.
    """

    _unit_likelihood: AbstractLikelihood
    _prior_precision: Tensor
    _prior_mean: Tensor
    _sigma_noise: Tensor
    _temperature: float | Tensor
    _output_temperature: float = 1.0
    _last_layer: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str | AbstractLikelihood,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        curvature_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self._unit_likelihood = chosen(likelihood)
        self.likelihood = self._unit_likelihood.name
        if not (curvature_dtype is None or curvature_dtype is torch.float32 or curvature_dtype is torch.float64):
            msg = f"curvature_dtype must be torch.float32 or torch.float64; got {curvature_dtype!r}."
            raise UnsupportedError(msg)
        self._curvature_dtype = curvature_dtype
        self._backend_cls, self._backend_kwargs = chosen_backend(backend, backend_kwargs, self.likelihood)
        self._asdl_fisher_kwargs = checks.keywords("asdl_fisher_kwargs", asdl_fisher_kwargs)
        if self._asdl_fisher_kwargs and not self._backend_cls.accepts_fisher_kwargs:
            msg = (
                f"asdl_fisher_kwargs are options of the ASDL back ends; {self._backend_cls.__name__} does not read "
                "them. Options of other back ends go into backend_kwargs."
            )
            raise UnsupportedError(msg)
        self._backend: CurvatureInterface | None = None
        self.enable_backprop = enable_backprop
        self.dict_key_x = dict_key_x
        self.dict_key_y = dict_key_y
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.sigma_noise = self._of_likelihood("sigma_noise", sigma_noise)
        self.temperature = self._of_likelihood("temperature", temperature)
        self.output_temperature = self._of_likelihood("output_temperature", 1.0)

    def _of_likelihood(self, name: str, value: Any) -> Any:
        """A hyperparameter that is given with the likelihood or beside it, and not twice."""
        within = getattr(self._unit_likelihood, name, 1.0)
        if bool((torch.as_tensor(within) == 1).all()):
            return value
        if isinstance(value, Tensor) or value != 1:
            msg = f"{name} is given twice, within the likelihood and as an option: give one of them."
            raise UnsupportedError(msg)
        return within

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
        if name in CHECKED:
            value = CHECKED[name](value)
            if name in vars(self) and "_backend" in vars(self) and value is not vars(self)[name]:
                value = self._replaced(name, value)
        super().__setattr__(name, value)

    def _replaced(self, name: str, value: Any) -> Any:
        """What an option becomes when it is assigned again: what was made with the former value is forgotten.

        Raises
        ------
        UnsupportedError
            If the object would have to be another one.
        """
        if name == "enable_backprop" or value == vars(self)[name]:
            return value
        if name == "likelihood":
            msg = (
                f"likelihood is {str(self.likelihood)!r} and cannot be replaced by {str(value)!r}: curvature and "
                "noise are those of the likelihood. Construct another object."
            )
            raise UnsupportedError(msg)
        if name == "model":
            value = self._as_model(value)
            before, after = ([tuple(p.shape) for p in model.parameters()] for model in (self.model, value))
            if before != after:
                msg = (
                    "The model can be replaced by one whose parameters have the same shapes, such as a compiled one or "
                    "a copy; this one has others. Construct another object."
                )
                raise UnsupportedError(msg)
        elif self._last_layer:
            setattr(self.model, name, value)
        self._backend = None
        vars(self).pop("_whole", None)
        self._hyperparameters_changed()
        return value

    def _as_model(self, model: nn.Module) -> nn.Module:
        """A model in the form in which it is kept."""
        return model

    # -- where and in which precision ---------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self._first_parameter.device

    @property
    def _dtype(self) -> torch.dtype:
        """What curvature, factorizations and hyperparameters are computed in."""
        return self._curvature_dtype or torch.promote_types(self._first_parameter.dtype, torch.float32)

    @property
    def _first_parameter(self) -> Tensor:
        for parameter in self.model.parameters():
            if not parameter.is_meta:  # of an offloaded part
                return parameter
        msg = "The model has no parameters with values; a Laplace approximation is one over its weights."
        raise UnsupportedError(msg)

    # -- hyperparameters ----------------------------------------------------------------------------------------------

    @property
    def prior_precision(self) -> Tensor:
        """Prior precision, ``[1]``, ``[n_layers]`` or ``[P]``, in 1/weight²; assign a float or a tensor.

        An assigned value must be positive and finite (``InputError``), fit the weights (``ShapeError``) and the
        structure: a Kronecker structure takes no precision a weight (``UnsupportedError``).
        """
        return self._handed_out(self._prior_precision)

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        self._prior_precision = self._checked_prior_precision(value)
        self._hyperparameters_changed()

    def _checked_prior_precision(self, value: Any) -> Tensor:
        precision = self._checked("prior_precision", value, positive=True)
        precision = precision.reshape(-1)
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
        if sigma.numel() == 1:
            return sigma.reshape(())
        fit: Fit | None = self.__dict__.get("_fit")
        if sigma.dim() != 1 or (fit is not None and len(sigma) != fit.n_outputs):
            outputs = "each output" if fit is None else f"each of the {fit.n_outputs} outputs"
            msg = f"sigma_noise must be one number, or one for {outputs}; got the shape {list(sigma.shape)}."
            raise InputError(msg)
        return sigma

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
        self._temperature = checked.reshape(()) if isinstance(value, Tensor) else _as_float(value)
        self._hyperparameters_changed()

    def _checked_temperature(self, value: Any) -> Tensor:
        checked = self._checked("temperature", value, positive=True)
        if checked.numel() != 1:
            msg = f"temperature must be one number; got the shape {list(checked.shape)}."
            raise InputError(msg)
        return checked

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
        checked = self._checked("output_temperature", value, positive=True)
        if checked.numel() != 1:
            msg = f"output_temperature must be one number; got the shape {list(checked.shape)}."
            raise InputError(msg)
        self._unit_likelihood.check_output_temperature(float(checked))
        self._output_temperature = _as_float(value)

    @staticmethod
    def _handed_out(value: Tensor) -> Tensor:
        """What a getter returns: a copy, unless a gradient is asked of it."""
        return value if value.requires_grad else value.clone()

    @linalg.lasting
    def _checked(self, name: str, value: Any, *, positive: bool = False) -> Tensor:
        """A hyperparameter as a tensor on the model's device, finite and, if asked, positive."""
        return checks.hyperparameter(name, value, self._dtype, self._device, positive=positive)

    @abstractmethod
    def _check_prior(self, precision: Tensor, mean: Tensor) -> None:
        """Raise if a prior does not fit the weights or the structure, as far as they are known."""

    @abstractmethod
    def _hyperparameters_changed(self) -> None:
        """Forget what depends on hyperparameters."""

    @property
    def _output_likelihood(self) -> AbstractLikelihood:
        """The likelihood with its present noise and temperatures, in the precision of the evidence."""
        temperature = torch.as_tensor(self._temperature, dtype=self._dtype, device=self._device)
        return self._unit_likelihood.at(
            self._sigma_noise.to(self._device, self._dtype), temperature, self._output_temperature
        )

    @property
    def _frozen_likelihood(self) -> AbstractLikelihood:
        """The same, cut off the graph of its hyperparameters."""
        temperature = torch.as_tensor(self._temperature, dtype=self._dtype, device=self._device).detach()
        sigma_noise = self._sigma_noise.detach().to(self._device, self._dtype)
        return self._unit_likelihood.at(sigma_noise, temperature, self._output_temperature)

    # -- back end -----------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> CurvatureInterface:
        """The object that computes the curvature; constructed on first use."""
        if self._backend is None:
            self._backend = self._make_backend()
            self._backend.output_likelihood = self._unit_likelihood.at(torch.ones(()), 1.0, 1.0)
        return self._backend

    @property
    def backend_kwargs(self) -> dict[str, Any]:
        """What the back end is constructed with, a copy."""
        return dict(self._backend_kwargs)

    @property
    def asdl_fisher_kwargs(self) -> dict[str, Any]:
        """What methods of an ASDL back end are given, a copy."""
        return dict(self._asdl_fisher_kwargs)

    @property
    def curvature_dtype(self) -> torch.dtype | None:
        """The precision that was asked for; ``None`` for that of the model, at least float32."""
        return self._curvature_dtype

    @abstractmethod
    def _make_backend(self) -> CurvatureInterface:
        """Construct the back end."""

    # -- the call -----------------------------------------------------------------------------------------------------

    def _options(self, pred_type: PredType | str, *arguments: Any, **keywords: Any) -> Options:
        """How to predict, checked; further arguments as in ``prediction_options``."""
        return prediction_options(self._unit_likelihood, self._device, pred_type, *arguments, **keywords)

    def predictive(
        self, x: Inputs, pred_type: PredType | str, link_approx: LinkApprox | str, n_samples: int
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict; the same as calling the object.

        Parameters
        ----------
        x
            A batch of inputs.
        pred_type, link_approx, n_samples
            As in ``__call__``.

        Returns
        -------
        As ``__call__``.
        """
        return self(x, pred_type=pred_type, link_approx=link_approx, n_samples=n_samples)

    @abstractmethod
    def __call__(self, x: Inputs, pred_type: PredType | str, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Predict at a batch of inputs."""

    @abstractmethod
    def fit(self, train_loader: Iterable[Any]) -> None:
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

    @property
    @abstractmethod
    def prior_precision_diag(self) -> Tensor:
        """Prior precision of each weight, ``[P]``."""

    @abstractmethod
    def sample(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draw weights from the posterior."""

    @abstractmethod
    def functional_samples(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GLM,
        n_samples: int = 1,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples of the outputs."""

    @abstractmethod
    def optimize_prior_precision(
        self,
        pred_type: PredType | str,
        method: TuningMethod | str = TuningMethod.MARGLIK,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: PriorStructure | str = PriorStructure.DIAG,
        val_loader: Iterable[Any] | None = None,
        loss: Callable[..., Any] | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
    ) -> None:
        """Choose the prior precision and assign it."""

    @staticmethod
    def _not_fitted(what: str) -> NotFittedError:
        return NotFittedError(f"{what} needs a fitted approximation: call fit(train_loader) first.")


__all__ = ["BaseLaplace"]
