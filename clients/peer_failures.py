"""Tests of laplace-torch 0.2.2 that fail on this library, and why; `peer_suite.py` compares a run with this table."""

from __future__ import annotations

from typing import NamedTuple

PASSED = 0
"""How many pass."""
INTERNALS, DIFFERENT, MISSING = "internals", "different", "missing"
KINDS = {
    INTERNALS: "fail on private internals of laplace-torch",
    DIFFERENT: "fail because the answer here is another one, or an answer where laplace-torch refuses",
    MISSING: "fail because something is missing here",
}


class Expected(NamedTuple):
    """Failures of one reason: which tests (the whole ``file::test[case]``), with which error, how many."""

    tests: str
    error: str
    kind: str
    count: int
    reason: str


EXPECTED: list[Expected] = []
