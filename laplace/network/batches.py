"""What a loader yields, as ``(x, y)`` on the model's device; and how ``x`` enters a model.

A batch is ``(x, y)``, ``(x1, …, xk, y)``, or a mapping that holds the target under ``dict_key_y``. ``x`` is any nesting
of tuples, lists and mappings of tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from laplace.errors import InputError, MissingKeyError, UnsupportedError, numbered
from laplace.network.failures import explained, leaves
from laplace.network.signatures import innermost, parameters_of, takes_keyword, takes_several
from laplace.network.targets import Shift, check_targets
from laplace.network.threads import together
from laplace.types import Inputs


class Batch(NamedTuple):
    """One batch: inputs and targets on the model's device."""

    x: Inputs
    y: Tensor


def to_device(value: Any, device: torch.device) -> Any:
    """Copy the tensors of a nested structure to ``device``; what is there already, or has no values, is kept.

    Mappings keep their type (a Hugging Face ``BatchEncoding`` stays one), as do named tuples. The host does not wait
    for copies to an accelerator.
    """
    ahead = device.type != "cpu"

    def move(item: Any) -> Any:
        return item.to(device, non_blocking=ahead) if isinstance(item, Tensor) and not item.is_meta else item

    return _map(value, move)


def copied(value: Any) -> Any:
    """The same nested structure with detached copies of its tensors, safe from later changes of the originals."""
    return _map(value, lambda item: item.detach().clone() if isinstance(item, Tensor) else item)


def in_precision(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """The same nested structure, its tensors of one dtype in another."""
    return _map(value, lambda item: item.to(new) if isinstance(item, Tensor) and item.dtype is old else item)


def plain(x: Inputs) -> Any:
    """Inputs as dictionaries, lists, tensors and plain values, which ``torch.load(weights_only=True)`` reads."""
    if isinstance(x, Tensor):
        return x.detach()
    if isinstance(x, Mapping):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, Sequence) and not isinstance(x, str):
        return [plain(value) for value in x]
    if isinstance(x, (bool, int, float, str, type(None))):
        return x
    msg = (
        f"The inputs that are to be saved hold a {type(x).__name__}, which a state cannot: it holds tensors and plain "
        "values. Pass such inputs through the model instead, or pickle the object."
    )
    raise UnsupportedError(msg)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to everything in a nested structure that is no container."""
    if isinstance(value, Mapping):
        mapped = {key: _map(item, function) for key, item in value.items()}
        if not isinstance(value, MutableMapping):
            return mapped
        same_type = copy.copy(value)
        same_type.update(mapped)
        return same_type
    if isinstance(value, tuple):
        items = [_map(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_map(item, function) for item in value]
    return function(value)


def split(batch: Any, dict_key_y: str, device: torch.device | None = None) -> Batch:
    """Split what a loader yielded, a mapping or a sequence of at least two entries, into inputs and targets.

    On a device, or where they are.

    Raises
    ------
    InputError
        If it is neither; a ``MissingKeyError`` if a mapping has no targets.
    MissingKeyError
        Likewise.
    """
    if isinstance(batch, Mapping):
        if dict_key_y not in batch:
            keys = ", ".join(repr(key) for key in batch)
            msg = (
                f"The loader yields mappings with {f'the keys {keys}' if keys else 'no key'}; the targets are expected "
                f"under {dict_key_y!r}. Pass dict_key_y= with the right key."
            )
            raise MissingKeyError(msg)
        check_targets(batch[dict_key_y], batch)
        x = batch if device is None else to_device(batch, device)
        y = x[dict_key_y]
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        check_targets(batch[-1], batch)
        *inputs, y = batch if device is None else to_device(tuple(batch), device)
        x = inputs[0] if len(inputs) == 1 else tuple(inputs)
    else:
        hint = ""
        if isinstance(batch, Tensor):
            hint = (
                " Inputs and targets belong together: DataLoader(TensorDataset(x, y)); one batch is a list, [(x, y)]."
            )
        msg = (
            "The loader must yield (x, y), (x1, ..., xk, y), or a mapping that holds the targets under "
            f"{dict_key_y!r}; got {type(batch).__name__}.{hint}"
        )
        raise InputError(msg)
    return Batch(x, y)


def is_loader(x: Any) -> bool:
    """Whether something is to be looped over, and not an input: a tensor or a nest of tuples, lists and mappings."""
    return isinstance(x, Iterable) and not isinstance(x, (Tensor, Mapping, tuple, list, str)) and not _is_array(x)


def inputs_of(batch: Any, device: torch.device) -> Inputs:
    """The inputs of a batch that a loader yielded, with or without targets, on a device."""
    if isinstance(batch, (tuple, list)):
        if not batch:
            msg = "The loader yields an empty batch: expected inputs, or (x, y)."
            raise InputError(msg)
        items: Any = batch
        return to_device(items[0] if len(items) <= 2 else tuple(items[:-1]), device)
    return to_device(batch, device)


def _is_array(x: Any) -> bool:
    """Whether it is an array of NumPy or another library."""
    return hasattr(x, "__array__")


def iterate(
    loader: Any,
    *,
    dict_key_y: str,
    device: torch.device,
    dict_key_x: str = "input_ids",
    progress_bar: bool = False,
    description: str = "",
    shift_labels: bool | None = None,
) -> Iterator[Batch]:
    """Yield the batches of a loader: a ``DataLoader``, a list of batches, anything that can be looped over.

    The loader needs neither a length nor a ``dataset``. Batches without rows are left out: there is nothing to learn
    from them. Labels that are the tokens of the inputs are those of the positions after, unless ``shift_labels`` says
    otherwise.

    Raises
    ------
    InputError
        If it is no iterable or yields something else than batches, or it is open whether labels are to be shifted.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, Tensor) or hasattr(loader, "__array__"):
        msg = (
            f"Expected a DataLoader or another iterable of (x, y) batches; got {type(loader).__name__}. Data as "
            "tensors are one batch, [(x, y)], or DataLoader(TensorDataset(x, y), batch_size=...)."
        )
        raise InputError(msg)
    # The bar is given an iterator: of a loader it would ask for two, each with worker processes and random numbers.
    bar = tqdm(iter(loader), desc=description, total=number_of(loader), disable=not progress_bar)
    shift = Shift(shift_labels)
    for index, batch in enumerate(bar):
        with numbered(index):
            # Where the loader leaves them, labels are compared with inputs: mostly in the memory of the host.
            given = split(batch, dict_key_y)
            x = given.x
            x = {key: value for key, value in x.items() if key != dict_key_y} if isinstance(x, Mapping) else x
            y = shift(x, given.y, dict_key_x)
            found = split(batch, dict_key_y, device)
            found = found if y is given.y else found._replace(y=to_device(y, device))
        if len(found.y) or count_rows(found.x):
            yield found


class Passes:
    """The batches of a loader, for as many passes as it allows; ``read`` makes one, and all must be equally long."""

    def __init__(self, loader: Any, read: Callable[[], Iterator[Batch]]) -> None:
        self.one_shot = isinstance(loader, Iterator)
        self._read = read
        self._n_rows: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Make one pass."""
        n_rows = 0
        for batch in self._read():
            n_rows += len(batch.y)
            yield batch
        if self._n_rows is None:
            self._n_rows = n_rows
        elif n_rows != self._n_rows:
            msg = (
                f"The loader yielded {self._n_rows} rows in its first pass and {n_rows} in a later one, and this "
                "structure needs the same data in each. Pass a DataLoader or a list of batches that can be read again."
            )
            raise InputError(msg)


def number_of(loader: Iterable[Any]) -> int | None:
    """Number of batches, where it is known: a loader of a stream has ``__len__``, which raises."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def arguments(
    model: nn.Module, x: Inputs, *, dict_key_x: str, dict_key_y: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How inputs of any nesting enter a model: positional and keyword arguments, read off its signature.

    A mapping is unpacked into keyword arguments when ``forward`` has a parameter named ``dict_key_x`` (the targets
    under ``dict_key_y`` are then left out); a tuple or list into positional ones when ``forward`` takes several inputs.
    Everything else is passed as one argument. Where ``dict_key_x`` was left at its default and a mapping has no such
    entry, ``main_input`` finds it.

    Raises
    ------
    MissingKeyError
        If a mapping has no entry ``dict_key_x``.
    """
    if isinstance(x, Mapping):
        dict_key_x = main_input(model, x, dict_key_x, dict_key_y)
        if dict_key_x not in x:
            keys = ", ".join(repr(key) for key in x)
            msg = (
                f"The inputs are a mapping with the keys {keys}; the main input is expected under {dict_key_x!r}. "
                "Pass dict_key_x= with the right key."
            )
            raise MissingKeyError(msg)
        if takes_keyword(model, dict_key_x):
            return (), {key: value for key, value in x.items() if key != dict_key_y}
    elif isinstance(x, (tuple, list)) and takes_several(model):
        return tuple(x), {}
    return (x,), {}


def main_input(model: nn.Module, x: Mapping[str, Any], dict_key_x: str, dict_key_y: str) -> str:
    """The entry of a mapping that is the main input: what was said; of the default that is not there, what is found.

    That is the ``main_input_name`` of the model, which those of Hugging Face have, the first parameter of ``forward``
    that is an entry, or the only entry beside the targets.
    """
    if dict_key_x != "input_ids" or dict_key_x in x:
        return dict_key_x
    said = getattr(innermost(model), "main_input_name", None)
    if isinstance(said, str):
        return said
    inputs, names = [key for key in x if key != dict_key_y], [parameter.name for parameter in parameters_of(model)]
    if dict_key_x in names:
        return dict_key_x  # the model wants it
    named = [name for name in names if name in inputs]
    return next(iter([*named, *(inputs if len(inputs) == 1 else [])]), dict_key_x)


def call(model: nn.Module, x: Inputs, *, dict_key_x: str, dict_key_y: str, **model_kwargs: Any) -> Any:
    """Call ``model`` on inputs of any nesting, see ``arguments``."""
    args, kwargs = arguments(model, x, dict_key_x=dict_key_x, dict_key_y=dict_key_y)
    kwargs = {**kwargs, **model_kwargs}
    with explained(model, x, args, kwargs), together(model):
        return model(*args, **kwargs)


def rows_of(x: Inputs, rows: slice | Tensor, n_rows: int) -> Inputs:
    """Some rows (a slice, or indices) of nested inputs, as a batch; tensors not as long as the batch are kept whole."""

    def take(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.shape[:1] == (n_rows,) else value

    return _map(x, take)


def signature(x: Inputs, n_rows: int) -> tuple[Any, ...]:
    """What inputs must share to be joined: the kind of every entry, and its shape but for the rows."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape[:1] == (n_rows,):
            return value.dtype, tuple(value.shape[1:])
        return id(value) if isinstance(value, Tensor) else repr(value)  # shared by all rows: equal only to itself

    return tuple(map(kind, leaves(x)))


def join_rows(parts: Sequence[Inputs], sizes: Sequence[int]) -> Inputs:
    """One batch of the rows of several with the same ``signature``; ``sizes`` are their numbers of rows."""
    entries = iter(zip(*map(leaves, parts), strict=True))

    def join(value: Any) -> Any:
        together = next(entries)
        return torch.cat(together) if isinstance(value, Tensor) and value.shape[:1] == (sizes[0],) else value

    return _map(parts[0], join)


def items_of(x: Inputs) -> Inputs:
    """The items of pairs as rows: ``[pairs, 2, *features]`` becomes ``[2 · pairs, *features]``; others are kept."""

    def flatten(value: Any) -> Any:
        pairs = isinstance(value, Tensor) and value.dim() > 2 and value.shape[1] == 2  # [batch, 2] are two features
        return value.flatten(0, 1) if pairs else value

    return _map(x, flatten)


def count_rows(x: Inputs) -> int:
    """Number of rows of the first tensor among nested inputs; 1 where there is none."""
    return next(_sizes(x), 1)


def one_row(x: Inputs) -> bool:
    """Whether inputs are a single row for sure: there are tensors, and each is."""
    sizes = list(_sizes(x))
    return bool(sizes) and all(n == 1 for n in sizes)  # a set would fix the sizes of a compiled graph


def _sizes(x: Inputs) -> Iterator[int]:
    """Lengths of the tensors among nested inputs."""
    return (len(value) for value in leaves(x) if isinstance(value, Tensor) and value.dim())


def require_rows(x: Inputs) -> None:
    """Raise if the inputs of a prediction are an empty batch."""
    if not count_rows(x):
        msg = "The inputs are an empty batch: there is nothing to predict. Leave such batches out."
        raise InputError(msg)


def differentiable(x: Inputs) -> Inputs:
    """Inputs that may be saved for a backward pass: tensors made under ``torch.inference_mode`` are copied."""
    return _map(x, lambda value: value.clone() if isinstance(value, Tensor) and value.is_inference() else value)
