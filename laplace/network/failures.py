"""What to say when the user's model raises an exception: what it was given, and the likely causes."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from laplace.errors import InputError, ModelError, UnsupportedError
from laplace.network.signatures import misfit

RAISED_BY_MODELS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions that are explained; others, such as an interruption or one of the user's own, mean something else."""


@contextmanager
def explained(model: nn.Module, x: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Generator[None]:
    """Explain what the model raises in the body; errors of this library pass, as does running out of memory."""
    try:
        yield
    except RAISED_BY_MODELS as error:
        if isinstance(error, torch.OutOfMemoryError) or type(error).__module__.partition(".")[0] == "laplace":
            raise
        unfit = misfit(model, args, kwargs, str(error)) if isinstance(error, TypeError) else None
        if unfit is not None:
            raise InputError(unfit) from error
        reason = str(error).strip().partition("\n")[0]
        msg = f"The model ({type(model).__name__}) raised {type(error).__name__}: {reason or 'no message'}. Its "
        msg += (
            f"input was {described(x)}.{''.join(f' {hint}' for hint in _hints(model, x, bool(args) and args[0] is x))}"
        )
        raise ModelError(msg) from error


def check_weights(named: Mapping[str, Tensor]) -> None:
    """Raise if some weights are on the meta device, where they have no values."""
    absent = [name for name, weight in named.items() if weight.is_meta]
    if absent:
        msg = (
            f"The weights {', '.join(map(repr, absent[:3]))}{' …' if len(absent) > 3 else ''} are on the meta device: "
            "they have no values, as those of a model that was built without loading it, or that are offloaded. Load "
            "them onto a device (for transformers leave out device_map, or pass one that fits the memory)."
        )
        raise UnsupportedError(msg)


def checked_model(model: Any) -> nn.Module:
    """The model, if it is a module whose weights are made already (no lazy layers) and real; else raises."""
    if not isinstance(model, nn.Module):
        msg = f"model must be a trained torch.nn.Module; got {type(model).__name__}."
        raise UnsupportedError(msg)
    for name, weight in model.named_parameters():
        if is_lazy(weight):
            msg = f"The weight {name!r} is made in the first forward pass: run the model on a batch, and train it."
            raise UnsupportedError(msg)
        if weight.is_complex():
            msg = f"The weight {name!r} is complex; a Laplace approximation is one over real weights."
            raise UnsupportedError(msg)
    return model


def described(value: Any) -> str:
    """Nested inputs in words: types, shapes and dtypes."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, Mapping):
        entries = ", ".join(f"{key!r}: {described(item)}" for key, item in value.items())
        return f"a {type(value).__name__} {{{entries}}}"
    if isinstance(value, tuple):
        return f"a tuple ({', '.join(described(item) for item in value)})"
    if isinstance(value, list):
        head = ", ".join(described(item) for item in value[:3])
        return f"a list of {len(value)}: [{head}{', …' if len(value) > 3 else ''}]"
    shape = getattr(value, "shape", None)
    kind = "None" if value is None else f"of type {type(value).__name__}"
    return f"{kind} {list(shape)}" if isinstance(shape, tuple) else kind


def _hints(model: nn.Module, x: Any, whole: bool) -> Iterator[str]:
    """What the cause may be, as far as inputs and weights tell."""
    if isinstance(x, Mapping) and whole:
        yield (
            "The mapping was passed whole, since forward has no parameter named as dict_key_x= says. For a model that "
            "takes a tensor let the loader yield (x, y)."
        )
    elif isinstance(x, tuple) and whole:
        yield f"Its forward takes one input, so that the {len(x)} were passed as one tuple."
    found = list(leaves(x))
    if not any(isinstance(leaf, Tensor) for leaf in found):
        yield "Models take tensors: convert the inputs, torch.as_tensor(x)."
        return
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    absent = sum(weight.is_meta for weight in weights)
    if absent:
        yield f"{absent} of its weights are on the meta device and have no values: load them first."
    # Integers may be for embeddings, so they count as another type of numbers only if no other inputs are there.
    given = {leaf.dtype for leaf in found if isinstance(leaf, Tensor)}
    numbers = {dtype for dtype in given if dtype.is_floating_point or dtype.is_complex}
    taken = {weight.dtype for weight in weights}
    if len(taken) == 1 and (numbers or not any(isinstance(module, nn.Embedding) for module in model.modules())):
        (dtype,) = taken
        others = (numbers or given) - taken
        if others:
            yield (
                f"Its weights are {dtype}, the inputs {', '.join(sorted(map(str, others)))}: convert the inputs with "
                f"x.to({dtype}), or the model."
            )
    devices = {weight.device for weight in weights if not weight.is_meta}
    elsewhere = {leaf.device for leaf in found if isinstance(leaf, Tensor)} - devices
    if devices and elsewhere:
        yield (
            f"Its weights are on {', '.join(sorted(map(str, devices)))}, the inputs on "
            f"{', '.join(sorted(map(str, elsewhere)))}: move the inputs."
        )


def leaves(value: Any) -> Iterator[Any]:
    """Everything in nested inputs that is no container."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    else:
        yield value
