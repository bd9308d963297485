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
    with _modes_restored(model):
        model.eval()
        with torch.inference_mode(False), torch.set_grad_enabled(build_graph):
            yield


@contextmanager
def training(model: nn.Module) -> Generator[None, None, None]:
    """Run the body with ``model`` in training mode and with gradients.

    Parameters
    ----------
    model
        Any module. The ``training`` flag of each of its submodules is restored on every exit. A model that is in
        training mode already is taken as it is: submodules that are kept in evaluation mode (frozen statistics, say)
        stay so.

    Notes
    -----
    Leaves ``torch.no_grad`` and ``torch.inference_mode`` for the duration.
    """
    with _modes_restored(model):
        if not model.training:
            model.train()
        with torch.inference_mode(False), torch.enable_grad():
            yield


@contextmanager
def _modes_restored(model: nn.Module) -> Generator[None, None, None]:
    """Bring each module of a model back into its mode on every exit."""
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


@contextmanager
def attributes_restored(model: nn.Module) -> Generator[None, None, None]:
    """Run a functional call: what the modules assign to themselves in it is undone on every exit.

    Parameters
    ----------
    model
        Any module.

    Notes
    -----
    A functional call puts back parameters and buffers. Other tensors that a module or a hook assigns were made of the
    weights of the call, as by ``torch.nn.utils.weight_norm``, which makes ``weight`` before each forward pass.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, kept in before:
            if len(attributes) != len(kept) or any(attributes.get(name) is not value for name, value in kept.items()):
                attributes.clear()
                attributes.update(kept)


def full_precision(device: torch.device) -> torch.autocast:
    """Switch autocasting off for the body: it is for the model's own forward pass, not for curvature and variances.

    Parameters
    ----------
    device
        Of the computation.
    """
    return torch.autocast(device.type, enabled=False)
