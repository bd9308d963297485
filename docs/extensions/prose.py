"""What a function returns is written as prose here; NumPy's convention would read its first line as a type."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(?P<head>(?:Returns|Yields)\n-+\n)(?P<body>.*?)(?=\n\n\w+\n-+\n|\Z)", re.MULTILINE | re.DOTALL)


def as_description(match: re.Match[str]) -> str:
    """Put a section under a colon, which stands for the type in the annotation, and indent it."""
    lines = match["body"].strip().splitlines()
    return match["head"] + ":\n" + "\n".join(f"    {line}".rstrip() for line in lines)


class ProseReturns(griffe.Extension):
    """Rewrite the sections of functions before they are parsed."""

    def on_function(self, *, func: griffe.Function, **_kwargs: Any) -> None:
        """Rewrite one docstring."""
        if func.docstring is not None:
            func.docstring.value = SECTION.sub(as_description, func.docstring.value)
