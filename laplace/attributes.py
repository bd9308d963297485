"""Which attributes can be assigned to objects of the library; for an unknown name the error says the nearest.

An object has the attributes that its class declares (annotations, values, properties) and those that its constructors
assign. Classes from elsewhere may assign others, except near misses of our options.
"""

from __future__ import annotations

import difflib
import dis
import functools
import inspect
from typing import Any

from laplace.errors import UnknownAttributeError

NEAR = 0.85
"""Share of common letters from which on a new name counts as a misspelt one of ours."""
SHORTEST = 8
"""Number of letters of an option below which a similar name is likely another word."""


def check_attribute(holder: object, name: str, *, takes_others: bool | None = None) -> None:
    """Raise unless an attribute may be assigned; with ``takes_others`` unknown names may, but near misses not."""
    cls = type(holder)
    if takes(cls, name):
        return
    if isinstance(inspect.getattr_static(cls, name, None), property):
        msg = f"{cls.__name__}.{name} is computed and cannot be assigned. {_listed(cls)}"
        raise UnknownAttributeError(msg)
    if name in vars(holder):
        return
    if not (not is_own(cls) if takes_others is None else takes_others):
        settable, hint = settable_names(cls), ""
        public = [other for other in known_names(cls) if other[0] != "_"]
        if near := difflib.get_close_matches(name, settable, n=1):
            hint = f" Did you mean {near[0]!r}?"
        elif near := difflib.get_close_matches(name, public, n=1):
            hint = f" The nearest is {near[0]!r}, which is computed."
        msg = f"{cls.__name__} has no attribute {name!r}: assigning it would have no effect.{hint} {_listed(cls)}"
        raise UnknownAttributeError(msg)
    options = [option for option in settable_names(cls) if len(option) >= SHORTEST]
    near = difflib.get_close_matches(name, options, n=1, cutoff=NEAR)
    # An option with something before or after it is another name, not a misspelt one.
    if near and not name.startswith(near[0]) and not name.endswith(near[0]):
        msg = (
            f"{cls.__name__} has no attribute {name!r}; did you mean {near[0]!r}? An attribute of your own with "
            f"this name is declared in the class, as in `{name}: float`."
        )
        raise UnknownAttributeError(msg)


@functools.lru_cache(maxsize=4096)
def takes(cls: type, name: str) -> bool:
    """Whether a class declares an attribute other than as a value that it only computes."""
    found = inspect.getattr_static(cls, name, None)
    if isinstance(found, property):
        return found.fset is not None
    return found is not None or name in known_names(cls)


def is_own(cls: type) -> bool:
    """Whether a class is one of this library."""
    return cls.__module__.partition(".")[0] == "laplace"


@functools.lru_cache(maxsize=256)
def known_names(cls: type) -> frozenset[str]:
    """Names that a class declares, and that its constructors assign."""
    names: set[str] = set()
    for base in cls.__mro__[:-1]:
        names |= {*vars(base), *inspect.get_annotations(base)}
        constructor = inspect.unwrap(vars(base).get("__init__", object.__init__))
        if inspect.isfunction(constructor):
            stores = (step for step in dis.get_instructions(constructor) if step.opname == "STORE_ATTR")
            names |= {str(step.argval) for step in stores}
    return frozenset(names)


@functools.lru_cache(maxsize=256)
def settable_names(cls: type) -> tuple[str, ...]:
    """Public names of our classes to which a value can be assigned with effect, sorted."""

    def takes_value(name: str) -> bool:
        found: Any = inspect.getattr_static(cls, name, None)
        return (
            found.fset is not None
            if isinstance(found, property)
            else not (callable(found) or isinstance(found, (classmethod, staticmethod)))
        )

    ours = [base for base in cls.__mro__ if is_own(base)]
    tables = {n for base in ours for n, said in inspect.get_annotations(base).items() if "ClassVar" in str(said)}
    own = {name for base in ours for name in known_names(base)} - tables
    return tuple(sorted(name for name in own if name[0] != "_" and takes_value(name)))


def _listed(cls: type) -> str:
    return f"What can be assigned: {', '.join(settable_names(cls))}."
