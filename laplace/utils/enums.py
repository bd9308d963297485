"""Forwarding address of ``laplace.enums``."""

from laplace.enums import *  # noqa: F403
