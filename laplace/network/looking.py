"""Features of a whole network, seen in a pass that is run anyway."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace.network.feature_extractor import FeatureExtractor
from laplace.network.watched import Pass
from laplace.types import Inputs

_LOOK: ContextVar[Look | None] = ContextVar("_LOOK", default=None)


@dataclass
class Look:
    """The passes of a network in which its last layer is watched, the first one of each batch."""

    extractor: FeatureExtractor | None = None
    """Knows the last layer; ``None`` where nobody looks."""
    passed: Pass | None = None
    """The first pass of this batch; ``None`` where there was none, or the layer was not known yet."""

    def read(self, x: Inputs) -> tuple[Tensor, Tensor] | None:
        """Outputs and features of the batch, once; ``None`` where they were not seen."""
        passed, self.passed = self.passed, None
        return None if passed is None or self.extractor is None else self.extractor.read(passed, x)


@contextmanager
def looking() -> Generator[Look]:
    """Watch the last layer in passes of whole networks in the body, of this thread, once an extractor is given."""
    look = Look()
    token = _LOOK.set(look)
    try:
        yield look
    finally:
        _LOOK.reset(token)


def seen(model: nn.Module, run: Callable[[], Any], outputs: Callable[[Any], Tensor]) -> Any:
    """What a pass of a model returns, of which ``outputs`` are the outputs; watched if somebody looks."""
    look = _LOOK.get()
    if look is None or look.passed is not None or look.extractor is None or look.extractor.model is not model:
        return run()
    with look.extractor.watching() as passed:
        returned = run()
    if passed is not None and not is_transformed(f := outputs(returned)):
        passed.f, look.passed = f, passed
    return returned


def is_transformed(value: Tensor) -> bool:
    """Whether it is what a function of ``torch.func`` passes through a model, and so has no values outside."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
