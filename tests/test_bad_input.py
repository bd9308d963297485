"""Bad input: a typed error that says what was expected, what came and what to do; an earlier fit predicts as before."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace import KronLLLaplace, Laplace
from laplace.enums import (
    FeatureReduction,
    FunctionalApproximation,
    HessianStructure,
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)
from laplace.errors import InputError, NotFittedError, ShapeError, UnsupportedError
from tests.cases import ADDITIVE, BASIC, Net, named
from tests.contracts import model_untouched
from tests.estimators import STRUCTURES, basic_cases, estimator, every_structure, fitted
from tests.tools import assert_same

CLASSIFICATION, REGRESSION = BASIC
NAN, INF = float("nan"), float("inf")
not_finite = pytest.mark.parametrize("value", [NAN, INF, -INF])


def numbers(la, case) -> list[torch.Tensor]:
    """What an earlier fit says: its evidence, which every hyperparameter enters, and its predictions."""
    result = la(case.test_inputs())
    counts = torch.tensor([la.n_data, la.n_outputs])
    return [counts, la.log_marginal_likelihood(), *((result,) if isinstance(result, torch.Tensor) else result)]


class refuses:
    """The body raises `error` with `says`, and `la`, which is fitted, and its model are what they were."""

    def __init__(self, la, case, error, says):
        self.la, self.case = la, case
        self.raises, self.untouched = pytest.raises(error, match=says), model_untouched(la.model.model)

    def __enter__(self):
        self.before = numbers(self.la, self.case)
        self.untouched.__enter__()
        self.raises.__enter__()

    def __exit__(self, *error):
        caught = self.raises.__exit__(*error)
        self.untouched.__exit__(None, None, None)
        assert_same(numbers(self.la, self.case), self.before)
        return caught


def spoiled(case, *, x=None, y=None, batch: int = 2) -> list:
    """The data of a case in three batches, one of them with an entry replaced."""
    batches = case.batches(3, 3)
    inputs, targets = (part.clone() for part in batches[batch])
    if x is not None:
        inputs[1, 0] = x
    if y is not None:
        targets.view(-1)[1] = y
    return [*batches[:batch], (inputs, targets), *batches[batch + 1 :]]


# -- loaders ----------------------------------------------------------------------------------------------------------


@every_structure
@basic_cases
@pytest.mark.parametrize("override", [True, False])
def test_an_empty_loader(case, structure, override):
    la = fitted(case, structure)
    for loader in ([], DataLoader(TensorDataset(*case.data()), batch_size=100, drop_last=True)):
        with refuses(la, case, InputError, "loader is empty: there is nothing to learn"):
            la.fit(loader, override=override or structure not in ADDITIVE)
        with refuses(la, case, InputError, r"nothing to score.*it is empty.*Pass labeled batches"):
            la.optimize_prior_precision(method="gridsearch", val_loader=loader)


def test_validation_data_without_a_label():
    la = fitted(CLASSIFICATION, "diag")
    x, y = CLASSIFICATION.data()
    with refuses(la, CLASSIFICATION, InputError, "every target is masked"):
        la.optimize_prior_precision(method="gridsearch", val_loader=[(x, torch.full_like(y, -100))])


X, Y = CLASSIFICATION.data()
LOADERS = {
    "a number": (3, "Expected a DataLoader or another iterable.*got int"),
    "a data set": (TensorDataset(X, Y), "Expected a DataLoader.*got TensorDataset"),
    "one batch": ((X, Y), r"must yield \(x, y\).*got Tensor"),
    "inputs alone": ([X, X], r"must yield \(x, y\).*got Tensor"),
    "one entry": ([(X,)], r"must yield \(x, y\).*got tuple"),
    "text": (["x", "y"], r"must yield \(x, y\).*got str"),
    "sets": ([{X, Y}], r"must yield \(x, y\).*got set"),
    "mappings without targets": ([{"input_ids": X, "target": Y}], "'input_ids', 'target'.*'labels'.*Pass dict_key_y="),
    "targets as a list": ([(X, Y.tolist())], "Targets must be a tensor; the loader yields list"),
    "targets missing": ([(X, None)], "Targets must be a tensor; the loader yields NoneType"),
}


@pytest.mark.parametrize(("loader", "says"), LOADERS.values(), ids=LOADERS)
def test_what_is_no_loader_of_batches(loader, says):
    la = fitted(CLASSIFICATION, "kron")
    with refuses(la, CLASSIFICATION, InputError, says):
        la.fit(loader)
    with refuses(la, CLASSIFICATION, InputError, says):
        la.optimize_prior_precision(method="gridsearch", val_loader=loader)


def test_a_mapping_without_its_main_entry():
    case = named("keyword_inputs")
    la = fitted(case, "diag")
    with refuses(la, case, InputError, "keys 'pixels'.*'input_ids'.*Pass dict_key_x="):
        la({"pixels": X})


# -- values of inputs, targets and outputs ----------------------------------------------------------------------------


@pytest.mark.every(2)
@every_structure
@basic_cases
@not_finite
def test_inputs_that_are_not_finite(case, structure, value):
    la = fitted(case, structure)
    # A saturating feature would hide an infinite input, and rightly so: this one does not.
    la.model.model.body[1] = nn.Identity()
    says = "outputs of the model must be finite; 1 of .* rows.*Look for NaN or infinite values in the inputs"
    with refuses(la, case, InputError, "Batch 2 of the loader.*" + says):
        la.fit(spoiled(case, x=value))
    with refuses(la, case, InputError, says):
        la.optimize_prior_precision(method="gridsearch", val_loader=spoiled(case, x=value))
    x = case.test_inputs()
    x[1, 0] = value
    for request in (
        la,
        la.functional_samples,
        la.predictive_samples,
        la.functional_variance_fast,
        lambda x: la(x, pred_type="nn"),
    ):
        with refuses(la, case, InputError, says):
            request(x)


@every_structure
@basic_cases
@not_finite
def test_weights_that_are_not_finite(case, structure, value):
    """Also where the loss hides it: a logit of -inf is one class less to the cross-entropy."""
    model = case.model()
    with torch.no_grad():
        model.head.bias[-1] = value
    la = estimator(case, structure, model)
    with model_untouched(model), pytest.raises(InputError, match=r"Batch 0 .*outputs of the model must be finite"):
        la.fit(case.batches(4))
    with pytest.raises(NotFittedError):
        la(case.test_inputs())


@every_structure
@not_finite
def test_regression_targets_that_are_not_finite(structure, value):
    la = fitted(REGRESSION, structure)
    says = "Regression targets must be finite; 1 of .* rows.*Leave those rows out"
    with refuses(la, REGRESSION, InputError, "Batch 2 of the loader.*" + says):
        la.fit(spoiled(REGRESSION, y=value))
    with refuses(la, REGRESSION, InputError, says):
        la.optimize_prior_precision(method="gridsearch", val_loader=spoiled(REGRESSION, y=value))


@every_structure
@pytest.mark.parametrize("value", [NAN, INF, -0.1, 0.9])
def test_soft_labels_that_are_no_distributions(structure, value):
    case = named("soft_labels")
    la = fitted(case, structure)
    for spoil in (la.fit, lambda loader: la.optimize_prior_precision(method="gridsearch", val_loader=loader)):
        with refuses(la, case, InputError, "Soft labels must be non-negative, finite, and sum to one"):
            spoil(spoiled(case, y=value))


@every_structure
@pytest.mark.parametrize("value", [4, 1000, -1, -99, -101])
def test_class_indices_out_of_range(structure, value):
    la = fitted(CLASSIFICATION, structure)
    says = rf"must lie in 0\.\.3 \(or be -100 to mask.*has .*{value}.*one output for each class"
    with refuses(la, CLASSIFICATION, InputError, "Batch 2.*" + says):
        la.fit(spoiled(CLASSIFICATION, y=value))
    with refuses(la, CLASSIFICATION, InputError, says):
        la.optimize_prior_precision(method="gridsearch", val_loader=spoiled(CLASSIFICATION, y=value))


TARGETS = {
    "labels as booleans": (CLASSIFICATION, Y > 1, r"must be integers; got torch\.bool.*y\.long\(\)"),
    "complex labels": (CLASSIFICATION, Y + 0j, r"must be integers; got torch\.complex(64|128).*y\.long\(\)"),
    "labels as floats": (
        CLASSIFICATION,
        Y.double(),
        r"Soft labels.*shape of the model's outputs, \[11, 4\]; got \[11\]",
    ),
    "labels in a column": (CLASSIFICATION, Y.unsqueeze(1), r"shape \[11\].*got \[11, 1\]"),
    "labels one-hot, as integers": (CLASSIFICATION, torch.eye(4).long()[Y], r"shape \[11\].*got \[11, 4\]"),
    "too few labels": (CLASSIFICATION, Y[:5], r"shape \[11\].*got \[5\]"),
    "integer values": (REGRESSION, torch.ones(11, 2).long(), r"floating-point numbers; got torch\.int64.*y\.float\(\)"),
    "complex values": (REGRESSION, torch.ones(11, 2) + 0j, r"floating-point numbers; got torch\.complex(64|128)"),
    "one value a row": (REGRESSION, torch.ones(11), r"shape of the model's outputs, \[11, 2\]; got \[11\]. Reshape"),
    "too many values": (REGRESSION, torch.ones(11, 3), r"\[11, 2\]; got \[11, 3\]"),
    "transposed values": (REGRESSION, torch.ones(2, 11), r"\[11, 2\]; got \[2, 11\]"),
}


@pytest.mark.parametrize(("case", "y", "says"), TARGETS.values(), ids=TARGETS)
def test_targets_of_another_dtype_or_shape(case, y, says):
    la = fitted(case, "kron")
    with refuses(la, case, InputError, says):
        la.fit([(case.data()[0], y)])
    with refuses(la, case, InputError, says):
        la.optimize_prior_precision(method="gridsearch", val_loader=[(case.data()[0], y)])


class Changing(Net):
    """Another number of outputs for small batches: fewer of them, or those of another head."""

    def __init__(self, how: str):
        super().__init__(3, 6, 4)
        self.other, self.how = nn.Linear(6, 3), how

    def forward(self, x):
        if len(x) > 3:
            return super().forward(x)
        return super().forward(x)[:, :3] if self.how == "slice" else self.other(self.body(x))


@every_structure
@pytest.mark.parametrize("how", ["slice", "head"])
def test_a_number_of_outputs_that_differs_between_batches(structure, how):
    model = Changing(how).double()
    la = estimator(CLASSIFICATION, structure, model)
    la.fit(CLASSIFICATION.batches(5))
    with refuses(la, CLASSIFICATION, ValueError, "'head'.*(4 outputs, but the model returns|does not run)"):
        la.fit(CLASSIFICATION.batches(5, 3))


# -- hyperparameters --------------------------------------------------------------------------------------------------

NO_VALUES = [0.0, -1.0, NAN, INF, -INF, torch.tensor([]), "one", None]


@pytest.mark.every(4)
@every_structure
@pytest.mark.parametrize("value", NO_VALUES, ids=str)
@pytest.mark.parametrize("name", ["prior_precision", "sigma_noise", "temperature"])
def test_hyperparameters_without_a_meaning(name, value, structure):
    la = fitted(REGRESSION, structure)
    says = f"{name} must be (positive and finite|a number or a tensor); got "
    with pytest.raises(InputError, match=says):
        estimator(REGRESSION, structure, **{name: value})
    with refuses(la, REGRESSION, InputError, says):
        setattr(la, name, value)
    if name != "temperature" and value is not None:
        with refuses(la, REGRESSION, InputError, says):
            la.log_marginal_likelihood(**{"prior_precision": 5.0, "sigma_noise": 5.0, name: value})


@pytest.mark.parametrize("value", [[1.7], np.array([1.7]), np.float64(1.7), torch.tensor([1.7], dtype=torch.float64)])
def test_one_number_in_a_container_is_a_number(value):
    la = fitted(CLASSIFICATION, "diag")
    la.temperature = la.output_temperature = la.prior_precision = value
    assert float(la.temperature) == pytest.approx(1.7)
    assert la.output_temperature == 1.7
    assert la.prior_precision.tolist() == pytest.approx([1.7])


@pytest.mark.parametrize("value", [*NO_VALUES[2:6], "one", torch.zeros(2)], ids=str)
def test_prior_means_without_a_meaning(value):
    la = fitted(REGRESSION, "diag")
    with refuses(la, REGRESSION, InputError, "prior.mean must be"):
        la.prior_mean = value


def test_a_first_prior_precision_without_a_meaning():
    la = fitted(REGRESSION, "diag")
    for value in (-1.0, NAN):
        with refuses(la, REGRESSION, InputError, "init_prior_prec must be positive and finite"):
            la.optimize_prior_precision(init_prior_prec=value)


def test_noise_in_classification():
    la = fitted(CLASSIFICATION, "kron")
    says = "sigma_noise is the observation noise of regression; leave it at 1"
    with pytest.raises(UnsupportedError, match=says):
        estimator(CLASSIFICATION, "kron", sigma_noise=0.5)
    with refuses(la, CLASSIFICATION, UnsupportedError, says):
        la.sigma_noise = 0.5
    with refuses(la, CLASSIFICATION, UnsupportedError, says):
        la.log_marginal_likelihood(prior_precision=5.0, sigma_noise=0.5)


# -- order of calls, names, generators --------------------------------------------------------------------------------


@every_structure
@basic_cases
def test_whatever_needs_a_fit_before_there_is_one(case, structure):
    la, x = estimator(case, structure), case.test_inputs()
    properties = "mean H loss n_outputs n_params posterior_precision log_likelihood scatter prior_precision_diag"
    requests = [lambda name=name: getattr(la, name) for name in properties.split()]
    requests += [la.sample, la.log_marginal_likelihood, la.optimize_prior_precision, la.state_dict]
    requests += [
        lambda method=method: method(x)
        for method in (la, la.functional_samples, la.predictive_samples, la.functional_variance_fast, la.log_prob)
    ]
    requests += [lambda: la.predictive(x, "glm", "probit", 10), lambda: la.functional_variance(torch.ones(1, 2, 3))]
    for request in requests:
        with model_untouched(la.model.model), pytest.raises(NotFittedError, match=r"call fit\(train_loader\) first"):
            request()


NAMES = {
    "likelihood": (Likelihood, lambda la, name: Laplace(la.model.model, name)),
    "subset_of_weights": (SubsetOfWeights, lambda la, name: Laplace(la.model.model, "classification", name)),
    "hessian_structure": (
        HessianStructure,
        lambda la, name: Laplace(la.model.model, "classification", hessian_structure=name),
    ),
    "functional_approximation": (
        FunctionalApproximation,
        lambda la, name: Laplace(la.model.model, "classification", functional_approximation=name),
    ),
    "feature_reduction": (
        FeatureReduction,
        lambda la, name: KronLLLaplace(la.model.model, "classification", feature_reduction=name),
    ),
    "pred_type": (PredType, lambda la, name: la(X, pred_type=name)),
    "link_approx": (LinkApprox, lambda la, name: la(X, link_approx=name)),
    "method": (TuningMethod, lambda la, name: la.optimize_prior_precision(method=name)),
    "prior_structure": (PriorStructure, lambda la, name: la.optimize_prior_precision(prior_structure=name)),
}


@pytest.mark.parametrize("keyword", NAMES)
def test_unknown_names_of_options(keyword):
    la = fitted(CLASSIFICATION, "kron")
    names, use = NAMES[keyword]
    values = ", ".join(repr(member.value) for member in names)
    for member in names:
        typo = member.value + "x"
        with refuses(
            la, CLASSIFICATION, UnsupportedError, f"{keyword} must be one of {values}; got '{typo}'. Did you mean '"
        ):
            use(la, typo)
    for other in ("§", ""):
        with refuses(la, CLASSIFICATION, UnsupportedError, f"{keyword} must be one of {values}; got "):
            use(la, other)


@every_structure
def test_unknown_keywords(structure):
    model = CLASSIFICATION.model()
    with pytest.raises(TypeError, match=r"no option 'prior_prec'; its options are .*Did you mean 'prior_precision'\?"):
        Laplace(model, "classification", hessian_structure=structure, prior_prec=3.0)
    for keywords, hint in (
        ({"num_sample": 3}, "Did you mean 'num_samples'?"),
        ({"last_layer": True}, "no option 'last_layer'"),
    ):
        with model_untouched(model), pytest.raises(TypeError, match=hint.replace("?", r"\?")):
            estimator(CLASSIFICATION, structure, backend_kwargs=keywords)


class Elsewhere(torch.Generator):
    """Stands for a generator of another device, which not every machine has."""

    device = torch.device("cuda")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_generators_that_cannot_be_used(structure):
    la, x = fitted(CLASSIFICATION, structure), CLASSIFICATION.test_inputs()
    requests = (la, la.functional_samples, la.predictive_samples, lambda _x, generator: la.sample(2, generator))
    for request in requests:
        with refuses(
            la, CLASSIFICATION, InputError, "generator is on cuda, the model on cpu; create it on the model's"
        ):
            request(x, generator=Elsewhere())
        with refuses(la, CLASSIFICATION, InputError, r"generator must be a torch\.Generator or None; got int"):
            request(x, generator=3)
    sampled = estimator(CLASSIFICATION, structure, backend_kwargs={"stochastic": True, "generator": Elsewhere()})
    with pytest.raises(InputError, match="generator is on cuda, the model on cpu"):
        sampled.fit(CLASSIFICATION.batches(4))


@every_structure
def test_weights_of_another_length(structure):
    la = fitted(REGRESSION, structure)
    for request in (la.log_prob, la.square_norm):
        with refuses(la, REGRESSION, ShapeError, r"Expected weights of shape \[\.\.\., 12\]; got \[3\]"):
            request(torch.ones(3))
    for request in (la.functional_variance, la.functional_covariance):
        with refuses(la, REGRESSION, ShapeError, r"\[batch, outputs, 12\]; got \[4, 2, 3\]"):
            request(torch.ones(4, 2, 3))
