"""Which weights form a subnetwork: masks, whose ``select()`` gives ``subnetwork_indices=`` of the estimators.

Masks and indices are in the order of ``torch.nn.utils.parameters_to_vector(model.parameters())`` and count all weights,
frozen ones (``requires_grad=False``) included; but a frozen weight is never selected.

To write one, derive from ``SubnetMask`` and return from ``get_subnet_mask`` a mask ``[P]``. Masks that select the
weights with the highest scores are in ``network/scoremask.py``.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from laplace.errors import InputError, NotFittedError, ShapeError, UnsupportedError
from laplace.network.batches import iterate
from laplace.network.feature_extractor import FeatureExtractor
from laplace.network.modes import evaluating
from laplace.network.whole_network import unwrap


class SubnetMask(ABC):
    """A choice of weights of a model.

    Parameters
    ----------
    model
        The trained network; it is read, never written.

    Raises
    ------
    UnsupportedError
        If none of its weights requires a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._named = dict(unwrap(model).named_parameters())
        self._indices: Int[Tensor, " chosen"] | None = None
        if not any(parameter.requires_grad for parameter in self._named.values()):
            msg = "No weight of the model requires a gradient, so none can be selected: see requires_grad_(True)."
            raise UnsupportedError(msg)

    @property
    def parameter_vector(self) -> Float[Tensor, " params"]:
        """A detached copy of all weights of the model, ``[P]``."""
        return parameters_to_vector(self._named.values()).detach()

    @property
    def trainable(self) -> Bool[Tensor, " params"]:
        """Which weights may be selected: those that require a gradient, ``[P]``."""
        return self._spread({id(parameter) for parameter in self._named.values() if parameter.requires_grad})

    def _spread(self, chosen: set[int]) -> Bool[Tensor, " params"]:
        """A mask of whole parameter tensors, which are given by their ids."""
        parts = [torch.full((p.numel(),), id(p) in chosen, device=p.device) for p in self._named.values()]
        return torch.cat(parts)

    @property
    def indices(self) -> Int[Tensor, " chosen"]:
        """Positions of the selected weights, ascending; after ``select``, before it ``NotFittedError``."""
        if self._indices is None:
            msg = f"No weights are selected yet: call {type(self).__name__}.select() first, which returns the indices."
            raise NotFittedError(msg)
        return self._indices.clone()

    @property
    def n_params_subnet(self) -> int:
        """Number of selected weights; after ``select``, before it ``NotFittedError`` unless it is given."""
        return len(self.indices)

    def convert_subnet_mask_to_indices(self, subnet_mask: Any) -> Int[Tensor, " chosen"]:
        """Where a mask is true, ascending.

        Parameters
        ----------
        subnet_mask
            ``[P]``, boolean or of zeros and ones.

        Raises
        ------
        ShapeError
            If it is no vector with an entry for each weight of the model.
        InputError
            If it has other entries, or selects no weight or a frozen one.
        """
        trainable = self.trainable
        if not isinstance(subnet_mask, Tensor) or subnet_mask.shape != trainable.shape:
            got = list(subnet_mask.shape) if isinstance(subnet_mask, Tensor) else type(subnet_mask).__name__
            msg = f"A mask has one entry for each weight of the model, [{len(trainable)}]; got {got}."
            raise ShapeError(msg)
        chosen = subnet_mask.bool()
        if not bool((subnet_mask == chosen).all()):
            msg = f"A mask is boolean, or of zeros and ones; it has {subnet_mask[subnet_mask != chosen][:3].tolist()}."
            raise InputError(msg)
        if not bool(chosen.any()):
            msg = "The mask selects no weight: a subnetwork has at least one."
            raise InputError(msg)
        frozen = (chosen & ~trainable.to(chosen.device)).nonzero().flatten()
        if len(frozen):
            msg = (
                f"The mask selects frozen weights (at {frozen[:3].tolist()}), which are not random: leave them out "
                "(see trainable), or unfreeze them with requires_grad_(True)."
            )
            raise InputError(msg)
        return chosen.nonzero().flatten()

    def select(self, train_loader: Iterable[Any] | None = None) -> Int[Tensor, " chosen"]:
        """Select the weights, once.

        Parameters
        ----------
        train_loader
            Training batches; needed, and read, by masks that look at data.

        Returns
        -------
        Positions in ``parameters_to_vector(model.parameters())``, ascending: a ``LongTensor``.

        Raises
        ------
        UnsupportedError
            If they are selected already.
        InputError
            If training data are needed and missing, or the mask is not valid.
        """
        if self._indices is not None:
            msg = "The weights are selected already: read them from indices, or make a new mask to select others."
            raise UnsupportedError(msg)
        self._indices = self.convert_subnet_mask_to_indices(self.get_subnet_mask(train_loader))
        return self.indices

    @abstractmethod
    def get_subnet_mask(self, train_loader: Iterable[Any] | None) -> Tensor:
        """The mask, ``[P]``.

        Parameters
        ----------
        train_loader
            Training batches, for masks that look at data.
        """

    def _needed(self, train_loader: Iterable[Any] | None) -> Iterable[Any]:
        if train_loader is None:
            msg = f"{type(self).__name__} looks at training data: pass select(train_loader)."
            raise InputError(msg)
        return train_loader


class ParamNameSubnetMask(SubnetMask):
    """All weights of some parameter tensors.

    Parameters
    ----------
    model
        The trained network.
    parameter_names
        A list of names as in ``model.named_parameters()``.

    Raises
    ------
    UnsupportedError
        If there is no such parameter, or it does not require a gradient.
    InputError
        If these are no names, or none.
    """

    def __init__(self, model: nn.Module, parameter_names: Any) -> None:
        super().__init__(model)
        self._parameter_names = known_names(parameter_names, "parameter", self._named)
        frozen = [name for name in self._parameter_names if not self._named[name].requires_grad]
        if frozen:
            msg = f"The parameter {frozen[0]!r} does not require a gradient: unfreeze it with requires_grad_(True)."
            raise UnsupportedError(msg)

    def get_subnet_mask(self, train_loader: Iterable[Any] | None) -> Bool[Tensor, " params"]:  # noqa: ARG002
        """Which weights belong to these tensors."""
        return self._spread({id(self._named[name]) for name in self._parameter_names})


class ModuleNameSubnetMask(SubnetMask):
    """All weights of some modules, and of the modules inside them, that require a gradient.

    Parameters
    ----------
    model
        The trained network.
    module_names
        A list of names as in ``model.named_modules()``.

    Raises
    ------
    UnsupportedError
        If there is no such module, or none of its weights requires a gradient.
    InputError
        If these are no names, or none.
    """

    def __init__(self, model: nn.Module, module_names: Any) -> None:
        super().__init__(model)
        self._module_names = self._with_weights(module_names)

    def _with_weights(self, module_names: Any) -> list[str]:
        """Names of modules with weights that can be selected."""
        modules = dict(unwrap(self.model).named_modules(remove_duplicate=False))
        names = known_names(module_names, "module", modules)
        for name in names:
            if not any(parameter.requires_grad for parameter in modules[name].parameters()):
                msg = f"The module {name!r} has no weights that require a gradient: there is nothing to select in it."
                raise UnsupportedError(msg)
        return names

    def get_subnet_mask(self, train_loader: Iterable[Any] | None) -> Bool[Tensor, " params"]:  # noqa: ARG002
        """Which weights belong to these modules."""
        modules = dict(unwrap(self.model).named_modules(remove_duplicate=False))
        inside = (parameter for name in self._module_names for parameter in modules[name].parameters())
        return self._spread({id(parameter) for parameter in inside if parameter.requires_grad})


class LastLayerSubnetMask(ModuleNameSubnetMask):
    """The weights of the last linear layer.

    Parameters
    ----------
    model
        The trained network.
    last_layer_name
        Name of the layer; found by a forward pass of the first training batch when ``None``.
    dict_key_x, dict_key_y
        Entries of mapping batches that hold the main input and the targets.

    Raises
    ------
    UnsupportedError
        If there is no linear layer of that name.

    Notes
    -----
    ``subset_of_weights="last_layer"`` gives the same posterior without a backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        last_layer_name: str | None = None,
        *,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
    ) -> None:
        self._extractor = FeatureExtractor(unwrap(model), last_layer_name, dict_key_x=dict_key_x, dict_key_y=dict_key_y)
        super().__init__(model, [""] if last_layer_name is None else [last_layer_name])

    def get_subnet_mask(self, train_loader: Iterable[Any] | None) -> Bool[Tensor, " params"]:
        """Which weights belong to the layer.

        Parameters
        ----------
        train_loader
            Training batches, of which the first is read if the layer is not named.

        Raises
        ------
        InputError
            If they are needed and missing or empty.
        UnsupportedError
            If the model has no last linear layer, or it is frozen.
        """
        if self._extractor.last_layer_name is None:
            self._find(self._needed(train_loader))
        assert self._extractor.last_layer_name is not None, "named or found"
        self._module_names = self._with_weights([self._extractor.last_layer_name])
        return super().get_subnet_mask(train_loader)

    def _find(self, train_loader: Iterable[Any]) -> None:
        device = next(iter(self._named.values())).device
        with evaluating(self.model):
            for batch in iterate(train_loader, dict_key_y=self._extractor.dict_key_y, device=device):
                self._extractor.find_last_layer(batch.x)
                return
        msg = "train_loader is empty: there is no batch to find the last layer with. Pass last_layer_name= instead."
        raise InputError(msg)


def known_names(names: Any, what: str, known: Mapping[str, Any]) -> list[str]:
    """A list of names of parts of a model, checked; ``what`` says for messages what they name."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        msg = f"{what}_names must be a list of names; got {names!r}."
        raise InputError(msg)
    if not names:
        msg = f"{what}_names is empty: a subnetwork has at least one weight."
        raise InputError(msg)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            msg = f"The model has no {what} {name!r}; see model.named_{what}s().{hint}"
            raise UnsupportedError(msg)
    return list(names)
