"""Knowledge that the passes of one model share, about the functions that it calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from laplace.curvature.layouts import Layout

ATTEMPTS = 4
"""Number of passes in which a weight is checked whose gradient is zero, so that it proves nothing."""
READ_AGAIN = {4**k for k in range(1, 16)}
"""Numbers of passes of equal shapes after which layouts are read again."""
KEPT = 64
"""Number of sequences of calls, with their shapes, that are remembered."""
Known = TypeVar("Known")


@dataclass
class Verdict:
    """Parameter groups of a model by how they must be differentiated, as far as earlier passes have shown."""

    slow: dict[int, str] = field(default_factory=dict)
    """Groups that no formula describes, with the reason."""
    unseen: set[int] = field(default_factory=set)
    """Groups among these that no watched function uses."""
    unused: set[int] = field(default_factory=set)
    """Groups on which the outputs do not depend."""
    settled: set[int] = field(default_factory=set)
    """Groups that later passes need not check: their gradient was large enough to judge by."""
    largest: float = 0.0
    """Norm of the largest gradient of any group so far."""


Found: TypeAlias = "list[list[tuple[Layout | None, Tensor | None] | None]]"
"""For each role of each call its layout and a mask of the rows that count; the layout is ``None`` where rows mix data,
the pair where outputs do not depend on the call."""


@dataclass
class Memory:
    """What the passes of one model share, looked up by the calls that they make."""

    verdicts: dict[Any, tuple[Verdict, int]] = field(default_factory=dict)
    """By the sequence of calls: the groups, and how many further passes are checked."""
    layouts: dict[Any, tuple[Found, int]] = field(default_factory=dict)
    """By the sequence of calls and their shapes: the layouts, and the number of their uses."""
    warned: set[int] = field(default_factory=set)
    """Groups that a warning has named, since they are differentiated one datum at a time."""


def remember(known: dict[Any, Known], key: Any, value: Known) -> None:
    """Store a value as the most recent, and forget those that have not been used for longest."""
    known.pop(key, None)
    known[key] = value
    for oldest in list(known)[:-KEPT]:
        known.pop(oldest, None)
