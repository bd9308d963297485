"""Import the packages of the extra ``evaluation`` when a figure or a metric needs them, not before.

``import laplace.evaluation`` therefore costs nothing and works without them.
"""

from __future__ import annotations

import importlib
from typing import Any

from laplace.errors import BackendUnavailableError


def require(module: str) -> Any:
    """Import a module of an optional package.

    Parameters
    ----------
    module
        Its full name, such as ``"matplotlib.figure"``.

    Returns
    -------
    The module.

    Raises
    ------
    BackendUnavailableError
        If the package is not installed; the message says how to install it.
    ModuleNotFoundError
        If it is installed, and lacks something that it imports itself.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        msg = (
            f"This part of laplace.evaluation needs the package {package!r}, which is not installed. Install the "
            "extra that holds it: pip install 'laplace-posthoc[evaluation]'."
        )
        raise BackendUnavailableError(msg) from error
