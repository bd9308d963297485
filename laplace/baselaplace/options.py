"""What users choose by name, checked: the back end, and how to predict. What has no meaning is refused in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace import checks
from laplace.baselaplace.random_weights import AllWeights
from laplace.curvature import AutogradGGN, CurvatureInterface
from laplace.enums import LinkApprox, PredType, choose
from laplace.errors import InputError, NotFittedError, ShapeError, UnsupportedError
from laplace.likelihoods import AbstractLikelihood, name_of
from laplace.network import ParameterSubset
from laplace.network.failures import checked_model
from laplace.network.signatures import innermost
from laplace.predictive import Options
from laplace.types import LinkApproxLike, PredTypeLike

CHECKED: dict[str, Callable[[Any], Any]] = {
    "model": checked_model,
    "likelihood": name_of,
    "enable_backprop": partial(checks.flag, "enable_backprop"),
    "dict_key_x": partial(checks.key, "dict_key_x"),
    "dict_key_y": partial(checks.key, "dict_key_y"),
}
"""Checks of options that are plain attributes, whenever they are assigned."""


def chosen_backend(
    backend: Any, backend_kwargs: Mapping[str, Any] | None, likelihood: str
) -> tuple[type[CurvatureInterface], dict[str, Any]]:
    """The class of a back end and its options; of an object those that it was made with, never its model."""
    given = checks.keywords("backend_kwargs", backend_kwargs)
    if "subnetwork_indices" in given:
        msg = (
            "backend_kwargs cannot hold subnetwork_indices: pass them to the estimator, "
            'Laplace(..., subset_of_weights="subnetwork", subnetwork_indices=...).'
        )
        raise UnsupportedError(msg)
    backend = AutogradGGN if backend is None else backend
    if isinstance(backend, type) and issubclass(backend, CurvatureInterface):
        check_backend_keywords(backend, given)
        return backend, given
    if not isinstance(backend, CurvatureInterface):
        msg = f"backend must be a subclass of CurvatureInterface, or an object of one; got {backend!r}."
        raise UnsupportedError(msg)
    cls, own = type(backend), backend.made_with
    changed = [name for name in given if name not in own or (given[name] is not own[name] and given[name] != own[name])]
    if changed:
        msg = (
            f"The {cls.__name__} object given as backend was made with {own or 'no options'}, and backend_kwargs says "
            f"otherwise of {', '.join(map(repr, changed))}. Pass the class with backend_kwargs, or the object alone."
        )
        raise UnsupportedError(msg)
    if backend.likelihood != likelihood:
        msg = (
            f"The {cls.__name__} object given as backend is one for likelihood={str(backend.likelihood)!r}; this "
            f"approximation has {str(likelihood)!r}. Pass the class: backend={cls.__name__}."
        )
        raise UnsupportedError(msg)
    return cls, own


def known(subset: ParameterSubset | None, what: str) -> ParameterSubset:
    """The random weights, for something that needs them."""
    if subset is None:
        msg = (
            f"{what} needs the last layer, which is found by the first batch: name it (last_layer_name=), or call "
            "fit(train_loader) first."
        )
        raise NotFittedError(msg)
    return subset


def one_number(name: str, value: Tensor) -> Tensor:
    """A hyperparameter that has one value."""
    if value.numel() != 1:
        msg = f"{name} must be one number; got the shape {list(value.shape)}."
        raise InputError(msg)
    return value


def by_output(sigma: Tensor, n_outputs: int | None) -> Tensor:
    """Observation noise, ``[]`` or one for each output, ``[C]``."""
    if sigma.numel() == 1:
        return sigma.reshape(())
    if sigma.dim() != 1 or n_outputs not in (None, len(sigma)):
        outputs = "each output" if n_outputs is None else f"each of the {n_outputs} outputs"
        msg = f"sigma_noise must be one number, or one for {outputs}; got the shape {list(sigma.shape)}."
        raise InputError(msg)
    return sigma


def replaced(weights: AllWeights, name: str, before: Any, value: Any) -> Any:
    """What an option of a network becomes when it is assigned again, if it can be."""
    if name == "likelihood":
        msg = (
            f"likelihood is {str(before)!r} and cannot be replaced by {str(value)!r}: curvature and noise are those of "
            "the likelihood. Construct another object."
        )
        raise UnsupportedError(msg)
    if name == "model":
        value = weights.replaced(value)
        shapes, others = ([tuple(p.shape) for p in model.parameters()] for model in (before, value))
        if shapes != others:
            msg = (
                "The model can be replaced by one whose parameters have the same shapes, such as a compiled one or "
                "a copy; this one has others. Construct another object."
            )
            raise UnsupportedError(msg)
    else:
        weights.renamed(name, value)
    return value


def said_once(likelihood: AbstractLikelihood, name: str, value: Any) -> Any:
    """A hyperparameter that is given with the likelihood or beside it, and not twice."""
    within = getattr(likelihood, name, 1.0)
    if bool((torch.as_tensor(within) == 1).all()):
        return value
    if isinstance(value, Tensor) or value != 1:
        msg = f"{name} is given twice, within the likelihood and as an option: give one of them."
        raise UnsupportedError(msg)
    return within


def checked_curvature_dtype(dtype: Any) -> torch.dtype | None:
    """A precision in which curvature can be computed; ``None`` for that of the model."""
    if not (dtype is None or dtype is torch.float32 or dtype is torch.float64):
        msg = f"curvature_dtype must be torch.float32 or torch.float64; got {dtype!r}."
        raise UnsupportedError(msg)
    return dtype


def checked_fisher_kwargs(given: Any, backend: type[CurvatureInterface]) -> dict[str, Any]:
    """Keywords for the methods of an ASDL back end."""
    keywords = checks.keywords("asdl_fisher_kwargs", given)
    if keywords and not backend.accepts_fisher_kwargs:
        msg = (
            f"asdl_fisher_kwargs are options of the ASDL back ends; {backend.__name__} does not read them. Options of "
            "other back ends go into backend_kwargs."
        )
        raise UnsupportedError(msg)
    return keywords


def prediction_options(
    likelihood: AbstractLikelihood,
    device: torch.device,
    pred_type: PredTypeLike,
    joint: bool = False,
    link_approx: LinkApproxLike = LinkApprox.PROBIT,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
    fitting: bool = False,
    *,
    for_targets: bool = False,
) -> Options:
    """Check how to predict: names, combinations, the generator."""
    kind = choose(PredType, pred_type, "pred_type")
    link = choose(LinkApprox, link_approx, "link_approx")
    joint = checks.flag("joint", joint)
    fitting = checks.flag("fitting", fitting)
    diagonal_output = checks.flag("diagonal_output", diagonal_output)
    if kind is PredType.GP:
        msg = 'pred_type="gp" belongs to function-space estimators; use "glm" or "nn" here.'
        raise UnsupportedError(msg)
    likelihood.check_prediction(
        kind, link, joint=joint, diagonal_output=diagonal_output, fitting=None if for_targets else fitting
    )
    n_samples, generator = checks.whole("n_samples", n_samples), checks.generator(generator, device)
    return Options(kind, link, joint, n_samples, diagonal_output, generator, fitting)


def checked_weights(value: Any, mean: Tensor) -> Tensor:
    """Weights of a user, ``[..., P]``, where the mean is and in its precision."""
    value = checks.tensor("value", value, "weights, a tensor [..., P]").to(mean)
    if value.shape[-1:] != mean.shape:
        msg = f"Expected weights of shape [..., {len(mean)}]; got {list(value.shape)}."
        raise ShapeError(msg)
    return value


def check_marginals(options: Options) -> None:
    """Raise where samples of each output's own marginal are asked for of what has none."""
    if options.diagonal_output and options.pred_type is PredType.NN:
        msg = 'diagonal_output=True draws from marginals of the linearized outputs: it needs pred_type="glm".'
        raise UnsupportedError(msg)


def check_model_keywords(model: nn.Module, predict: Callable[..., Any], given: Iterable[str]) -> None:
    """Raise where keywords for the user's model are misspelt options, or none that it takes."""
    names = list(given)
    if names:
        options = [name for name in checks.options_of(predict) if name != "x"]
        checks.model_keywords(names, options, _named_by(innermost(model)))


def _named_by(module: nn.Module) -> list[inspect.Parameter]:
    """Parameters of a ``forward``; one that takes any keyword may pass them on to the modules that it holds."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        parameters += [p for child in module.children() for p in _named_by(child)]
    return parameters


PASSED_BY_ESTIMATORS = {"model", "likelihood", "last_layer", "dict_key_x", "dict_key_y"}
"""What a back end is told by the estimator, and never in ``backend_kwargs``."""


def check_backend_keywords(backend: type[CurvatureInterface], given: Mapping[str, Any]) -> None:
    """Raise where ``backend_kwargs`` hold what the back end does not take."""
    options: dict[str, inspect.Parameter] = {}
    any_keyword = False
    for base in backend.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters
        options = {**parameters, **options}
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        any_keyword |= passes_on and not base.__module__.startswith("laplace.")
        if not passes_on:
            break
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [n for n, p in options.items() if p.kind not in kinds and n not in {"self", *PASSED_BY_ESTIMATORS}]
    if not any_keyword:
        checks.known_options(f"backend_kwargs: {backend.__name__}", given, names)
    elif given:
        clash = sorted(PASSED_BY_ESTIMATORS & given.keys())
        if clash:
            msg = f"backend_kwargs cannot hold {', '.join(map(repr, clash))}: the estimator passes its own."
            raise UnsupportedError(msg)
        unknown = [name for name in given if name not in names]
        checks.model_keywords(unknown, names, list(inspect.signature(backend).parameters.values()))
