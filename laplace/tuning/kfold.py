"""Cross-validation over prior precisions with fixed features: the head alone is trained again for each fold.

The features of all data are computed once. For each fold and prior the mode of the head's weights given the other folds
is found by Newton's method (``tuning/newton.py``), its curvature by the closed forms of the last layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace.curvature import last_layer
from laplace.enums import CurvatureKind
from laplace.errors import InputError, ShapeError, UnsupportedError
from laplace.likelihoods import AbstractLikelihood, Positions
from laplace.predictive.linearization import FeatureLinearization, Linearization
from laplace.predictive.pushforward import Options
from laplace.prior import GaussianPrior
from laplace.structures import AbstractCurvature, Kron
from laplace.tuning.gridsearch import Loss, Validation
from laplace.tuning.newton import Head, mode
from laplace.types import Features, Scalar, Targets


@dataclass(frozen=True)
class HeadData:
    """What a last layer sees of the training data.

    Attributes
    ----------
    phi
        Features, ``[rows, D]``, one row an unmasked position.
    y
        Targets of the same rows.
    bias
        Whether the layer has a bias.
    datum
        Which datum each row belongs to, ``[rows]``; ``None`` when every datum is one row.
    """

    phi: Features
    y: Targets
    bias: bool
    datum: Int[Tensor, " rows"] | None = None

    @classmethod
    def collect(cls, data: Validation, dtype: torch.dtype) -> HeadData:
        """From the training data after their one forward pass.

        Parameters
        ----------
        data
            The data, linearized in the weights of a last layer.
        dtype
            To compute in.

        Raises
        ------
        UnsupportedError
            If other weights are random as well, or targets compare inputs.
        """
        phis, targets, index, n_data, bias = [], [], [], 0, False
        for get, positions in data.batches:
            inputs = get()
            if not isinstance(inputs, FeatureLinearization):
                msg = (
                    "Cross-validation trains the last layer again from its features: it needs "
                    'subset_of_weights="last_layer" and a target for each input (no reward modeling). Use '
                    'method="marglik", or validation data (method="gridsearch").'
                )
                raise UnsupportedError(msg)
            bias = inputs.bias
            phis.append(positions.select(inputs.phi).to(dtype))
            targets.append(positions.to(dtype).y)
            rows = torch.arange(len(positions.f), device=positions.f.device)
            index.append(n_data + (rows if positions.datum is None else positions.datum))
            n_data += len(inputs.f)
        return cls(torch.cat(phis), torch.cat(targets), bias, torch.cat(index))

    def rows(self, index: Int[Tensor, " chosen"]) -> tuple[Features, Targets]:
        """Features and targets of some rows.

        Parameters
        ----------
        index
            Which.
        """
        return self.phi[index], self.y[index]

    def folds(
        self, n_folds: int, generator: torch.Generator
    ) -> Iterator[tuple[Int[Tensor, " train"], Int[Tensor, " held"]]]:
        """Split the data at random into folds of equal size (up to one datum).

        Parameters
        ----------
        n_folds
            How many.
        generator
            Source of the order.

        Yields
        ------
        Rows of the other folds and of the fold, ascending. All positions of a datum are in the same fold.

        Raises
        ------
        InputError
            If there are fewer than two folds, or fewer data than folds.
        """
        if self.datum is None:
            datum, n_data = torch.arange(len(self.phi), device=self.phi.device), len(self.phi)
        else:
            known, datum = self.datum.unique(return_inverse=True)
            n_data = len(known)
        if not 2 <= n_folds <= n_data:
            msg = (
                f"Cross-validation needs at least 2 folds and a datum with a target for each; got n_folds={n_folds} "
                f"for {n_data} data. Pass n_folds between 2 and {n_data}, or more data."
            )
            raise InputError(msg)
        order = torch.randperm(n_data, generator=generator, device=generator.device).to(datum.device)
        for fold in order.tensor_split(n_folds):
            held = torch.zeros(n_data, dtype=torch.bool, device=datum.device).index_fill(0, fold, True)[datum]
            yield (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)


@dataclass(frozen=True)
class HeadBackend:
    """The curvature of a head at some weights, as a structure asks for it; inputs are features.

    Attributes
    ----------
    head
        Likelihood and shape; its features are not used.
    theta
        The weights, ``[P]``.
    """

    head: Head
    theta: Float[Tensor, " params"]

    def full(self, x: Features, y: Targets) -> tuple[Scalar, Float[Tensor, "params params"]]:
        """Negative log-likelihood and dense curvature."""
        f = self.head.outputs(self.theta, x)
        matrix = last_layer.full(x, self.head.likelihood.hessian(f), self.head.bias)
        return self.head.likelihood.nll(f, y), matrix

    def diag(self, x: Features, y: Targets) -> tuple[Scalar, Float[Tensor, " params"]]:
        """Negative log-likelihood and diagonal."""
        f = self.head.outputs(self.theta, x)
        vector = last_layer.diag(x, self.head.likelihood.hessian(f), self.head.bias)
        return self.head.likelihood.nll(f, y), vector

    def kron(self, x: Features, y: Targets, N: int) -> tuple[Scalar, Kron]:
        """Negative log-likelihood and Kronecker factors, raw sums in float64 for ``N=1``."""
        assert N == 1, "structures ask for raw sums"
        f = self.head.outputs(self.theta, x)
        wide = x.dtype if x.device.type == "mps" else torch.float64  # which that device does not have
        factors = last_layer.kron(x.to(wide), self.head.likelihood.hessian(f.to(wide)), self.head.bias)
        return self.head.likelihood.nll(f, y), factors

    def count(self, y: Targets) -> int:
        """Number of rows."""
        return len(y)


def cross_validation_scores(
    data: HeadData,
    priors: Sequence[GaussianPrior],
    likelihood: AbstractLikelihood,
    structure: type[AbstractCurvature],
    options: Options,
    loss: Loss | None = None,
    *,
    n_folds: int = 5,
    generator: torch.Generator | None = None,
    initial: Float[Tensor, " params"] | None = None,
    **structure_options: Any,
) -> Float[Tensor, " priors"]:
    """Score priors over a last layer by k-fold cross-validation, with the features as they are.

    The features have seen all the data: the network was trained on them, held-out folds included. So the score is
    optimistic, the more the longer the network was trained, and it favors weak priors. Validation data that training
    never saw (``method="gridsearch"``) have no such fault; this is for where there are none, and never the default.

    Parameters
    ----------
    data
        Features and targets of the training data.
    priors
        The grid, over the weights of the head.
    likelihood
        With its noise and temperature.
    structure
        Of the curvature: one of ``STRUCTURES``.
    options
        How to predict. Its generator is not used.
    loss
        As in ``Validation.score``; averaged over folds by their rows. ``None`` for the mean negative log predictive
        density.
    n_folds
        Number of folds, at least 2.
    generator
        Source of the folds and of sampled predictions; each prior meets the same folds and random numbers. A
        generator with seed 0 when ``None``: the global one is left alone.
    initial
        Weights of the head to start from, ``[P]``; the prior mean when ``None``. They change the time, not the result.
    **structure_options
        Of the structure: ``damping``.

    Returns
    -------
    ``[priors]``, float64, to minimize; by default nats a position.

    Raises
    ------
    InputError
        If there are fewer than two folds, or fewer data than folds.
    ShapeError
        If the priors are not over the weights of a head with these features.
    UnsupportedError
        If targets compare inputs.

    Warns
    -----
    NumericalWarning
        If the weights of a fold did not reach their optimum.

    Notes
    -----
    Exact for the head: each fold's weights are the mode under that prior, its curvature the generalized Gauss–Newton
    matrix there. One fold and prior costs a few Newton steps from the weights of the next stronger prior (see
    ``newton.mode``), one curvature, its factorization, and the prediction of the fold.

    References
    ----------
    Stone (1974), "Cross-validatory choice and assessment of statistical predictions".
    """
    n_outputs = _count_outputs(data, priors, likelihood)
    source = torch.Generator().manual_seed(0) if generator is None else generator
    folds = list(data.folds(n_folds, source))
    seeds = torch.randint(2**62, (n_folds,), generator=source, device=source.device).tolist()
    totals = torch.zeros(len(priors), dtype=torch.float64)
    # From strong priors, whose modes are near, to weak ones: each starts at the mode of the one before.
    strongest_first = sorted(range(len(priors)), key=lambda index: -float(priors[index].logdet()))
    for (train, held), seed in zip(folds, seeds, strict=True):
        (phi, y), (held_phi, held_y) = data.rows(train), data.rows(held)
        theta = initial
        for index in strongest_first:
            head = Head(phi, y, data.bias, likelihood, priors[index], n_outputs)
            theta = mode(head, theta)
            _, curvature = structure.from_batch(HeadBackend(head, theta), phi, y)
            curvature = curvature * likelihood.curvature_scale(CurvatureKind.GGN)
            inputs = FeatureLinearization(head.outputs(theta, held_phi), held_phi, data.bias)
            held_out = Validation([(partial(_same, inputs), Positions(inputs.f, held_y))])
            drawn = replace(options, generator=torch.Generator(phi.device).manual_seed(seed))
            precision = curvature.posterior(priors[index], **structure_options)
            totals[index] += len(held) * held_out.score(precision, likelihood, drawn, loss, phi.dtype)
    return totals / len(data.phi)


def _count_outputs(data: HeadData, priors: Sequence[GaussianPrior], likelihood: AbstractLikelihood) -> int:
    """C, from the number of weights; everything checked before any work."""
    if likelihood.n_items > 1:
        msg = (
            "Cross-validation trains a head on one row a target; targets of reward modeling compare two inputs. Use "
            'method="marglik", or validation data (method="gridsearch").'
        )
        raise UnsupportedError(msg)
    width = data.phi.shape[1] + int(data.bias)
    sizes = {prior.n_params for prior in priors}
    if len(sizes) != 1 or (n_params := sizes.pop()) % width:
        msg = (
            f"Priors must be over the weights of one head: a multiple of {width} weights for {data.phi.shape[1]} "
            f"features {'and a bias' if data.bias else 'without bias'}; got {[prior.n_params for prior in priors]}."
        )
        raise ShapeError(msg)
    return n_params // width


def _same(inputs: Linearization) -> Linearization:
    """What is known already."""
    return inputs
