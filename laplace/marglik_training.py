"""``marglik_training``: train the weights of a network together with its prior and its observation noise.

Between epochs of ordinary training a Laplace approximation is fitted, and the hyperparameters climb its log marginal
likelihood. The formulas are in ``baselaplace/`` and what it imports; weights are trained in ``tuning/weights.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import trange

from laplace import checks, linalg
from laplace.baselaplace import BaseLaplace, ParametricLaplace
from laplace.baselaplace.described import described_by
from laplace.baselaplace.keywords import BackendKeywords
from laplace.curvature import CurvatureInterface
from laplace.enums import HessianStructure, Likelihood, PriorStructure, SubsetOfWeights, choose
from laplace.errors import InputError, UnsupportedError
from laplace.laplace import Laplace
from laplace.likelihoods import LikelihoodLike
from laplace.network import WholeNetwork, iterate
from laplace.network.outputs import Reading
from laplace.prior import GaussianPrior, fix_prior_prec_structure
from laplace.tuning.weights import (
    MAPObjective,
    Snapshot,
    make_optimizer,
    make_scheduler,
    train_epoch,
    trained_in_place,
)
from laplace.types import HessianStructureLike, PriorStructureLike


@described_by(BaseLaplace)
@linalg.lasting
def marglik_training(
    model: nn.Module,
    train_loader: Iterable[Any],
    likelihood: LikelihoodLike = Likelihood.CLASSIFICATION,
    hessian_structure: HessianStructureLike = HessianStructure.KRON,
    backend: type[CurvatureInterface] | CurvatureInterface | None = None,
    optimizer_cls: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    optimizer_kwargs: dict[str, Any] | None = None,
    scheduler_cls: Callable[..., LRScheduler] | None = None,
    scheduler_kwargs: dict[str, Any] | None = None,
    n_epochs: int = 300,
    lr_hyp: float = 1e-1,
    prior_structure: PriorStructureLike = PriorStructure.LAYERWISE,
    n_epochs_burnin: int = 0,
    n_hypersteps: int = 10,
    marglik_frequency: int = 1,
    prior_prec_init: float | Tensor = 1.0,
    sigma_noise_init: float | Tensor = 1.0,
    temperature: float = 1.0,
    fix_sigma_noise: bool = False,
    progress_bar: bool = False,
    enable_backprop: bool = False,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
    *,
    prior_mean: float | Tensor = 0.0,
    backend_kwargs: BackendKeywords | None = None,
    asdl_fisher_kwargs: dict[str, Any] | None = None,
    curvature_dtype: torch.dtype | None = None,
    output_key: str | int | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    output_dim: int | None = None,
    shift_labels: bool | None = None,
) -> tuple[ParametricLaplace, nn.Module, list[float], list[float]]:
    """Train weights and hyperparameters together, by the log marginal likelihood of the training data alone.

    Batch by batch the weights minimize ``s · nll + ½ (θ − μ₀)ᵀ diag(δ) (θ − μ₀)`` with s = 1/(σ² T). After an epoch a
    Laplace approximation of all weights is fitted, and log δ and log σ take steps of Adam up its evidence. What is
    returned are the weights and hyperparameters with the largest evidence seen. So the training data choose the prior,
    the end of training and, of several networks, the architecture; none are set aside for validation.

    Parameters
    ----------
    model
        The network. **It is trained in place**: its buffers and its weights that require a gradient end as those with
        the largest evidence. In evaluation mode it is put into training mode; in training mode it is taken as it is.
    train_loader
        Yields ``(x, y)``, ``(x1, …, xk, y)`` or mappings, anew in every epoch: a ``DataLoader``, a list of batches, …
        Its rows are counted by one pass before training.
    hessian_structure
        How the curvature of the weights is stored: any structure of ``Laplace`` but ``"gp"``.
    optimizer_cls, optimizer_kwargs
        A class of ``torch.optim``, called with the weights and these keywords. Its ``step`` is given a closure, so that
        LBFGS works. It must not decay weights: the prior does.
    scheduler_cls, scheduler_kwargs
        A class of ``torch.optim.lr_scheduler``, called with the optimizer and these keywords; steps after each batch.
    n_epochs
        Number of passes over the data.
    lr_hyp
        Learning rate of Adam for log δ and log σ.
    prior_structure
        One precision (``"scalar"``), one per parameter group (``"layerwise"``) or, except with Kronecker factors,
        one per weight (``"diag"``).
    n_epochs_burnin, marglik_frequency
        Epochs are counted from 1; those that are multiples of the frequency, and not below the burn-in, end with a fit.
    n_hypersteps
        Steps of the hyperparameters after each fit.
    prior_prec_init
        δ to start from, in 1/weight²: one value, or as many as the prior structure has.
    sigma_noise_init
        σ to start from, in target units; regression only.
    temperature
        T of the tempered likelihood ``p(y|f)^(1/T)``, in training as in the evidence.
    fix_sigma_noise
        Keep σ.
    progress_bar
        Show a progress bar over epochs.
    enable_backprop
        Keep predictions of the returned approximation differentiable with respect to the inputs.
    prior_mean
        μ₀: a scalar, or one value per weight.

    Returns
    -------
    la
        The approximation that was fitted at the returned weights, with the best hyperparameters.
    model
        The object that was passed.
    margliks
        The *negative* log marginal likelihood in nats before each step of the hyperparameters, ``n_hypersteps`` numbers
        per fit. None is below that of ``la``: hyperparameters after the last step of a fit count as seen, too.
    losses
        The objective of the weights, one number per epoch: averaged over rows while the weights moved, in the units of
        the usual loss (mean squared error or cross-entropy, the prior's part in the same units).

    Raises
    ------
    InputError
        If data are empty, not valid, or can be read once only; if a number is not valid; if weights, loss or evidence
        become infinite or NaN.
    UnsupportedError
        If options do not exist or do not fit together.
    ShapeError
        If prior, outputs and targets do not fit together.

    Notes
    -----
    If training fails, weights and buffers are what they were before; modes and gradients are restored on every exit.
    Random numbers are drawn by the loader, the model and back ends that sample, and by nothing else.

    A model that is linear in its weights, with a Gaussian likelihood and the full structure, ends at the maximum of its
    evidence if training converges. Beside training, each fit costs what ``fit`` does and ``n_hypersteps + 1`` times
    ``log_marginal_likelihood``. Memory: two copies of the weights, and two curvatures.

    References
    ----------
    Immer, Bauer, Fortuin, Rätsch & Khan (2021), "Scalable marginal likelihood estimation for model selection in deep
    learning", algorithm 1. arXiv:2104.04975
    """
    checks.loader("train_loader", train_loader)
    _check_epochs(n_epochs, n_epochs_burnin, n_hypersteps, marglik_frequency)
    checks.flags(fix_sigma_noise=fix_sigma_noise, progress_bar=progress_bar)
    optimizer_kwargs = checks.keywords("optimizer_kwargs", optimizer_kwargs)
    scheduler_kwargs = checks.keywords("scheduler_kwargs", scheduler_kwargs)
    lr_hyp = checks.number("lr_hyp", lr_hyp, from_zero=True)  # with 0 they stay as they are
    prior_structure = choose(PriorStructure, prior_structure, "prior_structure")
    _check_again_readable(train_loader)
    if choose(HessianStructure, hessian_structure, "hessian_structure") is HessianStructure.GP:
        msg = (
            'marglik_training takes a structure over weights; hessian_structure="gp" is the posterior of a subset of '
            'the data. Use "kron", "diag" or "full".'
        )
        raise UnsupportedError(msg)
    further = {} if asdl_fisher_kwargs is None else {"asdl_fisher_kwargs": asdl_fisher_kwargs}
    approximation = partial(
        Laplace,
        model,
        likelihood,
        SubsetOfWeights.ALL,
        hessian_structure,
        prior_mean=prior_mean,
        temperature=temperature,
        enable_backprop=enable_backprop,
        dict_key_x=dict_key_x,
        dict_key_y=dict_key_y,
        backend=backend,
        backend_kwargs=backend_kwargs,
        curvature_dtype=curvature_dtype,
        output_key=output_key,
        output_fn=output_fn,
        output_dim=output_dim,
        shift_labels=shift_labels,
        **further,
    )
    # Estimators and back end check the options: here, before anything is trained.
    la = approximation(sigma_noise=sigma_noise_init, prior_precision=prior_prec_init)
    hyper = _Hyperparameters(la, prior_structure, lr_hyp, fix_sigma_noise)
    la = approximation(**hyper.named())
    device = la.backend.params[0].device
    reading = Reading.of(output_key, output_fn, output_dim)
    network = WholeNetwork(model, dict_key_x=dict_key_x, dict_key_y=dict_key_y, reading=reading)
    keys: dict[str, Any] = {"dict_key_x": dict_key_x, "dict_key_y": dict_key_y, "shift_labels": shift_labels}
    batches = partial(iterate, train_loader, **keys, device=device)
    optimizer = make_optimizer(network.subset.parameters, optimizer_cls, optimizer_kwargs)
    scheduler = make_scheduler(optimizer, scheduler_cls, scheduler_kwargs)
    n_rows = sum(len(batch.y) for batch in batches())
    if not n_rows:
        msg = "The training loader is empty: there is nothing to learn from."
        raise InputError(msg)

    margliks: list[float] = []
    losses: list[float] = []
    best: _Best | None = None
    with trained_in_place(model):
        bar = trange(1, n_epochs + 1, desc="[Training by the marginal likelihood]", disable=not progress_bar)
        for epoch in bar:
            sigma_noise, prior_precision = hyper.values()
            noisy = la.likelihood_.at(sigma_noise, la.temperature, 1.0)
            prior = GaussianPrior(la.prior_mean, prior_precision, network.subset.sizes)
            losses.append(train_epoch(MAPObjective(network, noisy, prior, n_rows), batches(), optimizer, scheduler))
            if epoch >= n_epochs_burnin and epoch % marglik_frequency == 0:
                la = approximation(**hyper.named())
                la.fit(train_loader)
                seen, evidence = hyper.ascend(la, n_hypersteps)
                margliks += [-value for value in seen]
                if best is None or evidence > best.evidence:
                    best = _Best(evidence, la, Snapshot(model))
            bar.set_postfix(loss=losses[-1], evidence=math.nan if best is None else best.evidence, refresh=False)
        assert best is not None, "some epoch ends with a fit"
        best.snapshot.restore()
    return best.la, model, margliks, losses


class _Hyperparameters:
    """Logarithms of prior precision and noise, and their optimizer, which keeps its state from fit to fit."""

    def __init__(self, la: ParametricLaplace, structure: PriorStructureLike, lr: float, fixed_noise: bool) -> None:
        start = la.prior_precision.detach()
        shape = la.n_layers, la.n_params, start.device, start.dtype
        self._log_precision = fix_prior_prec_structure(start, structure, *shape).log().requires_grad_()
        self._log_sigma = la.sigma_noise.detach().log()
        moving = [self._log_precision]
        if "sigma_noise" in la.likelihood_.hyperparameters and not fixed_noise:
            moving.append(self._log_sigma.requires_grad_())
        self._optimizer = torch.optim.Adam(moving, lr=lr, maximize=True)

    def values(self) -> tuple[Tensor, Tensor]:
        """The present σ and δ."""
        return self._log_sigma.detach().exp(), self._log_precision.detach().exp()

    def named(self) -> dict[str, Tensor]:
        """The present σ and δ as keywords of an estimator."""
        sigma_noise, prior_precision = self.values()
        return {"sigma_noise": sigma_noise, "prior_precision": prior_precision}

    def ascend(self, la: ParametricLaplace, n_steps: int) -> tuple[list[float], float]:
        """Climb the evidence and leave ``la`` at the best values: the evidence before each step and the largest one."""
        seen: list[float] = []
        best, best_values = -math.inf, self.values()
        for step in range(n_steps + 1):
            evidence = la.log_marginal_likelihood(self._log_precision.exp(), self._log_sigma.exp())
            seen.append(float(evidence.detach()))
            if not math.isfinite(seen[-1]):
                msg = (
                    f"The log marginal likelihood became {seen[-1]}. Lower lr_hyp, start from another prior_prec_init "
                    "or sigma_noise_init, or let the weights settle before the first fit (n_epochs_burnin)."
                )
                raise InputError(msg)
            if seen[-1] > best:
                best, best_values = seen[-1], self.values()
            if step < n_steps:
                self._optimizer.zero_grad()
                evidence.backward()
                self._optimizer.step()
        la.sigma_noise, la.prior_precision = best_values
        return seen[:-1], best


@dataclass(frozen=True)
class _Best:
    """The largest evidence seen, its approximation, and the weights at which that was fitted."""

    evidence: float
    la: ParametricLaplace
    snapshot: Snapshot


def _check_epochs(n_epochs: int, n_epochs_burnin: int, n_hypersteps: int, marglik_frequency: int) -> None:
    """Raise unless the numbers are valid and some epoch ends with a fit."""
    for name, value, least in (
        ("n_epochs", n_epochs, 1),
        ("n_epochs_burnin", n_epochs_burnin, 0),
        ("n_hypersteps", n_hypersteps, 1),
        ("marglik_frequency", marglik_frequency, 1),
    ):
        checks.whole(name, value, least)
    last_fit = n_epochs - n_epochs % marglik_frequency
    if last_fit < max(n_epochs_burnin, 1):
        msg = (
            f"With n_epochs={n_epochs}, n_epochs_burnin={n_epochs_burnin} and marglik_frequency={marglik_frequency} no "
            "epoch ends with a fit, so that no hyperparameter would be learned. Train longer, or fit earlier."
        )
        raise InputError(msg)


def _check_again_readable(loader: Any) -> None:
    """Raise if a loader is an iterator."""
    if isinstance(loader, Iterator):
        msg = (
            "train_loader is read in every epoch and again for every fit, and an iterator "
            f"({type(loader).__name__}) can be read once only. Pass a DataLoader, or a list of batches."
        )
        raise InputError(msg)
