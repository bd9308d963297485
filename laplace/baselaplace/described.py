"""``described``: the text of an option stands in one docstring, and every class that takes the option shows it.

A class writes down the options that are new with it or mean something else; its section ``Parameters`` is completed by
the texts of its bases, in the order of its signature. So ``help(KronLaplace)`` describes all that it takes. Pages of
the documentation are made of source files: ``docs/extensions/described.py`` gives them what ``help`` shows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Described = TypeVar("Described", bound=Callable[..., Any])

HEADING = r"^\w[\w ]*\n-{3,}\n"
SECTION = re.compile(rf"^Parameters\n-+\n(?P<body>.*?)(?={HEADING}|\Z)", re.MULTILINE | re.DOTALL)
FIRST_SECTION = re.compile(rf"{HEADING}|\Z", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One entry of a section ``Parameters``."""

    names: tuple[str, ...]
    text: str
    """The indented lines below the names."""


OF_ITS_OWN: WeakKeyDictionary[Any, dict[str, Entry]] = WeakKeyDictionary()
"""What completed docstrings say beside what comes from base classes."""


def described_by(*sources: Any) -> Callable[[Described], Described]:
    """Complete a docstring by the options that others describe: first the given functions or classes, then bases."""

    def complete(what: Described) -> Described:
        if what.__doc__ is not None:  # python -OO leaves none
            written = inspect.cleandoc(what.__doc__)
            OF_ITS_OWN[what] = known = first_of([entries(written), *map(of_its_own, sources)])
            known = first_of([known, *map(of_its_own, getattr(what, "__mro__", ())[1:])])
            what.__doc__ = with_section(written, "\n".join(in_order(known, inspect.signature(what))))
        return what

    return complete


described = described_by()


def of_its_own(what: Any) -> dict[str, Entry]:
    """What a function or class describes beside what comes from base classes."""
    return OF_ITS_OWN[what] if what in OF_ITS_OWN else entries(what.__doc__ or "")


def first_of(texts: Iterable[dict[str, Entry]]) -> dict[str, Entry]:
    """The first entry of each name."""
    found: dict[str, Entry] = {}
    for some in texts:
        found = {**some, **found}
    return found


def entries(docstring: str) -> dict[str, Entry]:
    """What a docstring says of its parameters, by name."""
    section = SECTION.search(inspect.cleandoc(docstring))
    blocks = re.split(r"\n(?=\S)", section["body"].rstrip()) if section else []
    found = (Entry(tuple(head.split(", ")), text) for head, _, text in (block.partition("\n") for block in blocks))
    return {name: entry for entry in found for name in entry.names}


def in_order(known: dict[str, Entry], signature: inspect.Signature) -> Iterator[str]:
    """Entries of the parameters of a signature; those that share a text once, where the first of them stands."""
    shown: set[str] = set()
    for name in signature.parameters:
        if name in known and name not in shown:
            entry = known[name]
            together = [other for other in entry.names if other in signature.parameters and known[other] is entry]
            shown.update(together)
            yield f"{', '.join(together)}\n{entry.text}"


def with_section(docstring: str, body: str) -> str:
    """A docstring whose section ``Parameters`` is this one; it stands before all others."""
    rest = SECTION.sub("", docstring, count=1)
    section = FIRST_SECTION.search(rest)
    assert section is not None, "the end is found"
    parts = (rest[: section.start()].rstrip(), f"Parameters\n----------\n{body}", rest[section.start() :].strip())
    return "\n\n".join(part for part in parts if part) + "\n"


__all__ = ["described", "described_by"]
