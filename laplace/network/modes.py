"""Context managers that put a model into evaluation or training mode and leave it exactly as it was."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, *, enable_backprop: bool = False) -> Generator[None, None, None]:
    """Run the body with ``model`` in evaluation mode and, by default, without building a graph.

    Parameters
    ----------
    model
        Any module. The ``training`` flag of each of its submodules is restored on every exit.
    enable_backprop
        Build a graph, so that results can be differentiated with respect to the inputs; not under ``torch.no_grad``.

    Notes
    -----
    Leaves ``torch.inference_mode`` for the duration, so that what is computed can take part in autograd later.
    """
    build_graph = enable_backprop and torch.is_grad_enabled()
    with _flags_restored(model):
        model.eval()
        with torch.inference_mode(False), torch.set_grad_enabled(build_graph):
            yield


@contextmanager
def _flags_restored(model: nn.Module) -> Generator[None, None, None]:
    """Bring back the ``training`` flag of each submodule."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # A module may do more in train() than set its flag (merge adapters, say): undo it the same way. The flags below
        # are then set one by one, since train() reaches the children, too.
        for module, flag in flags:
            if module.training is not flag:
                module.train(flag)
        for module, flag in flags:
            module.training = flag


def full_precision(device: torch.device) -> torch.autocast:
    """Switch autocasting off for the body: it is for the model's own forward pass, not for curvature and variances.

    Parameters
    ----------
    device
        Of the computation.
    """
    return torch.autocast(device.type, enabled=False)


@contextmanager
def training(model: nn.Module) -> Generator[None, None, None]:
    """Run the body with ``model`` in training mode and with autograd on.

    Parameters
    ----------
    model
        Any module. The ``training`` flag of each of its submodules is restored on every exit.
    """
    with _flags_restored(model), torch.enable_grad():
        model.train()
        yield
