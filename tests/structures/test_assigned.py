"""Curvatures that users assign."""

import pytest
import torch

from laplace.errors import InputError, ShapeError
from laplace.structures import STRUCTURES, KronCurvature
from laplace.structures.by_hand import assigned_curvature
from laplace.structures.full import FullCurvature
from laplace.structures.kron import Kron
from tests.structures.samples import psd, uniform
from tests.structures.test_every_structure import SHAPES, as_it_is, ekfac
from tests.tools import assert_close

F64 = torch.float64
G3, A4, SYMMETRIC = psd(3, 1, rank=3), psd(4, 2, rank=4), psd(15, 3)
SKEW = SYMMETRIC + torch.triu(torch.ones(15, 15, dtype=F64), 1)


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("full", SKEW, InputError, "must be symmetric"),
        ("full", torch.zeros(14, 14), ShapeError, r"shape \[15, 15\]"),
        ("diag", torch.zeros(14), ShapeError, r"shape \[15\]; got \[14\]"),
        ("blockdiag", [torch.eye(12)], ShapeError, "a list of 2.* got 1"),
        ("blockdiag", torch.eye(15), InputError, "a list of 2.* got Tensor"),
        ("blockdiag", [torch.eye(12), torch.eye(4)], ShapeError, r"H\[1\] must have the shape \[3, 3\]"),
        ("kron", torch.eye(15), InputError, "Kron of factors"),
        ("kron", Kron([[G3, A4], [G3]]).decompose() + torch.ones(2), InputError, "holds a prior precision"),
        ("kron", Kron([[G3, A4]]), ShapeError, "a list of 2.* got 1"),
        ("kron", Kron([[G3], [G3]]), ShapeError, r"H\[0\].* a list of 2.* got 1"),
        ("kron", Kron([[A4, A4], [A4]]), ShapeError, r"H\[0\]\[0\] must have the shape \[3, 3\]"),
        ("ekfac", torch.eye(15), InputError, "EKFACPrecision"),
        ("ekfac", ekfac([(3, 4)]).curvature.public, ShapeError, "a list of 2.* got 1"),
        ("ekfac", ekfac([(4, 3), (3,)]).curvature.public, ShapeError, r"eigenvalues\[0\].*\[3, 4\]; got \[4, 3\]"),
        ("lowrank", (torch.eye(15)[:, :2],), ShapeError, "a list of 2.* got 1"),
        ("lowrank", (torch.eye(15)[:, :2], torch.tensor([1.0, -1.0])), InputError, "not negative"),
        ("lowrank", (torch.ones(15, 2), torch.ones(2)), InputError, "orthonormal"),
    ],
)  # fmt: skip
def test_what_is_no_such_curvature_is_refused(name, value, error, match):
    kind = {s.value: c for s, c in STRUCTURES.items()}[name]
    with pytest.raises(error, match=match):
        assigned_curvature(kind, value, SHAPES, as_it_is, None)


def test_factors_that_are_shared_and_diagonal_ones_are_assigned_as_they_are():
    d = uniform(3, 1)
    for outer, matrix in ((G3, G3), (d, d.diag())):
        for value in (Kron([[outer, A4], [outer]]), Kron([[outer, A4], [outer]]).decompose()):
            found = assigned_curvature(KronCurvature, value, SHAPES, as_it_is, None)
            assert found.sums.kfacs[0][0] is found.sums.kfacs[1][0]
            assert_close(found.to_dense(), torch.block_diag(torch.kron(matrix, A4), matrix))
    rounded = SYMMETRIC + 1e-6 * torch.triu(torch.ones(15, 15, dtype=F64), 1)
    found = assigned_curvature(FullCurvature, rounded, SHAPES, as_it_is, None)
    assert_close(found.to_dense(), (rounded + rounded.T) / 2)
