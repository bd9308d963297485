"""Scores that need probabilities only, or samples of them; higher is more foreign."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.linalg import wide_dtype


def log_one_minus_max(logits: Float[Tensor, "*rows outputs"]) -> Float[Tensor, "*rows"]:
    """log(1 − max p) of logits or of log probabilities, exact however near to 1 the largest probability is.

    One column is the logit of 1 against 0.
    """
    wide = logits.to(wide_dtype(logits))
    if wide.shape[-1] == 1:
        wide = torch.cat([wide, torch.zeros_like(wide)], -1)
    others = wide.scatter(-1, wide.argmax(-1, keepdim=True), -math.inf)
    return torch.logsumexp(others, -1) - torch.logsumexp(wide, -1)


def max_prob(probs: Float[Tensor, "*rows outputs"]) -> Float[Tensor, "*rows"]:
    """1 − max p, as the sum of the other probabilities, which loses nothing."""
    return probs.scatter(-1, probs.argmax(-1, keepdim=True), 0.0).sum(-1)


def entropy(probs: Float[Tensor, "*rows outputs"]) -> Float[Tensor, "*rows"]:
    """−Σ p log p, in nats."""
    return torch.special.entr(probs).sum(-1)


def mutual_information(samples: Float[Tensor, "samples *rows outputs"]) -> Float[Tensor, "*rows"]:
    """Entropy of the average of samples of probabilities less the average of their entropies, in nats (BALD)."""
    return (entropy(samples.mean(0)) - entropy(samples).mean(0)).clamp(min=0)


__all__ = ["entropy", "log_one_minus_max", "max_prob", "mutual_information"]
