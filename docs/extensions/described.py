"""Docstrings that a decorator completes are read from the running code: the pages are made of source files."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import griffe

DECORATORS = {"laplace.baselaplace.described.described", "laplace.baselaplace.described.described_by"}


class Described(griffe.Extension):
    """Replace the docstrings of classes and functions that are ``described``."""

    def on_class(self, *, cls: griffe.Class, **_kwargs: Any) -> None:
        """Of a class."""
        replace(cls)

    def on_function(self, *, func: griffe.Function, **_kwargs: Any) -> None:
        """Of a function."""
        replace(func)


def replace(found: griffe.Class | griffe.Function) -> None:
    """Take the docstring that ``help`` shows, where a decorator made it."""
    if found.docstring is not None and any(each.callable_path in DECORATORS for each in found.decorators):
        running = getattr(importlib.import_module(found.module.path), found.name)
        found.docstring.value = inspect.getdoc(running) or ""
