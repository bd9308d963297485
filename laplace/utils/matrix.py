"""Forwarding address of ``laplace.structures``."""

from laplace.structures import Kron, KronDecomposed

__all__ = ["Kron", "KronDecomposed"]
