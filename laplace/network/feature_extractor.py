"""Features before the last linear layer (``last_layer_name=``, ``feature_reduction=``), read by one forward pass.

Hooks live for the length of a call and nothing is stored on the user's model. What the extractor relies on, that the
outputs *are* the last layer applied to the features, is checked on the first pass and explained when it fails.
"""

from __future__ import annotations

import difflib
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from laplace.attributes import check_attribute
from laplace.enums import FeatureReduction, choose
from laplace.errors import MissingModuleError, ShapeError, UnsupportedError, warn
from laplace.network.batches import call, one_row, output_tensor
from laplace.network.failures import check_weights
from laplace.network.heads import HEADS, KINDS, head_of, n_outputs
from laplace.network.modes import full_precision
from laplace.network.threads import together
from laplace.types import Inputs

_HOOKS = threading.RLock()
"""Held while hooks are set and removed: PyTorch numbers them without a lock, so that two could get one number."""


_SEEN: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("_SEEN", default=None)


@contextmanager
def seeing_features() -> Generator[list[tuple[Tensor, Tensor]]]:
    """Yield a list that holds outputs and features of the last pass in the body, of this thread."""
    seen: list[tuple[Tensor, Tensor]] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


class FeatureExtractor(nn.Module):
    """A model together with its last linear layer.

    Parameters
    ----------
    model
        The trained network. Its outputs must be those of its last linear layer: nothing that changes them may follow.
        It may return a tensor, or a mapping (such as a Hugging Face ``ModelOutput``) with the entry ``logits``.
    last_layer_name
        Name of the last layer as in ``model.named_modules()``; found by the first forward pass when ``None``.
    enable_backprop
        Keep the graph from the features to the inputs.
    feature_reduction
        How the model reduces features ``[batch, positions, features]`` to one row per datum: ``"pick_first"``,
        ``"pick_last"`` or ``"average"``; ``None`` when it does not.
    dict_key_x, dict_key_y
        Entries of a mapping input that hold the main input and the targets; the mapping is unpacked when ``forward``
        has a parameter ``dict_key_x``, without the targets.

    Raises
    ------
    UnsupportedError
        If ``last_layer_name`` or ``feature_reduction`` is unknown, the layer is not linear, or the model is compiled by
        ``torch.jit``.
    """

    only_looks: bool = False
    """Whether the head's weights are not random on their own, so that it does not matter who shares them."""

    def __init__(
        self,
        model: nn.Module,
        last_layer_name: str | None = None,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
        *,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
    ) -> None:
        super().__init__()
        if isinstance(model, torch.jit.ScriptModule):
            msg = (
                f"The model is a {type(model).__name__}: its layers are compiled, so that the features of the last one "
                "cannot be read. Pass the module that it was made from (same weights: load_state_dict), or use "
                'subset_of_weights="all" with hessian_structure="diag" or "full".'
            )
            raise UnsupportedError(msg)
        # A compiled module may run a graph that was made without our hooks: use the module it was compiled from, which
        # has the same weights.
        original = dict(model.named_children()).get("_orig_mod")
        self.model = model if original is None else original
        self.training = self.model.training  # or each evaluation would bring back another mode
        self.enable_backprop = enable_backprop
        self.feature_reduction = (
            None if feature_reduction is None else choose(FeatureReduction, feature_reduction, "feature_reduction")
        )
        self.dict_key_x = dict_key_x
        self.dict_key_y = dict_key_y
        self.last_layer_name: str | None = None
        self._verified = False
        if last_layer_name is not None:
            self.set_last_layer(last_layer_name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute; frameworks may add some of theirs, near misses of ours raise.

        Raises
        ------
        UnknownAttributeError
            If the name is one of ours, misspelt.
        """
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
            return
        check_attribute(self, name, takes_others=True)
        super().__setattr__(name, value)

    @property
    def last_layer(self) -> Any:
        """The last linear layer, or ``None`` before it is known; assign a layer of the model, or ``None`` to forget it.

        An assigned value must be a linear layer of the model (``UnsupportedError``).
        """
        if self.last_layer_name is None:
            return None
        # What get_submodule finds; every prediction asks several times.
        layer = attrgetter(self.last_layer_name)(self.model) if self.last_layer_name else self.model
        assert isinstance(layer, KINDS), "set_last_layer checks this"
        return layer

    @last_layer.setter
    def last_layer(self, layer: nn.Module | None) -> None:
        if layer is None:
            self.last_layer_name, self._verified = None, False
            return
        names = [name for name, module in self.model.named_modules() if module is layer]
        if not names:
            msg = f"The last layer must be a layer of the model. {self._candidates()}"
            raise UnsupportedError(msg)
        self.set_last_layer(names[0])

    @property
    def _last_layer_name(self) -> str | None:
        """The name that laplace-torch gives to ``last_layer_name``."""
        return self.last_layer_name

    def set_last_layer(self, last_layer_name: str) -> None:
        """Choose the last layer by name.

        Raises
        ------
        MissingModuleError
            If there is no such module; an ``UnsupportedError`` and a ``KeyError``.
        UnsupportedError
            If it is no ``torch.nn.Linear``; the message lists the candidates.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if last_layer_name not in modules:
            near = difflib.get_close_matches(last_layer_name, modules, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            msg = f"The model has no module {last_layer_name!r}.{hint} {self._candidates()}"
            raise MissingModuleError(msg)
        layer = modules[last_layer_name]
        if not isinstance(layer, KINDS):
            kinds = " or ".join(head.called for head in HEADS.values())
            msg = f"The last layer must be a {kinds}; {last_layer_name!r} is a {type(layer).__name__}. "
            raise UnsupportedError(msg + self._candidates())
        self.last_layer_name = last_layer_name
        self._verified = False
        self._check_head(layer)

    def find_last_layer(self, x: Inputs) -> Tensor:
        """Find the last linear layer by one forward pass.

        Parameters
        ----------
        x
            A batch of inputs.

        Returns
        -------
        The outputs of the model, ``[batch, *positions, outputs]``.

        Raises
        ------
        UnsupportedError
            If no linear layer runs, or the outputs of the model are not those of the last one.
        """
        return self.forward_with_features(x)[0]

    def forward(self, x: Inputs, **model_kwargs: Any) -> Tensor:
        """Outputs of the model, ``[batch, *positions, outputs]``; finds the last layer when it is not known yet."""
        return self.forward_with_features(x, **model_kwargs)[0]

    def forward_with_features(self, x: Inputs, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Outputs and features in one forward pass.

        Parameters
        ----------
        x
            A batch of inputs: a tensor or any nesting of tensors.
        **model_kwargs
            Passed to the model's ``forward``.

        Returns
        -------
        Outputs ``f`` ``[batch, *positions, outputs]`` and features ``phi`` ``[batch, *positions, features]`` with
        ``f = W phi + b``. A model that returns ``[batch]`` gets its output axis back.

        Raises
        ------
        UnsupportedError
            If there is no linear last layer, or the outputs are not its outputs.
        ShapeError
            If outputs and features have positions that do not match.
        """
        with together(self.model):
            found = self._watched_pass(x, model_kwargs)
        seen = _SEEN.get()
        if seen is not None:
            seen[:] = [found]
        return found

    def _watched_pass(self, x: Inputs, model_kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The forward pass of ``forward_with_features``, while no thread has other weights in place."""
        known, here = self.last_layer, threading.get_ident()
        watched = {self.last_layer_name: known} if known is not None else self._linear_layers()
        calls: Counter[str | None] = Counter()
        seen: dict[str | None, tuple[Tensor, Tensor]] = {}

        def watch(name: str | None) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], *others: Any) -> None:
                if threading.get_ident() != here:
                    return  # the pass of another thread; it may find half of a hook that is just removed
                kwargs, output = others
                calls[name] += 1
                seen.clear()
                seen[name] = (args[0] if args else kwargs["input"], output)

            return hook

        handles: list[RemovableHandle] = []
        try:
            with _HOOKS:
                for name, layer in watched.items():
                    handles.append(layer.register_forward_hook(watch(name), with_kwargs=True))
            outputs = call(self.model, x, dict_key_x=self.dict_key_x, dict_key_y=self.dict_key_y, **model_kwargs)
        finally:
            with _HOOKS:
                for handle in handles:
                    handle.remove()
        f = output_tensor(outputs)
        if not seen:
            self._explain_unseen()
        ((name, (phi, head_outputs)),) = seen.items()
        if calls[name] > 1:
            msg = (
                f"The last linear layer {name!r} runs {calls[name]} times in one forward pass, so its features are "
                "not one tensor. Call it once on stacked inputs. " + self._candidates()
            )
            raise UnsupportedError(msg)
        if not self.enable_backprop:
            phi = phi.detach()
        layer = watched[name]
        if one_row(x):
            f, phi = unsqueezed(f, phi, layer)
        f, phi = self._align(f, phi, layer, name)
        self._verify(f, phi, head_outputs, layer, name)
        if not self._verified:
            if self.last_layer_name is None:
                assert name is not None, "unnamed only when the layer was known"
                self.last_layer_name = name
                self._check_head(layer)
            self._verified = True
        return f, phi

    # -- what the outputs are -----------------------------------------------------------------------------------------

    def _align(self, f: Tensor, phi: Tensor, layer: nn.Module, name: str | None) -> tuple[Tensor, Tensor]:
        """Give outputs and features the same leading axes."""
        n_outputs, width = head_of(layer).groups(layer)[0]
        if f.shape == (*phi.shape[:-1], n_outputs):
            if self.feature_reduction is not None and not self._verified:
                self._explain_useless_reduction(phi)
            return f, phi
        if self.feature_reduction is not None and phi.dim() >= 3:
            phi = reduce(phi, self.feature_reduction)
            if f.shape == (*phi.shape[:-1], n_outputs):
                return f, phi
        rows = phi.numel() // width
        if f.numel() == rows * n_outputs:
            # Squeezed, or the scores [batch, 2] of pairs that ran through the layer as [2 · batch] rows.
            if n_outputs == 1 and (f.dim() < phi.dim() or f.shape[-1] != 1):
                f = f.reshape(*(f.shape or (1,)), 1)
            if f.shape[-1] == n_outputs:
                return f, phi.reshape(*f.shape[:-1], width)
        msg = (
            f"The last linear layer {name!r} maps features {list(phi.shape)} to {n_outputs} outputs, but the "
            f"model returns {list(f.shape)}. "
        )
        if phi.dim() >= 3 and f.shape == (phi.shape[0], n_outputs):
            fits = [repr(r.value) for r in FeatureReduction if matches(f, reduce(phi, r), layer)]
            found = f"; {' and '.join(fits)} reproduces its outputs on this batch" if fits else ""
            msg += f"It reduces positions: pass feature_reduction='pick_first', 'pick_last' or 'average'{found}. "
        raise ShapeError(msg + self._candidates())

    def _explain_useless_reduction(self, phi: Tensor) -> None:
        assert self.feature_reduction is not None
        if phi.dim() >= 3:
            msg = (
                f"feature_reduction={self.feature_reduction.value!r} was given, but the model returns one output for "
                "each position; leave it out to treat positions as they are."
            )
            raise UnsupportedError(msg)
        msg = (
            f"feature_reduction={self.feature_reduction.value!r} has nothing to reduce: the features of the last layer "
            f"have the shape {list(phi.shape)} already."
        )
        warn(msg, UserWarning)

    def _verify(self, f: Tensor, phi: Tensor, head_outputs: Tensor, layer: nn.Module, name: str | None) -> None:
        """Check that the outputs are the last layer applied to the features.

        On the first pass the layer is applied again; later its outputs are compared with those of the model, which
        costs no more than reading them: a function after the layer may act on some batches only (clamping, padding).

        Raises
        ------
        UnsupportedError
            If they are not.
        """
        if self._verified:
            if f.numel() != head_outputs.numel():
                head_outputs = reduce(head_outputs, self.feature_reduction) if self.feature_reduction else head_outputs
            if f.numel() == head_outputs.numel() and close(f, head_outputs.reshape(f.shape), f.dtype):
                return
        elif matches(f, phi, layer):
            return
        reduced = "" if self.feature_reduction is None else f" reduced by {self.feature_reduction.value!r}"
        msg = (
            f"The outputs of the model are not those of its last linear layer {name!r}{reduced}. Likely causes, in "
            "order: something follows that layer (a softmax, a scaling: return the logits instead), another layer is "
            "the last one (pass last_layer_name=), the features are reduced in another way (feature_reduction=). "
        )
        raise UnsupportedError(msg + self._candidates())

    # -- which layers there are ---------------------------------------------------------------------------------------

    def _linear_layers(self) -> dict[str | None, nn.Module]:
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, KINDS)}

    def _candidates(self) -> str:
        sizes = {name: head_of(layer).groups(layer)[0] for name, layer in self._linear_layers().items()}
        layers = [f"{name!r} ({width} → {n})" for name, (n, width) in sizes.items()]
        if not layers:
            return "The model has no linear layer; a last-layer approximation needs one."
        return f"Linear layers of the model: {', '.join(layers)}."

    def _explain_unseen(self) -> None:
        """Raise an error that says why no linear layer was seen."""
        if self.last_layer_name is not None:
            msg = f"The last layer {self.last_layer_name!r} does not run in the forward pass. {self._candidates()}"
        else:
            msg = f"No linear layer runs as a module in the forward pass. {self._candidates()}"
        raise UnsupportedError(msg)

    def _check_head(self, layer: nn.Module) -> None:
        """Raise if the head has no values; warn when its weight is used elsewhere, too."""
        weight = head_of(layer).parameters(layer)[0]
        check_weights({f"{self.last_layer_name}.weight": weight})
        owners = [
            f"{name}.{key}"
            for name, module in self.model.named_modules()
            for key, parameter in module.named_parameters(recurse=False)
            if parameter is weight and module is not layer
        ]
        if owners and not self.only_looks:
            msg = (
                f"The weight of the last layer {self.last_layer_name!r} is tied to {', '.join(map(repr, owners))}. "
                "It is treated as the weight of the last layer alone: features do not change with it."
            )
            warn(msg, UserWarning)


def unsqueezed(f: Tensor, phi: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Outputs and features of one row with the axis of the batch, where the model squeezes all axes of one entry."""
    phi = phi.unsqueeze(0) if phi.dim() == 1 else phi
    squeezed = tuple(size for size in (*phi.shape[:-1], n_outputs(layer)) if size != 1)
    return (f.unsqueeze(0) if tuple(f.shape) == squeezed and len(phi) == 1 else f), phi


def reduce(phi: Tensor, reduction: FeatureReduction) -> Tensor:
    """Reduce features ``[batch, *positions, features]`` to ``[batch, features]``."""
    flat = phi.flatten(1, -2)
    if reduction is FeatureReduction.PICK_FIRST:
        return flat[:, 0]
    if reduction is FeatureReduction.PICK_LAST:
        return flat[:, -1]
    return flat.mean(1)


def matches(f: Tensor, phi: Tensor, layer: nn.Module) -> bool:
    """Whether ``f`` equals ``layer`` applied to ``phi``, to the square root of the coarsest dtype's precision."""
    with torch.no_grad(), full_precision(f.device):
        head = head_of(layer)
        dtype = head.parameters(layer)[0].dtype
        return close(
            f, head.outputs(layer, phi.to(dtype)), max(f.dtype, dtype, phi.dtype, key=lambda d: torch.finfo(d).eps)
        )


def close(f: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether outputs agree, relative to the largest and to the square root of a dtype's precision.

    NaN equals NaN here: what is not finite is reported by whoever uses the outputs, in its own words.
    """
    if expected.shape != f.shape:
        return False
    if expected.dtype is f.dtype and torch.equal(f, expected):
        return True
    with torch.no_grad():
        f, expected = f.detach().double(), expected.detach().double()
        finite = expected[torch.isfinite(expected)].abs()
        size = float(finite.max()) if finite.numel() else 0.0
        return torch.allclose(f, expected, rtol=0.0, atol=torch.finfo(dtype).eps ** 0.5 * size, equal_nan=True)
