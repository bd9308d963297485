"""``load``: from a file and a model to the estimator that was saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Any

from torch import nn
from typing_extensions import Unpack, overload

from laplace import checks
from laplace.baselaplace import statefile, untuned
from laplace.baselaplace.fitted import FittedLaplace
from laplace.baselaplace.keywords import AnyKeywords
from laplace.curvature import AutogradEF, AutogradGGN, CurvatureInterface
from laplace.errors import StateError, UnsupportedError
from laplace.laplace import ESTIMATORS, FUNCTIONAL
from laplace.likelihoods import LIKELIHOODS, L, LikelihoodLike

CLASSES: Mapping[str, Any] = {cls.__name__: cls for cls in (*ESTIMATORS.values(), *FUNCTIONAL.values())}
"""The estimators that a state can name."""
BACKENDS: Mapping[str, type[CurvatureInterface]] = {cls.kind.value: cls for cls in (AutogradGGN, AutogradEF)}
"""The built-in back end for each kind of curvature."""


@overload
def load(
    path: str | os.PathLike[str] | IO[bytes],
    model: nn.Module,
    likelihood: L,
    map_location: Any = ...,
    **options: Unpack[AnyKeywords],
) -> FittedLaplace[L]: ...
@overload
def load(
    path: str | os.PathLike[str] | IO[bytes],
    model: nn.Module,
    likelihood: None = ...,
    map_location: Any = ...,
    **options: Unpack[AnyKeywords],
) -> FittedLaplace: ...
def load(
    path: str | os.PathLike[str] | IO[bytes],
    model: nn.Module,
    likelihood: LikelihoodLike | None = None,
    map_location: Any = None,
    **options: Any,
) -> FittedLaplace:
    """Make the estimator that ``la.save(path)`` wrote, for the same model; nothing in the file is executed.

    Class, structure, random weights, likelihood, hyperparameters and all that was learned come from the file.

    Parameters
    ----------
    path
        Path of the file, or a file that is open: of this library, or of laplace-torch 0.2.2 or 0.3 (``full``, ``kron``
        and ``diag``).
    model
        The trained network, with the weights that it had when it was fitted.
    likelihood
        What the state does not hold in full: a likelihood with numbers of its own (a noise covariance), or one of your
        own. By default the name that the state holds.
    map_location
        Where ``torch.load`` puts tensors first; they end on the device of the model.
    **options
        Further options of the estimator that a state does not hold: ``backend=``, ``curvature_dtype=``, ``output_fn=``,
        ``dict_key_x=`` and others of its class.

    Returns
    -------
    The estimator, fitted.

    Raises
    ------
    StateError
        If the file cannot be read (a ``FileNotFoundError``, too, where there is none), is no state of an estimator, or
        belongs to another model.
    UnsupportedError
        If the state is one of several heads, of a class of your own, or of a likelihood that it does not hold.
    UnknownOptionError
        If the estimator has no such option.

    Examples
    --------
    >>> import tempfile, torch, laplace
    >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
    >>> la = laplace.Laplace(model, "classification", prior_precision=2.0).fit([(x, y)])
    >>> path = tempfile.mkdtemp() + "/la.pt"
    >>> la.save(path)
    >>> torch.equal(laplace.load(path, model)(x), la(x))
    True
    """
    state = statefile.read(path, "cpu" if map_location is None else map_location)
    if isinstance(state, Mapping) and "heads" in state:
        msg = (
            "The file holds the state of several heads: construct them as they were and read it, "
            "la = Laplace(model, {…}, …); la.load(path)."
        )
        raise UnsupportedError(msg)
    if not isinstance(state, Mapping) or not isinstance(state.get("cls_name"), str):
        msg = "The file holds no state of an estimator: it does not say of which class. States are written by la.save."
        raise StateError(msg)
    if (cls := CLASSES.get(state["cls_name"])) is None:
        msg = (
            f"The state was saved by a {state['cls_name']}, which is no class of this library: construct one and call "
            f"its load(path). Known here: {', '.join(CLASSES)}."
        )
        raise UnsupportedError(msg)
    taken = checks.options_of(cls)
    checks.known_options(cls.__name__, options, [name for name in taken if name not in ("model", "likelihood")])
    # Hyperparameters are read with the rest, and checked there.
    own = {
        name: state[name] for name in taken if name in state and name not in {*untuned.HYPERPARAMETERS, "likelihood"}
    }
    if "num_inducing" in own:  # the points themselves are read with what was learned
        own["inducing_locations"] = "random"
    kind = state.get("curvature_kind", AutogradGGN.kind.value)
    own.setdefault("backend", BACKENDS.get(kind))
    la: FittedLaplace = cls(model, _likelihood(state) if likelihood is None else likelihood, **{**own, **options})
    la.load_state_dict(state)
    return la


def _likelihood(state: Mapping[str, Any]) -> str:
    """The name of the likelihood, if that is all there is to it."""
    said = str(state.get("likelihood"))
    if said not in {str(name) for name in LIKELIHOODS}:
        msg = (
            f"The state was saved with likelihood={said!r}, which a name does not make again: pass "
            "laplace.load(path, model, likelihood=…) with the object that it was."
        )
        raise UnsupportedError(msg)
    return said


__all__ = ["load"]
