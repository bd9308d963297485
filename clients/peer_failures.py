"""Tests of laplace-torch 0.2.2 that fail on this library, and why; `peer_suite.py` compares a run with this table."""

from __future__ import annotations

from typing import NamedTuple

PASSED, SKIPPED = 948, 3
"""How many pass, and how many skip themselves."""
INTERNALS, DIFFERENT = "internals", "different"
KINDS = {
    INTERNALS: "call or assign private names of laplace-torch",
    DIFFERENT: "expect what is answered otherwise here, for a reason, or an error where there is an answer",
}


class Expected(NamedTuple):
    """Failures of one reason: which tests (the whole ``file::test[case]``), with which error, how many."""

    tests: str
    error: str
    kind: str
    count: int
    reason: str


EXPECTED = [
    Expected(
        r".*::test_(subnet_)?laplace_(large_)?init\[.*",
        "_init_H",
        INTERNALS,
        12,
        "`_init_H`: makes an empty Hessian",
    ),
    Expected(
        r"test_functional_laplace_unit.py::test_(store_K_batch|gp_kernel).*",
        "n_outputs|prior_factor_sod",
        INTERNALS,
        5,
        "Gaussian process: private sizes are assigned, and blocks of its kernel are stored by private methods",
    ),
    Expected(
        r"test_functional_laplace_unit.py::test_sod_data_loader",
        "_get_SoD_data_loader",
        INTERNALS,
        1,
        "`_get_SoD_data_loader`: draws the subset of the data",
    ),
    Expected(
        r"test_(baselaplace|lllaplace|subnetlaplace).py::test_dtype\[.*",
        r"torch\.float32 == torch\.float16",
        DIFFERENT,
        41,
        "float16: curvature is a sum over the data, and kept in float32",
    ),
    Expected(
        r"test_subnetlaplace.py::test_subnet_laplace_backend_init\[(Asdl|Curvlinops)Hessian.*",
        "DID NOT RAISE",
        DIFFERENT,
        12,
        "subnetworks with a true Hessian: works",
    ),
    Expected(
        r"test_subnetlaplace.py::test_subnet_laplace_backend_init\[CurvatureInterface.*",
        "DID NOT RAISE",
        DIFFERENT,
        4,
        "subnetworks with a back end of one's own that is neither `GGNInterface` nor `EFInterface`: works",
    ),
    Expected(
        r"test_baselaplace.py::test_dict_data\[.*",
        "DID NOT RAISE",
        DIFFERENT,
        5,
        "batches that are mappings, with the diagonal empirical Fisher of BackPACK or curvlinops: works",
    ),
    Expected(
        r"test_subset_params.py::test_incompatible_backend\[.*",
        "DID NOT RAISE",
        DIFFERENT,
        6,
        "frozen weights with BackPACK and ASDL: works",
    ),
    Expected(
        r".*::test_(parametric|functional)_fit_y_shape.*",
        "DID NOT RAISE",
        DIFFERENT,
        4,
        "one output, targets of shape `[batch]`: works, they are those of that output",
    ),
    Expected(
        r".*::test_reg_glm_predictive_correct_behavior\[.*",
        "joint=True asks for covariances",
        DIFFERENT,
        6,
        "`joint=True` with `diagonal_output=True`: refused, where laplace-torch ignores the latter",
    ),
    Expected(
        r"test_baselaplace.py::test_functional_samples\[.*",
        "cannot be replaced by",
        DIFFERENT,
        3,
        "`la.likelihood = ...` after a fit with another: refused, the curvature is that of the other",
    ),
    Expected(
        r"test_lllaplace.py::test_laplace_(large_)?init_nollname\[.*",
        "last_layer_name=",
        DIFFERENT,
        6,
        "`mean` before the last layer is known: an error that says to name it, where laplace-torch says `None`",
    ),
    Expected(
        r"test_feature_extractor.py::test_multidim_features\[.*",
        "feature_reduction=",
        DIFFERENT,
        6,
        "`feature_reduction` for a model that answers at each position: refused, its outputs are not of one feature",
    ),
    Expected(
        r"test_functional_laplace_unit.py::test_functional_samples",
        'pred_type="nn"',
        DIFFERENT,
        1,
        '`pred_type="nn"` of a Gaussian process: refused, where laplace-torch ignores it',
    ),
    Expected(
        r"test_serialization.py::test_serialize_no_pickle.*",
        "isinstance",
        DIFFERENT,
        5,
        "states hold mappings of tensors: read with `weights_only=True`, but the test lists types without `dict`",
    ),
    Expected(
        r"test_matrix.py::test_decompose",
        "NoneType",
        DIFFERENT,
        1,
        "eigenvectors of a diagonal factor: `None`, where laplace-torch makes an identity matrix",
    ),
    Expected(
        r"test_utils.py::test_symeig_custom",
        "allclose",
        DIFFERENT,
        1,
        "eigenvectors are those of the test up to their signs",
    ),
]
