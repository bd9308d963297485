"""``CurvatureInterface``: what every curvature back end provides (``backend=``, ``backend_kwargs=``).

A back end sees the model and the likelihood, never the prior. It declares what it can do as class data. Whatever it
computes comes with the negative log-likelihood, at unit noise, summed over the batch.
"""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace.attributes import check_attribute, is_own
from laplace.curvature.by_autograd import WrittenOut, by_functorch, select_outputs
from laplace.curvature.leading import Leading
from laplace.curvature.structured import StructuredInterface
from laplace.enums import HessianStructure, Likelihood, SubsetOfWeights
from laplace.errors import UnknownAttributeError, UnsupportedError
from laplace.likelihoods import AbstractLikelihood, OutputHessian, Positions, name_of, resolve
from laplace.network import heads
from laplace.network.feature_extractor import FeatureExtractor
from laplace.network.whole_network import WholeNetwork
from laplace.structures.head_block import head_blocks
from laplace.types import Inputs, Jacobians

B = TypeVar("B", bound="CurvatureInterface")

OF_ONE_MODEL = ("model", "likelihood", "last_layer", "subnetwork_indices", "dict_key_x", "dict_key_y")
"""Arguments of back ends that belong to the model and its data; the others are options."""


def positional_names(cls: type) -> list[str]:
    """The names of a constructor's positional arguments, those included that it passes on as ``*args``."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())
        here = [p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names += here[len(names) :]
        if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            break
    return names


class CurvatureInterface(StructuredInterface, ABC):
    """Access to derivatives of a model and its likelihood.

    Parameters
    ----------
    model
        The network; a ``FeatureExtractor`` around it when ``last_layer``.
    likelihood
        Name of the likelihood.
    last_layer
        Only the weights of the last layer are random.
    subnetwork_indices
        The random weights, as positions in ``parameters_to_vector(model.parameters())``; P is then their number.
    dict_key_x, dict_key_y
        Entries of mapping inputs that hold inputs and targets.
    curvature_dtype
        Precision the curvature is computed in; by default that of the model, at least float32.

    Raises
    ------
    UnsupportedError
        If the likelihood, or the choice of weights, is not available in this back end.
    InputError
        If ``subnetwork_indices`` are not valid.
    """

    _given: Mapping[str, Any] = MappingProxyType({})

    def __new__(cls: type[B], *args: Any, **kwargs: Any) -> B:
        """Remember the options, by which another one can be made for another model."""
        self = object.__new__(cls)
        self._given = {**dict(zip(positional_names(cls), args, strict=False)), **kwargs}
        for name in OF_ONE_MODEL:
            self._given.pop(name, None)
        return self

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        *,
        curvature_dtype: torch.dtype | None = None,
    ) -> None:
        self.likelihood = name_of(likelihood)
        self.subset = SubsetOfWeights.LAST_LAYER if last_layer else SubsetOfWeights.ALL
        if subnetwork_indices is not None:
            self.subset = SubsetOfWeights.SUBNETWORK
        if last_layer and subnetwork_indices is not None:
            msg = "last_layer=True and subnetwork_indices are two choices of random weights: give one of them."
            raise UnsupportedError(msg)
        self._check_capabilities()
        if last_layer and not isinstance(model, FeatureExtractor):
            msg = f"With last_layer=True the model must be a FeatureExtractor; got {type(model).__name__}."
            raise UnsupportedError(msg)
        self.model: Any = model  # a FeatureExtractor with last_layer
        self.network: WholeNetwork | None = None
        if not last_layer:
            self.network = WholeNetwork(model, dict_key_x=dict_key_x, dict_key_y=dict_key_y, indices=subnetwork_indices)
        self.n_outputs: int | None = None
        """C, once the model has run."""
        self.last_layer = last_layer
        self.subnetwork_indices = subnetwork_indices
        self.dict_key_x = dict_key_x
        self.dict_key_y = dict_key_y
        self.curvature_dtype = curvature_dtype
        self.output_likelihood: AbstractLikelihood = resolve(self.likelihood)
        self.lossfunc, self.factor = self.output_likelihood.torch_loss() or (None, 1.0)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute that this back end knows; one that is not ours may have others.

        Raises
        ------
        UnknownAttributeError
            If it does not know the name, or replacing the value would have no effect.
        """
        check_attribute(self, name)
        if name in ("lossfunc", "factor") and is_own(type(self)) and name in vars(self):
            msg = (
                f"{type(self).__name__}.{name} says which loss of PyTorch the likelihood is, and is not called: another"
                " would change nothing. Give targets the shape that the likelihood takes in the data loader (those "
                "of regression have the shape of the outputs). For another loss derive a back end of your own from "
                "CurvatureInterface, and pass it as backend=."
            )
            raise UnknownAttributeError(msg)
        super().__setattr__(name, value)

    @property
    def made_with(self) -> dict[str, Any]:
        """The options of the constructor that were given, without model, likelihood and which weights are random."""
        return dict(self._given)

    @property
    def params(self) -> list[Tensor]:
        """The random parameters: of a subnetwork, those that hold one of its weights."""
        if self.network is not None:
            return list(self.network.subset.parameters)
        layer = self._head
        return list(heads.head_of(layer).tensors(layer))

    @property
    def params_dict(self) -> dict[str, Tensor]:
        """The same by their names in the model; of a last layer by those in that layer, ``weight`` and ``bias``."""
        names = ("weight", "bias") if self.network is None else self.network.names
        return dict(zip(names, self.params, strict=False))

    @property
    def buffers_dict(self) -> dict[str, Tensor]:
        """The buffers of the model by their names."""
        return dict(self.model.named_buffers())

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parameter groups as structures see them: of a last layer ``(C, D)`` and ``(C,)``."""
        if self.network is not None:
            return [tuple(parameter.shape) for parameter in self.params]
        return heads.head_of(self._head).groups(self._head)

    def zeros(self) -> Float[Tensor, " params"]:
        """As many zeros as there are random weights, ``[P]``, where curvature is computed and in its precision."""
        parameters = self.params
        n_params = sum(p.numel() for p in parameters) if self.network is None else self.network.subset.n_params
        return self._widen(parameters[0].new_zeros(n_params))

    @property
    def _head(self) -> Any:
        layer = self.model.last_layer
        if layer is None:
            msg = "The last layer is not known yet: run one forward pass (model.find_last_layer(x)) or name it."
            raise UnsupportedError(msg)
        return layer

    def count(self, y: Tensor) -> int | Tensor:
        """Number of unmasked positions among targets: what the inputs' Kronecker factor is divided by.

        While ``fit`` reads an accelerator's data it stays there, a tensor ``[]``.

        Parameters
        ----------
        y
            Targets of a batch.

        Raises
        ------
        UnsupportedError
            If the model has not run yet, so that its number of outputs is not known.
        """
        n_outputs = heads.n_outputs(self._head) if self.last_layer else self.n_outputs
        if n_outputs is None:
            msg = "The number of outputs is not known yet: call outputs(x) once, or let full, diag or kron do it."
            raise UnsupportedError(msg)
        return self.output_likelihood.count(y, n_outputs)

    def outputs(self, x: Inputs, **model_kwargs: Any) -> Tensor:
        """Outputs of the model, ``[batch, *positions, C]``.

        Parameters
        ----------
        x
            A batch of inputs.
        **model_kwargs
            Passed to ``forward``.

        Raises
        ------
        UnsupportedError
            If their last axis is not surely that of the C outputs, as after a convolution.
        """
        f = (self.model if self.network is None else self.network)(x, **model_kwargs)
        shape, likelihood = f.shape, self.output_likelihood
        if self.network is not None and len(shape) > 2:
            likelihood.check_axes(shape, self.network.channels(f))
        self.n_outputs = likelihood.count_outputs(shape)
        return f

    def last_layer_jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Jacobians, Tensor]:
        """Jacobians of the outputs in the last layer's weights, written out.

        Parameters
        ----------
        x
            A batch of inputs.
        enable_backprop
            Keep the graph to the inputs.

        Returns
        -------
        Jacobians ``[rows, outputs, P]`` and outputs ``[rows, outputs]``, one row per position.

        Notes
        -----
        C times the size of anything that the estimators compute: kept for user code.
        """
        with torch.set_grad_enabled(enable_backprop):
            f, phi = self.model.forward_with_features(x)
            f, phi = self._widen(f), self._widen(phi)
            layer = self._head  # of a back end for all weights, too
            blocks = head_blocks(phi.reshape(-1, phi.shape[-1]), heads.head_of(layer).groups(layer))
            J = torch.cat([block.dense() for block in blocks], -1).transpose(0, 1).contiguous()
            return J, f.reshape(-1, f.shape[-1])

    def jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Jacobians, Tensor]:
        """Jacobians of the outputs in the random weights, ``[rows, outputs, P]``, and outputs ``[rows, outputs]``.

        Parameters
        ----------
        x
            A batch of inputs.
        enable_backprop
            Keep the graph to the inputs.

        Returns
        -------
        Jacobians and outputs, one row per position.
        """
        if self.last_layer:
            return self.last_layer_jacobians(x, enable_backprop)
        return self.functorch_jacobians(x, enable_backprop)

    def functorch_jacobians(self, x: Inputs, enable_backprop: bool = False) -> tuple[Jacobians, Tensor]:
        """The same by ``torch.func``, one datum at a time under ``vmap``.

        Parameters
        ----------
        x
            A batch of inputs.
        enable_backprop
            Keep the graph to the inputs.

        Returns
        -------
        Jacobians and outputs, one row per position.

        Notes
        -----
        Exact. Memory O(rows · outputs · weights of ``params``); models that ``vmap`` cannot run raise its errors.
        """
        with torch.set_grad_enabled(enable_backprop):
            J, f = by_functorch(self.outputs, self.model, self.params, x)
            return self._restrict(self._widen(J)), self._widen(f)

    def selected_output_jacobians(
        self, x: Inputs, outputs: Int[Tensor, "batch ..."], enable_backprop: bool = False
    ) -> tuple[Float[Tensor, "batch chosen params"], Tensor]:
        """Jacobians of chosen outputs of each input.

        Parameters
        ----------
        x
            A batch of inputs.
        outputs
            Which outputs, ``[batch]`` or ``[batch, k]``.
        enable_backprop
            Keep the graph to the inputs.

        Returns
        -------
        Jacobians ``[batch, k, P]`` and all outputs ``[batch, C]``.

        Raises
        ------
        ShapeError
            If ``outputs`` has another number of rows, or is no matrix.
        """
        J, f = self.jacobians(x, enable_backprop)
        return select_outputs(J, f, outputs)

    def derivatives(self, x: Inputs, enable_backprop: bool = False, **model_kwargs: Any) -> Any:
        """Outputs ``f`` and their derivatives for predictions, here from ``jacobians``.

        Parameters
        ----------
        x
            A batch of inputs.
        enable_backprop
            Keep the graph to the inputs.
        **model_kwargs
            Passed to ``forward``; a back end that only gives ``jacobians`` takes none.

        Returns
        -------
        An object with ``f``, ``columns(mix)`` and ``n_columns_at_once``.
        """
        self._refuse(model_kwargs)
        J, f = self.jacobians(x, enable_backprop)
        shape = self.outputs(x).shape
        n_columns = f.numel() // shape[0]
        chosen = self.subset is SubsetOfWeights.SUBNETWORK
        sizes = (J.shape[-1],) if chosen else tuple(p.numel() for p in self.params)
        return WrittenOut(f.reshape(shape), J.reshape(shape[0], n_columns, -1), sizes)

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the negative log-likelihood of each datum, ``[batch, P]``, and the summed loss.

        Parameters
        ----------
        x
            A batch of inputs.
        y
            Its targets.
        """
        with torch.no_grad():
            f = self.outputs(x)
            positions = self.positions(f, y)
            J = positions.select(self.jacobians(x)[0].flatten(1)).unflatten(1, (positions.f.shape[-1], -1))
            rows = torch.einsum("nc,ncp->np", self.output_likelihood.gradient(positions.f, positions.y), J)
            if positions.datum is None:
                per_datum = rows
            else:
                per_datum = rows.new_zeros(len(f), rows.shape[1]).index_add_(0, positions.datum, rows)
            return per_datum, self.output_likelihood.nll(positions.f, positions.y)

    def output_hessian(self, positions: Positions) -> OutputHessian:
        """The matrices in the outputs whose pullback is this curvature: the likelihood's Hessian.

        Parameters
        ----------
        positions
            Outputs and targets of the unmasked positions.
        """
        return self.output_likelihood.hessian(self.output_likelihood.observed(positions.f, positions.y))

    def output_root(self, positions: Positions) -> Float[Tensor, "rows outputs columns"]:
        """Roots of the output Hessians, ``r rᵀ``.

        Parameters
        ----------
        positions
            As in ``output_hessian``.
        """
        if self.adds_over_positions or self.is_sampled:
            root = self.output_hessian(positions).root
            assert root is not None, "gradients and samples are roots"
            return root
        return self.output_likelihood.hessian_root(self.output_likelihood.observed(positions.f, positions.y))

    def with_likelihood(self, likelihood: AbstractLikelihood) -> CurvatureInterface:
        """Compute with a likelihood that may have numbers of its own, from now on; return the back end itself.

        Parameters
        ----------
        likelihood
            At unit noise and temperature.

        Raises
        ------
        UnsupportedError
            If a package computes, and no loss of PyTorch is that of the likelihood with these numbers.
        """
        if not self.weighs_outputs and likelihood.torch_loss() is None:
            msg = (
                f"{type(self).__name__} computes with a loss of PyTorch, and there is none for {likelihood.described}. "
                "Use a built-in back end (backend=None)."
            )
            raise UnsupportedError(msg)
        self.output_likelihood = likelihood
        return self

    def positions(self, f: Tensor, y: Tensor, *, whole: bool = False) -> Positions:
        """Outputs and their targets, checked and flattened to unmasked rows, in the precision of the curvature.

        Parameters
        ----------
        f
            Outputs, ``[batch, *positions, C]``.
        y
            Targets.
        whole
            Masked rows may stay, if they say nothing.
        """
        f = self._widen(f)
        if self.last_layer:
            self.output_likelihood.check_head(heads.n_outputs(self._head))
        return self.output_likelihood.whole(f, y) if whole else self.output_likelihood.flatten(f, y)

    leading: Leading | None = None
    """Which columns of the output Hessian's root are exact, where not all are; ``None``: all."""

    loss_by_output: bool = False
    """Whether losses of a last layer come output by output, ``[C]``: set while an estimator of regression is fitted."""

    def loss(self, positions: Positions) -> Tensor:
        """Negative log-likelihood of some positions, ``[]``, or ``[C]`` with ``loss_by_output``."""
        if self.loss_by_output:
            return self.output_likelihood.nll_by_output(positions.f, positions.y)
        return self.output_likelihood.nll(positions.f, positions.y)

    def _restrict(self, values: Tensor) -> Tensor:
        """Of values for the weights of ``params``, along the last axis, those of random ones."""
        return values if self.network is None else self.network.subset.restrict(values)

    def _refuse(self, kwargs: dict[str, Any], structure: HessianStructure | None = None) -> None:
        """Raise when a method gets options that this back end does not read, or is not there for the chosen weights."""
        if structure is not None and self.subset is SubsetOfWeights.SUBNETWORK and not self.provides(structure):
            raise self.cannot(structure)
        if kwargs:
            msg = f"{type(self).__name__} takes no further options; got {', '.join(map(repr, kwargs))}."
            raise UnsupportedError(msg)

    def _widen(self, values: Tensor) -> Tensor:
        """Bring model outputs to the precision that curvature is computed in."""
        dtype = self.curvature_dtype or torch.promote_types(values.dtype, torch.float32)
        return values.to(dtype)
