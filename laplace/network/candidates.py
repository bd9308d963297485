"""Which layers of a model may be its last, to look at and to name in messages."""

from __future__ import annotations

from torch import Tensor, nn

from laplace.network import heads
from laplace.network.heads import head_of, is_head

LISTED = 5
"""How many layers a message lists."""


def candidates(model: nn.Module) -> dict[str | None, nn.Module]:
    """Layers by name that may be the last, and quantized ones, which are refused by name."""
    return {name: layer for name, layer in model.named_modules() if is_head(layer) or heads.is_quantized(layer)}


def listed(model: nn.Module) -> str:
    """The candidates in words, the last ones where there are many."""
    layers = {name: layer for name, layer in candidates(model).items() if is_head(layer)}
    if not layers:
        return (
            "The model has no linear layer; a last-layer approximation needs one. What there can be "
            f"(last_layer_name=): {heads.kinds()}."
        )
    shown = list(layers.items())[-LISTED:]
    sizes = {name: head_of(layer).shape(layer) for name, layer in shown}
    text = ", ".join(f"{name!r} ({width} → {n})" for name, (n, width) in sizes.items())
    which = f"The last {len(shown)} of the {len(layers)} linear" if len(layers) > len(shown) else "Linear"
    return f"{which} layers of the model: {text}; last_layer_name= chooses one."


def sharing(model: nn.Module, layer: nn.Module, weight: Tensor) -> list[str]:
    """Names under which modules outside a layer hold its weight."""
    inside = set(layer.modules())
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter is weight and module not in inside
    ]


__all__ = ["candidates", "listed", "sharing"]
