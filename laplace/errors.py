"""The exceptions and warnings of the library.

Each derives from the built-in type that plain code would have raised, so that existing ``except`` clauses keep working.
Messages say what was expected, what came, and what to do.
"""

from __future__ import annotations

import torch


class NotFittedError(AttributeError):
    """Something was asked for that only ``fit`` provides."""


class InputError(ValueError):
    """An argument or a batch holds values that cannot be used."""


class ShapeError(InputError):
    """A tensor has another shape than the formula needs."""


class StateError(InputError):
    """A saved state cannot be loaded here: it is no state, or was saved for another object."""


class UnsupportedError(ValueError):
    """An option, or a combination of options, that does not exist here; the message lists those that do."""


class BackendUnavailableError(ImportError):
    """An optional package is needed; the message names the extra to install."""


class NotPositiveDefiniteError(torch.linalg.LinAlgError):  # pyright: ignore[reportUntypedBaseClass]
    """A precision matrix could not be factorized."""


class NumericalWarning(UserWarning):
    """A number was computed, but with less precision or with a stated correction."""


class PerformanceWarning(UserWarning):
    """A result is exact, but took a way that is much slower than another; the message names both."""
