"""Classification: a categorical distribution with the outputs as logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from laplace import linalg, pending
from laplace.density import log_one_minus_max
from laplace.enums import Likelihood, LinkApprox
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods import softmax
from laplace.likelihoods.base import Ask, Link, Positions, check_outputs, check_same_shape, datum_index
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.predictions import PredictsProbabilities
from laplace.likelihoods.roots import CategoricalRoot
from laplace.types import Outputs, Scalar, Targets

COARSE = (torch.float32, torch.bfloat16, torch.float16)
"""Precisions that outputs may have been computed in before they got here in a wider one."""
CHANCE = 1e-5
"""With which probability, about, outputs that are none may be taken for probabilities: few coarse rows tell nothing."""
FEW = 1024
"""Number of rows that tell whether outputs are probabilities."""
SURE = -1e4
"""A logit whose probability is zero, with all derivatives."""
IGNORED = -100
"""The target that masks a position, as in PyTorch's cross-entropy."""


@dataclass(frozen=True)
class CategoricalLikelihood(PredictsProbabilities):
    """−log p(y|f) = logsumexp(f) − f_y, tempered by 1/T; soft labels weigh the classes.

    Attributes
    ----------
    temperature
        T.
    output_temperature
        What logits are divided by before the link, when predicting.
    """

    temperature: float | Tensor = 1.0
    output_temperature: float | Tensor = 1.0

    name: ClassVar[str] = Likelihood.CLASSIFICATION.value
    links: ClassVar[Mapping[LinkApprox, Callable[..., Tensor]]] = softmax.LINKS
    variance_links: ClassVar[frozenset[LinkApprox]] = softmax.VARIANCE_LINKS
    ignores_shifts: ClassVar[bool] = True

    @classmethod
    def check_balanced(cls) -> None:
        """There are classes to balance."""

    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """Cross-entropy summed over rows."""
        return F.cross_entropy(f, y, reduction="sum")

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """Softmax(f) minus the (soft) label, ``[rows, C]``."""
        p = f.softmax(-1)
        return p - y if y.is_floating_point() else p.scatter_add(-1, y.unsqueeze(-1), -torch.ones_like(p[..., :1]))

    def hessian(self, f: Outputs) -> OutputHessian:
        """``diag(p) − p pᵀ``; singular, since probabilities sum to one.

        Its diagonal ``p (1 − p)`` is computed without the difference: where a network is confident, as on its training
        data, ``p − p²`` has no digits left in float32.
        """
        p = f.softmax(-1)
        top = p.argmax(-1, keepdim=True)
        rest = (1 - p).scatter(-1, top, p.scatter(-1, top, 0.0).sum(-1, keepdim=True))
        return OutputHessian(f.shape[-1], diagonal=p, root=p.unsqueeze(-1), sign=-1, total=p * rest)

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """The Cholesky factor of ``diag(p) − p pᵀ`` in closed form, ``[rows, C, C − 1]``: its last column is zero.

        With tails ``q_j = Σ_{i>j} p_i``:  ``L_jj = √(p_j q_j / q_{j−1})``, ``L_ij = −p_i √(p_j / (q_{j−1} q_j))``. The
        tails are sums, never ``1 − Σ p``, so that a confident network loses no digits.

        References
        ----------
        Tanabe & Sagae (1992), "An exact Cholesky decomposition and the generalized inverse of the variance-covariance
        matrix of the multinomial distribution, with applications".
        """
        _check_room(f)
        p = f.softmax(-1)
        from_here = p.flip(-1).cumsum(-1).flip(-1)  # q_{j−1}
        here, before, after = p[:, :-1], from_here[:, :-1], from_here[:, 1:]
        # A tail that underflows is that of classes whose probability does: their entries are zero.
        tiny = torch.finfo(p.dtype).tiny
        ratio = (here / before.clamp(min=tiny)).sqrt()
        below = -(p.unsqueeze(-1) / after.clamp(min=tiny).sqrt().unsqueeze(1)) * ratio.unsqueeze(1)
        lower = torch.ones(p.shape[-1], p.shape[-1] - 1, dtype=torch.bool, device=p.device).tril(-1)
        root = torch.where(lower, below, 0.0)
        root.diagonal(dim1=1, dim2=2).copy_(ratio * after.sqrt())
        return root

    def lazy_root(self, f: Outputs) -> CategoricalRoot:
        """A Cholesky factor in closed form, with the likeliest class of each row first."""
        return CategoricalRoot.of(f.softmax(-1))

    def n_groups(self, n_outputs: int) -> int:
        """C."""
        return n_outputs

    def group_of(self, y: Targets) -> Tensor:
        """The targets themselves."""
        return y

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Softmax(f) minus labels drawn from it, ``[samples, rows, C]``."""
        p = f.softmax(-1)
        if n_samples == 1:  # as multinomial does it, which reads whether probabilities are valid
            labels = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
        else:
            labels = torch.multinomial(p, n_samples, replacement=True, generator=generator)
        each = p.expand(n_samples, *p.shape)
        return each.scatter_add(-1, labels.T.unsqueeze(-1), -torch.ones_like(each[..., :1]))

    def expectation(self, f: Tensor) -> Tensor:
        """Class probabilities, ``[..., C]``."""
        return (f / self.output_temperature).softmax(-1)

    def link(self, name: LinkApprox, n_samples: int, generator: torch.Generator | None) -> Link:
        """To log probabilities, ``[rows, classes]``, of logits divided by the output temperature."""
        link = self.links[name]
        if name is LinkApprox.MC:
            link = partial(link, n_samples=n_samples, generator=generator)
        T = self.output_temperature
        if not isinstance(T, Tensor) and T == 1:
            return link
        return lambda mean, cov: link(mean / T, cov / T**2)

    def average(
        self,
        functions: Iterable[Float[Tensor, "samples rows outputs"]],
        n_samples: int,
        center: Outputs,  # noqa: ARG002 - probabilities are averaged as they are
    ) -> tuple[Tensor, Tensor, Link]:
        """Log of the average probabilities, ``[rows, classes]``."""
        logits = (f / self.output_temperature for f in functions)
        found = softmax.average_softmax(logits, n_samples)
        return found, torch.zeros_like(found), lambda mean, _cov: mean

    def log_doubt(self, f: Tensor) -> Float[Tensor, "*rows"]:
        """At the output temperature."""
        return log_one_minus_max(f / linalg.number(self.output_temperature, f.device, f.dtype))

    def energy_asks(self, alpha: float) -> Ask:
        """Variances are enough for the probit approximation."""
        return Ask.COVARIANCE if alpha * float(self.scale) < 1 else Ask.VARIANCE

    def energy(self, mean: Outputs, cov: Tensor, y: Targets, alpha: float) -> Float[Tensor, " rows"]:
        """In closed form, between a bound and the probit approximation: ``softmax.energy``."""
        return softmax.energy(mean, cov, self.label(y), self.scale, alpha)

    def sampled_energy(
        self, samples: Float[Tensor, "samples rows outputs"], y: Targets, alpha: float
    ) -> Float[Tensor, " rows"]:
        """From samples of the logits."""
        return softmax.sampled_energy(samples, self.label(y), self.scale, alpha)

    @classmethod
    def check_sampled_energy(cls) -> None:
        """It may be."""

    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check class indices ``[batch, *positions]`` (−100: masked) or soft labels; flatten unmasked positions."""
        return self.whole(f, y).selected()

    def whole(self, f: Tensor, y: Tensor) -> Positions:
        """The same; on an accelerator masked positions stay."""
        n_outputs = f.shape[-1]
        if n_outputs == 1:
            msg = (
                'likelihood="classification" is a softmax over one output per class, and the model has one output, '
                'whose softmax is always 1. A model with one logit for two classes is likelihood="binary".'
            )
            raise UnsupportedError(msg)
        flat = f.reshape(-1, n_outputs)
        datum = datum_index(len(f), len(flat), f.device)
        if y.is_floating_point():
            check_same_shape(f, y, "Soft labels (floating-point targets of a classifier)")
            soft = y.reshape(flat.shape).to(f.dtype)
            tolerance = 10 * torch.finfo(y.dtype).eps * n_outputs
            proper = (soft >= 0).all() & ((soft.sum(-1) - 1).abs() <= tolerance).all()  # not where there are NaN
            pending.refuse(
                ~proper,
                InputError,
                lambda: "Soft labels must be non-negative, finite, and sum to one over the classes of each position.",
            )
            check_logits(flat)
            return Positions(flat, soft, datum=datum)
        if y.shape != f.shape[:-1]:
            msg = (
                f"Class indices must have the shape {list(f.shape[:-1])}, one for each output vector of "
                f"{list(f.shape)}; got {list(y.shape)}."
            )
            raise ShapeError(msg)
        if y.dtype is torch.bool or y.is_complex():
            msg = f"Class indices must be integers; got {y.dtype}. Convert them with y.long()."
            raise InputError(msg)
        labels = y.reshape(-1).long()
        masked = labels == IGNORED
        wrong = ((labels < 0) | (labels >= n_outputs)) & ~masked
        given = labels
        pending.refuse(
            wrong.any(),
            InputError,
            lambda least, most: (
                f"Class indices must lie in 0..{n_outputs - 1} (or be {IGNORED} to mask a position); the batch "
                f"has {int(least)}..{int(most)}. Does the model have one output for each class?"
            ),
            lambda: [given.min(), given.max()],
        )
        if pending.is_free(labels.device):
            found = Positions(flat, labels, datum=datum, counted=~masked if bool(masked.any()) else None).selected()
            check_logits(found.f)
            return found
        # Masked rows stay, with probability 1 of their label; no kernel survives indices out of range.
        sure = (torch.arange(n_outputs, device=flat.device) == 0).to(flat.dtype)
        check_logits(torch.where(masked.unsqueeze(-1), sure, flat), ~masked)
        flat = torch.where(masked.unsqueeze(-1), SURE * (1 - sure), flat)
        return Positions(flat, labels.masked_fill(wrong | masked, 0), datum=datum, counted=~masked)

    def tells_axis(self, shape: Sequence[int]) -> bool:
        """Class indices leave out the axis of classes, unless all axes are equally long."""
        return len(set(shape[1:])) > 1

    def hard_targets(self, y: Targets) -> Targets:
        """Class indices, also where probabilities were given."""
        return y.argmax(-1) if y.is_floating_point() else y

    def training_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Cross-entropy."""
        return cross_entropy

    def torch_loss(self) -> tuple[nn.Module, float]:
        """``CrossEntropyLoss`` and 1."""
        return nn.CrossEntropyLoss(reduction="sum"), 1.0

    def count(self, y: Tensor, n_outputs: int) -> int | Tensor:
        """Number of positions that are not masked."""
        return y.numel() // n_outputs if y.is_floating_point() else pending.count((y.long() != IGNORED).sum())


def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    """The mean over unmasked positions, of class indices or probabilities."""
    rows = f.reshape(-1, f.shape[-1])
    if y.is_floating_point():
        return F.cross_entropy(rows, y.reshape(rows.shape))
    labels = y.reshape(-1).long()
    n_unmasked = (labels != IGNORED).sum()
    # A batch without labels says nothing: its mean would be 0/0.
    return F.cross_entropy(rows, labels, ignore_index=IGNORED, reduction="sum") / n_unmasked.clamp(min=1)


def check_logits(f: Outputs, counted: Tensor | None = None) -> None:
    """Raise if outputs are not finite, or probabilities: none is negative, and each row sums to one.

    Log probabilities are logits: their softmax is the probabilities. Rows that are not ``counted`` ``[rows]`` must
    look like probabilities.

    Raises
    ------
    InputError
        If some are not finite.
    UnsupportedError
        If they are probabilities.
    """
    check_outputs(f)
    f = f.detach()[:FEW]
    n_rows = len(f) if counted is None else counted[:FEW].sum()
    # Reading whether one is negative saves the rest, where it costs nothing.
    if len(f) and not (pending.is_free(f.device) and bool((f < 0).any())):
        pending.refuse(
            are_probabilities(f, n_rows),
            UnsupportedError,
            lambda: (
                "The outputs of the model are probabilities: none is negative, and in each row they sum to one. "
                'likelihood="classification" takes logits and applies the softmax itself. Leave out the softmax at the '
                "end of the model, or return log probabilities, which are logits, too."
            ),
        )


def are_probabilities(f: Outputs, n_rows: int | Tensor) -> Tensor:
    """Whether no output is negative and each row sums to one, to the coarsest precision that they can have, ``[]``.

    ``n_rows`` are those that say something.
    """
    # Each probability is rounded once; sums over classes are accumulated in float32 at least.
    off = (f.sum(-1, dtype=torch.promote_types(f.dtype, torch.float32)) - 1).abs().max()
    found = _sums_to_one(off, f, n_rows, f.dtype)
    # From fine to coarse: the coarsest precision in which they are exact decides.
    for dtype in sorted(COARSE, key=lambda dtype: torch.finfo(dtype).eps):
        if torch.finfo(dtype).eps > torch.finfo(f.dtype).eps:
            found = torch.where((f.to(dtype).to(f.dtype) == f).all(), _sums_to_one(off, f, n_rows, dtype), found)
    return found & (f >= 0).all()


def _sums_to_one(off: Tensor, f: Outputs, n_rows: int | Tensor, dtype: torch.dtype) -> Tensor:
    """Whether sums are one in a precision, and in so many rows as not to be so by chance."""
    eps = torch.finfo(dtype).eps
    tolerance = 4 * (eps + min(eps, torch.finfo(torch.float32).eps) * f.shape[-1] ** 0.5)
    return (off <= tolerance) & (n_rows * math.log(tolerance) <= math.log(CHANCE))


def _check_room(f: Outputs) -> None:
    """Raise if all columns of the roots of a batch have no room: beside them two temporaries of their size."""
    n_rows, n_outputs = f.shape
    needed, available = 3 * n_rows * n_outputs * (n_outputs - 1) * f.element_size(), linalg.memory_of(f.device)
    if available is not None and needed > available:
        msg = (
            f"The exact curvature of {n_rows} rows with {n_outputs} classes takes {n_outputs - 1} columns for each, "
            f"about {needed / 1e9:.1f} GB; this device has {available / 1e9:.1f} GB. What takes less: "
            'backend_kwargs={"columns": k} (the k leading columns exactly, the others as one random mixture), '
            'backend_kwargs={"stochastic": True} (one sampled column), diagonal_hessian=True for '
            'hessian_structure="gp", smaller batches, or subset_of_weights="last_layer" with "kron" or "diag".'
        )
        raise UnsupportedError(msg)
