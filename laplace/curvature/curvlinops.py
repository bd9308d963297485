"""Curvature by curvlinops (``backend=CurvlinopsGGN``, ``CurvlinopsEF``, ``CurvlinopsHessian``).

The package gives matrices as linear operators; a dense matrix is the product with the identity, a few columns at a
time. ``pip install laplace-posthoc[curvlinops]``.

References
----------
Dangel, Eschenhagen, Ormaniec, Fernandez, Tatzel & Kristiadi (2025), "Position: curvature matrices should be
democratized via linear operators", arXiv:2501.19183.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace.curvature.curvature import EFInterface, GGNInterface
from laplace.curvature.package import PackageInterface, mixing
from laplace.curvature.private_batch import PrivateBatch
from laplace.enums import HessianStructure, KfacApprox, Likelihood, choose
from laplace.errors import InputError, ModelError, UnsupportedError
from laplace.likelihoods import Positions, with_loss
from laplace.network.batches import count_rows, rows_of
from laplace.optional import require
from laplace.types import Inputs, Jacobians

COLUMNS_AT_ONCE = 64
"""Columns to which an operator is applied together: they are vectorized, and each takes the memory of a pass."""

SYMMETRY = 1e-3
"""Asymmetry of a Hessian, relative to its size along two directions, that is not rounding."""


class CurvlinopsInterface(PackageInterface):
    """What curvlinops computes for all matrices: products with linear operators, and Jacobians."""

    package: ClassVar[str] = "curvlinops"
    extra: ClassVar[str] = "curvlinops"
    likelihoods: ClassVar[frozenset[Likelihood]] = with_loss(nn.CrossEntropyLoss, nn.MSELoss, compared=True)

    @classmethod
    def known_layers(cls, structure: HessianStructure | None) -> frozenset[type[nn.Module]] | None:
        """Any layer; for Kronecker factors linear layers and two-dimensional convolutions."""
        return frozenset({nn.Linear, nn.Conv2d}) if structure is HessianStructure.KRON else None

    @classmethod
    def objection(cls, structure: HessianStructure | None, layer: Any, x: Tensor) -> str | None:  # noqa: ARG003
        """Factors of grouped convolutions and of other padding than zeros would be wrong."""
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
            return "Kronecker factors of convolutions are those without groups, with zeros for padding"
        return None

    def _jacobians(self, batch: PrivateBatch) -> Jacobians:
        eye = torch.eye(batch.f.shape[1], dtype=batch.f.dtype, device=batch.f.device)
        return torch.cat(list(self._pull_back(batch, eye.expand(len(batch.f), -1, -1))))

    def _gradients(self, batch: PrivateBatch) -> Float[Tensor, "rows params"]:
        gradient = self.output_likelihood.gradient(batch.f, batch.y).unsqueeze(-1)
        return torch.cat(list(self._pull_back(batch, gradient))).squeeze(1)

    def _pull_back(
        self, batch: PrivateBatch, columns: Float[Tensor, "rows outputs columns"]
    ) -> Iterator[Float[Tensor, "some columns params"]]:
        """``Jᵀ r`` for the columns r of each row, some rows at a time, by the transposed Jacobian as an operator."""
        n_rows, _, n_columns = columns.shape
        step = max(1, COLUMNS_AT_ONCE // n_columns)
        for start in range(0, n_rows, step):
            some = slice(start, start + step)
            rows = rows_of(batch.x, some, n_rows)
            blocks = torch.block_diag(*columns[some])
            operator = self._operator("TransposedJacobianLinearOperator", batch, rows, batch.y[some])
            yield (operator @ blocks).T.reshape(-1, n_columns, len(batch.zeros(1)))

    def _operator(self, name: str, batch: PrivateBatch, x: Inputs, y: Tensor, **options: Any) -> Any:
        """A linear operator of curvlinops over some rows, which it takes for one batch."""
        loss = () if "Jacobian" in name else (self.lossfunc,)
        return getattr(require("curvlinops", "curvlinops"), name)(
            batch.model,
            *loss,
            batch.parameters,
            [(x, y)],
            check_deterministic=False,  # no comparison of passes: models are in evaluation mode
            num_data=len(y),
            batch_size_fn=count_rows,
            **options,
        )

    def _columns(self, operator: Any, batch: PrivateBatch) -> Iterator[tuple[slice, Tensor]]:
        """A P × P operator as a matrix, some columns at a time."""
        n_params = len(batch.zeros(1))
        for start in range(0, n_params, COLUMNS_AT_ONCE):
            some = slice(start, min(start + COLUMNS_AT_ONCE, n_params))
            chosen = batch.f.new_zeros(n_params, some.stop - start)
            chosen[some] = torch.eye(some.stop - start, dtype=batch.f.dtype, device=batch.f.device)
            yield some, operator @ chosen

    def _matrix(self, operator: Any, batch: PrivateBatch) -> Tensor:
        """The whole matrix of an operator."""
        return torch.cat([columns for _, columns in self._columns(operator, batch)], 1)

    kfac_approx: KfacApprox = KfacApprox.EXPAND
    """How positions that share a weight enter Kronecker factors."""
    options_of: ClassVar[Mapping[HessianStructure, frozenset[str]]] = {}
    """Options of curvlinops that a method takes, by structure."""

    def _check_options(self, structure: HessianStructure | None, options: Mapping[str, Any]) -> None:
        known = frozenset[str]() if structure is None else self.options_of.get(structure, frozenset())
        self._refuse({name: value for name, value in options.items() if name not in known})
        if "kfac_approx" in options:
            choose(KfacApprox, options["kfac_approx"], "kfac_approx")

    def _factors(self, batch: PrivateBatch, y: Tensor, fisher_type: str, scale: float, **options: Any) -> list[Any]:
        """Kronecker factors in the order of the weights; the inputs' factor is a sum over data."""
        approx = choose(KfacApprox, batch.options.get("kfac_approx", self.kfac_approx), "kfac_approx")
        curvlinops = require("curvlinops", "curvlinops")
        whole = replace(batch, model=nn.Sequential(batch.model))  # since curvlinops needs a layer to have a name
        kind = getattr(curvlinops.FisherType, fisher_type)
        operator = self._operator(
            "KFACLinearOperator",
            whole,
            batch.x,
            y,
            fisher_type=kind,
            kfac_approx=getattr(curvlinops.KFACType, approx.name),
            num_per_example_loss_terms=1,
            **options,
        )
        operator.compute_kronecker_factors()
        state = operator.state_dict()
        G = {layer: scale * covariance for layer, covariance in state["gradient_covariances"].items()}
        A = {layer: len(y) * covariance for layer, covariance in state["input_covariances"].items()}
        names = [name.rpartition(".") for name, p in whole.model.named_parameters() if p.requires_grad]
        return [[G[layer], A[layer]] if kind == "weight" else [G[layer]] for layer, _, kind in names]


class CurvlinopsGGN(CurvlinopsInterface, GGNInterface):
    """Generalized Gauss–Newton matrix by curvlinops, exact or sampled.

    ``full``, ``diag`` and ``kron`` take ``mc_samples``, the number of samples of that call, and ``kron`` takes
    ``kfac_approx``; see ``GGNInterface`` for the parameters.

    Parameters
    ----------
    model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y, stochastic, num_samples, generator
        As in ``GGNInterface``.
    curvature_dtype
        As in ``CurvatureInterface``.
    kfac_approx
        As in ``AutogradGGN``.
    """

    options_of: ClassVar[Mapping[HessianStructure, frozenset[str]]] = {
        HessianStructure.FULL: frozenset({"mc_samples"}),
        HessianStructure.DIAG: frozenset({"mc_samples"}),
        HessianStructure.KRON: frozenset({"mc_samples", "kfac_approx"}),
    }

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        *,
        generator: torch.Generator | None = None,
        curvature_dtype: torch.dtype | None = None,
        kfac_approx: KfacApprox | str = KfacApprox.EXPAND,
    ) -> None:
        self.kfac_approx = choose(KfacApprox, kfac_approx, "kfac_approx")
        super().__init__(
            model,
            likelihood,
            last_layer,
            subnetwork_indices,
            dict_key_x,
            dict_key_y,
            stochastic,
            num_samples,
            generator=generator,
            curvature_dtype=curvature_dtype,
        )

    def _check_options(self, structure: HessianStructure | None, options: Mapping[str, Any]) -> None:
        super()._check_options(structure, options)
        n = options.get("mc_samples", 1)
        if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
            msg = f"mc_samples must be a positive whole number; got {n!r}."
            raise InputError(msg)
        if "mc_samples" in options and not self.stochastic:
            msg = "mc_samples belongs to the sampled Fisher: construct the back end with stochastic=True."
            raise UnsupportedError(msg)

    def _n_samples(self, batch: PrivateBatch) -> int:
        """Number of samples of a call."""
        return int(batch.options.get("mc_samples", self.num_samples))

    def _root(self, batch: PrivateBatch) -> Float[Tensor, "rows outputs columns"]:
        """Roots of the output Hessians, exact or sampled."""
        positions = Positions(batch.f, batch.y)
        root = self._sampled(positions, self._n_samples(batch)).root if self.stochastic else self.output_root(positions)
        assert root is not None, "samples are roots"
        return root

    def _full(self, batch: PrivateBatch) -> Tensor:
        root = self._root(batch)
        rows = (part.flatten(0, 1) for part in self._pull_back(batch, root))
        return sum((part.T @ part for part in rows), batch.zeros(2))

    def _diag(self, batch: PrivateBatch) -> Tensor:
        root = self._root(batch)
        return sum((part.square().sum((0, 1)) for part in self._pull_back(batch, root)), batch.zeros(1))

    def _kron(self, batch: PrivateBatch) -> list[list[Tensor]]:
        options = {"mc_samples": self._n_samples(batch), "seed": self._seed()} if self.stochastic else {}
        kind = "MC" if self.stochastic else "TYPE2"
        return self._factors(batch, batch.labels, kind, self.factor, **options)


class CurvlinopsEF(CurvlinopsInterface, EFInterface):
    """Empirical Fisher by curvlinops; of regression it is that of the likelihood, not of the squared error.

    ``kron`` takes ``kfac_approx``, see ``AutogradGGN``.
    """

    options_of: ClassVar[Mapping[HessianStructure, frozenset[str]]] = {
        HessianStructure.KRON: frozenset({"kfac_approx"})
    }

    def _full(self, batch: PrivateBatch) -> Tensor:
        gradients = batch.sum_positions(self._gradients(batch))
        return gradients.T @ gradients

    def _diag(self, batch: PrivateBatch) -> Tensor:
        return batch.sum_positions(self._gradients(batch)).square().sum(0)

    def _kron(self, batch: PrivateBatch) -> list[list[Tensor]]:
        if batch.y is not batch.labels:
            able = self._takers_of_any_layer(HessianStructure.KRON)
            msg = f"CurvlinopsEF has Kronecker factors of class labels, not of probabilities. {able} takes both."
            raise UnsupportedError(msg)
        return self._factors(batch, batch.y, "EMPIRICAL", self.factor**2)


class CurvlinopsHessian(CurvlinopsInterface):
    """The Hessian by curvlinops; it may be indefinite, see ``AutogradHessian``."""

    structures: ClassVar[frozenset[HessianStructure]] = frozenset({HessianStructure.FULL, HessianStructure.DIAG})

    def _full(self, batch: PrivateBatch) -> Tensor:
        return self.factor * self._matrix(self._hessian(batch), batch)

    def _diag(self, batch: PrivateBatch) -> Tensor:
        columns = self._columns(self._hessian(batch), batch)
        return self.factor * torch.cat([part[some].diagonal() for some, part in columns])

    def _hessian(self, batch: PrivateBatch) -> Any:
        """The operator, after a check that PyTorch differentiates the model twice and the Hessian is symmetric."""
        operator = self._operator("HessianLinearOperator", batch, batch.x, batch.y)
        # A third direction gives the size: a last layer has no curvature along directions equal for all classes.
        probes = mixing(batch.f.new_zeros(len(batch.zeros(1)), 3))
        probes[:, :2] = 1
        probes[::2, 1] = -1
        try:
            form = probes.T @ (operator @ probes)
        except (NotImplementedError, ModelError) as error:
            # The forward pass is differentiated, so the model raises what PyTorch cannot do.
            reason = error.__cause__ if isinstance(error, ModelError) else error
            if not isinstance(reason, NotImplementedError):
                raise
            msg = f"curvlinops needs a derivative that PyTorch does not have ({reason}). Use AutogradHessian."
            raise UnsupportedError(msg) from error
        rounding = 1e3 * torch.finfo(form.dtype).eps * float(form.abs().max())
        plain = form[:2, :2]
        if not torch.allclose(plain, plain.T, rtol=0, atol=SYMMETRY * float(plain.abs().max()) + rounding):
            msg = (
                f"curvlinops returns a Hessian that is not symmetric ({float(form[0, 1]):.6g} and "
                f"{float(form[1, 0]):.6g} for the same number): a forward-mode derivative of PyTorch is wrong for an "
                "operation of this model. Use AutogradHessian."
            )
            raise UnsupportedError(msg)
        return operator
