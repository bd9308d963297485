"""What tests compare and measure with."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOLERANCES = {torch.float64: (1e-9, 1e-10), torch.float32: (2e-4, 2e-5)}
"""(relative, absolute to the largest entry): a dozen chained operations above the rounding unit of each dtype."""


def slow_but(kept: Collection[Any], *axes: Iterable[Any]) -> list[Any]:
    """All combinations of the axes (one axis: its values), marked slow but for those kept."""
    values = product(*axes) if len(axes) > 1 else [(value,) for value in axes[0]]
    named = [("-".join(map(str, value)), value) for value in values]
    assert set(kept) <= {name for name, _ in named}, "one that is kept is none of them"
    return [pytest.param(*value, id=name, marks=() if name in kept else pytest.mark.slow) for name, value in named]


def assert_close(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equal shape, and equal values up to the tolerance of the narrower dtype."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    dtype = min(actual.dtype, expected.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    rtol, atol = TOLERANCES[dtype]
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol * scale, msg=lambda text: f"{what}: {text}")


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Equal bit for bit, and in dtype."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def assert_within(estimate: Tensor, truth: Tensor, standard_error: Tensor, what: str = "estimate") -> None:
    """A Monte-Carlo estimate lies within five standard errors of the truth, entry by entry (plus rounding)."""
    assert estimate.shape == truth.shape, f"{what}: shape {tuple(estimate.shape)}, expected {tuple(truth.shape)}"
    excess = (estimate - truth).abs() - 5 * standard_error - 1e-9 * truth.abs().max()
    assert bool((excess <= 0).all()), f"{what}: off by more than five standard errors, by {float(excess.max()):.3g}"


def assert_mean_is(samples: Tensor, truth: Tensor, what: str = "mean") -> None:
    """The mean over the first axis is `truth`, in standard errors taken from the spread of the samples."""
    assert_within(samples.mean(0), truth, samples.std(0) / len(samples) ** 0.5, what)


def assert_covariance_of(samples: Tensor, mean: Tensor, cov: Tensor) -> None:
    """Mean and covariance of `samples` [n, P] are those of N(mean, cov), in standard errors of a Gaussian sample."""
    n, variances = len(samples), cov.diagonal()
    assert_within(samples.mean(0), mean, (variances / n).sqrt(), "sample mean")
    centered = samples - mean
    error = ((cov**2 + torch.outer(variances, variances)) / n).sqrt()
    assert_within(centered.T @ centered / n, cov, error, "sample covariance")


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation in its body allocates (views count as their base)."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                numel = tensor.untyped_storage().nbytes() // tensor.element_size()
                if numel > self.numel:
                    self.numel, self.operation = numel, f"{func} {tuple(tensor.shape)}"
        return result


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory in use at once while a function runs, above what was before, by the events of the allocator."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
