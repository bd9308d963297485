"""Derivatives by autograd, one datum at a time: the exact and slow way for weights whose use no formula describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace.errors import InputError, PerformanceWarning, warn
from laplace.network.batches import rows_of
from laplace.structures.jacobian import DenseBlock

DEPENDENT = (
    "The outputs of a row depend on the other rows of its batch (statistics of the batch, padding, attention across "
    "rows?), so that derivatives a datum do not exist. Use a model whose rows are independent in evaluation mode, or "
    "batches of one row, to fit and to predict."
)


def row_by_row(
    run: Callable[[Any], Tensor],
    x: Any,
    outputs: Tensor,
    parameters: Mapping[int, Tensor],
    directions: Sequence[Tensor],
    dtype: torch.dtype,
    eps: float,
    *,
    create_graph: bool,
) -> dict[int, DenseBlock]:
    """Derivatives of directions in the outputs of each datum, by autograd."""
    rows: dict[int, list[Tensor]] = {group: [] for group in parameters}
    for b in range(len(outputs)):
        try:
            with torch.enable_grad():
                f = run(rows_of(x, slice(b, b + 1), len(outputs)))
        except (ValueError, RuntimeError) as error:
            msg = f"The model does not run on one row of a batch ({error}). {DEPENDENT}"
            raise InputError(msg) from error
        check_row(f, outputs[b : b + 1], eps)
        columns = [
            torch.autograd.grad(
                along(f, direction[b : b + 1]),
                list(parameters.values()),
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
            for direction in directions
        ]
        for number, (group, parameter) in enumerate(parameters.items()):
            found = [column[number] for column in columns]
            flat = [torch.zeros_like(parameter) if g is None else dense(g) for g in found]
            rows[group].append(torch.stack(flat).flatten(1).to(dtype))
    return {group: DenseBlock(torch.stack(values, 1)) for group, values in rows.items()}


def warn_of_slow(reasons: Mapping[int, str], names: Sequence[str], warned: set[int]) -> None:
    """Name weights that went this way although their function is known, or could not be watched; once each."""
    new = {group: reason for group, reason in sorted(reasons.items()) if group not in warned}
    if not new:
        return
    warned.update(new)
    listed = "; ".join(f"{names[group]!r}: {reason}" for group, reason in new.items())
    msg = (
        "Some weights are differentiated one datum at a time, which is exact but many times slower than the formula of "
        f"their layer: {listed}."
    )
    warn(msg, PerformanceWarning)


def check_row(f: Tensor, there: Tensor, eps: float) -> None:
    """Raise if a datum alone gets other outputs than in its batch."""
    relative = max(10 * min(eps, torch.finfo(torch.float32).eps) ** 0.5, 16 * eps)
    limit = relative * max(1.0, float(there.detach().abs().max()))
    if f.shape != there.shape or bool(((f - there).detach().abs() > limit).any()):
        raise InputError(DEPENDENT)


def along(f: Tensor, direction: Tensor) -> Tensor:
    """``direction · f``, a number: to start a backward pass from it loads less of PyTorch than to pass a direction."""
    with torch.enable_grad():
        return (f * direction).sum()


def dense(g: Tensor) -> Tensor:
    """A gradient that may be sparse (of an embedding, say), written out."""
    return g.to_dense() if g.is_sparse else g
