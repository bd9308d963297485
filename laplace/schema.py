"""Checks of the entries of a saved state, for the tables of ``Fit``, structures and estimators.

A check is a function of an entry, its name, and the sizes known so far; it raises ``StateError`` or does nothing.
Nothing is copied, and no number is looked at before the shape of its tensor is known to be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from laplace.errors import StateError

Known: TypeAlias = dict[str, Any]
"""Sizes by name (``"P"`` weights, ``"C"`` outputs), ``"sizes"`` of parameter groups, ``"dtype"`` of the object."""
Check: TypeAlias = Callable[[Any, str, Known], None]
Table: TypeAlias = Mapping[str, Check]

OVERLAP = 2**20
"""How many bytes a tensor may be larger than its memory, as an expanded one is."""
REAL = (torch.float32, torch.float64)
LIMIT = 2**63 - 1


def describe(value: Any) -> str:
    """A few words on what a value is."""
    if isinstance(value, Tensor):
        return f"a tensor of the shape {list(value.shape)} and {value.dtype}"
    if isinstance(value, (bool, int, float, str, type(None))):
        text = repr(value)
        return f"{text[:40]}…" if len(text) > 40 else text
    return f"a {type(value).__name__}"


def refuse(where: str, expected: str, value: Any) -> NoReturn:
    """Raise a ``StateError`` that says what an entry must be and what it is."""
    msg = f"The state is damaged: {where} must be {expected}; it is {describe(value)}."
    raise StateError(msg)


def check_entries(state: Any, table: Table, known: Known, where: str = "") -> None:
    """Raise unless a mapping has just the entries of a table and each in turn passes its check; adds to ``known``."""
    inside = f" in {where}" if where else ""
    if not isinstance(state, Mapping):
        refuse(where, "a mapping", state)
    missing = [name for name in table if name not in state]
    if missing:
        msg = f"The state is incomplete: it has no entry {', '.join(map(repr, missing))}{inside}."
        raise StateError(msg)
    further = [describe(name) for name in state if name not in table]
    if further:
        msg = f"The state has entries{inside} that this release does not know: {', '.join(further)}."
        raise StateError(msg)
    for name, check in table.items():
        check(state[name], f"{where}[{name!r}]" if where else repr(name), known)


def check_tree(value: Any, where: str = "the state") -> None:
    """Raise unless nested containers hold plain values and tensors only, none of them much larger than its memory."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.device.type == "meta" or value.is_quantized or value.is_nested:
            refuse(where, "a dense tensor with values", value)
        claimed = value.numel() * value.element_size()
        if claimed > max(value.untyped_storage().nbytes(), OVERLAP):
            refuse(where, "a tensor of as many numbers as its memory holds", value)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            check_tree(item, f"{where}[{name!r}]" if isinstance(name, str) else where)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_tree(item, f"an entry of {where}")
    elif not isinstance(value, (bool, int, float, str, type(None))):
        refuse(where, "a tensor, a plain value, or a list or mapping of those", value)


# -- plain values -----------------------------------------------------------------------------------------------------


def text(value: Any, where: str, known: Known) -> None:  # noqa: ARG001 - a check
    """A string."""
    if not isinstance(value, str):
        refuse(where, "a text", value)


def flag(value: Any, where: str, known: Known) -> None:  # noqa: ARG001 - a check
    """``True`` or ``False``."""
    if not isinstance(value, bool):
        refuse(where, "True or False", value)


def finite(*, above: float = -math.inf, low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite float that is greater than ``above``, and from ``low`` to ``high``."""

    def check(value: Any, where: str, known: Known) -> None:  # noqa: ARG001 - a check
        if type(value) is not float or not math.isfinite(value) or not (value > above and low <= value <= high):
            refuse(where, "a finite float" + bounds(above, low, high), value)

    return check


def whole(low: int, size: str | None = None) -> Check:
    """A whole number; with a name it is a size, and must equal the one known by that name."""

    def check(value: Any, where: str, known: Known) -> None:
        if type(value) is not int or not low <= value <= LIMIT:
            refuse(where, f"a whole number, at least {low}", value)
        if size is not None and known.setdefault(size, value) != value:
            refuse(where, f"{known[size]}, as elsewhere in the state and the model", value)

    return check


def real(value: Any, where: str, known: Known) -> None:  # noqa: ARG001 - a check
    """A float, finite or not."""
    if type(value) is not float:
        refuse(where, "a float", value)


def optional(inner: Check) -> Check:
    """``None``, or what passes another check."""

    def check(value: Any, where: str, known: Known) -> None:
        if value is not None:
            inner(value, where, known)

    return check


def bounds(above: float, low: float, high: float) -> str:
    """Bounds, in words."""
    said = [f"above {above:g}"] if above > -math.inf else [f"at least {low:g}"] if low > -math.inf else []
    said += [f"at most {high:g}"] if high < math.inf else []
    return ", " + " and ".join(said) if said else ""


# -- tensors ----------------------------------------------------------------------------------------------------------


def _fits(shape: tuple[int | str, ...], value: Tensor, known: Known) -> Known | None:
    """The sizes that a tensor of this shape adds to the known ones; ``None`` if the tensor has another shape."""
    if value.dim() != len(shape):
        return None
    found: Known = {}
    for size, there in zip(shape, value.shape, strict=True):
        expected = size if isinstance(size, int) else known.get(size, found.get(size, there))
        if expected != there:
            return None
        if isinstance(size, str):
            found[size] = there
    return found


def tensor(*shapes: tuple[int | str, ...], above: float = -math.inf, low: float = -math.inf) -> Check:
    """A real finite tensor of one of some shapes, whose sizes are numbers or names, with values within bounds."""

    def check(value: Any, where: str, known: Known) -> None:
        has_shape = shaped(value, where, known, shapes)
        if has_shape.dtype not in REAL:
            refuse(where, "of torch.float32 or torch.float64", value)
        numbers = has_shape.detach()
        if not numbers.numel():
            return
        smallest, largest = (float(bound) for bound in torch.aminmax(numbers))
        limit = torch.finfo(known["dtype"]).max
        if not -limit <= smallest <= largest <= limit:  # false for NaN, too
            refuse(where, f"of numbers that are finite in {known['dtype']}", value)
        if not (smallest > above and smallest >= low):
            refuse(where, f"of numbers{bounds(above, low, math.inf)}", smallest)

    return check


def shaped(value: Any, where: str, known: Known, shapes: Sequence[tuple[int | str, ...]]) -> Tensor:
    """A tensor that has one of some shapes, whose sizes are numbers or names."""
    if isinstance(value, Tensor):
        for shape in shapes:
            found = _fits(shape, value, known)
            if found is not None:
                known.update(found)
                return value
    names = [[known.get(size, size) if isinstance(size, str) else size for size in shape] for shape in shapes]
    said = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in names)
    refuse(where, f"a tensor of the shape {said}", value)


def signed_vector(size: str) -> Check:
    """A finite vector; ``known["negative"]`` says whether a number in it is negative."""
    vector = tensor((size,))

    def check(value: Any, where: str, known: Known) -> None:
        vector(value, where, known)
        known["negative"] = known.get("negative", False) or bool((value < 0).any())

    return check


def factor(value: Any, where: str, known: Known) -> int:
    """The size of a Kronecker factor, which must be a symmetric matrix or a diagonal without negative numbers."""
    if not isinstance(value, Tensor) or value.dim() not in (1, 2):
        refuse(where, "a square matrix or a diagonal", value)
    length = len(value)
    if value.dim() == 1:
        tensor((length,), low=0)(value, where, known)
    else:
        within: Known = {**known, "side": length, "negative": False}
        symmetric("side")(value, where, within)
        if within["negative"]:
            refuse(where, "a matrix without negative numbers on its diagonal", value)
    return length


def symmetric(size: str) -> Check:
    """A finite matrix, symmetric up to rounding; ``known["negative"]`` says whether a diagonal entry is negative."""
    matrix = tensor((size, size))

    def check(value: Any, where: str, known: Known) -> None:
        matrix(value, where, known)
        known["negative"] = known.get("negative", False) or bool((value.diagonal() < 0).any())
        if value.numel() and float((value - value.mT).abs().max()) > 1e-3 * float(value.abs().max()):
            refuse(where, "a symmetric matrix", value)

    return check


def indices(size: str) -> Check:
    """A tensor of whole numbers that are not negative, ``[size]``."""

    def check(value: Any, where: str, known: Known) -> None:
        vector = shaped(value, where, known, [(size,)])
        if vector.dtype is not torch.int64 or (vector.numel() and int(vector.min()) < 0):
            refuse(where, "indices, torch.int64 and not negative", value)

    return check


# -- containers -------------------------------------------------------------------------------------------------------


def groups(inner: Check) -> Check:
    """A list with one entry for each parameter group, whose size is known as ``"p"`` and number as ``"group"``."""

    def check(value: Any, where: str, known: Known) -> None:
        sizes = known["sizes"]
        if not isinstance(value, list) or len(value) != len(sizes):
            refuse(where, f"a list of {len(sizes)} entries, one for each parameter group", value)
        for index, (item, size) in enumerate(zip(value, sizes, strict=True)):
            known["p"], known["group"] = size, index
            inner(item, f"{where}[{index}]", known)

    return check


def listed(inner: Check) -> Check:
    """A list of any length."""

    def check(value: Any, where: str, known: Known) -> None:
        if not isinstance(value, list):
            refuse(where, "a list", value)
        for index, item in enumerate(value):
            inner(item, f"{where}[{index}]", known)

    return check


def nested(table: Table) -> Check:
    """A mapping with the entries of a table."""

    def check(value: Any, where: str, known: Known) -> None:
        check_entries(value, table, known, where)

    return check


def either(*checks: Check) -> Check:
    """What passes one of some checks; the error is that of the last."""

    def check(value: Any, where: str, known: Known) -> None:
        for inner in checks[:-1]:
            try:
                return inner(value, where, known)
            except StateError:
                continue
        return checks[-1](value, where, known)

    return check


def anything(value: Any, where: str, known: Known) -> None:
    """Anything that passes ``check_tree``."""
