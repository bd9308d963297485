"""Features before the last linear layer (``last_layer_name=``, ``feature_reduction=``), read by one forward pass.

Hooks live for the length of a call and nothing is stored on the user's model. What the extractor relies on, that the
outputs *are* the last layer applied to the features, is checked on the first pass and explained when it fails. A layer
of another name than asked for is never taken; without a name it is that which ran last, or else the one whose outputs
are those of the model.
"""

from __future__ import annotations

import difflib
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from laplace.attributes import check_attribute
from laplace.enums import FeatureReduction, choose
from laplace.errors import MissingModuleError, ShapeError, UnsupportedError, warn
from laplace.network import heads
from laplace.network.batches import call, one_row
from laplace.network.candidates import candidates, listed, sharing
from laplace.network.compiled import around, as_written
from laplace.network.failures import check_weights
from laplace.network.heads import Head, head_of, is_head
from laplace.network.matching import check_useful, close, matches, picked, reduce, require_close, unsqueezed
from laplace.network.outputs import Reading
from laplace.network.threads import together
from laplace.network.watched import Pass, watched
from laplace.types import Inputs

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
    reading
        Which part of what the model returns are its outputs, and which axis holds the C outputs.

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
        reading: Reading | None = None,
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
        self.reading = Reading() if reading is None else reading
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
        assert is_head(layer), "set_last_layer checks this"
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
            If it is of no kind of ``HEADS``, or quantized; the message says what there is, or what to do.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if last_layer_name not in modules:
            near = difflib.get_close_matches(last_layer_name, modules, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            msg = f"The model has no module {last_layer_name!r}.{hint} {self._candidates()}"
            raise MissingModuleError(msg)
        layer = modules[last_layer_name]
        heads.check_head(last_layer_name, layer)
        if not is_head(layer):
            msg = f"The last layer must be a {heads.kinds()}; {last_layer_name!r} is a {type(layer).__name__}. "
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
        known = self.last_layer
        if known is not None:
            passed = self._run(x, model_kwargs, {self.last_layer_name: known})
            if not passed.seen:
                self._explain_unseen()
            return self._accepted(self._read(passed, self.last_layer_name, known, x))
        layers = candidates(self.model)
        passed = self._run(x, model_kwargs, layers)
        if not passed.seen:
            self._explain_unseen()
        (name,) = passed.seen
        try:
            found = self._read(passed, name, layers[name], x)
        except (ShapeError, UnsupportedError):
            others = self._producer(x, model_kwargs, {key: layer for key, layer in layers.items() if key != name})
            if others is None:
                raise
            name, found = others
        return self._accepted(found, name)

    def _producer(
        self, x: Inputs, model_kwargs: dict[str, Any], layers: dict[str | None, nn.Module]
    ) -> tuple[str | None, tuple[Tensor, Tensor]] | None:
        """Of several layers that which produces the outputs, the latest; by another pass that keeps what all made."""
        passed = self._run(x, model_kwargs, layers, keep=True)
        for name in reversed(passed.seen):
            try:
                return name, self._read(passed, name, layers[name], x)
            except (ShapeError, UnsupportedError):
                continue
        return None

    def _run(
        self, x: Inputs, model_kwargs: dict[str, Any], layers: dict[str | None, nn.Module], *, keep: bool = False
    ) -> Pass:
        """One pass of the model, with the input and output of the layer that ran last, or of all."""
        keys = {"dict_key_x": self.dict_key_x, "dict_key_y": self.dict_key_y}
        with watched(layers, keep=keep) as passed, as_written(around(self.model, layers)):
            returned = call(self.model, x, **keys, **model_kwargs)
        passed.f = self.reading.tensor(returned)
        return passed

    @contextmanager
    def watching(self) -> Generator[Pass | None]:
        """Watch the last layer in a pass that the body runs, for ``read``; ``None`` while the layer is not known."""
        layer = self.last_layer if self._verified else None
        if layer is None:
            yield None
            return
        with watched({self.last_layer_name: layer}) as passed:
            yield passed

    def read(self, passed: Pass, x: Inputs) -> tuple[Tensor, Tensor]:
        """Outputs and features of a pass that was watched.

        Parameters
        ----------
        passed
            By ``watching``, with the outputs of the model.
        x
            Its inputs.

        Returns
        -------
        As ``forward_with_features``.
        """
        if not passed.seen:
            self._explain_unseen()
        return self._read(passed, self.last_layer_name, self.last_layer, x)

    def _accepted(self, found: tuple[Tensor, Tensor], name: str | None = None) -> tuple[Tensor, Tensor]:
        """Outputs and features of a layer that is the last from now on."""
        if not self._verified:
            if name is not None and self.last_layer_name is None:
                self.last_layer_name = name
                self._check_head(self.last_layer)
            self._verified = True
        return found

    # -- what the outputs are -----------------------------------------------------------------------------------------

    def _read(self, passed: Pass, name: str | None, layer: nn.Module, x: Inputs) -> tuple[Tensor, Tensor]:
        """Outputs and features of a pass, if the outputs are those of a layer; else raises."""
        if not torch.compiler.is_compiling():  # what is traced was read before, and kinds of layers cannot be asked
            heads.check_head(name, layer)
        if passed.calls[name] > 1:
            msg = (
                f"The last linear layer {name!r} runs {passed.calls[name]} times in one forward pass, so its features "
                "are not one tensor. Call it once on stacked inputs. " + self._candidates()
            )
            raise UnsupportedError(msg)
        head, (entered, made) = head_of(layer), passed.seen[name]
        if not self.enable_backprop:
            entered = entered.detach()
        phi = head.features(layer, entered)
        if head.channels == 1:
            made = (made if made.dim() == phi.dim() else made.unsqueeze(0)).movedim(1, -1)
        f = passed.f
        if one_row(x):
            f, phi = unsqueezed(f, phi, layer)
        f = self._channels_last(f, made, head)
        f, phi = self._align(f, phi, made, layer, name)
        if not torch.compiler.is_compiling():  # values cannot be looked at
            self._verify(f, phi, made, layer, name)
        return f, phi

    def _channels_last(self, f: Tensor, made: Tensor, head: Head) -> Tensor:
        """Outputs with the C outputs last: which axis these are on is seen by comparing them with those of the head."""
        if f.dim() > 2 and self.reading.axis(f.dim()) is None and f.numel() == made.numel():
            last = f.dim() - 1
            for axis in (1, last) if head.channels == 1 else (last, 1):
                moved = f.movedim(axis, -1)
                if moved.shape[-1] == made.shape[-1] and close(moved, made.reshape(moved.shape), f.dtype):
                    self.reading.see(f.dim(), axis)
                    break
        return self.reading.last(f)

    def _align(self, f: Tensor, phi: Tensor, made: Tensor, layer: nn.Module, name: str | None) -> tuple[Tensor, Tensor]:
        """Give outputs and features the same leading axes."""
        n_outputs, width = head_of(layer).shape(layer)
        if f.shape == (*phi.shape[:-1], n_outputs):
            if self.feature_reduction is not None and not self._verified:
                check_useful(self.feature_reduction, phi)
            return f, phi
        pooled = phi.dim() >= 3 and f.shape == (phi.shape[0], n_outputs)
        if self.feature_reduction is not None and pooled:
            position = picked(f, made, self.feature_reduction, first=not self._verified)
            return f, reduce(phi, self.feature_reduction, position)
        rows = phi.numel() // width
        if f.numel() == rows * n_outputs:
            # Squeezed, or the scores [batch, 2] of pairs that ran through the layer as [2 · batch] rows.
            if n_outputs == 1 and (f.dim() < phi.dim() or f.shape[-1] != 1):
                f = f.reshape(*(f.shape or (1,)), 1)
            if f.shape[-1] == n_outputs:
                return f, phi.reshape(*f.shape[:-1], width)
        msg = (
            f"The last linear layer {name!r} maps features {list(phi.shape)} to {n_outputs} outputs, but the "
            f"model returns {list(f.shape)}. {self._said_axis(f.dim())}"
        )
        if pooled:
            fits = [
                repr(r.value)
                for r in FeatureReduction
                if matches(f, reduce(phi, r, picked(f, made, r, first=not self._verified)), layer)
            ]
            found = f"; {' and '.join(fits)} reproduces its outputs on this batch" if fits else ""
            msg += f"It reduces positions: pass feature_reduction='pick_first', 'pick_last' or 'average'{found}. "
        elif head_of(layer).channels == 1 and f.shape[-1] == n_outputs:
            msg += (
                "If they are interpolated, interpolate what enters a 1×1 convolution instead: the outputs are the same."
            )
        raise ShapeError(msg + self._candidates())

    def _verify(self, f: Tensor, phi: Tensor, made: Tensor, layer: nn.Module, name: str | None) -> None:
        """Check that the outputs are the last layer applied to the features.

        On the first pass the layer is applied again; later its outputs are compared with those of the model, which
        costs no more than reading them: a function after the layer may act on some batches only (clamping, padding).

        Raises
        ------
        UnsupportedError
            If they are not.
        """
        if self._verified:
            if f.numel() != made.numel() and self.feature_reduction:
                made = reduce(
                    made, self.feature_reduction, picked(f, made, self.feature_reduction, first=not self._verified)
                )
            if f.numel() == made.numel():
                require_close(f, made.reshape(f.shape), partial(self._foreign, f.dim(), name))
                return
        elif matches(f, phi, layer):
            return
        raise UnsupportedError(self._foreign(f.dim(), name))

    def _foreign(self, n_axes: int, name: str | None) -> str:
        """That outputs with so many axes are not those of a layer."""
        reduced = "" if self.feature_reduction is None else f" reduced by {self.feature_reduction.value!r}"
        msg = (
            f"The outputs of the model are not those of its last linear layer {name!r}{reduced}. Likely causes, in "
            "order: something follows that layer (a softmax, a scaling: return the logits instead), another layer is "
            "the last one (pass last_layer_name=), the features are reduced in another way (feature_reduction=). "
        )
        return msg + self._said_axis(n_axes) + self._candidates()

    def _said_axis(self, n_axes: int) -> str:
        """What may be wrong about an axis that was given, of outputs with so many."""
        if self.reading.dim is None or n_axes < 3:
            return ""
        return f"Maybe output_dim={self.reading.dim} is another axis than that of the outputs of the layer. "

    # -- which layers there are ---------------------------------------------------------------------------------------

    def _candidates(self) -> str:
        return listed(self.model)

    def _explain_unseen(self) -> None:
        """Raise an error that says why no linear layer was seen."""
        if self.last_layer_name is not None:
            msg = f"The last layer {self.last_layer_name!r} does not run in the forward pass. {self._candidates()}"
        else:
            msg = f"No linear layer runs as a module in the forward pass. {self._candidates()}"
        raise UnsupportedError(msg)

    def _check_head(self, layer: nn.Module) -> None:
        """Raise if the head has no values; warn when its weight is used elsewhere, too."""
        weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
        if not isinstance(weight, Tensor):
            return
        check_weights({f"{self.last_layer_name}.weight": weight})
        owners = sharing(self.model, layer, weight)
        if owners and not self.only_looks:
            msg = (
                f"The weight of the last layer {self.last_layer_name!r} is tied to {', '.join(map(repr, owners))}. "
                "It is treated as the weight of the last layer alone: features do not change with it."
            )
            warn(msg, UserWarning)
