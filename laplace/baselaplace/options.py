"""What users choose by name, checked: the back end, and how to predict. What has no meaning is refused in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from laplace import checks
from laplace.curvature import AutogradGGN, CurvatureInterface
from laplace.enums import LinkApprox, PredType, choose
from laplace.errors import UnsupportedError
from laplace.likelihoods import AbstractLikelihood
from laplace.network.signatures import innermost
from laplace.predictive import Options


def chosen_backend(
    backend: Any, backend_kwargs: Mapping[str, Any] | None, likelihood: str
) -> tuple[type[CurvatureInterface], dict[str, Any]]:
    """The class of a back end and its options; of an object those that it was made with, never its model.

    Parameters
    ----------
    backend, backend_kwargs, likelihood
        As in ``BaseLaplace``.

    Raises
    ------
    UnsupportedError
        If ``backend`` is no back end, or an object that contradicts the options or the likelihood beside it; or an
        option is unknown to the class (``UnknownOptionError``).
    InputError
        If ``backend_kwargs`` are no mapping.
    """
    given = checks.keywords("backend_kwargs", backend_kwargs)
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


def prediction_options(
    likelihood: AbstractLikelihood,
    device: torch.device,
    pred_type: PredType | str,
    joint: bool = False,
    link_approx: LinkApprox | str = LinkApprox.PROBIT,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
    fitting: bool = False,
    *,
    for_targets: bool = False,
) -> Options:
    """Check how to predict: names, combinations, the generator.

    Parameters
    ----------
    likelihood
        Of the estimator.
    device
        Of its model.
    pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting
        As in ``ParametricLaplace.__call__``.
    for_targets
        Of the predictions that targets are scored by: of pairs, where they are preferences.

    Raises
    ------
    UnsupportedError
        If a name is unknown, or options do not go together.
    InputError
        If a flag is neither ``True`` nor ``False``, ``n_samples`` is no positive whole number, or the generator none
        on the model's device.
    """
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


def check_model_keywords(model: nn.Module, predict: Callable[..., Any], given: Iterable[str]) -> None:
    """Raise where keywords for the user's model are misspelt options, or none that it takes.

    Parameters
    ----------
    model
        Of the user.
    predict
        The method that passes the keywords on; its signature is the table of options.
    given
        The keywords.

    Raises
    ------
    UnknownOptionError
        If one is; the message names the nearest option.
    """
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
    """Raise where ``backend_kwargs`` hold what the back end does not take.

    Parameters
    ----------
    backend
        Its class; what the constructors of its bases take is found through ``*args, **kwargs``.
    given
        The keywords.

    Raises
    ------
    UnknownOptionError
        If one is unknown; a class from elsewhere may take any but near misses.
    """
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
        unknown = [name for name in given if name not in names]
        checks.model_keywords(unknown, names, list(inspect.signature(backend).parameters.values()))
