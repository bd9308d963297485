"""How outputs are read (``output_key=``, ``output_fn=``, ``output_dim=``), and put back into the model's layout.

Inside, outputs are ``[batch, *positions, C]``. A model may return more than its outputs, and have the C outputs on
another axis, as segmentation networks do: what comes in goes through ``Reading.tensor`` and ``last``, predictions leave
through ``returned``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from torch import Tensor

from laplace.checks import flag, shown
from laplace.errors import InputError, MissingKeyError, ShapeError, UnsupportedError

KEYS = (str, int)
"""What says where outputs are in a mapping, a sequence or an object."""


@dataclass(frozen=True)
class Reading:
    """Which part of what a model returns are its outputs, and which axis holds the C outputs."""

    key: str | int | None = None
    """Of an entry of a mapping or a sequence, or the name of an attribute."""
    function: Callable[[Any], Any] | None = None
    """From what the model returns to its outputs."""
    dim: int | None = None
    """The axis of the C outputs; ``None``: it is found, and the last one where nothing says otherwise."""
    shift: bool | None = None
    """Whether labels are those of the positions after; ``None``: found by the labels themselves."""
    seen: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    """That axis by the number of axes of the outputs, once a pass has shown it."""

    @classmethod
    def of(cls, key: Any, function: Any, dim: Any, shift: Any = None) -> Reading:
        """What a user says, checked.

        Raises
        ------
        UnsupportedError
            If a key is no name or number, a function cannot be called, or both are given.
        InputError
            If the axis is no whole number, or that of the batch, or ``shift_labels`` is no flag.
        """
        if key is not None and function is not None:
            msg = "output_key= and output_fn= both say what the outputs are: give one of them."
            raise UnsupportedError(msg)
        if isinstance(key, bool) or not isinstance(key, (*KEYS, type(None))):
            msg = f"output_key must be the key, index or attribute that holds the outputs; got {key!r}."
            raise UnsupportedError(msg)
        if function is not None and not callable(function):
            msg = f"output_fn must be a function from what the model returns to its outputs; got {function!r}."
            raise UnsupportedError(msg)
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, Integral) or dim == 0):
            msg = (
                "output_dim must be the axis of the outputs that holds classes, or outputs of a regression: 1 where "
                f"channels come after the batch, -1 where they are last, never 0, the batch; got {shown(dim)}."
            )
            raise InputError(msg)
        shift = None if shift is None else flag("shift_labels", shift)
        return cls(key, function, None if dim is None else int(dim), shift)

    # -- what comes in ------------------------------------------------------------------------------------------------

    def tensor(self, returned: Any) -> Tensor:
        """The real-valued tensor in what a model returned, in the model's layout.

        Raises
        ------
        MissingKeyError
            If there is no such entry; the message lists those that there are.
        UnsupportedError
            If it is no tensor of real numbers.
        """
        found, said = returned, "The model"
        if self.function is not None:
            found, said = self.function(returned), "output_fn"
        elif self.key is not None:
            found, said = entry(returned, self.key), f"Under output_key={self.key!r} the model"
        elif isinstance(returned, Mapping):
            if "logits" not in returned:
                msg = (
                    f"The model returns a mapping without 'logits' ({names_in(returned)}); say which of them are the "
                    "outputs: output_key=."
                )
                raise UnsupportedError(msg)
            found = returned["logits"]
        return real(found, said)

    def axis(self, n_axes: int) -> int | None:
        """The axis of the C outputs among so many, as it was given or seen; ``None`` where it is not known.

        Raises
        ------
        ShapeError
            If there is no axis that was given.
        """
        if self.dim is None or n_axes < 2:
            return self.seen.get(n_axes)
        axis = self.dim + n_axes if self.dim < 0 else self.dim
        if not 1 <= axis < n_axes:
            msg = f"output_dim={self.dim}, and the outputs of the model have {n_axes} axes, the first for the batch."
            raise ShapeError(msg)
        return axis

    @property
    def found(self) -> int | None:
        """The axis of the C outputs, as given, or as seen where all passes agree."""
        axes = set(self.seen.values())
        return axes.pop() if self.dim is None and len(axes) == 1 else self.dim

    def see(self, n_axes: int, axis: int | None) -> None:
        """Take note of the axis that a pass has shown; one that was given holds."""
        axis = axis if self.dim is None else self.axis(n_axes)
        if axis is not None and n_axes > 2:
            self.seen[n_axes] = axis

    def last(self, f: Tensor) -> Tensor:
        """Outputs with the C outputs on the last axis, ``[batch, *positions, C]``."""
        axis = self.axis(f.dim())
        if axis is None:
            return f
        self.see(f.dim(), axis)
        return f if axis == f.dim() - 1 else f.movedim(axis, -1)

    def targets(self, y: Tensor) -> Tensor:
        """Targets with an entry for each output, in the same order of axes; class indices have no such axis."""
        axis = self.seen.get(y.dim())
        return y if axis is None or axis == y.dim() - 1 else y.movedim(axis, -1)

    # -- what leaves --------------------------------------------------------------------------------------------------

    def returned(self, predicted: Any, n_leading: int = 0) -> Any:
        """Predictions in the layout of the model: ``[*leading, batch, *positions, C]``, alone or with (co)variances.

        The axis of C moves to where the model has it; of covariances both, one after the other: ``[batch, C, C, H, W]``
        beside a mean ``[batch, C, H, W]``. Joint covariances are matrices and stay as they are, C innermost.
        """
        if not isinstance(predicted, tuple):
            return self._back(predicted, n_leading, 1)
        mean, spread = predicted
        return self._back(mean, n_leading, 1), self._back(spread, n_leading, 1 + spread.dim() - mean.dim())

    def _back(self, values: Tensor, n_leading: int, n_last: int) -> Tensor:
        n_axes = values.dim() - n_leading - n_last + 1
        axis = self.seen.get(n_axes)
        if axis is None or axis == n_axes - 1:
            return values
        start = n_leading + axis
        return values.movedim(tuple(range(-n_last, 0)), tuple(range(start, start + n_last)))


def entry(returned: Any, key: str | int) -> Any:
    """An entry of a mapping or a sequence, or an attribute."""
    if isinstance(returned, Mapping) and key in returned:
        return returned[key]
    if isinstance(key, int) and isinstance(returned, (tuple, list)) and -len(returned) <= key < len(returned):
        return returned[key]
    if isinstance(key, str) and not isinstance(returned, (Tensor, Mapping)) and hasattr(returned, key):
        return getattr(returned, key)
    msg = f"The model returns nothing under output_key={key!r}: it returns {names_in(returned)}."
    raise MissingKeyError(msg)


def names_in(returned: Any) -> str:
    """What a model returned, and the keys that there are."""
    if isinstance(returned, Mapping):
        keys = ", ".join(repr(key) for key in returned)
        return f"a mapping with {f'the keys {keys}' if keys else 'no key'}"
    if isinstance(returned, Tensor):
        return "a tensor, which is taken as it is"
    if isinstance(returned, (tuple, list)):
        named = getattr(returned, "_fields", ())
        names = f", named {', '.join(map(repr, named))}" if named else ""
        return f"a {type(returned).__name__} of {len(returned)} (output_key=0 is the first{names})"
    held = sorted(name for name, value in getattr(returned, "__dict__", {}).items() if isinstance(value, Tensor))
    said = f"tensors {', '.join(map(repr, held))}" if held else "no tensor"
    return f"an object of type {type(returned).__name__} with {said}"


def real(outputs: Any, said: str = "The model") -> Tensor:
    """Outputs, if they are a tensor of real numbers with values; else raises."""
    if isinstance(outputs, Tensor) and outputs.is_meta:
        msg = (
            "The outputs of the model are on the meta device, as inputs or weights are: they have no values. Load them."
        )
        raise UnsupportedError(msg)
    if not isinstance(outputs, Tensor):
        msg = (
            f"{said} must return a tensor, or a mapping with the tensor 'logits'; it returns {names_in(outputs)}. Say "
            "where the outputs are: output_key=, or output_fn=, a function of what the model returns."
        )
        raise UnsupportedError(msg)
    if not outputs.is_floating_point():
        msg = f"{said} must return real numbers [batch, ..., outputs]; it returns a tensor of {outputs.dtype}."
        raise UnsupportedError(msg)
    return outputs


AS_RETURNED = Reading()
"""The outputs as they come, or ``logits`` of a mapping."""

__all__ = ["AS_RETURNED", "Reading", "entry", "names_in", "real"]
