"""Predictions that are compiled whole, as functions that raise where something is wrong.

They run in a process of their own: no compiler traces the checks of shapes that --check-shapes adds to this one.
`python -m tests.compiled_predictions [--slow]` prints what came of each.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace import Laplace
from tests.tools import assert_close

X = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS: dict[str, Tensor] = {
    "classification": torch.arange(24) % 3,
    "regression": torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    "binary": torch.arange(24) % 2,
    "multilabel": torch.arange(72).reshape(24, 3) % 2,
    "poisson": torch.arange(72).reshape(24, 3) % 5,
    "heteroscedastic_regression": torch.randn(24, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
}
N_OUTPUTS = {"binary": 1, "heteroscedastic_regression": 2}


class Network(nn.Module):
    def __init__(self, n_outputs: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())
        self.head = nn.Linear(6, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def network(likelihood: str = "classification") -> Network:
    torch.manual_seed(0)
    return Network(N_OUTPUTS.get(likelihood, 3)).double().eval()


def fitted(model: nn.Module, subset: str = "last_layer", structure: str = "kron", likelihood: str = "classification"):
    la: Any = Laplace(model, likelihood, subset, structure)
    la.fit([(X[:12], TARGETS[likelihood][:12]), (X[12:], TARGETS[likelihood][12:])])
    la.accept_untuned()
    return la


def n_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def same(ours: Any, theirs: Any) -> None:
    for a, b in zip(*(value if isinstance(value, tuple) else (value,) for value in (ours, theirs)), strict=True):
        assert_close(a, b)


def whole(model: Network, backend: Any) -> nn.Module:
    return torch.compile(model, backend=backend)  # pyright: ignore[reportReturnType]


def whole_in_place(model: Network, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def part(model: Network, backend: Any) -> nn.Module:
    model.backbone = torch.compile(model.backbone, backend=backend)
    return model


def part_in_place(model: Network, backend: Any) -> nn.Module:
    model.backbone.compile(backend=backend)
    return model


WAYS = {way.__name__: way for way in (whole, whole_in_place, part, part_in_place)}


STRUCTURES = ["diag", "kron", "full", "lowrank", "ekfac", "blockdiag"]


def compiles_whole(structure: str, likelihood: str) -> None:
    la = fitted(network(likelihood), "last_layer", structure, likelihood)
    compiled = torch.compile(la, backend="aot_eager", fullgraph=True)
    same(compiled(X), la(X))
    same(compiled(X + 1), la(X + 1))
    assert n_graphs() == 1


def options_compile(**options: Any) -> None:
    la = fitted(network(), likelihood="regression" if "diagonal_output" in options else "classification")
    same(torch.compile(lambda x: la(x, **options), backend="eager", fullgraph=True)(X), la(X, **options))


def any_size_needs_two_graphs(structure: str) -> None:
    la = fitted(network(), structure=structure)
    compiled = torch.compile(la, backend="eager", fullgraph=True)
    for n in (24, 7, 9, 20, 2):
        same(compiled(X[:n]), la(X[:n]))
    assert n_graphs() <= 2


def changes_are_seen() -> None:
    la = fitted(network())
    compiled = torch.compile(la, backend="eager", fullgraph=True)
    compiled(X)
    la.prior_precision = 50.0
    same(compiled(X), la(X))
    la.weight_uncertainty = False
    same(compiled(X), la(X))
    with torch.no_grad():
        la._network.backbone[0].weight.mul_(1.5)
    same(compiled(X), la(X))
    for twin in (pickle.loads(pickle.dumps(la)), copy.deepcopy(la)):
        same(twin(X), la(X))


def is_differentiated_in_its_inputs() -> None:
    la = fitted(network())
    la.enable_backprop = True
    x = X.clone().requires_grad_()
    compiled = torch.compile(la, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, la))
    same(ours, theirs)


def the_model_is_left_alone() -> None:
    model = network().train()
    la = fitted(model)
    torch.compile(la, backend="eager", fullgraph=True)(X)
    assert all(module.training and not module._forward_hooks for module in model.modules())


def all_weights_compile_in_pieces() -> None:
    la = fitted(part(network(), "eager"), "all", "diag")
    same(torch.compile(la, backend="eager")(X), la(X))


def of_a_compiled_backbone(way: str) -> None:
    la = fitted(WAYS[way](network(), "eager"))
    same(torch.compile(la, backend="eager", fullgraph=True)(X), fitted(network())(X))


def by_the_default_compiler(structure: str) -> None:
    la = fitted(network(), structure=structure)
    same(torch.compile(la, fullgraph=True)(X), la(X))


CASES: dict[str, Callable[[], None]] = {
    "lowrank, regression": partial(compiles_whole, "lowrank", "regression"),
    "batches of any size": partial(any_size_needs_two_graphs, "kron"),
    "changes": changes_are_seen,
    "the model": the_model_is_left_alone,
}
SLOW: dict[str, Callable[[], None]] = {
    **{f"all: {s}, {name}": partial(compiles_whole, s, name) for s in STRUCTURES for name in TARGETS},
    **{f"sizes: {s}": partial(any_size_needs_two_graphs, s) for s in STRUCTURES if s != "lowrank"},
    **{f"inductor: {s}": partial(by_the_default_compiler, s) for s in ("diag", "kron", "full", "lowrank")},
    "mf1": partial(options_compile, link_approx="mf1"),
    "bridge": partial(options_compile, link_approx="bridge"),
    "variances": partial(options_compile, diagonal_output=True),
    "gradients": is_differentiated_in_its_inputs,
    "all weights": all_weights_compile_in_pieces,
    "a compiled backbone": partial(of_a_compiled_backbone, "part"),
    "compiled in place": partial(of_a_compiled_backbone, "part_in_place"),
}


def outcome(case: Callable[[], None]) -> str:
    """What went wrong, or nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = SLOW if "--slow" in sys.argv else CASES
    print(json.dumps({name: outcome(case) for name, case in chosen.items()}))
