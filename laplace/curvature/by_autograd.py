"""Derivatives by ``torch.func`` and by autograd, without formulas: Jacobians a datum, and the true Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils._pytree import tree_map

from laplace.errors import ShapeError
from laplace.structures.jacobian import DenseBlock, JacobianBlock
from laplace.types import Inputs, Jacobians


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
    """Jacobians ``[rows, outputs, P]`` and outputs ``[rows, outputs]``.

    Parameters
    ----------
    function
        From inputs to outputs ``[batch, *positions, C]``; it runs ``model``.
    model, parameters
        Whose parameters are meant.
    x
        A batch of inputs, all of its tensors with the batch as first axis.
    """
    caller = _Caller(model, function)
    chosen = {id(parameter) for parameter in parameters}
    weights = {name: p for name, p in caller.named_parameters() if id(p) in chosen}

    def one(weights: dict[str, Tensor], row: Inputs) -> tuple[Tensor, Tensor]:
        batch_of_one = tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, row)
        f = functional_call(caller, weights, (batch_of_one,)).squeeze(0)
        return f, f

    J, f = vmap(jacrev(one, has_aux=True), in_dims=(None, 0))(weights, x)
    flat = [part.flatten(f.dim()) if part.dim() > f.dim() else part.unsqueeze(-1) for part in J.values()]
    together, n_outputs = torch.cat(flat, -1), f.shape[-1]
    return together.reshape(-1, n_outputs, together.shape[-1]), f.reshape(-1, n_outputs)


def select_outputs(
    J: Jacobians, f: Tensor, outputs: Int[Tensor, "batch ..."]
) -> tuple[Float[Tensor, "batch chosen params"], Tensor]:
    """Keep the Jacobians of chosen outputs, ``[batch, k, P]``.

    Parameters
    ----------
    J, f
        Of all outputs.
    outputs
        Which ones, ``[batch]`` or ``[batch, k]``.

    Raises
    ------
    ShapeError
        If ``outputs`` does not fit.
    """
    chosen = outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs
    if chosen.dim() != 2 or len(chosen) != len(J):
        msg = f"outputs must have the shape [{len(J)}] or [{len(J)}, k]; got {list(outputs.shape)}."
        raise ShapeError(msg)
    return J.gather(1, chosen.unsqueeze(-1).expand(-1, -1, J.shape[-1])), f


def hessian_rows(loss: Tensor, parameters: Sequence[Tensor]) -> Iterator[Float[Tensor, " params"]]:
    """Rows of the second derivative of a loss, one backward pass each.

    Parameters
    ----------
    loss
        A number with its graph.
    parameters
        In which to differentiate.

    Yields
    ------
    ``[P]``, P of them.
    """
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        entries = torch.cat([gradient.reshape(-1) for gradient in gradients]).unbind()
    for entry in entries:
        row = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        yield torch.cat([part.reshape(-1) for part in row])


@dataclass(frozen=True)
class WrittenOut:
    """Derivatives from a back end that gives Jacobians.

    Attributes
    ----------
    f
        Outputs, ``[batch, *positions, C]``.
    J
        ``[batch, positions·C, P]``.
    sizes
        Of the parameter groups.
    """

    f: Tensor
    J: Float[Tensor, "batch columns params"]
    sizes: tuple[int, ...]

    @property
    def n_columns_at_once(self) -> int:
        """All of them are there already."""
        return self.J.shape[1]

    def columns(self, mix: Float[Tensor, "columns all"]) -> list[JacobianBlock]:
        """Mixtures of the columns, group by group."""
        return [DenseBlock(part) for part in torch.einsum("mq,bqp->mbp", mix, self.J).split(self.sizes, -1)]
