"""Checks of what users pass for options: flags, whole numbers, numbers, keys, keywords.

Each function is given the keyword, with which its message begins, and returns the value in its plain form.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from laplace.errors import InputError, ShapeError, UnknownOptionError

NEAR = 0.75
"""Similarity from which on a keyword counts as a misspelt option: that of ``num_samples`` and ``n_samples`` is 0.9."""


def flag(name: str, value: Any) -> bool:
    """``True`` or ``False``, also given as 0 or 1 or NumPy's flag, but not as text: ``"no"`` would count as true."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Integral) and value in (0, 1)):
        return bool(value)
    msg = f"{name} must be True or False; got {shown(value)}."
    raise InputError(msg)


def flags(**values: Any) -> None:
    """Several flags, by name."""
    for name, value in values.items():
        flag(name, value)


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number that is not below ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        kinds = {0: "a whole number that is not negative", 1: "a positive whole number"}
        msg = f"{name} must be {kinds.get(least, f'a whole number, at least {least}')}; got {shown(value)}."
        raise InputError(msg)
    return int(value)


def as_float(value: Any) -> float:
    """One number, maybe in a list, an array or a tensor, with all its digits."""
    return float(torch.as_tensor(value.item() if isinstance(value, Tensor) else value, dtype=torch.float64))


def number(name: str, value: Any, *, positive: bool = False, from_zero: bool = False) -> float:
    """One finite number, also given as a tensor or an array of one element."""
    found = math.nan
    single = isinstance(value, Real) or (isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1)
    if single and what_is_no_number(value) is None:
        found = float(value.item() if isinstance(value, (Tensor, np.ndarray)) else value)
    if not math.isfinite(found) or (positive and found <= 0) or (from_zero and found < 0):
        kind = "positive finite number" if positive else "finite number, at least 0" if from_zero else "finite number"
        msg = f"{name} must be one {kind}; got {shown(value)}."
        raise InputError(msg)
    return found


def what_is_no_number(value: Any) -> str | None:
    """What in a value (itself or an entry) is no real number, in words; ``None`` if nothing is found."""
    if isinstance(value, (bool, np.bool_)):
        return repr(value)
    if isinstance(value, (str, bytes, complex, Mapping)) or value is None:
        return shown(value)
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.device.type == "meta":
            return "a tensor on the meta device" if value.device.type == "meta" else f"a {value.layout} tensor"
        return f"a tensor of {value.dtype}" if value.dtype is torch.bool or value.is_complex() else None
    if isinstance(value, np.ndarray):
        return None if value.dtype.kind in "iuf" else f"an array of {value.dtype}"
    if isinstance(value, (list, tuple)):
        return next((found for found in map(what_is_no_number, value) if found is not None), None)
    return None


def hyperparameter(name: str, value: Any, dtype: torch.dtype, device: torch.device, *, positive: bool) -> Tensor:
    """A copy of a hyperparameter as a finite number or vector; see ``numbers``."""
    checked = numbers(name, value, dtype, device, positive=positive)
    if checked.dim() > 1:
        msg = f"{name} must be a number or a vector; got the shape {list(checked.shape)}."
        raise ShapeError(msg)
    return checked


def numbers(name: str, value: Any, dtype: torch.dtype, device: torch.device, *, positive: bool = False) -> Tensor:
    """A copy of an argument as a finite tensor, which no later change of the user's tensor reaches; gradients pass."""
    wrong = what_is_no_number(value)
    try:
        # Straight into the precision of the evidence: a detour through the default dtype would round.
        found = None if wrong else torch.as_tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        wrong, found = f"a {type(value).__name__}", None
    if found is None:
        msg = f"{name} must be a number or a tensor; got {wrong}."
        raise InputError(msg)
    if found.is_inference():
        found = found.clone()
    bad = ~torch.isfinite(found.detach())
    if positive:
        bad |= found.detach() <= 0
    if bool(bad.any()) or found.numel() == 0:
        need = "positive and finite" if positive else "finite"
        got = found.detach().flatten()[bad.flatten()][:3].tolist() if found.numel() else "an empty tensor"
        msg = f"{name} must be {need}; got {got}."
        raise InputError(msg)
    return found.clone()


def key(name: str, value: Any) -> str:
    """The name of an entry of mapping batches."""
    if not isinstance(value, str):
        msg = f"{name} must be the name of an entry of mapping batches, a text; got {shown(value)}."
        raise InputError(msg)
    return value


def keywords(name: str, value: Any) -> dict[str, Any]:
    """Keyword arguments in a mapping; ``None`` stands for none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        msg = f"{name} must be a mapping from the names of options to their values, or None; got {shown(value)}."
        raise InputError(msg)
    return dict(value)


def loader(name: str, value: Any) -> None:
    """Raise if tensors or arrays come instead of a loader of batches, as in ``fit(x, y)``."""
    if isinstance(value, (Tensor, np.ndarray, str, bytes, Mapping)):
        msg = (
            f"{name} must be a loader that yields batches (x, y), such as a DataLoader or the list [(x, y)]; got "
            f"{shown(value)}. Not fit(x, y): fit(DataLoader(TensorDataset(x, y), batch_size=64))."
        )
        raise InputError(msg)


def generator(value: Any, device: torch.device) -> torch.Generator | None:
    """A ``torch.Generator`` on the model's device, or ``None``; a seed is refused."""
    if not isinstance(value, (torch.Generator, type(None))):
        msg = f"generator must be a torch.Generator or None; got {type(value).__name__}."
        raise InputError(msg)
    if value is not None and value.device.type != device.type:
        msg = f"The generator is on {value.device}, the model on {device}; create it on the model's device."
        raise InputError(msg)
    return value


def device(name: str, value: Any) -> torch.device:
    """A device of this machine that holds numbers."""
    try:
        found = torch.device(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else value
        if isinstance(found, torch.device) and found.type != "meta":
            torch.empty(0, device=found)
            return found
        reason = "no number can be kept there" if isinstance(found, torch.device) else "no device"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
    msg = f"{name} must be a device of this machine, such as 'cpu'; got {shown(value)} ({reason})."
    raise InputError(msg)


def tensor(name: str, value: Any, what: str) -> Tensor:
    """A dense tensor of real numbers that has values; ``what`` says in words what it should be."""
    if not isinstance(value, Tensor):
        msg = f"{name} must be {what}; got {shown(value)}."
        raise InputError(msg)
    wrong = what_is_no_number(value)
    if wrong is not None:
        msg = f"{name} must be {what}; got {wrong}."
        raise InputError(msg)
    return value


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar name, as the one that may have been meant; ``None`` if no name is near."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def options_of(function: Callable[..., Any]) -> list[str]:
    """Names of the options of a function, read off its signature."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def known_options(what: str, given: Iterable[str], options: Iterable[str]) -> None:
    """Raise unless all keywords are options of ``what``; the message names the nearest option."""
    names = list(options)
    for name in given:
        if name not in names:
            near = nearest(name, names)
            hint = "" if near is None else f" Did you mean {near!r}?"
            msg = f"{what} has no option {name!r}; its options are {', '.join(names)}.{hint}"
            raise UnknownOptionError(msg)


def model_keywords(given: Iterable[str], options: Iterable[str], parameters: Iterable[inspect.Parameter]) -> None:
    """Raise if keywords for ``forward``, whose parameters are given, are misspelt options or none that it takes."""
    parameters, options = list(parameters), list(options)
    own = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in given:
        if name in own:
            continue
        near = nearest(name, options, NEAR)
        if near is not None:
            msg = (
                f"There is no option {name!r}. Did you mean {near!r}? To pass {name!r} on to the model, name it in the "
                "signature of its forward."
            )
            raise UnknownOptionError(msg)
        if not takes_any:
            msg = (
                f"{name!r} is neither an option ({', '.join(options)}) nor a keyword of the model's forward, which "
                f"takes {', '.join(own)}."
            )
            raise UnknownOptionError(msg)


def shown(value: Any) -> str:
    """A short text of a value, for messages."""
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) > 3:
        return f"a {type(value).__name__} of the shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


__all__ = [
    "device",
    "flag",
    "flags",
    "generator",
    "hyperparameter",
    "key",
    "keywords",
    "known_options",
    "loader",
    "model_keywords",
    "nearest",
    "number",
    "options_of",
    "shown",
    "tensor",
    "what_is_no_number",
    "whole",
]
