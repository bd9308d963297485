"""Derivatives by ``torch.func`` and by autograd, without formulas: Jacobians of each datum, and the true Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils._pytree import tree_map

from laplace.errors import ShapeError
from laplace.network.parameters import ParameterSubset
from laplace.network.threads import alone
from laplace.structures.jacobian import DenseBlock, JacobianBlock
from laplace.types import Inputs, Jacobians

ROWS_AT_ONCE = 64
"""Rows of a Hessian in one vectorized backward pass: each takes the memory of one."""


class _Caller(nn.Module):
    """A module around a model whose forward pass is a function of inputs, so that it can be called functionally."""

    def __init__(self, model: nn.Module, function: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Any) -> Tensor:
        return self.function(x)


def by_functorch(
    function: Callable[[Inputs], Tensor], model: nn.Module, parameters: Sequence[Tensor], x: Inputs
) -> tuple[Jacobians, Tensor]:
    """Jacobians ``[rows, outputs, P]`` and outputs ``[rows, outputs]``; in ``x`` the batch is the first axis of all."""
    caller = _Caller(model, function)
    chosen = {id(parameter) for parameter in parameters}

    def one(weights: dict[str, Tensor], row: Inputs) -> tuple[Tensor, Tensor]:
        batch_of_one = tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, row)
        f = functional_call(caller, weights, (batch_of_one,)).squeeze(0)
        return f, f

    with alone(model):
        weights = {name: p for name, p in caller.named_parameters() if id(p) in chosen}
        J, f = vmap(jacrev(one, has_aux=True), in_dims=(None, 0))(weights, x)
    flat = [part.flatten(f.dim()) if part.dim() > f.dim() else part.unsqueeze(-1) for part in J.values()]
    together, n_outputs = torch.cat(flat, -1), f.shape[-1]
    return together.reshape(-1, n_outputs, together.shape[-1]), f.reshape(-1, n_outputs)


def select_outputs(
    J: Jacobians, f: Tensor, outputs: Int[Tensor, "batch ..."]
) -> tuple[Float[Tensor, "batch chosen params"], Tensor]:
    """The Jacobians of the outputs with these indices, ``[batch]`` or ``[batch, k]``: ``[batch, k, P]``."""
    chosen = outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs
    if chosen.dim() != 2 or len(chosen) != len(J):
        msg = f"outputs must have the shape [{len(J)}] or [{len(J)}, k]; got {list(outputs.shape)}."
        raise ShapeError(msg)
    return J.gather(1, chosen.unsqueeze(-1).expand(-1, -1, J.shape[-1])), f


def hessian_products(loss: Tensor, subset: ParameterSubset) -> Callable[[Tensor], Tensor]:
    """A function from directions ``[k, P]`` to their products with the second derivative, one backward pass each."""
    assert not torch.is_inference_mode_enabled(), "nothing would be recorded"
    parameters = subset.parameters
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])

    def rows(directions: Tensor, *, together: bool) -> Tensor:
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "is_grads_batched": together}
        found = torch.autograd.grad(flat, parameters, directions, **options)
        n = len(directions) if together else 1
        empty = [directions.new_zeros(n, parameter.numel()) for parameter in parameters]
        return torch.cat([zero if g is None else g.reshape(n, -1) for g, zero in zip(found, empty, strict=True)], 1)

    if not flat.requires_grad:  # a loss that is linear in the weights
        return lambda directions: torch.zeros_like(directions, dtype=flat.dtype)
    together = can_batch(rows, flat)

    def products(directions: Tensor) -> Tensor:
        everywhere = subset.embed(directions.to(flat.dtype))
        parts = everywhere.split(ROWS_AT_ONCE) if together else everywhere
        return torch.cat([subset.restrict(rows(some, together=together)) for some in parts])

    return products


def hessian_rows(loss: Tensor, subset: ParameterSubset) -> Iterator[Float[Tensor, " params"]]:
    """The P rows ``[P]`` of the second derivative of a loss, one backward pass each, many at once where PyTorch can."""
    products, first = hessian_products(loss, subset), subset.parameters[0]
    for some in torch.arange(subset.n_params, device=first.device).split(ROWS_AT_ONCE):
        directions = first.new_zeros(len(some), subset.n_params)
        directions.scatter_(1, some.unsqueeze(1), 1)
        yield from products(directions)


def can_batch(rows: Callable[..., Tensor], flat: Tensor) -> bool:
    """Whether several backward passes at once give what they give one by one: not for every operation of PyTorch."""
    probes = torch.stack([torch.linspace(-1, 1, len(flat)).cos(), torch.linspace(0, 9, len(flat)).sin()]).to(flat)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as: an operation is not vectorized and would only be slower
            batched = rows(probes, together=True)
    except (RuntimeError, Warning):
        return False
    single = torch.cat([rows(probe, together=False) for probe in probes])
    precision = torch.finfo(flat.dtype).eps ** 0.5
    return torch.allclose(batched, single, rtol=0, atol=precision * float(single.abs().max()))


@dataclass(frozen=True)
class WrittenOut:
    """Derivatives that are written out, from a back end that gives Jacobians."""

    f: Tensor
    """Outputs, ``[batch, *positions, C]``."""
    J: Float[Tensor, "batch columns params"]
    """Jacobians, ``[batch, positions·C, P]``."""
    sizes: tuple[int, ...]
    """Sizes of the parameter groups."""

    @property
    def n_columns_at_once(self) -> int:
        """All columns, since they are there already."""
        return self.J.shape[1]

    def columns(self, mix: Float[Tensor, "columns all"]) -> list[JacobianBlock]:
        """Mixtures of the columns, group by group, ``mix`` being ``[columns, positions·C]``."""
        return [DenseBlock(part) for part in torch.einsum("mq,bqp->mbp", mix, self.J).split(self.sizes, -1)]

    def blocks(self, directions: Sequence[Tensor]) -> list[JacobianBlock]:
        """Derivatives along directions in the outputs, ``[batch, *positions, C]`` each, group by group."""
        mix = torch.stack([direction.flatten(1) for direction in directions]).to(self.J.dtype)
        return [DenseBlock(part) for part in torch.einsum("mbq,bqp->mbp", mix, self.J).split(self.sizes, -1)]
