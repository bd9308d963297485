"""What the passes of one model share: what was found out about the functions that it calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from laplace.curvature.layouts import Layout

ATTEMPTS = 4
"""In how many passes a weight is looked at whose gradient is zero, so that it proves nothing."""
READ_AGAIN = {4**k for k in range(1, 16)}
"""After how many passes of equal shapes layouts are read again."""
KEPT = 64
"""How many sequences of calls, with their shapes, are remembered."""
Known = TypeVar("Known")


@dataclass
class Verdict:
    """What is known of the random weights of a model from earlier passes.

    Attributes
    ----------
    slow
        Groups that no formula describes, and why.
    unseen
        Those of them that no watched function uses.
    unused
        Groups on which the outputs do not depend.
    """

    slow: dict[int, str] = field(default_factory=dict)
    unseen: set[int] = field(default_factory=set)
    unused: set[int] = field(default_factory=set)


Found: TypeAlias = "list[list[tuple[Layout | None, Tensor | None] | None]]"
"""For each role of each call its layout and which rows count; the layout is ``None`` where rows mix data, the pair
where outputs do not depend on the call."""


@dataclass
class Memory:
    """What passes of one model share: it is looked up by the calls that they make.

    Attributes
    ----------
    verdicts
        By the sequence of calls: what was found, and how many passes may still be asked.
    layouts
        By the sequence of calls and their shapes: the layouts, and how often they were used.
    warned
        Groups that a warning named already, since they are differentiated one datum at a time.
    """

    verdicts: dict[Any, tuple[Verdict, int]] = field(default_factory=dict)
    layouts: dict[Any, tuple[Found, int]] = field(default_factory=dict)
    warned: set[int] = field(default_factory=set)


def remember(known: dict[Any, Known], key: Any, value: Known) -> None:
    """Keep a value as the one that was used last, and forget the one that was not used for longest."""
    known.pop(key, None)
    known[key] = value
    for oldest in list(known)[:-KEPT]:
        known.pop(oldest, None)
