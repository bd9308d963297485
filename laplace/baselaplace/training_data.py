"""Features and targets of the training data, for the methods that fit the head again."""

# Functions of an estimator, in its own room:
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from laplace.baselaplace.tuned import collected
from laplace.errors import UnsupportedError
from laplace.tuning import HeadData, Settings, check_same_data

if TYPE_CHECKING:
    from laplace.baselaplace.parametric import ParametricLaplace


@dataclass
class TrainingData:
    """Features and targets of the training data: those of a loader, or those that ``fit`` kept."""

    la: ParametricLaplace
    asked: Settings
    loader: Iterable[Any] | None
    _read: HeadData | None = None

    def found(self, why: str) -> HeadData:
        """The data; raise where there are none."""
        if self.loader is None:
            if self.la._kept is None:
                msg = f"{why} That takes the features of the training data. {self.la._why_not[1]} Pass train_loader=."
                raise UnsupportedError(msg)
            return self.la._kept
        if self._read is None:
            la, fit = self.la, self.la._fitted
            data = HeadData.collect(collected(la, self.asked, self.loader, "training"), la._dtype)
            check_same_data(fit, data, la._unit_likelihood)
            self._read = data
        return self._read

    @property
    def are_there(self) -> bool:
        """Whether there are some."""
        return self.loader is not None or self.la._kept is not None


__all__ = ["TrainingData"]
