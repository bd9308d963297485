"""``EKFACLaplace``: the eigenbasis of Kronecker factors with eigenvalues of its own."""

from __future__ import annotations

from typing import ClassVar

from laplace.baselaplace.described import described
from laplace.baselaplace.parametric import ParametricLaplace
from laplace.likelihoods import L_co
from laplace.prior import GaussianPrior
from laplace.structures import AbstractCurvature, EKFACCurvature


@described
class EKFACLaplace(ParametricLaplace[L_co]):
    """A posterior whose precision is ``(U ⊗ V) diag(s · s_ij + δ) (U ⊗ V)ᵀ`` for each parameter group.

    All weights that require a gradient are random. U and V are the eigenvectors of the Kronecker factors of
    ``KronLaplace``; the eigenvalues ``s_ij`` are the diagonal of the exact curvature in that basis, so that no group is
    further from it, in the Frobenius norm, than with ``KronLaplace``. Memory O(O² + I² + O I) for a layer of O outputs
    and I inputs, time O(O³ + I³) once.

    Fitting makes two passes over the data, so a loader that can be read only once is refused; of a last layer the
    features of the first pass are kept, and the model runs once. ``fit(override=False)`` is refused: eigenbases do not
    merge.

    References
    ----------
    George, Laurent, Bouthillier, Ballas & Vincent (2018), "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis", arXiv:1806.03884.
    """

    curvature_type: ClassVar[type[AbstractCurvature]] = EKFACCurvature

    def _fits_structure(self, prior: GaussianPrior) -> None:
        prior.per_layer()
