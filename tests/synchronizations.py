"""Counts what would make a host wait for a device, while everything runs on the CPU."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_linalg_check_errors",
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "histc",
    "masked_select",
    "multinomial",
    "nonzero",
    "nonzero_static",
    "unique_consecutive",
    "unique_dim",
}
"""Operations whose results, or their sizes, the host reads."""
MOVES = {Tensor.cpu: "cpu", Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.__array__: "numpy"}
"""Methods that copy to the host."""
MAKES = {torch.tensor: "tensor", torch.as_tensor: "as_tensor", Tensor.new_tensor: "new_tensor"}
"""Functions that copy numbers to a device: the copy of a small piece of pageable memory is waited for."""


def is_mask(value: Any) -> bool:
    """Whether an index selects by truth."""
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def read_by(name: str, func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation waits for the device."""
    if name in READS:
        return True
    if name == "repeat_interleave" and isinstance(args[-1], Tensor):
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [index for index in args[1] if is_mask(index)]
        filled = name != "index" and args[2].numel() == 1 and len(masks) == 1  # a masked fill
        return bool(masks) and not filled
    return False


def where() -> str:
    """The line of the library that asked."""
    frames = [frame for frame in traceback.extract_stack() if "/laplace/" in frame.filename]
    return " < ".join(f"{frame.filename.rsplit('/laplace/')[-1]}:{frame.lineno}" for frame in frames[:-4:-1])


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if read_by(name, func, args, kwargs):
            self.found[f"{name} at {where()}"] += 1
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = MOVES.get(func)
        if func in MAKES:
            of_numbers = not isinstance(args[1 if func is Tensor.new_tensor else 0], Tensor)
            if of_numbers and (kwargs.get("device") is not None or func is Tensor.new_tensor):
                name = MAKES[func]
        if func is Tensor.__getitem__ and any(isinstance(each, (list, range)) for each in _indices(args[1])):
            name = "list as index"
        if name is not None:
            self.found[f"{name} at {where()}"] += 1
        return func(*args, **kwargs)


def _indices(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


class Synchronizations(AbstractContextManager["Synchronizations"]):
    """Counts, by line of the library, how often the host would wait for a device in the body."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> Synchronizations:
        self._stack.enter_context(_Functions(self.found))
        self._stack.enter_context(_Operations(self.found))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def count(self) -> int:
        """How often."""
        return self.found.total()

    def __str__(self) -> str:
        return "\n".join(f"{times}× {line}" for line, times in self.found.most_common())
