"""Which weights are random, as a value: ``AllWeights``, ``Subnetwork`` or ``LastLayer``.

It knows the parameters, how outputs depend on them, and what a state says about them; estimators ask it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import pending
from laplace.baselaplace.statefile import move
from laplace.curvature import CurvatureInterface
from laplace.enums import PredType
from laplace.errors import StateError, UnsupportedError, warn
from laplace.network import Batch, FeatureExtractor, ParameterSubset, WholeNetwork, evaluating
from laplace.network.heads import head_of, is_head, n_outputs
from laplace.network.outputs import Reading
from laplace.network.threads import together
from laplace.network.whole_network import unwrap
from laplace.predictive import Linearization, NetworkLinearization
from laplace.schema import Known, Table, check_entries, indices, optional, text
from laplace.types import Inputs

_CHOSEN: Table = {"subnetwork_indices": indices("P")}
_NAME: Table = {"last_layer_name": text}


@dataclass(frozen=True, eq=False)
class AllWeights:
    """All weights of a network that require a gradient."""

    model: nn.Module
    dict_key_x: str
    dict_key_y: str
    reading: Reading
    """What the outputs are, and which axis holds the C outputs."""

    of_head: ClassVar[bool] = False
    """Whether each weight belongs to one output, as those of a linear head do."""
    called: ClassVar[str] = "random weights"
    entries: ClassVar[Table] = {}
    """What the entries of a state must be that say which weights are random."""
    sees_features: ClassVar[bool] = True
    """Whether what enters the last linear layer is looked at."""

    @cached_property
    def whole(self) -> WholeNetwork:
        """The network as a function of its weights."""
        return WholeNetwork(self.model, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        """How inputs enter the network, and outputs leave it."""
        return {"dict_key_x": self.dict_key_x, "dict_key_y": self.dict_key_y, "reading": self.reading}

    @property
    def network(self) -> nn.Module:
        """The user's model."""
        return self.model

    @property
    def subset(self) -> ParameterSubset | None:
        """The random weights; ``None`` while they are not known."""
        return self.whole.subset

    @property
    def first(self) -> Tensor:
        """The parameter that decides device and precision."""
        for parameter in self.model.parameters():
            if not parameter.is_meta:  # of an offloaded part
                return parameter
        msg = "The model has no parameters with values; a Laplace approximation is one over its weights."
        raise UnsupportedError(msg)

    @property
    def head(self) -> list[tuple[int, ...]] | None:
        """Shapes of the parameter groups of a head, ``(C, D)`` and ``(C,)``; ``None`` of other weights."""
        return None

    def backend_options(self) -> dict[str, Any]:
        """What a back end is told about them."""
        return {"last_layer": False}

    def tell(self, backend: CurvatureInterface) -> None:
        """Let a back end read outputs as this object does; what one of them sees, both know."""
        if backend.network is not None:
            backend.network.reading = self.reading

    def check_unchanged(self) -> None:
        """Raise if other weights require a gradient than when this object was made."""
        self.whole.check_still_random()

    def warn_if_moved(self, mean: Float[Tensor, " params"]) -> None:
        """Warn where the model has other weights than a fit had: outputs and posterior then belong to other ones."""
        subset = self.subset
        msg = (
            f"The {self.called} have changed since fit, or la.mean was assigned: predictions are centered at the "
            "weights of the model, their uncertainty belongs to la.mean. Fit again."
        )
        if subset is None:
            warn(msg, UserWarning)
        else:
            pending.when(subset.differ(mean), lambda: warn(msg, UserWarning))

    def before_first(self, backend: CurvatureInterface, x: Inputs) -> None:
        """Prepare for the first batch: a back end with outputs of its own may not tell how many there are."""
        if not backend.finds_last_layer:
            backend.outputs(x)

    def n_outputs(self, backend: CurvatureInterface) -> int:
        """C, once the model has run."""
        assert backend.n_outputs is not None, "fit has run the model"
        return backend.n_outputs

    def outputs(self, x: Inputs, **model_kwargs: Any) -> Tensor:
        """Outputs of the model, ``[batch, *positions, C]``."""
        return self.whole(x, **model_kwargs)

    def aligned(self, batch: Batch) -> Batch:
        """A batch whose targets have their axes in the order of the outputs inside, ``[batch, *positions, C]``.

        The model runs once where it is not known yet which axis holds the C outputs.
        """
        if batch.y.dim() < 3:
            return batch
        if not self.reading.seen and len(batch.y):
            with torch.no_grad(), evaluating(self.network):
                self.outputs(batch.x)
        return Batch(batch.x, self.reading.targets(batch.y))

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """Sees what enters the last linear layer."""
        extractor = FeatureExtractor(unwrap(self.model), **self._options)  # as the back end runs it
        extractor.only_looks = True
        return extractor

    def outputs_and_features(self, x: Inputs, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Outputs and what enters the last linear layer, ``[batch, *positions, D]``, by a forward pass."""
        with torch.no_grad(), evaluating(self.model):
            return self.extractor.forward_with_features(x, **model_kwargs)

    def linearize(
        self,
        x: Inputs,
        center: Float[Tensor, " params"] | None,
        backend: Callable[[], CurvatureInterface],
        pred_type: PredType = PredType.GLM,
        *,
        differentiable: bool = False,
        **model_kwargs: Any,
    ) -> Linearization:
        """Outputs at ``x`` and how they depend on the random weights around ``center``, those of the model if not said.

        Of the network itself (``pred_type="nn"``) no derivatives are taken.
        """
        center = self.whole.subset.vector() if center is None else center

        def evaluate(theta: Tensor) -> Tensor:
            return self.whole.at(theta, x, **model_kwargs)

        def seen() -> Tensor:
            features = self.outputs_and_features(x, **model_kwargs)[1]
            return features.reshape(-1, features.shape[-1])

        if pred_type is PredType.NN:
            return NetworkLinearization(self.whole(x, **model_kwargs), None, evaluate, center, seen)
        derivatives = backend().derivatives(x, differentiable, **model_kwargs)
        return NetworkLinearization(derivatives.f, derivatives, evaluate, center, seen)

    @property
    def holders(self) -> tuple[object, ...]:
        """Objects whose attributes loading a state may assign."""
        return ()

    def replaced(self, model: nn.Module) -> nn.Module:
        """A model that takes the place of the present one, in the form in which it is kept."""
        return model

    def renamed(self, name: str, key: str) -> None:
        """Take over another name of an entry of mapping inputs, ``dict_key_x`` or ``dict_key_y``."""

    # -- states -------------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What a state and the object that loads it must agree on."""
        return {}

    def choices(self) -> dict[str, Any]:
        """What a state carries and restores."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over ``choices``."""

    def sizes_in(self, state: Mapping[str, Any]) -> tuple[int, ...]:  # noqa: ARG002 - of all weights it does not matter
        """Sizes of the parameter groups that are random in a state."""
        return self.whole.subset.sizes

    def known(self, state: Mapping[str, Any]) -> Known:  # noqa: ARG002
        """Further sizes that the entries of a state must have."""
        return {}

    def find(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Find out from a state of laplace-torch which weights are random; of a last layer it says so."""

    def of_peer(self, mean: Tensor) -> Tensor:
        """The random weights among those that a state of laplace-torch holds."""
        return mean


@dataclass(frozen=True, eq=False)
class Subnetwork(AllWeights):
    """Chosen weights of a network, by their positions in ``parameters_to_vector``."""

    indices: Tensor

    entries: ClassVar[Table] = _CHOSEN
    sees_features: ClassVar[bool] = False

    @cached_property
    def whole(self) -> WholeNetwork:
        """The network as a function of the chosen weights."""
        return WholeNetwork(self.model, **self._options, indices=self.indices)

    def backend_options(self) -> dict[str, Any]:
        """Which weights are chosen."""
        return {"last_layer": False, "subnetwork_indices": self.indices.to(self.first.device)}

    def choices(self) -> dict[str, Any]:
        """Which weights are chosen."""
        return {"subnetwork_indices": self.indices}

    def sizes_in(self, state: Mapping[str, Any]) -> tuple[int, ...]:
        """Of the same subnetwork."""
        sizes = super().sizes_in(state)
        if "subnetwork_indices" not in state:
            return sizes
        there, here = state["subnetwork_indices"], self.indices
        if not isinstance(there, Tensor) or not torch.equal(there.to(here.device), here):
            msg = (
                "The state was saved for another subnetwork: construct the object with "
                'subnetwork_indices=state["subnetwork_indices"].'
            )
            raise StateError(msg)
        return sizes

    def of_peer(self, mean: Tensor) -> Tensor:
        """laplace-torch saves those of the whole network."""
        return mean[self.indices] if len(mean) > int(self.indices.max()) else mean


@dataclass(frozen=True, eq=False)
class LastLayer(AllWeights):
    """The weights of the last linear layer, whose inputs are features; not known before its name is."""

    model: FeatureExtractor

    of_head: ClassVar[bool] = True
    called: ClassVar[str] = "weights of the last layer"
    entries: ClassVar[Table] = {"feature_reduction": optional(text), **_NAME}

    @property
    def network(self) -> nn.Module:
        """The user's model."""
        return self.model.model

    @property
    def subset(self) -> ParameterSubset | None:
        """Weight and bias, once the layer is known."""
        layer = self.model.last_layer
        if layer is None:
            return None
        with together(layer):
            return ParameterSubset.last_layer(layer)

    @property
    def first(self) -> Tensor:
        """The head decides device and precision, once it is known: the backbone may have others."""
        layer = self.model.last_layer
        return super().first if layer is None else next(layer.parameters())

    @property
    def layer(self) -> nn.Module:
        """The layer, once the model has run."""
        layer = self.model.last_layer
        assert layer is not None, "a forward pass finds it"
        return layer

    @property
    def head(self) -> list[tuple[int, ...]]:
        """Shapes of weight and bias."""
        layer = self.layer
        return head_of(layer).groups(layer)

    def backend_options(self) -> dict[str, Any]:
        """That it is a last layer."""
        return {"last_layer": True}

    def check_unchanged(self) -> None:
        """A last layer is random whether or not it requires a gradient."""

    def before_first(self, backend: CurvatureInterface, x: Inputs) -> None:
        """Find the layer, unless the back end's own pass does."""
        if self.model.last_layer is None and not backend.finds_last_layer:
            self.model.find_last_layer(x)

    def n_outputs(self, backend: CurvatureInterface) -> int:  # noqa: ARG002
        """C, of the layer."""
        return n_outputs(self.layer)

    def outputs(self, x: Inputs, **model_kwargs: Any) -> Tensor:
        """Outputs of the model, ``[batch, *positions, C]``."""
        return self.model(x, **model_kwargs)

    def linearize(
        self,
        x: Inputs,
        center: Float[Tensor, " params"] | None,  # noqa: ARG002 - outputs are linear in these weights
        backend: Callable[[], CurvatureInterface],  # noqa: ARG002
        pred_type: PredType = PredType.GLM,  # noqa: ARG002
        *,
        differentiable: bool = False,  # noqa: ARG002
        **model_kwargs: Any,
    ) -> Linearization:
        """Outputs and features."""
        f, phi = self.model.forward_with_features(x, **model_kwargs)
        return NetworkLinearization.of_head(f, phi, self.head)

    @property
    def holders(self) -> tuple[object, ...]:
        """The extractor, which learns the name of the layer."""
        return (self.model,)

    def replaced(self, model: nn.Module) -> FeatureExtractor:
        """In an extractor, with what the present one knows."""
        kept = self.model
        if not isinstance(model, FeatureExtractor):
            return FeatureExtractor(
                model,
                kept.last_layer_name,
                kept.enable_backprop,
                kept.feature_reduction,
                dict_key_x=kept.dict_key_x,
                dict_key_y=kept.dict_key_y,
                reading=kept.reading,
            )
        if model.last_layer_name is None and kept.last_layer_name is not None:
            model.set_last_layer(kept.last_layer_name)
        return model

    def renamed(self, name: str, key: str) -> None:
        """The extractor runs the model, and knows the names, too."""
        setattr(self.model, name, key)

    # -- states -------------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """How features are reduced."""
        reduction = self.model.feature_reduction
        return {"feature_reduction": None if reduction is None else reduction.value}

    def choices(self) -> dict[str, Any]:
        """The name of the layer."""
        return {"last_layer_name": self.model.last_layer_name}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Its name, if it was not known."""
        if self.model.last_layer_name is None:
            self.model.set_last_layer(state["last_layer_name"])

    def sizes_in(self, state: Mapping[str, Any]) -> tuple[int, ...]:
        """Of the layer that the state names."""
        return ParameterSubset.last_layer(self._layer_in(state)).sizes

    def known(self, state: Mapping[str, Any]) -> Known:
        """How many outputs it has, and whether a bias."""
        layer = self._layer_in(state)
        groups = head_of(layer).groups(layer)
        return {"C": groups[0][0], "bias": len(groups) > 1}

    def find(self, state: Mapping[str, Any], device: torch.device) -> None:
        """By its name, or by running the model on the batch in the state."""
        name, known, data = state["_last_layer_name"], self.model.last_layer_name, state["data"]
        if known is not None or name is not None:
            self._layer_in({"last_layer_name": known if name is None else name})
        if known is None and name is not None:
            self.model.set_last_layer(name)
        elif known is None:
            if data is None:
                msg = (
                    "The state of laplace-torch does not say which layer is the last: construct with last_layer_name=."
                )
                raise StateError(msg)
            with evaluating(self.model), torch.no_grad():
                self.model.find_last_layer(move(data[0] if isinstance(data, (list, tuple)) else data, device))

    def _layer_in(self, state: Mapping[str, Any]) -> nn.Module:
        """The layer that a state was saved for."""
        check_entries({key: state[key] for key in state if key in _NAME}, _NAME, {})
        name, known = state["last_layer_name"], self.model.last_layer_name
        if known not in (None, name):
            msg = f"The state was saved for the last layer {name!r}; this object was constructed with {known!r}."
            raise StateError(msg)
        layer = dict(self.network.named_modules()).get(name)
        if not (isinstance(layer, nn.Module) and is_head(layer)):
            msg = f"The state was saved for the last layer {name!r}; the model has no linear layer of that name."
            raise StateError(msg)
        return layer


__all__ = ["AllWeights", "LastLayer", "Subnetwork"]
