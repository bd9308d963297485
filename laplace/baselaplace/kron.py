"""``KronLaplace``: Kronecker-factored curvature of all weights, with or without damping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from laplace import checks
from laplace.baselaplace.described import described
from laplace.baselaplace.keywords import BackendKeywords
from laplace.baselaplace.parametric import ParametricLaplace
from laplace.curvature import CurvatureInterface
from laplace.errors import UnsupportedError
from laplace.likelihoods import L_co
from laplace.prior import GaussianPrior
from laplace.schema import Table, flag
from laplace.structures import AbstractCurvature, Kron, KronCurvature
from laplace.structures.by_hand import independent
from laplace.structures.wide_kron import WideKronCurvature


@described
class KronLaplace(ParametricLaplace[L_co]):
    """A posterior whose precision is one Kronecker product per parameter group, plus the prior.

    Parameters
    ----------
    damping
        Add the root of the prior precision to both sides of each product instead of adding the prior to it; may be set
        at any time.

    Notes
    -----
    For each parameter group ``(U ⊗ V) diag(s γ_i λ_j + δ) (U ⊗ V)ᵀ`` with G = U diag(γ) Uᵀ and A = V diag(λ) Vᵀ;
    damped, ``(√s γ_i + √δ)(√s λ_j + √δ)``. Approximate: a sum of products becomes a product of sums, and nothing is
    kept between groups. A layer of O outputs and I inputs (of a convolution: channels times kernel) takes memory
    O(O² + I²), and time O(O³ + I³) to factorize, once. Fitting all weights takes a backward pass for each output of a
    datum. Norms and other groups without factors get their exact block, dense while it is small, else its diagonal.
    Beyond 4,096 outputs of a last layer G is diagonal plus low rank: its diagonal, and its block of the 2,048 outputs
    with most curvature, in memory O(C D) and time O(2048³ + D³); ``fit`` warns of it.

    References
    ----------
    Ritter, Botev & Barber (2018), "A scalable Laplace approximation for neural networks"; factors of shared weights:
    Eschenhagen, Immer, Turner, Schneider & Hennig (2023), arXiv:2311.00636.
    """

    curvature_type: ClassVar[type[AbstractCurvature]] = KronCurvature
    _damping = False

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        damping: bool = False,
        backend_kwargs: BackendKeywords | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        curvature_dtype: torch.dtype | None = None,
        output_key: str | int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        output_dim: int | None = None,
        shift_labels: bool | None = None,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            enable_backprop,
            dict_key_x,
            dict_key_y,
            backend,
            backend_kwargs,
            asdl_fisher_kwargs,
            curvature_dtype=curvature_dtype,
            output_key=output_key,
            output_fn=output_fn,
            output_dim=output_dim,
            shift_labels=shift_labels,
        )
        self.damping = damping

    @property
    def damping(self) -> bool:
        """Whether the prior enters each side of a product; assign to change it, also after ``fit``.

        An assigned value must be ``True`` or ``False`` (``InputError``). Nothing is fitted again.
        """
        return self._damping

    @damping.setter
    def damping(self, value: bool) -> None:
        self._damping = checks.flag("damping", value)
        self._hyperparameters_changed()

    def _posterior_options(self) -> dict[str, Any]:
        return {"damping": self._damping}

    state_entries: ClassVar[Table] = {"damping": flag}
    _saved: ClassVar[tuple[str, ...]] = (*ParametricLaplace._saved, "damping")

    def _fits_structure(self, prior: GaussianPrior) -> None:
        prior.per_layer()

    @property
    def H_facs(self) -> Kron:  # noqa: N802 - the recorded name
        """The Kronecker factors of the curvature; zero before ``fit``. A copy.

        Kept for code written for laplace-torch; ``H`` holds the same.

        Raises
        ------
        UnsupportedError
            Of a last layer of more than 4,096 outputs, whose factors are under ``H``.
        """
        curvature = self._zero_curvature if self._is_prior else self._fitted.curvature
        if isinstance(curvature, WideKronCurvature):
            msg = (
                f"The output factor of {len(curvature.sums.diagonal)} outputs is diagonal plus low rank, not a Kron of "
                "matrices: la.H has its diagonal, the outputs that are kept, and their block."
            )
            raise UnsupportedError(msg)
        assert isinstance(curvature, KronCurvature), "made by this class"
        return independent(curvature.factors)
