"""`torch.compile`: compiled models fit and predict as others do, and a prediction of a last layer compiles whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiled_predictions import CASES, SLOW, WAYS, X, fitted, network, same
from tests.tools import slow_but

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """Counts how often compiled code runs."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("subset", ["last_layer", "all"])
@pytest.mark.parametrize("structure", slow_but(["kron"], ["diag", "kron", "full"]))
def test_a_compiled_model_fits_and_predicts_as_before(way: str, subset: str, structure: str) -> None:
    expected, backend = fitted(network(), subset, structure), Backend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la = fitted(WAYS[way](network(), backend), subset, structure)
        same(la(X), expected(X))
    same(la.log_marginal_likelihood(), expected.log_marginal_likelihood())
    if subset == "last_layer" and way == "part":
        before = backend.calls
        la(X)
        assert backend.calls > before, "the compiled backbone runs in predictions"
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    before = backend.calls
    compiled(X)
    assert backend.calls > before, "the compiler is left as it was"


def failed(cases: Iterable[str], *options: str) -> dict[str, str]:
    """What went wrong in some of the cases, which run in a process of their own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.compiled_predictions", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    outcomes = json.loads(done.stdout.splitlines()[-1])
    return {name: outcomes[name] for name in cases if outcomes[name]}


@pytest.mark.slow
def test_a_prediction_compiles_whole() -> None:
    assert not failed(CASES)


@pytest.mark.slow
def test_predictions_of_every_kind_compile_whole() -> None:
    # The default compiler of PyTorch needs one of C++.
    assert not failed([name for name in SLOW if "inductor" not in name or shutil.which("g++")], "--slow")
