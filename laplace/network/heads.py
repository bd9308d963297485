"""What a last layer can be, as a table: its weights as a matrix ``[C, D]`` and a bias, and the features they multiply.

The outputs of every kind are ``W φ + b`` at each position: of a convolution φ is the patch of its input under the
kernel. The order of the weights is that of ``W``, row by row, then the bias: of most kinds that of the parameters
themselves, of those that keep inputs first (transposed convolutions, ``Conv1D`` of transformers) of the transposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from laplace.errors import UnsupportedError


@dataclass(frozen=True)
class Head:
    """How one kind of layer is read; all functions take the layer first."""

    called: str
    """In messages."""
    shape: Callable[[Any], tuple[int, int]]
    """``(C, D)``."""
    weight: Callable[[Any], Tensor]
    """``W`` ``[C, D]``, read from attributes: of a parametrized layer that which multiplies the features."""
    features: Callable[[Any, Tensor], Tensor]
    """From the input of the layer to φ, ``[batch, *positions, D]``."""
    plain: Callable[[Any, bool], nn.Module]
    """A new layer of this kind with weights of its own, with or without a bias."""
    own: Callable[[Any, Tensor], Tensor]
    """From ``W`` to the shape in which the new layer keeps it."""
    channels: int = -1
    """The axis of its outputs that holds the C outputs."""
    in_order: bool = True
    """Whether the layer keeps the entries of ``W`` row by row."""
    objection: Callable[[Any], str | None] = lambda _: None
    """Why a layer of this kind cannot be taken, and what to do; ``None`` when it can."""

    def tensors(self, layer: Any) -> tuple[Tensor, ...]:
        """The tensors that hold its weights in that order, in which outputs can be differentiated if there are such."""
        weight, *bias = self.parameters(layer)
        own = getattr(layer, "weight", None) if self.in_order else None
        return (own if isinstance(own, Tensor) else weight, *bias)

    def groups(self, layer: Any) -> list[tuple[int, ...]]:
        """Shapes of its parameter groups: ``(C, D)`` and, with a bias, ``(C,)``."""
        weight = self.shape(layer)
        return [weight] if bias_of(layer) is None else [weight, weight[:1]]

    def parameters(self, layer: Any) -> tuple[Tensor, ...]:
        """Its weights in that order."""
        weight, bias = self.weight(layer), bias_of(layer)
        return (weight,) if bias is None else (weight, bias)

    def outputs(self, layer: Any, phi: Tensor) -> Tensor:
        """``W φ + b`` of features in the precision of the weights, ``[..., D]`` to ``[..., C]``."""
        return F.linear(phi, *self.parameters(layer))

    def at(self, layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A new layer of this kind with other weights, ``[C, D]`` and ``[C]``, where these are."""
        new = self.plain(layer, bias is not None).to(weight)
        with torch.no_grad():
            next(iter(new.parameters())).copy_(self.own(new, weight))
            if bias is not None:
                dict(new.named_parameters())["bias"].copy_(bias)
        return new


def bias_of(layer: Any) -> Tensor | None:
    """The bias, of a wrapper that of what it wraps."""
    return getattr(getattr(layer, "base_layer", layer), "bias", None)


# -- linear layers ----------------------------------------------------------------------------------------------------


def _as_it_comes(_: Any, x: Tensor) -> Tensor:
    return x


def _linear(shape: Callable[[Any], tuple[int, int]], weight: Callable[[Any], Tensor], called: str) -> Head:
    """A kind whose features are its inputs."""

    def plain(layer: Any, biased: bool) -> nn.Module:
        n, width = shape(layer)
        return nn.Linear(width, n, biased)

    return Head(called, shape, weight, _as_it_comes, plain, lambda _, weight: weight)


def _adapted(layer: Any) -> Tensor:
    """The weight of the layer inside with what adapters add to it."""
    weight = layer.base_layer.weight
    if getattr(layer, "disable_adapters", False):
        return weight
    merged = set(getattr(layer, "merged_adapters", ()))
    for name in layer.active_adapters:
        if name in layer.lora_A and name not in merged:
            weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


def _against_adapter(layer: Any) -> str | None:
    if head_in_table(layer.base_layer) is not HEADS[LINEAR] or getattr(layer, "fan_in_fan_out", False) is not False:
        return "it adapts another kind of layer than torch.nn.Linear: merge the adapter into it (merge_and_unload())"
    if any(getattr(layer, "use_dora", {}).values()):
        return "its adapter scales the weight (DoRA): merge it (merge_and_unload())"
    return objection(layer.base_layer)


def _transformers_conv1d(layer: Any, biased: bool) -> nn.Module:
    new = type(layer)(layer.weight.shape[1], layer.weight.shape[0])
    if not biased:  # it has always one
        new.bias = None
    return new


# -- convolutions -----------------------------------------------------------------------------------------------------


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """What lies under a kernel at each of its positions: ``[batch, *positions, channels, *kernel]``, a view."""
    for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
    return x.movedim(1, 1 + len(kernel))


def _batched(x: Tensor, n_spatial: int) -> Tensor:
    return x.unsqueeze(0) if x.dim() == n_spatial + 1 else x


def _padding(layer: Any) -> list[int]:
    """How much is added before and after each spatial axis, in the order of ``torch.nn.functional.pad``."""
    if isinstance(layer.padding, str):
        spans = [
            (step * (size - 1) if layer.padding == "same" else 0)
            for size, step in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        pairs = [(span // 2, span - span // 2) for span in spans]
    else:
        pairs = [(size, size) for size in layer.padding]
    return [size for pair in reversed(pairs) for size in pair]


def _patches(layer: Any, x: Tensor) -> Tensor:
    """Patches of the padded input under the kernel; of a kernel of size 1 they are views."""
    n = len(layer.kernel_size)
    padding, mode = _padding(layer), layer.padding_mode
    x = _batched(x, n)
    if any(padding):
        x = F.pad(x, padding, mode="constant" if mode == "zeros" else mode)
    return _windows(x, layer.kernel_size, layer.stride, layer.dilation).flatten(1 + n)


def _reached(layer: Any, x: Tensor) -> Tensor:
    """For each output of a transposed convolution the inputs that reach it, at the entry of the kernel they meet."""
    n = len(layer.kernel_size)
    x = _batched(x, n)
    sizes = zip(x.shape[2:], layer.stride, strict=True)
    apart = x.new_zeros(*x.shape[:2], *((size - 1) * step + 1 for size, step in sizes))
    apart[(..., *(slice(None, None, step) for step in layer.stride))] = x
    padding: list[int] = []
    sides = zip(layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True)
    for size, step, left_out, more in reversed(list(sides)):
        margin = step * (size - 1) - left_out
        padding += [margin, margin + more]
    windows = _windows(F.pad(apart, padding), layer.kernel_size, [1] * n, layer.dilation)
    return windows.flip(tuple(range(-n, 0))).flatten(1 + n)


def _against_groups(layer: Any) -> str | None:
    if layer.groups == 1:
        return None
    return (
        f"it has groups={layer.groups}, so that outputs have features of their own. Take all weights "
        '(subset_of_weights="all"), or another last layer'
    )


def _convolution(kind: type[Any], *, transposed: bool) -> Head:
    def shape(layer: Any) -> tuple[int, int]:
        return layer.out_channels, layer.in_channels * math.prod(layer.kernel_size)

    def weight(layer: Any) -> Tensor:
        return (layer.weight.transpose(0, 1) if transposed else layer.weight).flatten(1)

    def plain(layer: Any, biased: bool) -> nn.Module:
        options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        more = {"output_padding": layer.output_padding} if transposed else {}
        return kind(layer.in_channels, layer.out_channels, layer.kernel_size, bias=biased, **options, **more)

    def own(new: Any, weight: Tensor) -> Tensor:
        size = (new.out_channels, new.in_channels, *new.kernel_size)
        return weight.reshape(size).transpose(0, 1) if transposed else weight.reshape(size)

    features = _reached if transposed else _patches
    return Head(f"torch.nn.{kind.__name__}", shape, weight, features, plain, own, 1, not transposed, _against_groups)


# -- the table --------------------------------------------------------------------------------------------------------


def name_of(kind: type[Any]) -> str:
    """Where a class is written, and its name."""
    return f"{kind.__module__}.{kind.__qualname__}"


LINEAR = name_of(nn.Linear)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ADAPTED = "an adapted layer"
"""One that holds a linear layer as ``base_layer`` and says what it adds to its weight, as those of LoRA do."""

HEADS: Mapping[str, Head] = {
    LINEAR: _linear(
        lambda layer: (layer.out_features, layer.in_features), lambda layer: layer.weight, "torch.nn.Linear"
    ),
    **{name_of(kind): _convolution(kind, transposed=False) for kind in CONVOLUTIONS},
    **{name_of(kind): _convolution(kind, transposed=True) for kind in TRANSPOSED},
    "transformers.pytorch_utils.Conv1D": Head(
        "Conv1D of transformers",
        lambda layer: (layer.weight.shape[1], layer.weight.shape[0]),
        lambda layer: layer.weight.T,
        _as_it_comes,
        _transformers_conv1d,
        lambda _, weight: weight.T,
        in_order=False,
    ),
    ADAPTED: Head(
        "a linear layer with LoRA",
        lambda layer: HEADS[LINEAR].shape(layer.base_layer),
        _adapted,
        _as_it_comes,
        lambda layer, bias: HEADS[LINEAR].plain(layer.base_layer, bias),
        lambda _, weight: weight,
        in_order=False,
        objection=_against_adapter,
    ),
}
"""Kinds of layers whose outputs are linear in features and weights, by the name of their class; one more is a row."""

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "bitsandbytes", "quanto", "hqq", "awq")
"""Where classes of quantized layers are written."""
QUANTIZED_NAMES = ("QuantLinear", "QLinear", "Linear8bit", "Linear4bit", "LinearNF4", "WQLinear", "HQQLinear")
"""What their names begin with."""


def head_in_table(layer: nn.Module) -> Head | None:
    """The row of a layer, if there is one."""
    for kind in type(layer).__mro__:
        found = HEADS.get(name_of(kind))
        if found is not None:
            return found
    adapted = isinstance(getattr(layer, "base_layer", None), nn.Module) and hasattr(layer, "get_delta_weight")
    return HEADS[ADAPTED] if adapted and hasattr(layer, "lora_A") else None


def head_of(layer: nn.Module) -> Head:
    """The row of a layer that ``is_head``."""
    found = head_in_table(layer)
    assert found is not None, "callers ask is_head"
    return found


def is_head(layer: nn.Module) -> bool:
    """Whether a layer has a row in the table."""
    return head_in_table(layer) is not None


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weights of a layer are rounded to a few values."""
    for kind in type(layer).__mro__:
        if kind.__module__.startswith(QUANTIZED) or kind.__name__.startswith(QUANTIZED_NAMES):
            return True
    weight = getattr(layer, "weight", None) if is_head(layer) else None
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def is_sharded(layer: nn.Module) -> bool:
    """Whether the weights of a layer are spread over processes, so that this one has none of them or a part."""
    if not is_head(layer):
        return False
    weights = [weight for weight in layer.parameters() if not is_lazy(weight)]
    there = any(weight.dim() > 1 for weight in weights) or any(map(is_lazy, layer.parameters()))
    return not there or any(type(weight).__name__ == "DTensor" for weight in weights)


def objection(layer: nn.Module) -> str | None:
    """Why a layer cannot be a last layer although it looks like one, and what to do; ``None`` when it can."""
    if is_quantized(layer):
        return (
            f"it is quantized ({type(layer).__name__}), and rounded weights have no posterior. Load the model without "
            "quantization, or with the last layer left out of it (of transformers: llm_int8_skip_modules=, "
            "modules_to_not_convert=), or replace that layer by a torch.nn.Linear with its dequantized weights"
        )
    if is_sharded(layer):
        return (
            "its weights are spread over processes, and each of them needs all. Leave the last layer out: shard the "
            "rest (fully_shard(model.backbone)), or pass ignored_params= or, of FullyShardedDataParallel, "
            "ignored_modules=[model.head]"
        )
    found = head_in_table(layer)
    return None if found is None else found.objection(layer)


def check_head(name: str | None, layer: nn.Module) -> None:
    """Raise for a layer that cannot be the last.

    Raises
    ------
    UnsupportedError
        The message says why, and what to do.
    """
    reason = objection(layer)
    if reason is not None:
        msg = f"The last layer {name!r} ({type(layer).__name__}) cannot be the random one: {reason}."
        raise UnsupportedError(msg)


def n_outputs(layer: nn.Module) -> int:
    """C."""
    return head_of(layer).shape(layer)[0]


def kinds() -> str:
    """All kinds in words."""
    called = [head.called for head in HEADS.values()]
    return f"{', '.join(called[:-1])} or {called[-1]}"


__all__ = ["HEADS", "Head", "check_head", "head_of", "is_head", "is_quantized", "kinds", "n_outputs", "objection"]
