"""The keywords of a prediction where a function passes them on: ``**options: Unpack[PredictionKeywords]``."""

from __future__ import annotations

import torch
from typing_extensions import TypedDict

from laplace.types import LinkApproxLike, PredTypeLike


class PredictionKeywords(TypedDict, total=False):
    """Of a call of an estimator, which describes them."""

    pred_type: PredTypeLike
    joint: bool
    link_approx: LinkApproxLike
    n_samples: int
    diagonal_output: bool
    generator: torch.Generator | None
    fitting: bool


class PredictKeywords(TypedDict, total=False):
    """Of ``la.predict`` of several heads."""

    link_approx: LinkApproxLike
    n_samples: int
    generator: torch.Generator | None
    progress_bar: bool


__all__ = ["PredictKeywords", "PredictionKeywords"]
