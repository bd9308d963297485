"""``LowRankLaplace``: leading eigenpairs of the curvature plus the prior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace import checks
from laplace.baselaplace.described import described
from laplace.baselaplace.keywords import BackendKeywords
from laplace.baselaplace.parametric import ParametricLaplace
from laplace.curvature import CurvatureInterface
from laplace.errors import InputError
from laplace.likelihoods import L_co
from laplace.schema import Table, finite, optional, whole
from laplace.structures import AbstractCurvature, LowRankCurvature, Truncation


@described
class LowRankLaplace(ParametricLaplace[L_co]):
    """A posterior with the precision ``s U diag(λ) Uᵀ + diag(δ)``: leading eigenpairs of the curvature, and the prior.

    Parameters
    ----------
    rank
        Number of eigenpairs; fewer are kept where the curvature has no more that are positive. With the back end
        ``AutogradHessian``, of whose curvature the positive part is taken, it must be given.
    captured_trace
        In its place: as many eigenpairs as hold this share of the trace of the curvature; 0.95 if neither is given.

    Raises
    ------
    InputError
        If ``rank`` or ``captured_trace`` makes no sense, or both are given.

    Notes
    -----
    All weights that require a gradient are random. Approximate: curvature beyond the eigenpairs is dropped, so that the
    posterior is wider than that of ``FullLaplace``, which it equals at full rank. No P×P matrix is formed: memory
    O(P r), products with the curvature instead of the curvature. With a back end that samples (``stochastic=True``) the
    eigenpairs are those of the sample of the last pass.

    Fitting makes 3 passes over the data with ``rank`` (r + 10 directions in each; of a Hessian up to 6, with the
    directions of all in memory and a warning if fewer positive eigenvalues are found), and as many as it takes with
    ``captured_trace`` (32 directions in the first, twice as many in each later one, and a last one that sharpens them);
    one where the directions span all weights. Where it would take more directions than an eighth of the weights, or
    more than the first 32 with at most 4,096 weights, the matrix is formed instead, in one last pass, if 4 P² numbers
    fit the memory: eigenpairs are then exact, and the cost that of ``"full"`` plus an eigendecomposition. ``n_passes``
    says how many passes it were. A loader that can be read once is refused; of a last layer the features of the first
    pass are kept, and the model runs once. A pass takes time O(P r) for each output of a datum. What is below the
    precision of the curvature beside the largest eigenvalue is dropped: pass ``curvature_dtype=torch.float64`` where
    it matters. Of equal eigenvalues that ``rank`` divides, as of outputs that share their curvature, those are kept
    whose eigenvectors lie in the first weights.
    The random directions are the same in every call. ``fit(override=False)`` compresses the sum of both, and warns.

    References
    ----------
    Halko, Martinsson & Tropp (2011), "Finding structure with randomness", arXiv:0909.4061.
    """

    curvature_type: ClassVar[type[AbstractCurvature]] = LowRankCurvature
    _truncation = Truncation()

    def __init__(
        self,
        model: nn.Module,
        likelihood: L_co,
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend_kwargs: BackendKeywords | None = None,
        *,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        curvature_dtype: torch.dtype | None = None,
        output_key: str | int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        output_dim: int | None = None,
        shift_labels: bool | None = None,
        rank: int | None = None,
        captured_trace: float | None = None,
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
        self._truncation = checked_truncation(rank, captured_trace)

    def _fit_options(self) -> dict[str, Any]:
        return {**super()._fit_options(), "truncation": self._truncation}

    @property
    def _refitted_type(self) -> type[AbstractCurvature]:
        return LowRankCurvature.choosing(self._truncation)

    state_entries: ClassVar[Table] = {"rank": optional(whole(1)), "captured_trace": optional(finite(above=0, high=1))}

    def _choices(self) -> dict[str, Any]:
        chosen = {"rank": self._truncation.rank, "captured_trace": self._truncation.captured_trace}
        return {**super()._choices(), **chosen}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self._truncation = Truncation(state["rank"], state["captured_trace"])

    @property
    def _curvature(self) -> LowRankCurvature:
        curvature = self._fitted.curvature
        assert isinstance(curvature, LowRankCurvature), "made by this class"
        return curvature

    @property
    def rank(self) -> int | None:
        """Number of eigenpairs that are kept; before ``fit`` the one that was asked for."""
        return self._truncation.rank if "_fit" not in vars(self) else len(self._curvature.values)

    @property
    def captured_trace(self) -> float | None:
        """Share of the trace that they hold, ``None`` where that is not known; before ``fit`` what was asked for."""
        return self._truncation.captured_trace if "_fit" not in vars(self) else self._curvature.captured

    @property
    def n_passes(self) -> int:
        """How many passes over the data were made; with ``override=False`` in all fits."""
        return self._curvature.n_passes

    @property
    def V(self) -> Float[Tensor, "params rank"]:  # noqa: N802 - the recorded name
        """``diag(1/δ) U``, ``[P, r]``: the posterior covariance is ``diag(1/δ) − V Kinv Vᵀ`` (Woodbury)."""
        (vectors, _), delta = self._in_form.public
        return vectors / delta.unsqueeze(1)

    @property
    def Kinv(self) -> Float[Tensor, "rank rank"]:  # noqa: N802 - the recorded name
        """``(diag(1/(s λ)) + Uᵀ diag(1/δ) U)⁻¹``, ``[r, r]``."""
        (vectors, values), delta = self._in_form.public
        root = values.sqrt()
        inner = (vectors * root).mT @ (vectors * root / delta.unsqueeze(1))
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        # With √λ on both sides nothing is divided by an eigenvalue.
        return root.unsqueeze(1) * torch.linalg.inv(eye + inner) * root


def checked_truncation(rank: Any, captured_trace: Any) -> Truncation:
    """How many eigenpairs are kept, from what a user passed."""
    if rank is not None:
        rank = checks.whole("rank", rank)
    is_share = (
        isinstance(captured_trace, Real) and not isinstance(captured_trace, bool) and 0 < float(captured_trace) <= 1
    )
    if captured_trace is not None and not is_share:
        msg = f"captured_trace is a share of the trace, above 0 and at most 1; got {captured_trace!r}."
        raise InputError(msg)
    if rank is not None and captured_trace is not None:
        msg = "rank and captured_trace both say how many eigenpairs are kept: pass one of them."
        raise InputError(msg)
    return Truncation(None if rank is None else int(rank), None if captured_trace is None else float(captured_trace))
