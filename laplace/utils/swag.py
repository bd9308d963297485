"""Forwarding address of ``laplace.network.swag``."""

from laplace.network.swag import fit_diagonal_swag_var

__all__ = ["fit_diagonal_swag_var"]
