"""Predictions that ``torch.compile`` can trace whole: those of a last layer.

What a prediction needs beside its inputs is prepared when it is traced: the factorized posterior, and a copy of the
network's modules that shares all tensors and shows what enters the last layer. An object counts its changes, and what
was compiled is traced anew after one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laplace.network import full_precision
from laplace.network.batches import arguments
from laplace.network.feature_extractor import Pass
from laplace.network.twin import Entered, twin_of
from laplace.predictive import NetworkLinearization, Options
from laplace.types import Inputs


class ClosedForm:
    """A prediction of fixed options as a function of outputs and features."""

    def __init__(self, la: Any, options: Options) -> None:
        self.fit, self.shapes = la._fitted, la._random_weights.head
        self.posterior, self.likelihood = la._predicting_posterior, la._frozen_likelihood
        self.adjustments, self.options, self.dtype, self.place = la._adjustments, options, la._dtype, la._device
        (n_outputs, width), like = self.shapes[0], la._random_weights.first
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.example = (like.new_zeros(2, n_outputs, dtype=dtype), like.new_zeros(2, width, dtype=dtype))
        with full_precision(self.place):
            self(*self.example)  # makes what is made when it is first asked for

    def __call__(self, f: Tensor, phi: Tensor) -> Any:
        """Of outputs ``[batch, *positions, C]`` and features ``[batch, *positions, D]``."""
        inputs = NetworkLinearization.of_head(f, phi, self.shapes)
        inputs = inputs if self.fit.trained is None else inputs.with_weights(self.fit.mean)
        return self.adjustments.predict(inputs, self.fit, self.posterior, self.likelihood, self.options, self.dtype)


class Predictor(nn.Module):
    """A prediction of fixed options as a function of inputs alone."""

    def __init__(self, la: Any, options: Options) -> None:
        super().__init__()
        self.extractor = la.model
        self.seen: list[Entered] = []
        self.twin = twin_of(la.model.model, la.model.last_layer_name, self.seen.append, shared=True)
        self.closed_form = ClosedForm(la, options)
        self.reading, self.keeps_graph = la._reading, la.enable_backprop

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
            f, phi = extractor._read(passed, name, extractor.last_layer, x)
            with full_precision(self.closed_form.place):
                return self.reading.returned(self.closed_form(f, phi))


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


__all__ = ["ClosedForm", "Predictor", "predict", "prepare"]
