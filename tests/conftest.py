"""What every test stands on: float64, fixed seeds, warnings as errors (in pyproject.toml), and shapes that can be checked."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from importlib import metadata

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# With --check-shapes every annotated shape and type inside the house is checked at run time. The estimators are the border:
# they check what users pass themselves, and tests must reach their own messages.
INSIDE = [
    "curvature",
    "density",
    "fit",
    "gp",
    "likelihoods",
    "linalg",
    "network",
    "predictive",
    "prior",
    "structures",
    "tuning",
]

# Properties draw the same examples every time, and the first call of a torch function may be slow.
settings.register_profile(
    "house",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("house")

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Ask for checked shapes, with which tests take three times as long."""
    parser.addoption(
        "--check-shapes", action="store_true", help="check the shapes that annotations inside laplace/ say"
    )


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each process, and for those that tests start: a test is too small to share."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if config.getoption("--check-shapes"):
        _check_shapes()


def _check_shapes() -> None:
    """Check annotations in modules that are imported from here on."""
    from jaxtyping import install_import_hook

    import tests.typechecker  # noqa: F401 - the hook finds it by name

    if any(name.split(".")[0] == "laplace" for name in sys.modules):
        message = "laplace was imported before tests/conftest.py, so its annotations would not be checked."
        raise RuntimeError(message)
    install_import_hook([f"laplace.{room}" for room in INSIDE], "tests.typechecker.check")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what ``@pytest.mark.every(k)`` leaves out: all but one in k and, of several axes, each value once."""
    seen: dict[str, tuple[int, set[str]]] = {}
    for item in items:
        mark = item.get_closest_marker("every")
        if mark is None or item.get_closest_marker("slow"):
            continue
        test, _, values = item.nodeid.partition("[")
        n, known = seen.get(test, (0, set()))
        named = set(values.rstrip("]").split("-"))
        if n % mark.args[0] and (named <= known or len(named) == 1 or not mark.kwargs.get("each_value", True)):
            item.add_marker(pytest.mark.slow)
        seen[test] = n + 1, known | named


def pytest_report_header() -> str:
    """Which releases of the optional back ends are tested."""
    packages = ("backpack-for-pytorch", "asdfghjkl", "curvlinops-for-pytorch")
    return "back ends: " + ", ".join(f"{name} {metadata.version(name)}" for name in packages)


@pytest.fixture(autouse=True)
def _reproducible_in_float64() -> Iterator[None]:
    """Same random numbers whatever ran before, and a default dtype that no test can leave behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a CUDA device where there is one."""
    return torch.device(request.param)
