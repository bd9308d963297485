"""Multi-label classification: each output is the logit of a label of its own, which may be missing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from laplace import pending
from laplace.enums import Likelihood
from laplace.errors import InputError
from laplace.likelihoods.base import Positions, check_outputs, check_same_shape, datum_index
from laplace.likelihoods.bernoulli import BernoulliLikelihood
from laplace.likelihoods.categorical import IGNORED, SURE
from laplace.types import Outputs, Targets


@dataclass(frozen=True)
class MultiLabelLikelihood(BernoulliLikelihood):
    """C independent labels: −log p(y|f) = Σ_c softplus(f_c) − y_c f_c, tempered by 1/T.

    Targets have the shape of the outputs, ``[batch, *positions, C]``: 0 or 1 of any type, or probabilities in
    [0, 1] (soft labels). A label is missing, and says nothing, where a floating-point target is NaN or an integer one
    is −100. A position without any label is masked, and does not count. Predictions are the probabilities of the
    labels, ``[batch, *positions, C]``, which do not sum to one.

    Attributes
    ----------
    temperature
        T.
    output_temperature
        What logits are divided by before the link, when predicting.

    Notes
    -----
    Of a posterior over functions each label is scored by its marginal; nothing depends on covariances of logits but
    functions that are drawn whole.
    """

    name: ClassVar[str] = Likelihood.MULTILABEL.value
    unlinked: ClassVar[str] = 'is made for classes of which one is right; for labels use "probit" or "mc".'
    exclusive: ClassVar[bool] = False

    def observed(self, f: Outputs, y: Targets) -> Outputs:
        """With logits of missing labels so low that they say nothing."""
        return torch.where(y.isnan(), SURE, f)

    def n_groups(self, n_outputs: int) -> int:  # noqa: ARG002
        """One: rows have several labels."""
        return 1

    def group_of(self, y: Targets) -> None:
        """All rows are one."""

    def torch_loss(self) -> None:
        """None that leaves out missing labels."""

    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check labels, in the shape of the outputs, and flatten positions with at least one label."""
        return self.whole(f, y).selected()

    def whole(self, f: Tensor, y: Tensor) -> Positions:
        """The same; on an accelerator positions without labels stay, and say nothing."""
        check_same_shape(f, y, "Labels")
        labels = known(y).reshape(-1, f.shape[-1])
        msg = (
            'likelihood="multilabel" takes labels that are 0 or 1, or probabilities between them; NaN (of integers '
            f"{IGNORED}) says that a label is missing. Others came."
        )
        if y.is_complex():
            raise InputError(msg)
        pending.refuse(~((labels >= 0) & (labels <= 1) | labels.isnan()).all(), InputError, lambda: msg)
        flat = f.reshape(labels.shape)
        datum = datum_index(len(f), len(flat), f.device)
        masked = labels.isnan().all(-1)
        found = Positions(flat, labels.to(f.dtype), datum=datum)
        if not pending.is_free(masked.device):
            found = replace(found, f=torch.where(masked.unsqueeze(-1), SURE, flat), counted=~masked)
        elif bool(masked.any()):
            found = replace(found, counted=~masked).selected()
        check_outputs(found.f)
        return found

    def check_head(self, n_outputs: int) -> None:
        """Any number of outputs is one."""

    def count(self, y: Tensor, n_outputs: int) -> int | Tensor:
        """Number of positions with at least one label."""
        return pending.count((~known(y).reshape(-1, n_outputs).isnan()).any(-1).sum())


def known(y: Tensor) -> Tensor:
    """Labels as floating-point numbers, with NaN in the place of missing ones."""
    if y.is_floating_point() or y.is_complex():
        return y
    return torch.where(y.long() == IGNORED, torch.nan, y.to(torch.get_default_dtype()))


__all__ = ["MultiLabelLikelihood"]
