"""A model whose weights are random, all of them or chosen ones: how it is evaluated, also at other weights.

``subset_of_weights="all"`` and ``"subnetwork"`` lead here.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace.errors import ShapeError, UnsupportedError
from laplace.network.axes import Axes
from laplace.network.batches import arguments, call, count_rows, one_row
from laplace.network.compiled import as_written
from laplace.network.failures import check_weights, explained
from laplace.network.looking import seen
from laplace.network.modes import attributes_restored
from laplace.network.outputs import Reading
from laplace.network.parameters import ParameterSubset
from laplace.network.threads import alone, together
from laplace.types import Inputs


class WholeNetwork:
    """A model, read and never written, and its random weights: those at ``indices``, or all that require a gradient."""

    def __init__(
        self,
        model: nn.Module,
        *,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        indices: Any = None,
        reading: Reading | None = None,
    ) -> None:
        self.model = unwrap(model)
        self._looked = False
        self.reading = Reading() if reading is None else reading
        self.dict_key_x = dict_key_x
        self.dict_key_y = dict_key_y
        with together(self.model):
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        if not named:
            msg = (
                "No weight of the model requires a gradient, so none is random. Unfreeze the weights that should be "
                "random with requires_grad_(True)."
            )
            raise UnsupportedError(msg)
        whole = ParameterSubset(tuple(parameter for _, parameter in named))
        with together(self.model):
            self.subset = whole if indices is None else ParameterSubset.indices(self.model, indices)
        touched = {id(parameter) for parameter in self.subset.parameters}
        self.names = tuple(name for name, parameter in named if id(parameter) in touched)
        check_weights(dict(zip(self.names, self.subset.parameters, strict=True)))

    @property
    def constants(self) -> list[Tensor]:
        """Tensors of the model without random weights: other parameters and buffers."""
        random = {id(parameter) for parameter in self.subset.parameters}
        with together(self.model):
            others = [parameter for parameter in self.model.parameters() if id(parameter) not in random]
            return [*others, *self.model.buffers()]

    def check_still_random(self) -> None:
        """Raise if other weights require a gradient than when this object was made."""
        with together(self.model):
            now = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if self.subset.choice is not None:  # chosen weights alone matter
            now &= set(self.names)
        changed = sorted(now ^ set(self.names))
        if changed:
            msg = (
                f"requires_grad of {', '.join(map(repr, changed[:3]))} has changed since this object was made, and "
                "which weights are random is decided once: construct it again."
            )
            raise UnsupportedError(msg)

    def owner(self, group: int) -> tuple[str, nn.Module]:
        """Name and module that a parameter group belongs to."""
        name = self.names[group].rpartition(".")[0]
        return name, dict(self.model.named_modules(remove_duplicate=False))[name]  # scripted ones have no get_submodule

    def __call__(self, x: Inputs, **model_kwargs: Any) -> Float[Tensor, "batch ..."]:
        """Outputs, ``[batch, *positions, C]``; a model that returns ``[batch]`` gets an output axis."""
        if isinstance(x, Tensor) and x.layout is not torch.strided:
            msg = f"The inputs are a tensor of layout {x.layout}; derivatives of all weights need x.to_dense()."
            raise UnsupportedError(msg)
        keys = {"dict_key_x": self.dict_key_x, "dict_key_y": self.dict_key_y}
        axes = None if self._looked else Axes()
        # Alone: layers may assign tensors made of their weights to themselves, and derivatives go through their graph.
        with alone(self.model), axes or nullcontext():
            run = partial(call, self.model, x, **keys, **model_kwargs)
            f = self.reading.tensor(seen(self.model, run, self.reading.tensor))
        if axes is not None and f.dim() > 1:
            self._looked = True
            self.reading.see(f.dim(), axes.of(f))
        return with_axes(self.reading.last(f), x)

    def channels(self, f: Tensor) -> int | None:
        """The axis of outputs that holds the C outputs, the last, if it was given or seen in a pass; see ``Axes``."""
        return None if self.reading.axis(f.dim()) is None else f.dim() - 1

    def at(self, theta: Float[Tensor, " params"], x: Inputs, **model_kwargs: Any) -> Float[Tensor, "batch ..."]:
        """Outputs with the random weights ``theta``, by a functional call: the model is not touched."""
        weights = dict(zip(self.names, self.subset.at(theta), strict=True))
        args, kwargs = arguments(self.model, x, dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y)
        kwargs = {**kwargs, **model_kwargs}
        written = as_written(self.model.modules())
        with alone(self.model), attributes_restored(self.model), explained(self.model, x, args, kwargs), written:
            outputs = torch.func.functional_call(self.model, weights, args, kwargs)
        return with_axes(self.reading.last(self.reading.tensor(outputs)), x)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside wrappers that run it elsewhere: data parallel ones, and compiled graphs made of it."""
    while True:
        original = dict(model.named_children()).get("_orig_mod")
        if original is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            original = model.module
        if original is None:
            return model
        model = original


def with_axes(f: Tensor, x: Inputs) -> Tensor:
    """Outputs with the axes put back that a model squeezes away: of a single output, or of a batch of one row."""
    if f.dim() >= 2:
        return f
    single = one_row(x)
    if f.dim() == 0 and not single:
        msg = (
            f"The model returns one number for a batch of {count_rows(x)} rows. Return the outputs of each row, "
            "[batch, outputs], not their loss or mean."
        )
        raise ShapeError(msg)
    return f.reshape(1, -1) if single else f.unsqueeze(-1)
