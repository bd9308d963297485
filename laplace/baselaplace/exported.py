"""``export_module``: the predictions of a last layer as a module without the estimator, for other programs to run."""

# A method of an estimator, in its own room:
# pyright: reportPrivateUsage=false

from __future__ import annotations

from dataclasses import replace
from typing import Any

from laplace import linalg
from laplace.baselaplace.compiled import ClosedForm
from laplace.enums import LinkApprox, PredType
from laplace.errors import UnsupportedError
from laplace.likelihoods import Ask
from laplace.network.exported import ExportedModule
from laplace.predictive.graph import graph_of
from laplace.predictive.pushforward import asked


@linalg.lasting
def export_module(
    self: Any, link_approx: LinkApprox | str = LinkApprox.PROBIT, *, diagonal_output: bool = False
) -> ExportedModule:
    """Predictions as a plain ``torch.nn.Module`` that can be exported and served without this library.

    It holds a copy of the network in evaluation mode, and the closed form of its predictions: variance of the last
    layer, density of the features where predictions are widened by it, heads and temperatures that ``tune`` chose,
    and the link. Exporters take it with batches of any size: ``torch.export.export``, ``torch.onnx.export``,
    ``torch.compile(fullgraph=True)`` and ``torch.jit.trace``.

    Parameters
    ----------
    link_approx
        As in a call: one that is a closed form, which is any but ``"mc"``.
    diagonal_output
        As in a call: of a regression return variances instead of covariances.

    Returns
    -------
    A module which, called with inputs, returns what ``la(x, link_approx=…)`` returns now. It shares nothing with this
    object or with the model: later changes of either leave it as it is.

    Raises
    ------
    NotFittedError
        Before ``fit``.
    UnsupportedError
        If all weights or functions are random, whose predictions need derivatives of the network; if the link or the
        likelihood draws samples; if the model cannot be copied. The message says what to do.

    Notes
    -----
    Equal to ``la(x)`` up to rounding, but for what is looked at and reported there: nothing here checks whether the
    model's outputs are finite, or still those of its last layer. A model that squeezes the axis of a batch of one row
    away is not put right: what can be seen of it raises ``ShapeError``.
    Takes as much memory as the network and the posterior, and a few seconds, in which PyTorch traces the formulas.
    """
    options = self._options(PredType.GLM, False, link_approx, diagonal_output=diagonal_output)
    _check(self, options)
    form = ClosedForm(self, options)
    f, phi = form.example
    extractor, keys = self.model, {"dict_key_x": self.dict_key_x, "dict_key_y": self.dict_key_y}
    reading = replace(self._reading, seen=dict(self._reading.seen))
    graph = graph_of(form, f, phi)
    how = extractor.last_layer_name, graph, f.dtype, reading, extractor.feature_reduction, keys
    try:
        return ExportedModule(extractor.model, *how)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        msg = (
            f"{type(extractor.model).__name__} cannot be copied ({error}), and what is exported is a copy. Remove the "
            "attribute that cannot be, or compile the object, torch.compile(la), which shares the tensors of the model."
        )
        raise UnsupportedError(msg) from error


def _check(la: Any, options: Any) -> None:
    """Raise unless predictions with these options are a closed form of outputs and features."""
    if hasattr(la, "_functions_at"):
        msg = (
            f"A {type(la).__name__} predicts by derivatives of the network, or inducing points, and is no module to "
            'export. Take the last layer instead: Laplace(model, likelihood, subset_of_weights="last_layer").'
        )
        raise UnsupportedError(msg)
    if not la._weights_type.of_head:
        msg = (
            f"{type(la).__name__} takes derivatives of the network at each input, which exporters cannot do. Use "
            'subset_of_weights="last_layer", or serve the object itself.'
        )
        raise UnsupportedError(msg)
    if options.link is LinkApprox.MC:
        others = ", ".join(repr(link.value) for link in LinkApprox if link is not LinkApprox.MC)
        msg = f'link_approx="mc" draws samples, which an exported module does not. Closed forms are {others}.'
        raise UnsupportedError(msg)
    if asked(la._unit_likelihood, options) not in (Ask.VARIANCE, Ask.COVARIANCE):
        msg = (
            f"likelihood={la._unit_likelihood.name!r} predicts by samples of functions, which an exported module does "
            "not draw. Serve the object itself."
        )
        raise UnsupportedError(msg)
    la._fitted  # noqa: B018 - raises before fit


__all__ = ["export_module"]
