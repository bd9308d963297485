"""Import optional packages when they are used, not before: ``import laplace`` costs nothing for them."""

from __future__ import annotations

import importlib
from typing import Any

from laplace.errors import BackendUnavailableError


def require(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Parameters
    ----------
    module
        Its full name, such as ``"matplotlib.figure"``.
    extra
        The extra of this library that installs it.

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
            f"This needs the package {package!r}, which is not installed. Install the extra that holds it: "
            f"pip install 'laplace-posthoc[{extra}]'."
        )
        raise BackendUnavailableError(msg) from error
