"""Context managers that put a model into evaluation mode and leave it exactly as it was."""

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
        Build a graph, so that results can be differentiated with respect to the inputs; not under
        ``torch.inference_mode``, where there is nothing to differentiate.

    Notes
    -----
    Leaves ``torch.inference_mode`` for the duration, so that what is computed can take part in autograd later.
    """
    enable_backprop = enable_backprop and not torch.is_inference_mode_enabled()
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(False), torch.set_grad_enabled(enable_backprop):
            yield
    finally:
        for module, training in flags:
            module.training = training
