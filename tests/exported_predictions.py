"""Predictions that leave as plain modules, through every exporter, as functions that raise where something is wrong.

They run in a process of their own: no exporter traces the checks of shapes that --check-shapes adds to this one.
`python -m tests.exported_predictions NAME…` prints what came of each, and how far ONNX Runtime is from the estimator.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace import Laplace
from tests.compiled_predictions import STRUCTURES, TARGETS, X, fitted, network, outcome
from tests.tools import assert_close

SIZES = (1, 7, 64)
WIDE = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
MAIN = ("diag", "kron", "full", "lowrank")
BATCH = {0: torch.export.Dim("batch")}
FIGURES: dict[str, float] = {}
"""Largest difference of ONNX Runtime in float32, by the case."""


def rows(x: Any, n: int) -> Any:
    return {key: value[:n] for key, value in x.items()} if isinstance(x, Mapping) else x[:n]


def dynamic(x: Any) -> Any:
    return dict.fromkeys(x, BATCH) if isinstance(x, Mapping) else BATCH


def several(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def agrees(function: Callable[..., Any], la: Any, x: Any, tolerance: float | None = None, **options: Any) -> None:
    """At batches of every size, in double precision to rounding."""
    for n in SIZES:
        if n > len(next(iter(x.values())) if isinstance(x, Mapping) else x):
            continue
        for ours, theirs in zip(several(function(rows(x, n))), several(la(rows(x, n), **options)), strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype is theirs.dtype
            if tolerance is None:
                assert_close(ours, theirs)
            else:
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# -- exporters --------------------------------------------------------------------------------------------------------


def as_it_is(module: nn.Module, _: Any) -> Any:
    return module


def exported(module: nn.Module, x: Any, *, strict: bool) -> Any:
    return torch.export.export(module, (rows(x, 5),), dynamic_shapes=(dynamic(x),), strict=strict).module()


def compiled(module: nn.Module, _: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend="eager", fullgraph=True)


def traced(module: nn.Module, x: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a tracer that fixes a value or a size says so
        warnings.filterwarnings("ignore", module=r"transformers\.")
        warnings.filterwarnings("ignore", message=".*is deprecated", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        return torch.jit.trace(module, (rows(x, 5),), strict=False)


def in_onnx(module: nn.Module, x: Any) -> Any:
    import onnxruntime

    logging.disable(logging.CRITICAL)
    how: dict[str, Any] = {"kwargs": {"x": rows(x, 5)}, "dynamic_shapes": {"x": dynamic(x)}}
    program: Any = torch.onnx.export(module, (), dynamo=True, verbose=False, **how)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [each.name for each in session.get_inputs()]

    def run(x: Any) -> tuple[Tensor, ...]:
        values = [value.numpy() for value in (x.values() if isinstance(x, Mapping) else [x])]
        return tuple(map(torch.as_tensor, session.run(None, dict(zip(names, values, strict=True)))))

    return run


EXPORTERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "eager": as_it_is,
    "export": partial(exported, strict=False),
    "strict export": partial(exported, strict=True),
    "compile": compiled,
    "jit": traced,
    "onnx": in_onnx,
}

# -- cases ------------------------------------------------------------------------------------------------------------


def estimator(structure: str, likelihood: str, dtype: torch.dtype, *, tuned: str | bool = False) -> Any:
    if dtype is torch.float64 and not tuned:
        return fitted(network(likelihood), "last_layer", structure, likelihood)
    y = TARGETS[likelihood]
    data = [(X.to(dtype), y.to(dtype) if y.is_floating_point() else y)]
    la: Any = Laplace(network(likelihood).to(dtype), likelihood, "last_layer", structure).fit(data)
    la.accept_untuned()
    if tuned:
        la.tune(data, average=tuned if isinstance(tuned, str) else "parameters")
    return la


def leaves(
    structure: str, likelihood: str, ways: tuple[str, ...], *, tuned: str | bool = False, **options: Any
) -> None:
    """Through exporters, of an estimator in double precision, and of one in float32 into ONNX."""
    made = cache(partial(estimator, structure, likelihood, tuned=tuned))
    for way in ways:
        dtype = torch.float32 if way == "onnx" else torch.float64
        la, x = made(dtype), WIDE.to(dtype)
        if tuned:
            assert la.tuning_ is not None
        function = EXPORTERS[way](la.export_module(**options), x)
        if way == "onnx":
            for n in SIZES:
                pairs = zip(function(x[:n]), several(la(x[:n], **options)), strict=True)
                worst = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
                name = f"{structure}, {likelihood}{f', tuned {tuned}' if tuned else ''}{options or ''}"
                FIGURES[name] = max(FIGURES.get(name, 0.0), worst)
        agrees(function, la, x, 1e-5 if way == "onnx" else None, **options)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = (nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(*first, nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Dropout())
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1)


def tokens(length: int = 9) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 50, (24, length), generator=numbers)
    ids[::2, 5:] = 0
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=50, num_labels=3, pad_token_id=0, **sizes))


def pictures() -> Tensor:
    return torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(4))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any, Tensor, dict[str, Any]]]] = {
    "a convolutional network": lambda: (Pictures(), pictures(), torch.arange(24) % 4, {}),
    "a convolution as last layer": lambda: (
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)),
        pictures(),
        (torch.arange(24 * 64) % 3).view(24, 8, 8),
        {},
    ),
    "an output without an axis": lambda: (Squeezed(), X.float(), TARGETS["regression"][:, 0].float(), {}),
    "BERT": lambda: (bert(), tokens(), torch.arange(24) % 3, {}),
    "GPT-2": lambda: (gpt2(), tokens(), torch.arange(24) % 3, {"feature_reduction": "pick_last"}),
}


def of_a_network(name: str, ways: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, x, y, options = NETWORKS[name]()
    la: Any = Laplace(
        model.eval(), "regression" if y.is_floating_point() else "classification", "last_layer", **options
    )
    la.fit([{**x, "labels": y}] if isinstance(x, Mapping) else [(x, y)])
    la.accept_untuned()
    module = la.export_module()
    for way in ways:
        agrees(EXPORTERS[way](module, x), la, x, 1e-5)


def stands_alone() -> None:
    """Copies, states and precisions are those of any module; the model is left alone."""
    model = network("classification").train()
    la = fitted(model)
    module, expected = la.export_module(), la(X)
    assert all(each.training and not each._forward_hooks for each in model.modules())
    assert not any(each.training for each in module.train().modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    la.prior_precision = 50.0
    assert_close(module(X), expected)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_close(twin(X), expected)
        twin.network.backbone[0].weight.zero_()
        assert not torch.allclose(twin(X), expected)
    assert_close(module(X), expected)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert any(name.startswith("closed_form.") for name in state)
    for value in module.state_dict().values():
        value.zero_()
    module.load_state_dict(state)
    assert_close(module(X), expected)
    half = copy.deepcopy(module).bfloat16()
    assert half.network.head.weight.dtype is torch.bfloat16
    assert all(value.dtype is torch.float64 for value in half.closed_form.buffers())
    assert half(X.bfloat16()).dtype is torch.bfloat16
    torch.testing.assert_close(half(X.bfloat16()).double(), expected, rtol=0, atol=0.03)
    there = copy.deepcopy(module).to("meta")
    assert {value.device.type for value in there.state_dict().values()} == {"meta"}
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(module(x)[:, 0].sum(), x)
    eps = torch.zeros_like(X).index_fill(1, torch.tensor([0]), 1e-6)
    with torch.no_grad():
        expected = (module(X + eps) - module(X - eps))[:, 0] / 2e-6
        torch.testing.assert_close(slope[:, 0], expected, rtol=1e-5, atol=1e-8)


ALL = tuple(EXPORTERS)
LINKS = ("mf1", "mf2", "bridge", "bridge_norm")
CASES: dict[str, Callable[[], None]] = {
    "a tuned classifier": partial(leaves, "kron", "classification", ("eager", "export", "jit"), tuned=True),
    "alone": stands_alone,
}
SLOW: dict[str, dict[str, Callable[[], None]]] = {
    **{
        structure: {
            f"{structure}, {likelihood}": partial(
                leaves, structure, likelihood, ALL if structure in MAIN else ("export", "jit")
            )
            for likelihood in (TARGETS if structure == "kron" else ("classification", "regression"))
        }
        for structure in STRUCTURES
    },
    "tuned": {
        f"{structure}, {likelihood}, tuned": partial(leaves, structure, likelihood, ALL, tuned=True)
        for structure in ("kron", "full")
        for likelihood in ("classification", "regression")
    },
    "options": {
        "mixture": partial(leaves, "kron", "classification", ("export", "jit", "onnx"), tuned="mixture"),
        "variances": partial(leaves, "kron", "regression", ALL, diagonal_output=True),
        **{
            link: partial(leaves, "kron", "classification", ("export", "jit", "onnx"), link_approx=link)
            for link in LINKS
        },
    },
    "networks": {
        name: partial(of_a_network, name, ALL if name != "GPT-2" else ("eager", "export", "onnx")) for name in NETWORKS
    },
}
EVERY = {**CASES, **{name: case for cases in SLOW.values() for name, case in cases.items()}}

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {name: outcome(EVERY[name]) for name in sys.argv[1:]}
    for name, figure in FIGURES.items():
        print(f"{figure:.1e}  {name}")
    print(json.dumps(found))
