"""What each function of PyTorch does with a parameter: the roles of its arguments, by one reader per function.

``READERS`` is the table. Functions are watched, not modules, so that attention, functional code and wrapped layers are
seen like any other. Functions that are not in the table are left to exact, slower ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace.curvature.roles import Elementwise, Gather, Product, Role, Sum
from laplace.errors import UnsupportedError

Roles: TypeAlias = "list[tuple[Tensor, Role]]"
Reader: TypeAlias = Callable[[Tensor, Mapping[str, Any]], Roles]


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def as_they_are(g: Tensor) -> Tensor:
    """Gradients at rows."""
    return g


def by_position(g: Tensor) -> Tensor:
    """Gradients at images, position by position: ``[columns, batch, channels, *space]`` with the channels last."""
    return g.flatten(3).transpose(2, 3)


def linear(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """``out = x Wᵀ + b``."""
    x, n_lead = call["input"], out.dim() - 1
    roles: Roles = [(call["weight"], Product(lambda: x.unsqueeze(-2), as_they_are, n_lead))]
    if call.get("bias") is not None:
        roles.append((call["bias"], Sum(as_they_are, n_lead)))
    return roles


def matmul(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """``out = x W``, W a matrix stored inputs first."""
    x, weight = call["input"], call["other"] if "other" in call else call["mat2"]
    if weight.dim() != 2 or x.dim() < 2:
        return []
    return [(weight, Product(lambda: x.unsqueeze(-2), as_they_are, out.dim() - 1, transposed=True))]


def addmm(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """``out = b + x W``."""
    if call.get("beta", 1) != 1 or call.get("alpha", 1) != 1:
        return []
    roles = matmul(out, {"input": call["mat1"], "other": call["mat2"]})
    return [*roles, (call["input"], Elementwise(broadcast(call["input"], out)))]


def convolution(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """Patches of the input times a kernel, at every position."""
    x, weight, groups = call["input"], call["weight"], call.get("groups", 1)
    if out.dim() != weight.dim():
        return []
    spatial = out.dim() - 2
    stride, dilation = (each(call.get(name, 1), spatial) for name in ("stride", "dilation"))
    kernel = tuple(weight.shape[2:])
    padding = amounts(call.get("padding", 0), kernel, dilation)

    def inputs() -> Tensor:
        return patches(x, kernel, stride, padding, dilation).unflatten(2, (groups, -1))

    roles: Roles = [(weight, Product(inputs, by_position, 2, groups))]
    if call.get("bias") is not None:
        roles.append((call["bias"], Sum(by_position, 2)))
    return roles


def transposed_convolution(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """The adjoint of a convolution: every input position adds a kernel, so the *gradient* is cut into patches."""
    x, weight, groups = call["input"], call["weight"], call.get("groups", 1)
    if out.dim() != weight.dim():
        return []
    spatial = out.dim() - 2
    stride, dilation = (each(call.get(name, 1), spatial) for name in ("stride", "dilation"))
    kernel = tuple(weight.shape[2:])
    padding = amounts(call.get("padding", 0), kernel, dilation)
    extra = each(call.get("output_padding", 0), spatial)
    n_positions = int(torch.Size(x.shape[2:]).numel())

    def inputs() -> Tensor:
        return x.flatten(2).transpose(1, 2).unflatten(2, (groups, -1))

    def outputs(g: Tensor) -> Tensor:
        # The part that output_padding adds beyond the last kernel is cut off again.
        beyond = [(low, high - more) for (low, high), more in zip(padding, extra, strict=True)]
        cut = patches(g.flatten(0, 1), kernel, stride, beyond, dilation)[:, :n_positions]
        return cut.unflatten(0, g.shape[:2])

    roles: Roles = [(weight, Product(inputs, outputs, 2, groups, transposed=True))]
    if call.get("bias") is not None:
        roles.append((call["bias"], Sum(by_position, 2)))
    return roles


def embedding(out: Tensor, call: Mapping[str, Any]) -> Roles:  # noqa: ARG001
    """``out`` is rows of the weight, by token."""
    if call.get("scale_grad_by_freq"):
        msg = (
            "An embedding with scale_grad_by_freq=True has gradients that are no derivatives; its curvature is not "
            "defined. Set layer.scale_grad_by_freq = False to fit."
        )
        raise UnsupportedError(msg)
    if call.get("max_norm") is not None:
        return []
    return [(call["weight"], Gather(call["input"], call["weight"].shape[0], call.get("padding_idx")))]


def normalization(normalize: Callable[[Mapping[str, Any]], Tensor], *, channels: bool) -> Reader:
    """``out = x̂ w + b``, where the normalized input x̂ is made again when it is needed."""

    def read(out: Tensor, call: Mapping[str, Any]) -> Roles:
        roles: Roles = []
        for name, factor in (("weight", lambda: normalize(call)), ("bias", None)):
            value = call.get(name)
            if value is not None:
                shape = tuple(value.shape)
                target = (1, *shape, *[1] * (out.dim() - 2)) if channels else (*[1] * (out.dim() - len(shape)), *shape)
                roles.append((value, Elementwise(target, factor)))
        return roles

    return read


def normalized_by_layer(call: Mapping[str, Any]) -> Tensor:
    """x̂ of ``layer_norm``."""
    return F.layer_norm(call["input"], call["normalized_shape"], None, None, call.get("eps", 1e-5))


def normalized_by_root_mean_square(call: Mapping[str, Any]) -> Tensor:
    """x̂ of ``rms_norm``."""
    return F.rms_norm(call["input"], call["normalized_shape"], None, call.get("eps"))


def normalized_by_group(call: Mapping[str, Any]) -> Tensor:
    """x̂ of ``group_norm``."""
    return F.group_norm(call["input"], call["num_groups"], None, None, call.get("eps", 1e-5))


def normalized_by_batch(call: Mapping[str, Any]) -> Tensor:
    """x̂ of ``batch_norm`` with running statistics."""
    return F.batch_norm(
        call["input"], call["running_mean"], call["running_var"], None, None, False, 0.0, call.get("eps", 1e-5)
    )


def batch_normalization(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """As other normalizations; with the statistics of the batch it mixes data, and has no roles."""
    if call.get("training", False):
        return []
    return normalization(normalized_by_batch, channels=True)(out, call)


def addition(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """A parameter on either side of a sum."""
    alpha = call.get("alpha", 1)
    sides = ((call["input"], 1.0), (call["other"], float(alpha)))
    return [(t, Elementwise(broadcast(t, out), sign=sign)) for t, sign in sides if isinstance(t, Tensor)]


def subtraction(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """A parameter on either side of a difference."""
    return addition(out, {**call, "alpha": -call.get("alpha", 1)})


def multiplication(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """A parameter on either side of a product."""
    first, second = call["input"], call["other"]
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return []
    pairs = ((first, second), (second, first))
    return [(t, Elementwise(broadcast(t, out), lambda other=other: other)) for t, other in pairs]


def expansion(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """A parameter that is repeated along new axes."""
    return [(call["input"], Elementwise(broadcast(call["input"], out)))]


def leaky(out: Tensor, call: Mapping[str, Any]) -> Roles:
    """``prelu``: the weight multiplies the negative part of the input."""
    x, weight = call["input"], call["weight"]
    target = [1] * out.dim()
    if weight.numel() > 1:
        target[1] = weight.numel()
    return [(weight, Elementwise(tuple(target), lambda: x.clamp(max=0)))]


def each(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    """One number per axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def amounts(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after each axis."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(amount, amount) for amount in each(padding, len(kernel))]


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> Tensor:
    """The inputs of each output position of a convolution, ``[batch, positions, channels · kernel]``."""
    x = F.pad(x, [amount for pair in reversed(padding) for amount in pair])
    for axis, (k, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (k - 1) + 1, step)[..., ::gap]
    n = len(kernel)
    x = x.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n))
    return x.flatten(1 + n).flatten(1, n)


def broadcast(value: Tensor, out: Tensor) -> tuple[int, ...]:
    """Shape of an argument with as many axes as the output."""
    return (*[1] * (out.dim() - value.dim()), *value.shape)


INPUT, SIDES = ("input", "weight", "bias"), ("input", "other")
CONVOLUTION = (*INPUT, "stride", "padding", "dilation", "groups")
TRANSPOSED = (*INPUT, "stride", "padding", "output_padding", "groups", "dilation")

READERS: dict[Any, tuple[Reader, Sequence[str]]] = {
    F.linear: (linear, INPUT),
    torch.matmul: (matmul, SIDES),
    torch.mm: (matmul, ("input", "mat2")),
    Tensor.mm: (matmul, ("input", "mat2")),
    torch.addmm: (addmm, ("input", "mat1", "mat2")),
    torch.conv1d: (convolution, CONVOLUTION),
    torch.conv2d: (convolution, CONVOLUTION),
    torch.conv3d: (convolution, CONVOLUTION),
    torch.conv_transpose1d: (transposed_convolution, TRANSPOSED),
    torch.conv_transpose2d: (transposed_convolution, TRANSPOSED),
    torch.conv_transpose3d: (transposed_convolution, TRANSPOSED),
    F.embedding: (
        embedding,
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    ),
    F.layer_norm: (
        normalization(normalized_by_layer, channels=False),
        ("input", "normalized_shape", "weight", "bias", "eps"),
    ),
    F.rms_norm: (
        normalization(normalized_by_root_mean_square, channels=False),
        ("input", "normalized_shape", "weight", "eps"),
    ),
    F.group_norm: (normalization(normalized_by_group, channels=True), ("input", "num_groups", "weight", "bias", "eps")),
    F.batch_norm: (
        batch_normalization,
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    ),
    torch.prelu: (leaky, ("input", "weight")),
    Tensor.expand: (expansion, ("input",)),
}
"""For each function its reader and the names of its positional arguments."""
READERS.update(dict.fromkeys((torch.add, Tensor.add, Tensor.add_), (addition, SIDES)))
READERS.update(dict.fromkeys((torch.sub, Tensor.sub, Tensor.sub_), (subtraction, SIDES)))
READERS.update(dict.fromkeys((torch.mul, Tensor.mul), (multiplication, SIDES)))  # mul_ overwrites what it multiplies
READERS.update(dict.fromkeys((Tensor.matmul, Tensor.__matmul__), (matmul, SIDES)))
READER_NAMES = {getattr(function, "__name__", "") for function in READERS}
"""Names of these functions."""
