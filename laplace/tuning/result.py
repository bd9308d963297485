"""What tuning found (``la.tuning_``): the choice, its score and the curve, to print and to plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Tuning:
    """Hyperparameters that were chosen, and on what grounds.

    Attributes
    ----------
    method
        ``"marglik"``, ``"gridsearch"``, ``"loo"``, ``"elbo"``, ``"cv"`` or ``"validation"``.
    score
        What was optimized: ``"log marginal likelihood"`` or ``"evidence lower bound"`` (more is better), or the name of
        a loss (less is better).
    value
        The score at the choice.
    hyperparameters
        The choice, by name.
    points, values
        The curve: prior precisions that were tried (the first one where there are several) and their scores, on the
        CPU; for ``"validation"`` each with the best other hyperparameters on the grid.
    candidates
        Scores of what the choice was compared with, by name; less is better.
    n_clipped
        How many values were clipped to the stated bounds.
    notes
        What was done and what was left out, in sentences.
    uses_variance
        Whether predictions are best with the posterior's variance.
    """

    method: str
    score: str
    value: float
    hyperparameters: Mapping[str, Tensor]
    points: Tensor
    values: Tensor
    candidates: Mapping[str, float] = field(default_factory=dict)
    n_clipped: int = 0
    notes: tuple[str, ...] = ()
    uses_variance: bool = True

    def __str__(self) -> str:
        """One line."""
        chosen = "; ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in self.hyperparameters.items())
        return f"{chosen} ({self.grounds})"

    @property
    def grounds(self) -> str:
        """How the choice was made, its score, and the scores of what it was compared with."""
        others = "".join(f", {name} {value:.4f}" for name, value in self.candidates.items())
        clipped = f", {self.n_clipped} clipped to the bounds" if self.n_clipped else ""
        return f"{self.method}: {self.score} {self.value:.4f}{others}{clipped}"

    def to_dict(self) -> dict[str, Any]:
        """The attributes as numbers, text, lists and dictionaries, which ``json.dumps`` writes.

        Returns
        -------
        A dictionary with the names of the attributes; of a score that is not finite it holds ``None``.
        """

        def plain(value: Any) -> Any:
            if isinstance(value, Tensor):
                return plain(value.tolist())
            if isinstance(value, Mapping):
                return {name: plain(item) for name, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {entry.name: plain(getattr(self, entry.name)) for entry in fields(self)}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the curve of scores over prior precisions, and the choice.

        Parameters
        ----------
        ax
            Where to draw; a new picture when ``None``.

        Returns
        -------
        The axes.

        Raises
        ------
        BackendUnavailableError
            If matplotlib is not installed (extra ``evaluation``).
        """
        pyplot: Any = require("matplotlib.pyplot", "evaluation")
        axes = pyplot.subplots(layout="constrained")[1] if ax is None else ax
        order = self.points.argsort()
        finite = order[torch.isfinite(self.values[order])]
        axes.plot(self.points[finite], self.values[finite], marker=".", label=self.method)
        for (name, value), style in zip(self.candidates.items(), ("--", ":", "-."), strict=False):
            axes.axhline(value, linestyle=style, color="gray", label=name)
        precision = self.hyperparameters.get("prior_precision")
        if precision is not None:
            axes.plot([float(precision.reshape(-1)[0])], [self.value], "o", color="black", label="chosen")
        axes.set(xscale="log", xlabel="prior precision (1/weight²)", ylabel=self.score)
        axes.legend()
        return axes


def _shown(value: Tensor) -> str:
    """The first values of a vector."""
    flat = value.reshape(-1)
    return ", ".join(f"{float(v):.4g}" for v in flat[:5]) + (", …" if len(flat) > 5 else "")
