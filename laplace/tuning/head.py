"""A last layer trained again: its features and targets, and the posterior around its mode under any prior.

What cross-validation and refitted leave-one-out scores share. The features are computed once and never change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.curvature import last_layer
from laplace.enums import CurvatureKind, HessianStructure
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.fit import Fit
from laplace.likelihoods import AbstractLikelihood, OutputHessian, Positions
from laplace.predictive import Linearization, NetworkLinearization
from laplace.prior import GaussianPrior
from laplace.structures import AbstractCurvature, AbstractPrecision, Kron
from laplace.structures.accumulate import SAME
from laplace.structures.wide_kron import WideKron
from laplace.tuning.cached import CachedData
from laplace.tuning.newton import Head, mode
from laplace.types import Features, Outputs, Scalar, Targets


@dataclass(frozen=True)
class HeadData:
    """What a last layer sees of the training data."""

    phi: Features
    """Features, ``[rows, D]``, one row per unmasked position."""
    y: Targets
    """Targets of the same rows."""
    shapes: Sequence[tuple[int, ...]]
    """Shapes of its parameter groups, ``(C, D)`` and, with a bias, ``(C,)``."""
    datum: Int[Tensor, " rows"] | None = None
    """Which datum each row belongs to, ``[rows]``; ``None`` when every datum is one row."""

    @classmethod
    def collect(cls, data: CachedData, dtype: torch.dtype) -> HeadData:
        """From the training data after their one forward pass."""
        phis, targets, index, n_data, shapes = [], [], [], 0, ()
        for get, positions in data.batches:
            inputs = get()
            if not (isinstance(inputs, NetworkLinearization) and inputs.is_linear):
                msg = (
                    "To train the last layer again from its features takes "
                    'subset_of_weights="last_layer" and a target for each input (no reward modeling). Use '
                    'method="marglik", or validation data (method="gridsearch").'
                )
                raise UnsupportedError(msg)
            shapes = [block.shape for block in inputs.head]
            phis.append(positions.select(inputs.head[0].phi).to(dtype))
            targets.append(positions.to(dtype).y)
            rows = torch.arange(len(positions.f), device=positions.f.device)
            index.append(n_data + (rows if positions.datum is None else positions.datum))
            n_data = int(index[-1].max()) + 1 if len(index[-1]) else n_data
        return cls(torch.cat(phis), torch.cat(targets), shapes, torch.cat(index))

    def followed_by(self, other: HeadData) -> HeadData | None:
        """The rows of both; ``None`` where targets are of two kinds."""
        if (self.y.dim(), self.y.dtype) != (other.y.dim(), other.y.dtype):
            return None
        start = 0 if self.datum is None or not len(self.datum) else int(self.datum.max()) + 1
        indices = [torch.arange(len(d.phi), device=d.phi.device) if d.datum is None else d.datum for d in (self, other)]
        datum = torch.cat([indices[0], indices[1] + start])
        return HeadData(torch.cat([self.phi, other.phi]), torch.cat([self.y, other.y]), self.shapes, datum)

    def to(self, like: Tensor) -> HeadData:
        """In another precision, on another device."""
        y = self.y.to(like) if self.y.is_floating_point() else self.y.to(like.device)
        datum = None if self.datum is None else self.datum.to(like.device)
        return HeadData(self.phi.to(like), y, self.shapes, datum)

    def rows(self, index: Int[Tensor, " chosen"]) -> HeadData:
        """Some of the rows."""
        return HeadData(self.phi[index], self.y[index], self.shapes, None if self.datum is None else self.datum[index])

    def outputs(self, theta: Float[Tensor, " params"]) -> Outputs:
        """What a head predicts of them, ``[rows, C]``."""
        zeros = self.phi.new_zeros(len(self.phi), self.shapes[0][0])
        return NetworkLinearization.of_head(zeros, self.phi, self.shapes).with_weights(theta.to(self.phi)).f

    def at(self, f: Outputs) -> CachedData:
        """The data with outputs of their own, as other weights of the head give them."""
        inputs = NetworkLinearization.of_head(f, self.phi, self.shapes)
        return CachedData([(partial(same, inputs), Positions(f, self.y, datum=self.datum))])


@dataclass(frozen=True)
class HeadBackend:
    """The curvature of a head at some weights, as a structure asks for it; inputs are features."""

    head: Head
    """Likelihood and shape; its features are not used."""
    theta: Float[Tensor, " params"]
    """The weights, ``[P]``."""
    is_sampled = False

    def hessian(self, f: Outputs, y: Targets) -> OutputHessian:
        """Of the rows in their outputs."""
        return self.head.likelihood.hessian(self.head.likelihood.observed(f, y))

    def full(self, x: Features, y: Targets) -> tuple[Scalar, Float[Tensor, "params params"]]:
        """Negative log-likelihood and dense curvature."""
        f = self.head.outputs(self.theta, x)
        matrix = last_layer.full(self.head.blocks(x), self.hessian(f, y))
        return self.head.likelihood.nll(f, y), matrix

    def diag(self, x: Features, y: Targets) -> tuple[Scalar, Float[Tensor, " params"]]:
        """Negative log-likelihood and diagonal."""
        f = self.head.outputs(self.theta, x)
        vector = last_layer.diag(self.head.blocks(x), self.hessian(f, y))
        return self.head.likelihood.nll(f, y), vector

    def kron(self, x: Features, y: Targets, N: int) -> tuple[Scalar, Kron | WideKron]:
        """Negative log-likelihood and Kronecker factors, raw sums in float64 for ``N=1``."""
        assert N == 1, "structures ask for raw sums"
        f = self.head.outputs(self.theta, x)
        wide = x.dtype if x.device.type == "mps" else torch.float64  # which that device does not have
        factors = last_layer.kron(self.head.blocks(x.to(wide)), self.hessian(f.to(wide), y))
        return self.head.likelihood.nll(f, y), factors

    def blockdiag(self, x: Features, y: Targets) -> tuple[Scalar, list[Tensor]]:
        """Negative log-likelihood and the blocks of weight and bias."""
        f = self.head.outputs(self.theta, x)
        blocks = last_layer.blockdiag(self.head.blocks(x), self.hessian(f, y))
        return self.head.likelihood.nll(f, y), blocks

    def ekfac(
        self,
        x: Features,
        y: Targets,
        basis: Sequence[Sequence[Tensor | None]],
        shapes: Sequence[tuple[int, ...]],  # noqa: ARG002 - those of the head
    ) -> tuple[Scalar, list[Tensor]]:
        """Negative log-likelihood and the diagonal of the curvature in a basis."""
        f = self.head.outputs(self.theta, x)
        diagonals = last_layer.ekfac(self.head.blocks(x), self.hessian(f, y), basis)
        return self.head.likelihood.nll(f, y), diagonals

    def lowrank(self, x: Features, y: Targets, directions: Tensor) -> tuple[Scalar, Tensor, Tensor | None]:
        """Negative log-likelihood, products of the curvature with directions ``[P, k]``, and its trace."""
        f = self.head.outputs(self.theta, x)
        found = last_layer.lowrank(self.head.blocks(x), self.hessian(f, y), directions)
        return self.head.likelihood.nll(f, y), *found

    def zeros(self) -> Float[Tensor, " params"]:
        """As many zeros as there are weights."""
        return torch.zeros_like(self.theta)

    def repeatable(
        self,
        batches: Iterable[tuple[Any, Tensor]],
        structure: HessianStructure,  # noqa: ARG002 - any
    ) -> Iterable[tuple[Any, Tensor]]:
        """Features are there as often as they are asked for."""
        return batches

    def count(self, y: Targets) -> int:
        """Number of rows."""
        return len(y)


ROWS_AT_ONCE = 4096
"""Rows of a batch of features."""


def fit_at(
    fit: Fit,
    data: HeadData,
    theta: Float[Tensor, " params"],
    likelihood: AbstractLikelihood,
    structure: type[AbstractCurvature],
) -> Fit:
    """What ``fit`` would have learned if the model had other weights in its last layer; features do not change."""
    prior = GaussianPrior(theta.new_zeros(()), theta.new_ones(1), tuple(math.prod(shape) for shape in data.shapes))
    data = data.to(theta)
    head = Head(data.phi, data.y, data.shapes, likelihood, prior)
    batches = list(zip(data.phi.split(ROWS_AT_ONCE), data.y.split(ROWS_AT_ONCE), strict=True))
    found = structure.accumulate(HeadBackend(head, theta), batches)
    assert found is not None, "there are rows"
    nll = sum((likelihood.nll_by_output(head.outputs(theta, phi), y) for phi, y in batches), torch.zeros(()).to(theta))
    trained = fit.mean if fit.trained is None else fit.trained
    by_output = nll if nll.dim() else None
    moved = replace(fit, mean=theta, curvature=found[1], nll=nll.sum(), output_nll=by_output, trained=trained)
    return replace(moved, averaged=False)


def fit_at_own(fit: Fit, data: HeadData, likelihood: AbstractLikelihood, structure: type[AbstractCurvature]) -> Fit:
    """The fit at the model's own head, wherever it is now."""
    if fit.trained is None:
        return fit
    return replace(fit_at(fit, data, fit.trained, likelihood, structure), trained=None)


def posteriors(
    data: HeadData,
    priors: Sequence[GaussianPrior],
    likelihood: AbstractLikelihood,
    structure: type[AbstractCurvature],
    initial: Float[Tensor, " params"] | None = None,
    **options: Any,
) -> Iterator[tuple[int, Head, Float[Tensor, " params"], AbstractPrecision]]:
    """Yield which prior, the head, its mode ``[P]`` and the posterior there, from strong priors to weak ones."""
    check_priors(data, priors, likelihood)
    theta, n_outputs = initial, data.shapes[0][0]
    for index in sorted(range(len(priors)), key=lambda index: -float(priors[index].logdet())):
        head = Head(data.phi, data.y, data.shapes, likelihood, priors[index])
        theta = mode(head, theta)
        nll, curvature = structure.from_batch(HeadBackend(head, theta), data.phi, data.y)
        fit = Fit(theta, curvature, nll, len(data.phi), len(data.phi), n_outputs, head=data.shapes)
        scaled = fit.scaled(likelihood.curvature_scale(CurvatureKind.GGN))
        yield index, head, theta, scaled.posterior(priors[index], **options)


def check_priors(data: HeadData, priors: Sequence[GaussianPrior], likelihood: AbstractLikelihood) -> None:
    """Raise unless priors are over the weights of the head."""
    likelihood.check_rows()
    n_params = sum(math.prod(shape) for shape in data.shapes)
    if {prior.n_params for prior in priors} != {n_params}:
        msg = (
            f"Priors must be over the weights of one head, {n_params} in parameter groups of the shapes "
            f"{list(map(list, data.shapes))}; got {[prior.n_params for prior in priors]}."
        )
        raise ShapeError(msg)


def check_same_data(fit: Fit, data: HeadData, likelihood: AbstractLikelihood) -> None:
    """Raise unless training data are those that ``fit`` had."""
    nll = likelihood.nll(data.outputs(fit.mean), data.y)
    if len(data.phi) == fit.n_positions and bool((nll - fit.nll).abs() <= SAME * fit.nll.abs().clamp(min=1)):
        return
    msg = (
        f"train_loader yields other data than fit had: {len(data.phi)} targets with a negative log-likelihood of "
        f"{float(nll):.6g}, where fit had {fit.n_positions} with {float(fit.nll):.6g}. Pass the loader that fit had, "
        "without augmentation and with all of its rows (no drop_last=True)."
    )
    raise InputError(msg)


def same(inputs: Linearization) -> Linearization:
    """What is known already, where a function that computes it is asked for."""
    return inputs
