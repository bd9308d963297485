"""What users choose by name, checked: the back end, and how to predict. What has no meaning is refused in words."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch

from laplace.curvature import AutogradGGN, CurvatureInterface
from laplace.enums import Likelihood, LinkApprox, PredType, choose
from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods import LIKELIHOODS
from laplace.predictive import Options


def chosen_backend(
    backend: Any, backend_kwargs: Mapping[str, Any] | None, likelihood: Likelihood
) -> tuple[type[CurvatureInterface], dict[str, Any]]:
    """The class of a back end and its options; of an object those that it was made with, never its model.

    Parameters
    ----------
    backend, backend_kwargs, likelihood
        As in ``BaseLaplace``.

    Raises
    ------
    UnsupportedError
        If ``backend`` is no back end, or an object that contradicts the options or the likelihood beside it.
    """
    given = dict(backend_kwargs or {})
    if backend is None:
        return AutogradGGN, given
    if isinstance(backend, type) and issubclass(backend, CurvatureInterface):
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
    if backend.likelihood is not likelihood:
        msg = (
            f"The {cls.__name__} object given as backend is one for likelihood={backend.likelihood.value!r}; this "
            f"approximation has {likelihood.value!r}. Pass the class: backend={cls.__name__}."
        )
        raise UnsupportedError(msg)
    return cls, own


def prediction_options(
    likelihood: Likelihood,
    device: torch.device,
    pred_type: PredType | str,
    joint: bool = False,
    link_approx: LinkApprox | str = LinkApprox.PROBIT,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
    fitting: bool = False,
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

    Raises
    ------
    UnsupportedError
        If a name is unknown, or options do not go together.
    InputError
        If ``n_samples`` is no positive whole number, or the generator none on the model's device.
    """
    kind = choose(PredType, pred_type, "pred_type")
    link = choose(LinkApprox, link_approx, "link_approx")
    # Scores are predicted as they are; probabilities of pairs pass the link.
    has_link = LIKELIHOODS[likelihood].has_link or fitting
    bridge = link in (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM)
    problem = ""
    if kind is PredType.GP:
        problem = 'pred_type="gp" belongs to function-space estimators; use "glm" or "nn" here.'
    elif fitting and LIKELIHOODS[likelihood].n_items == 1:
        problem = f"fitting=True is for reward modeling; it has no meaning for {likelihood.value}."
    elif fitting and bridge:
        problem = f'link_approx={link.value!r} is made for several classes; for pairs use "probit" or "mc".'
    elif fitting and diagonal_output:
        problem = "Probabilities of pairs need the covariance of both scores: leave out diagonal_output=True."
    elif joint and diagonal_output:
        problem = "joint=True asks for covariances across inputs, diagonal_output=True for none: pass one of them."
    elif joint and kind is PredType.NN:
        problem = 'joint=True needs pred_type="glm"; sampled predictions are functions already.'
    elif joint and has_link and link is not LinkApprox.MC:
        problem = 'Probabilities with joint=True average over whole functions: pass link_approx="mc" with it.'
    elif bridge and not has_link:
        problem = f"link_approx={link.value!r} turns logits into probabilities; regression and scores have none."
    elif bridge and kind is PredType.NN:
        problem = f'pred_type="nn" averages over weight samples; link_approx={link.value!r} needs pred_type="glm".'
    elif bridge and diagonal_output:
        problem = f"link_approx={link.value!r} needs covariances between outputs: leave out diagonal_output=True."
    if problem:
        raise UnsupportedError(problem)
    if isinstance(n_samples, bool) or not isinstance(n_samples, Integral) or n_samples < 1:
        msg = f"n_samples must be a positive whole number; got {n_samples!r}."
        raise InputError(msg)
    if not isinstance(generator, (torch.Generator, type(None))):
        msg = f"generator must be a torch.Generator or None; got {type(generator).__name__}."
        raise InputError(msg)
    if generator is not None and generator.device.type != device.type:
        msg = f"The generator is on {generator.device}, the model on {device}; create it on the model's device."
        raise InputError(msg)
    return Options(kind, link, joint, int(n_samples), diagonal_output, generator, fitting)
