"""Import optional packages when they are used, not before: ``import laplace`` costs nothing for them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

from laplace.errors import BackendUnavailableError, warn

NAMESAKE = "laplace-torch"
"""Another distribution whose package is called ``laplace``."""


def warn_of_namesake() -> None:
    """Warn if another package of the same import name is installed: they overwrite each other's files."""
    try:
        other = importlib.metadata.version(NAMESAKE)
    except importlib.metadata.PackageNotFoundError:
        return
    msg = (
        f"{NAMESAKE} {other} is installed in the same environment, and its package is called `laplace`, too: what is "
        "imported are files of this library where both have one, and uninstalling either deletes files of the other. "
        f"Uninstall both and install the one that you want: pip uninstall {NAMESAKE} laplace-posthoc && "
        "pip install laplace-posthoc"
    )
    warn(msg, UserWarning)


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


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
