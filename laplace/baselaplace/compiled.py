"""Predictions that ``torch.compile`` can trace whole: those of a last layer.

What a prediction needs beside its inputs is prepared when it is traced: the factorized posterior, and a copy of the
network's modules that shares all tensors and shows what enters the last layer. An object counts its changes, and what
was compiled is traced anew after one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from laplace.network import full_precision
from laplace.network.batches import arguments
from laplace.network.feature_extractor import Pass
from laplace.predictive import NetworkLinearization, Options
from laplace.types import Inputs

ORIGINAL = "_orig_mod"
"""Under which name a module of ``torch.compile`` holds what it was made from."""
Entered = list[tuple[Tensor, Tensor]]
"""What entered the last layer, and what it made, in the pass that runs."""


class Predictor(nn.Module):
    """A prediction of fixed options as a function of inputs alone."""

    def __init__(self, la: Any, options: Options) -> None:
        super().__init__()
        self.fit = la._fitted
        self.extractor = la.model
        self.seen: Entered = []
        self.twin = _shared_copy(la.model.model, la.model.last_layer_name, self.seen)
        self.shapes = la._random_weights.head
        self.posterior, self.likelihood = la._predicting_posterior, la._frozen_likelihood
        self.adjustments, self.options, self.dtype, self.place = la._adjustments, options, la._dtype, la._device
        self.reading, self.keeps_graph = la._reading, la.enable_backprop
        # What is made when it is first asked for.
        (n_outputs, width), like = self.shapes[0], la._random_weights.first
        self._of(like.new_zeros(1, n_outputs), like.new_zeros(1, width))

    def forward(self, x: Inputs, **model_kwargs: Any) -> Any:
        """The prediction, in the layout of the model."""
        with torch.set_grad_enabled(self.keeps_graph and torch.is_grad_enabled()):
            extractor = self.extractor
            args, kwargs = arguments(self.twin, x, dict_key_x=extractor.dict_key_x, dict_key_y=extractor.dict_key_y)
            returned = self.reading.tensor(self.twin(*args, **kwargs, **model_kwargs))
            entered, made = self.seen.pop()
            name = extractor.last_layer_name
            calls: Any = {name: 1}
            passed = Pass(calls, {name: (entered, made)}, returned)
            found = self._of(*extractor._read(passed, name, extractor.last_layer, x))
            return self.reading.returned(found)

    def _of(self, f: Tensor, phi: Tensor) -> Any:
        """Of outputs and features."""
        inputs = NetworkLinearization.of_head(f, phi, self.shapes)
        inputs = inputs if self.fit.trained is None else inputs.with_weights(self.fit.mean)
        with full_precision(self.place):
            how = self.posterior, self.likelihood, self.options, self.dtype
            return self.adjustments.predict(inputs, self.fit, *how)


def predict(la: Any, x: Inputs, how: tuple[Any, ...], model_kwargs: dict[str, Any]) -> Any:
    """A prediction while it is traced."""
    la._prepare(*how)
    return la._predictors[how](x, **model_kwargs)


def prepare(self: Any, *how: Any) -> None:
    """Make what a compiled prediction with these options is; runs while it is traced, and is no part of it."""
    *options, fitting = how
    predictor = Predictor(self, self._options(*options, None, fitting))
    vars(self)["_predictors"] = {**self._predictors, how: predictor}


# As by `torch.compiler.assume_constant_result`, which would load the compiler wherever this library is imported; the
# compiler looks the method up by the name of the function.
vars(prepare)["_dynamo_marked_constant"] = True
prepare.__name__ = "_prepare"


def _shared_copy(model: nn.Module, name: str, seen: Entered) -> nn.Module:
    """Modules of their own, in evaluation mode, with the tensors of a model; its last layer shows what it sees."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        values = (*vars(module).values(), *module.parameters(recurse=False), *module.buffers(recurse=False))
        memo.update({id(value): value for value in values if isinstance(value, Tensor)})
    for module in model.modules():
        if hasattr(module, ORIGINAL) and id(module) not in memo:  # compiled as a part of the whole
            memo[id(module)] = copy.deepcopy(getattr(module, ORIGINAL), memo)
    twin = copy.deepcopy(model, memo).eval()
    name = ".".join(part for part in name.split(".") if part != ORIGINAL)

    def show(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append((args[0] if args else next(iter(kwargs.values())), output))

    twin.get_submodule(name).register_forward_hook(show, with_kwargs=True)
    return twin


__all__ = ["Predictor", "predict", "prepare"]
