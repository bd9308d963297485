"""The exceptions and warnings of the library.

Each derives from the built-in type that plain code would have raised, so that existing ``except`` clauses keep working.
Messages say what was expected, what came, and what to do.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch


class NotFittedError(AttributeError):
    """Something was asked for that only ``fit`` provides."""


class InputError(ValueError):
    """An argument or a batch holds values that cannot be used."""


class ShapeError(InputError):
    """A tensor has another shape than the formula needs."""


class MissingKeyError(InputError, KeyError):
    """A mapping that a loader yields has no entry of the name that was expected."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class ModelError(InputError, RuntimeError, TypeError):
    """The model raised an exception on its inputs, which is the cause of this one."""


class StateError(InputError):
    """A saved state cannot be loaded here: it is no state, is damaged, or was saved for another object."""


class StateNotFoundError(StateError, FileNotFoundError):
    """There is no such file, or no folder to save a state in."""


class ProcessError(RuntimeError):
    """Another process of the group failed, so that what they do together is not done here either."""


class UnsupportedError(ValueError):
    """An option, or a combination of options, that does not exist here; the message lists those that do."""


class OutOfMemoryError(UnsupportedError, MemoryError, torch.OutOfMemoryError):
    """Something does not fit the memory that is free; the message says how much it takes and what takes less."""


class MissingModuleError(UnsupportedError, KeyError):
    """The model has no module of the name that was given; the message lists those that it has."""

    __str__ = Exception.__str__  # a KeyError shows its message in quotes


class UnknownAttributeError(UnsupportedError, AttributeError):
    """A name was assigned that an object does not have; the message says the nearest."""


class UnknownOptionError(UnsupportedError, TypeError):
    """A keyword that is no option here, often a misspelt one; the message names the nearest."""


class BackendUnavailableError(ImportError):
    """An optional package is needed; the message names the extra to install."""


class NotPositiveDefiniteError(torch.linalg.LinAlgError):  # pyright: ignore[reportUntypedBaseClass]
    """A precision matrix could not be factorized."""


class NumericalWarning(UserWarning):
    """A number was computed, but with less precision or with a stated correction."""


class UntunedWarning(UserWarning):
    """Predictions were made with hyperparameters that nobody has chosen, and are far from those of the network."""


class PerformanceWarning(UserWarning):
    """A result is exact, but took a way that is much slower than another; the message names both."""


BETWEEN = {"beartype", "contextlib", "functools", "jaxtyping", "laplace", "torch", "tqdm"}
"""Packages whose frames may lie between a warning of the library and the user's line that led to it."""
_FILTERS = threading.RLock()


def refuse_before_fit(what: str) -> NoReturn:
    """Raise: something needs a fit."""
    msg = f"{what} needs a fitted approximation: call fit(train_loader) first."
    raise NotFittedError(msg)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and point at the user's line that called the library."""
    level, outer = 1, inspect.currentframe()
    while outer is not None and str(outer.f_globals.get("__name__")).partition(".")[0] in BETWEEN:
        level, outer = level + 1, outer.f_back
    warnings.warn(message, category, stacklevel=1 if outer is None else level)


@contextmanager
def quiet(message: str) -> Generator[None]:
    """Ignore warnings of other libraries that begin with ``message``; one thread at a time, as filters are global."""
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield


_BATCH: ContextVar[tuple[int, int | None] | None] = ContextVar("_BATCH", default=None)


@contextmanager
def numbered(index: int, x: Any = None) -> Generator[None]:
    """Put the number of a batch, and what was taken for its targets, into the message of an ``InputError``."""
    batch = index, len(x) if type(x) is tuple else None
    token = _BATCH.set(batch)
    try:
        yield
    except InputError as error:
        raise of_batch(error, *batch) from error
    finally:
        _BATCH.reset(token)


def current_batch() -> tuple[int, int | None] | None:
    """The number of the batch that ``numbered`` is about, and of its inputs where there are several."""
    return _BATCH.get()


def of_batch(error: InputError, index: int, n_inputs: int | None = None) -> InputError:
    """The same error with the number of a batch in its message."""
    msg = f"Batch {index} of the loader (counting from 0): {error}"
    if n_inputs is not None:
        msg += (
            f" (The batch has {n_inputs + 1} items: the first {n_inputs} were taken for inputs of the model, the last "
            "one for the targets. If they are (x, y, index) or in another order, let the loader yield (x, y): "
            "[(x, y) for x, y, _ in loader].)"
        )
    return type(error)(msg)
