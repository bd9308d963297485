"""Models x likelihoods x data: one row a situation, each built from its own seed, float64, C != D, bias not zero."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests import reference

MASK = reference.IGNORED
_PROBLEMS: dict[str, reference.Problem] = {}


class Net(nn.Module):
    """Features, then a linear `head`; subclasses say how the input is read and what is returned."""

    def __init__(self, n_inputs: int, n_features: int, n_outputs: int, *, bias: bool = True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_inputs, n_features), nn.Tanh())
        self.head = nn.Linear(n_features, n_outputs, bias=bias)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


class ConvNet(nn.Module):
    """Convolution, batch normalization and dropout before the head: layers with a state and with randomness."""

    def __init__(self, n_outputs: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten()
        )
        self.head = nn.Linear(8, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Squeezed(Net):
    """A regressor that returns [B]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)


class TwoInputs(Net):
    """Takes two tensors."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return super().forward(torch.cat([first, second], -1))


class NestedInputs(Net):
    """Takes a tensor and a nested structure."""

    def forward(self, first: Tensor, rest: dict[str, list[Tensor]]) -> Tensor:
        return super().forward(torch.cat([first, rest["deep"][0]], -1))


class WholeMapping(Net):
    """Takes the batch itself, as a mapping."""

    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch["inputs"])


class KeywordInputs(Net):
    """Takes a batch by keywords and returns a mapping with `logits`, as Hugging Face models do."""

    def forward(self, input_ids: Tensor, scale: Tensor | None = None, labels: Tensor | None = None) -> OrderedDict:
        assert labels is None, "targets are not inputs"
        features = self.body(input_ids if scale is None else input_ids * scale)
        return OrderedDict(logits=self.head(features), hidden_states=features)


class Reduced(Net):
    """Applies the head at every position and keeps one output a row."""

    def __init__(self, reduction: str, *sizes: int):
        super().__init__(*sizes)
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        f = super().forward(x)
        return {"pick_first": f[:, 0], "pick_last": f[:, -1], "average": f.mean(1)}[self.reduction]


class Pixels(Net):
    """A head that is a convolution, whose channels are moved to the end."""

    def __init__(self, n_channels: int, n_features: int, n_outputs: int):
        nn.Module.__init__(self)
        self.body = nn.Sequential(nn.Conv2d(n_channels, n_features, 2), nn.Tanh())
        self.head = nn.Conv2d(n_features, n_outputs, (3, 2), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).movedim(1, -1)


class Compared(Net):
    """A reward model: scores [B, 1] of single inputs, and [B, 2] of pairs, which run through the layers as 2B rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 2 else super().forward(x.flatten(0, 1)).reshape(len(x), 2)


def plain(model: nn.Module, x: Any) -> Tensor:
    return model(x)


@dataclass(frozen=True)
class Case:
    """One situation: how to build the model and data, and how the reference calls the model."""

    name: str
    likelihood: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    targets: Callable[[int], Tensor]
    n_outputs: int
    n_rows: int = 9
    seed: int = 0
    bias: bool = True
    forward: Callable[[nn.Module, Any], Tensor] = plain
    batch: Callable[[Any, Tensor], Any] = lambda x, y: (x, y)
    options: dict[str, Any] = field(default_factory=dict)
    sigma: float = 1.0

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.build().double()
            with torch.no_grad():
                for buffer in model.buffers():
                    if buffer.is_floating_point():
                        buffer.copy_(torch.rand(buffer.shape, dtype=buffer.dtype) + 0.5)
        return model.eval()

    def data(self, *, n_rows: int | None = None, shift: int = 1) -> tuple[Any, Tensor]:
        """Inputs and targets; another `shift` gives other data."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 100 * shift)
            return self.inputs(n_rows or self.n_rows), self.targets(n_rows or self.n_rows)

    def batches(self, *sizes: int) -> list[Any]:
        """The data as a list of batches of the given sizes (the last takes the rest), as a loader would yield them."""
        x, y = self.data()
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        slices = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(y)], strict=True) if a < len(y)]
        return [self.batch(reference.rows_of(x, s), y[s]) for s in slices]

    def test_inputs(self) -> Any:
        return self.data(n_rows=4, shift=2)[0]

    @property
    def names(self) -> tuple[str, ...]:
        return ("head.weight", "head.bias") if self.bias else ("head.weight",)

    @property
    def scale(self) -> float:
        """1 / sigma^2, of the GGN."""
        return self.sigma**-2

    def problem(self, model: nn.Module | None = None) -> reference.Problem:
        """The same situation for the reference; without a model of its own it is computed once."""
        if model is None:
            if self.name not in _PROBLEMS:
                _PROBLEMS[self.name] = self.problem(self.model())
            return _PROBLEMS[self.name]
        x, y = self.data()
        return reference.Problem(model, self.forward, self.names, x, y, self.likelihood, self.n_outputs)

    def extractor(self, model: nn.Module | None = None, **options: Any) -> Any:
        """A feature extractor around the model, with the options that this case needs."""
        from laplace.network.feature_extractor import FeatureExtractor

        chosen = {
            key: self.options[key] for key in ("feature_reduction", "dict_key_x", "dict_key_y") if key in self.options
        }
        extractor = FeatureExtractor(self.model() if model is None else model, **chosen, **options)
        extractor.find_last_layer(self.test_inputs())
        return extractor

    def laplace_options(self) -> dict[str, Any]:
        noise = {"sigma_noise": self.sigma} if self.likelihood == "regression" else {}
        return {**noise, **self.options}


def labels(n_classes: int, *positions: int, masked: bool = False) -> Callable[[int], Tensor]:
    def draw(n: int) -> Tensor:
        y = torch.randint(n_classes, (n, *positions))
        if masked:
            y[torch.rand(y.shape) < 0.3] = MASK
            y[0] = MASK  # a row that says nothing
        return y

    return draw


def soft_labels(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64).softmax(-1)


def normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def as_mapping(**shapes: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {key: torch.randn(n, size, dtype=torch.float64) for key, size in shapes.items()}


def mapping_batch(x: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    return {**x, "labels": y}


CASES = (
    Case("classification", "classification", lambda: Net(3, 6, 4), normal(3), labels(4), 4, n_rows=11, seed=1),
    Case("regression", "regression", lambda: Net(3, 5, 2), normal(3), normal(2), 2, n_rows=11, seed=2, sigma=0.7),
    Case("conv_classification", "classification", lambda: ConvNet(3), normal(1, 4, 4), labels(3), 3, seed=3),
    Case("conv_regression", "regression", lambda: ConvNet(2), normal(1, 4, 4), normal(2), 2, seed=4, sigma=1.3),
    Case("no_bias_classification", "classification", lambda: Net(3, 5, 3, bias=False), normal(3), labels(3), 3, seed=5, bias=False),
    Case("no_bias_regression", "regression", lambda: Net(3, 4, 2, bias=False), normal(3), normal(2), 2, seed=6, bias=False, sigma=0.5),
    Case("soft_labels", "classification", lambda: Net(3, 5, 3), normal(3), soft_labels(3), 3, seed=7),
    Case("masked_rows", "classification", lambda: Net(3, 5, 4), normal(3), labels(4, masked=True), 4, n_rows=9, seed=19),
    Case("masked_positions", "classification", lambda: Net(3, 5, 4), normal(6, 3), labels(4, 6, masked=True), 4, n_rows=5, seed=8),
    Case("positions_regression", "regression", lambda: Net(3, 4, 2), normal(3, 3), normal(3, 2), 2, n_rows=5, seed=9, sigma=0.8),
    Case("squeezed_regression", "regression", lambda: Squeezed(3, 4, 1), normal(3), normal(), 1, seed=10, sigma=0.6),
    Case("squeezed_positions", "regression", lambda: Squeezed(3, 4, 1), normal(3, 3), normal(3), 1, n_rows=5, seed=15, sigma=0.9),
    Case("soft_positions", "classification", lambda: Net(3, 4, 3), normal(2, 3), soft_labels(2, 3), 3, n_rows=5, seed=16),
    Case("image_positions", "classification", lambda: Net(2, 4, 3), normal(2, 2, 2), labels(3, 2, 2, masked=True), 3, n_rows=5, seed=17),
    Case("pixels", "classification", lambda: Pixels(1, 2, 3), normal(1, 3, 4), labels(3, 2, 2, masked=True), 3, n_rows=5, seed=23),
    Case("nested_inputs", "classification", lambda: NestedInputs(5, 4, 3), lambda n: (normal(2)(n), {"deep": [normal(3)(n)]}), labels(3), 3,
         seed=18, forward=lambda model, x: model(*x), batch=lambda x, y: (*x, y)),
    Case("two_inputs", "regression", lambda: TwoInputs(5, 4, 3), lambda n: (normal(2)(n), normal(3)(n)), normal(3), 3, seed=11,
         forward=lambda model, x: model(*x), batch=lambda x, y: (*x, y)),
    Case("whole_mapping", "classification", lambda: WholeMapping(3, 5, 3), as_mapping(inputs=3), labels(3), 3, seed=12,
         batch=lambda x, y: {**x, "target": y}, options={"dict_key_x": "inputs", "dict_key_y": "target"}),
    Case("keyword_inputs", "classification", lambda: KeywordInputs(3, 5, 4), as_mapping(input_ids=3, scale=3), labels(4), 4, seed=13,
         forward=lambda model, x: model(**x)["logits"], batch=mapping_batch),
    *(
        Case(reduction, likelihood, lambda reduction=reduction, C=C: Reduced(reduction, 3, 5, C), normal(4, 3), targets, C, seed=14,
             n_rows=6, options={"feature_reduction": reduction})
        for reduction, likelihood, C, targets in (
            ("pick_first", "classification", 3, labels(3)),
            ("pick_last", "regression", 2, normal(2)),
            ("average", "classification", 3, labels(3)),
        )
    ),
    Case("preferences", "reward_modeling", lambda: Net(3, 5, 1), normal(2, 3), labels(2), 1, n_rows=11, seed=20),
    Case("no_bias_preferences", "reward_modeling", lambda: Net(3, 4, 1, bias=False), normal(2, 3), labels(2), 1, seed=21, bias=False),
    Case("compared_preferences", "reward_modeling", lambda: Compared(3, 4, 1), normal(2, 3), labels(2), 1, seed=22),
)  # fmt: skip
BASIC = CASES[:2]
"""One classification and one regression problem, for claims that do not depend on the kind of network."""
STRUCTURES = ("full", "kron", "diag", "blockdiag", "ekfac", "lowrank")
ADDITIVE = tuple(structure for structure in STRUCTURES if structure != "ekfac")
"""Those whose curvatures of two data sets can be merged."""
BY_GROUP = ("kron", "ekfac")
"""Those whose prior precision is one value for all weights or one per parameter group."""
EVERYTHING = {"lowrank": {"captured_trace": 1.0}}
"""Options with which a structure holds all that it can; low rank is then the dense matrix."""


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


class Stream(IterableDataset):
    """Batches without a length."""

    def __init__(self, batches: list[Any]):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def stream(batches: list[Any]) -> DataLoader:
    """A `DataLoader` that has no length."""
    return DataLoader(Stream(batches), batch_size=None)


def tensor_loader(case: Case, batch_size: int, **options: Any) -> DataLoader:
    """The data of a case with one input tensor, in a `DataLoader`."""
    return DataLoader(TensorDataset(*case.data()), batch_size=batch_size, **options)
