"""Sections of docstrings are written so that the parser of NumPy's convention reads what is meant.

What a function returns is prose: its first line would be read as a type. Parameters that share a description are listed
one by one: all would get the type and the default of the first.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(?P<head>(?:Returns|Yields)\n-+\n)(?P<body>.*?)(?=\n\n\w+\n-+\n|\Z)", re.MULTILINE | re.DOTALL)

PARAMETERS = re.compile(r"^(?:Other )?Parameters\n-+\n(?:.*\n?)*?(?=\n\w+\n-+\n|\Z)", re.MULTILINE)
SHARED = re.compile(r"^(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+)\n(?P<text>(?:[ ]+.*\n?|\n(?=[ ]))+)", re.MULTILINE)


def one_by_one(match: re.Match[str]) -> str:
    """Give each of several parameters a copy of their description."""
    text = match["text"].rstrip("\n")
    after = match["text"][len(text) :]
    return "\n".join(f"{name}\n{text}" for name in match["names"].split(", ")) + after


def as_description(match: re.Match[str]) -> str:
    """Put a section under a colon, which stands for the type in the annotation, and indent it."""
    lines = match["body"].strip().splitlines()
    return match["head"] + ":\n" + "\n".join(f"    {line}".rstrip() for line in lines)


def with_own_types(text: str) -> str:
    """List parameters one by one, wherever parameters are described."""
    return PARAMETERS.sub(lambda section: SHARED.sub(one_by_one, section[0]), text)


class ProseReturns(griffe.Extension):
    """Rewrite the sections of functions before they are parsed."""

    def on_function(self, *, func: griffe.Function, **_kwargs: Any) -> None:
        """Rewrite one docstring."""
        if func.docstring is not None:
            func.docstring.value = SECTION.sub(as_description, with_own_types(func.docstring.value))

    def on_class(self, *, cls: griffe.Class, **_kwargs: Any) -> None:
        """Rewrite the parameters of one class."""
        if cls.docstring is not None:
            cls.docstring.value = with_own_types(cls.docstring.value)
