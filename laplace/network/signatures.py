"""How inputs enter a model, read off its signature through wrappers that pass all arguments on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

PASSES_ON = {
    "torch.nn.parallel": "module",
    "torch.distributed.fsdp": "module",
    "torch.optim.swa_utils": "module",
    "torch._dynamo.eval_frame": "_orig_mod",
    "peft.peft_model": "base_model",
    "peft.mixed_model": "base_model",
    "peft.tuners": "model",
}
"""Classes (module and name) of wrappers that pass all arguments on, and the attribute that holds what they wrap."""


def innermost(model: nn.Module) -> nn.Module:
    """The model that the arguments of a call arrive at: inside known wrappers that pass all of them on."""
    while passes_on(model):
        rooms = [cls.__module__ for cls in type(model).__mro__]
        names = [name for prefix, name in PASSES_ON.items() if any(room.startswith(prefix) for room in rooms)]
        inside = getattr(model, names[0], None) if names else None
        if not isinstance(inside, nn.Module):
            break
        model = inside
    return model


def passes_on(model: nn.Module) -> bool:
    """Whether ``forward`` is written with ``*args, **kwargs`` and nothing else."""
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    return kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of ``forward``, seen through wrappers that pass everything on."""
    return list(inspect.signature(innermost(model).forward).parameters.values())


def misfit(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], said: str) -> str | None:
    """Why a call raised a ``TypeError`` with the text ``said``, in words; ``None`` if its arguments do fit."""
    inside = innermost(model)
    for module in (inside, *(inside.children() if passes_on(inside) else ())):
        signature = inspect.signature(module.forward)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            if said.startswith(f"{type(module).forward.__qualname__}() "):
                form = f"{len(args)} positional and the keyword arguments {', '.join(map(repr, kwargs)) or 'none'}"
                return (
                    f"The model was called with {form}, and {type(module).__name__}.forward{signature} does not take "
                    f"them ({error}). A forward with a parameter named as dict_key_x takes the entries of a mapping as "
                    "keywords, any other with a named parameter takes the mapping whole: write so what the wrapper "
                    "takes, and leave entries that it does not take out of the batches."
                )
    return None


def takes_keyword(model: nn.Module, name: str) -> bool:
    """Whether ``forward`` has a parameter of that name, or passes all keywords on."""
    parameters = parameters_of(model)
    if any(p.name == name for p in parameters):
        return True
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return not named and any(p.kind is p.VAR_KEYWORD for p in parameters)


def takes_several(model: nn.Module) -> bool:
    """Whether ``forward`` takes several inputs: any number, or two or more that have no default or ``None`` for one.

    Parameters with another default are options, not inputs.
    """
    parameters = parameters_of(model)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(p.default is p.empty or p.default is None for p in positional) > 1
