"""Every public keyword changes a result or raises; none is accepted and ignored."""

import inspect

import pytest
import torch

from laplace import DiagLLLaplace, FullLLLaplace, KronLLLaplace, Laplace
from laplace.curvature import AutogradEF
from laplace.errors import InputError, UnsupportedError
from tests.cases import BASIC, Case, named
from tests.contracts import generator
from tests.estimators import dense, estimator

REGRESSION = BASIC[1]


def everything(la, x) -> list[torch.Tensor]:
    """Whatever a keyword of the constructor can reach."""
    results = [dense(la.posterior_precision), la.log_marginal_likelihood(), la.log_likelihood, la.scatter]
    prediction = la(x)
    return [*results, *((prediction,) if isinstance(prediction, torch.Tensor) else prediction)]


def differs(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return any(
        a.shape != b.shape or a.dtype != b.dtype or a.requires_grad != b.requires_grad or not torch.allclose(a, b)
        for a, b in zip(first, second, strict=True)
    )


def outcome(case: Case, structure: str, **options) -> list[torch.Tensor]:
    la = estimator(case, structure, **options)
    la.fit(case.batches(4))
    return everything(la, case.test_inputs().requires_grad_())


CONSTRUCTOR = {
    "likelihood": {"likelihood": "classification"},
    "sigma_noise": {"sigma_noise": 0.3},
    "prior_precision": {"prior_precision": 3.0},
    "prior_mean": {"prior_mean": 0.5},
    "temperature": {"temperature": 2.0},
    "enable_backprop": {"enable_backprop": True},
    "feature_reduction": {"feature_reduction": "average"},
    "dict_key_x": {"dict_key_x": "pixels"},
    "dict_key_y": {"dict_key_y": "truth"},
    "backend": {"backend": AutogradEF},
    "last_layer_name": {"last_layer_name": "body.0"},
    "damping": {"damping": True},
    "backend_kwargs": {"backend_kwargs": {"stochastic": True, "generator": "seeded"}},
    "asdl_fisher_kwargs": {"asdl_fisher_kwargs": {"fisher_type": "mc"}},
    "curvature_dtype": {"curvature_dtype": torch.float32},
    "output_key": {"output_key": 0},
    "output_fn": {"output_fn": len},
    "output_dim": {"output_dim": 2},
    "shift_labels": {"shift_labels": True},
}


@pytest.mark.parametrize("cls", [FullLLLaplace, KronLLLaplace, DiagLLLaplace])
def test_the_table_covers_every_keyword_of_the_constructors(cls):
    keywords = set(inspect.signature(cls.__init__).parameters) - {"self", "model"}
    assert keywords <= set(CONSTRUCTOR)


ABOUT_MODELS = {"likelihood", "feature_reduction", "dict_key_x", "dict_key_y", "last_layer_name"}
ABOUT_OUTPUTS = {"output_key", "output_fn", "output_dim", "shift_labels"}
SIMPLE = sorted(set(CONSTRUCTOR) - ABOUT_MODELS - ABOUT_OUTPUTS)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("keyword", SIMPLE)
def test_every_keyword_of_the_constructor_has_an_effect_or_an_error(keyword, structure):
    options = dict(CONSTRUCTOR[keyword])
    if keyword == "backend_kwargs":
        options["backend_kwargs"] = {"stochastic": True, "generator": generator(0)}
    if keyword == "asdl_fisher_kwargs" or (keyword == "damping" and structure != "kron"):
        with pytest.raises((UnsupportedError, TypeError), match=keyword):
            outcome(REGRESSION, structure, **options)
    else:
        assert differs(outcome(REGRESSION, structure, **options), outcome(REGRESSION, structure))


@pytest.mark.parametrize("keyword", sorted(ABOUT_OUTPUTS))
def test_the_keywords_about_outputs_are_not_passed_over(keyword):
    with pytest.raises((UnsupportedError, ValueError), match=keyword):
        outcome(REGRESSION, "full", **CONSTRUCTOR[keyword])


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_the_keywords_about_model_and_data_have_an_effect_or_an_error(structure):
    with pytest.raises(InputError, match="Soft labels"):
        Laplace(REGRESSION.model(), "classification", hessian_structure=structure).fit(REGRESSION.batches(4))
    with pytest.raises(ValueError, match=r"body\.0"):
        outcome(REGRESSION, structure, last_layer_name="body.0")
    with pytest.warns(UserWarning, match="feature_reduction"):
        outcome(REGRESSION, structure, feature_reduction="average")
    for wrong in ({"dict_key_x": "pixels"}, {"dict_key_y": "truth"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            estimator(named("whole_mapping"), structure, **wrong).fit(named("whole_mapping").batches(4))


# -- the call ---------------------------------------------------------------------------------------------------------

CALL = {
    "classification": {
        "pred_type": ({}, {"pred_type": "nn", "generator": 0}),
        "link_approx": ({}, {"link_approx": "bridge"}),
        "n_samples": ({"link_approx": "mc", "generator": 0}, {"link_approx": "mc", "generator": 0, "n_samples": 7}),
        "generator": ({"link_approx": "mc", "generator": 0}, {"link_approx": "mc", "generator": 1}),
        "joint": ({"link_approx": "mc", "generator": 0}, {"link_approx": "mc", "generator": 0, "joint": True}),
        "diagonal_output": (
            {"link_approx": "mc", "generator": 0, "n_samples": 5000},
            {"link_approx": "mc", "generator": 0, "n_samples": 5000, "diagonal_output": True},
        ),
        "fitting": ({}, {"fitting": True}),
    },
    "regression": {
        "pred_type": ({}, {"pred_type": "nn", "generator": 0}),
        "link_approx": ({}, {"link_approx": "bridge"}),
        "n_samples": ({"pred_type": "nn", "generator": 0}, {"pred_type": "nn", "generator": 0, "n_samples": 7}),
        "generator": ({"pred_type": "nn", "generator": 0}, {"pred_type": "nn", "generator": 1}),
        "joint": ({}, {"joint": True}),
        "diagonal_output": ({}, {"diagonal_output": True}),
        "fitting": ({}, {"fitting": True}),
    },
}


def call(la, x, options) -> list[torch.Tensor]:
    seeded = {**options, "generator": generator(options["generator"])} if "generator" in options else options
    result = la(x, **seeded)
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("likelihood", CALL)
def test_the_table_covers_every_keyword_of_the_call(likelihood):
    case = BASIC[likelihood == "regression"]
    keywords = set(inspect.signature(type(estimator(case, "full")).__call__).parameters)
    assert keywords - {"self", "x", "model_kwargs"} == set(CALL[likelihood])


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize(
    ("case", "keyword"),
    [pytest.param(case, keyword, id=f"{case}-{keyword}") for case in BASIC for keyword in CALL[case.likelihood]],
)
def test_every_keyword_of_the_call_has_an_effect_or_an_error(case, keyword, structure):
    la = estimator(case, structure)
    la.fit(case.batches(4))
    without, with_it = CALL[case.likelihood][keyword]
    expected = call(la, case.test_inputs(), without)
    if keyword == "fitting" or (case.likelihood == "regression" and keyword == "link_approx"):
        with pytest.raises(UnsupportedError):
            call(la, case.test_inputs(), with_it)
        return
    actual = call(la, case.test_inputs(), with_it)
    assert differs(actual, expected)


def test_keywords_that_the_model_does_not_take_are_not_swallowed():
    la = estimator(BASIC[0], "diag")
    la.fit(BASIC[0].batches(4))
    with pytest.raises(TypeError, match="n_sample"):
        la(BASIC[0].test_inputs(), n_sample=3)


@pytest.mark.parametrize(
    ("method", "keywords"),
    [
        ("functional_samples", ("pred_type", "n_samples", "diagonal_output", "generator")),
        ("predictive_samples", ("pred_type", "n_samples", "diagonal_output", "generator")),
    ],
)
def test_every_keyword_of_the_samples_has_an_effect(method, keywords):
    case = BASIC[1]
    la = estimator(case, "full")
    la.fit(case.batches(4))
    assert set(inspect.signature(getattr(la, method)).parameters) == {"x", *keywords}

    def draw(**options) -> torch.Tensor:
        return getattr(la, method)(case.test_inputs(), **{"generator": generator(0), **options})

    assert draw(n_samples=3).shape[0] == 3
    assert not torch.equal(draw(), draw(generator=generator(1)))
    assert not torch.equal(draw(), draw(diagonal_output=True))
    with pytest.raises(UnsupportedError, match="gp"):
        draw(pred_type="gp")
    with pytest.raises(UnsupportedError, match="glm"):
        draw(pred_type="nn", diagonal_output=True)
