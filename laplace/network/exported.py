"""A network with a closed form of its predictions behind it, as one module that exporters take."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from laplace import linalg
from laplace.enums import FeatureReduction
from laplace.errors import ShapeError
from laplace.network.batches import arguments
from laplace.network.heads import head_of
from laplace.network.matching import picked, reduce
from laplace.network.modes import full_precision
from laplace.network.outputs import Reading
from laplace.network.twin import Entered, twin_of
from laplace.types import Inputs

_LOCAL = threading.local()
"""What entered last layers in the passes of this thread."""


class ExportedModule(nn.Module):
    """A copy of the network, and the closed form of its predictions, without the estimator they are of.

    ``la.export_module()`` makes it. Called with a batch of inputs it returns what ``la`` returned at that time. It is
    always in evaluation mode, its weights have no gradients, and all numbers are parameters and buffers. ``half()`` and
    ``bfloat16()`` change the precision of the network alone.

    Attributes
    ----------
    network
        A copy of the model, head included.
    closed_form
        From outputs and features of the last layer to predictions: a graph of tensor operations; ``print`` shows it.
    """

    network: nn.Module
    closed_form: nn.Module

    def __init__(
        self,
        model: nn.Module,
        last_layer_name: str,
        closed_form: nn.Module,
        dtype: torch.dtype,
        reading: Reading,
        feature_reduction: FeatureReduction | None,
        keys: dict[str, str],
    ) -> None:
        super().__init__()
        self._entered: list[Entered] = []
        self.network = twin_of(model, last_layer_name, self._show, shared=False).requires_grad_(False)
        self.closed_form = closed_form
        self._name, self._dtype, self._keys = last_layer_name.replace("_orig_mod.", ""), dtype, keys
        self._reading, self._reduction = reading, feature_reduction
        super().train(False)

    def forward(self, x: Inputs, **model_kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Predict at a batch of inputs.

        Parameters
        ----------
        x
            A batch of inputs, as ``la`` takes it.
        **model_kwargs
            Passed to the ``forward`` of the network.

        Returns
        -------
        As ``la(x, link_approx=…)``: probabilities, or mean and (co)variance.

        Raises
        ------
        ShapeError
            If the network squeezes the axis of a batch of one row away.
        """
        args, kwargs = arguments(self.network, x, **self._keys)
        returned = self.network(*args, **kwargs, **model_kwargs)
        f, phi = self._rows(self._reading.tensor(returned), *self._seen().pop())
        rows, features = f.flatten(0, -2).to(self._dtype), phi.flatten(0, -2).to(self._dtype)
        traced = linalg.is_exporting() or torch.jit.is_tracing()
        with nullcontext() if traced else full_precision(f.device):
            found = self.closed_form(rows, features)
        parts = [self._restored(part, f) for part in (found if isinstance(found, tuple) else (found,))]
        return self._reading.returned(parts[0] if len(parts) == 1 else tuple(parts))

    def _rows(self, f: Tensor, entered: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[batch, *positions, C]`` and features ``[batch, *positions, D]``, by their numbers of axes."""
        layer = self.network.get_submodule(self._name)
        head = head_of(layer)
        phi, (n_outputs, width) = head.features(layer, entered), head.shape(layer)
        made = made.movedim(1, -1) if head.channels == 1 else made
        axis = self._reading.axis(f.dim())
        f = f if axis is None or axis == f.dim() - 1 else f.movedim(axis, -1)
        if self._reduction is not None and phi.dim() > 2 and f.dim() == 2:
            return f, reduce(phi, self._reduction, picked(f, made, self._reduction, first=False))
        if n_outputs == 1 and f.dim() < phi.dim():  # squeezed
            f = f.unsqueeze(-1)
        if f.dim() < 2:
            msg = (
                f"The network returned outputs of shape {list(f.shape)}, without an axis for the batch: it squeezes "
                "that of one row away. Let it squeeze the last axis alone, squeeze(-1), or pass two rows or more."
            )
            raise ShapeError(msg)
        return f, phi if f.dim() == phi.dim() else phi.reshape(*f.shape[:-1], width)

    @staticmethod
    def _restored(rows: Tensor, f: Tensor) -> Tensor:
        """From rows back to positions, in the precision of the outputs."""
        return (rows if f.dim() == 2 else rows.reshape(*f.shape[:-1], *rows.shape[1:])).to(f.dtype)

    def _seen(self) -> list[Entered]:
        """What the last layer showed: while a graph is made of the module its own, else of each thread another."""
        return self._entered if torch.compiler.is_compiling() else vars(_LOCAL).setdefault("entered", [])

    def _show(self, entered: Entered) -> None:
        """Take note of what entered the last layer."""
        self._seen().append(entered)

    def train(self, mode: bool = True) -> ExportedModule:  # noqa: ARG002
        """Stay in evaluation mode: predictions are those of a trained network."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExportedModule:
        """Move everything; convert the network alone, as variances of few digits are none."""
        before = dict(self.closed_form.named_buffers())
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self.closed_form.get_buffer(name)
            if moved.dtype is not value.dtype:
                self.closed_form.register_buffer(name, value.to(moved.device))
        return self


__all__ = ["ExportedModule"]
