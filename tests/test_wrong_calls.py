"""Wrong calls are refused at the border: by a typed error that names the keyword, before anything changes.

Calls are generated in `tests/wrong_calls.py`. The default suite takes a part of them, spread over all estimators and
keywords; `make test-slow` all; `python -m tests.test_wrong_calls` counts them by kind.
"""

from __future__ import annotations

import fnmatch
import inspect
import traceback
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laplace import errors, linalg
from tests import wrong_calls, wrong_values
from tests.contracts import model_untouched
from tests.wrong_calls import (
    SUBJECTS,
    Call,
    Subject,
    Swallows,
    base_arguments,
    batches,
    calls,
    keywords_of,
    misspelt,
    of_training,
    takes,
)
from tests.wrong_values import METHODS, SORTS, inputs

TYPED = tuple(
    error
    for error in vars(errors).values()
    if isinstance(error, type) and error.__module__ == errors.__name__ and not issubclass(error, Warning)
)
NEVER = {
    "merge": ("lowrank", "ekfac", "gp", "ella", "valla"),
    "subtract": ("lowrank", "ekfac", "gp", "ella", "valla"),
    "export_module": ("gp", "ella", "valla"),
    "sample": ("ella", "valla"),
    "plan": ("gp", "ella", "valla"),
    "log_marginal_likelihood": ("valla",),
    "optimize_prior_precision": ("valla",),
    "tune": ("valla",),
}
"""Methods that estimators refuse altogether, by the ends of their names."""


STRIDE = 41
"""Every how many-th call the default suite takes."""

LEGITIMATE = {
    "*(x=sparse)": "the model takes sparse inputs",
    "*(X=sparse)": "the same",
    "*: frozen": "weights of a last layer are random whether or not they are trained; for all weights it is refused",
    "*: detached": "a last layer is not differentiated by autograd; for all weights it is refused",
    "all-*: scripted": "functions are watched as in any other model",
    "all-*: traced": "the same",
    "subnet-*: scripted": "the same",
    "subnet-*: traced": "the same",
    "*valla(inducing_locations=wide)": "the model does not run before fit, which refuses them",
    "*valla(inducing_locations=nan)": "the same: for a model that takes NaN for missing they are inputs",
    "*valla(inducing_classes=outside)": "how many outputs there are is known in fit, which refuses them",
}
"""Calls that look wrong and make sense, and why."""


def never(subject: Subject, method: str) -> bool:
    """Whether a subject refuses a method altogether; probabilities have no standard deviation of a target."""
    if method == "predict_std":
        return subject.likelihood != "regression"
    if method == "export_module" and not subject.name.startswith("last"):
        return True
    return method in NEVER and subject.name.endswith(NEVER[method])


def outcome(call: Call, la: Any) -> tuple[str, BaseException | None]:
    """What comes of a call: "refused", "signature" (by Python itself), "raw" or "accepted", with the exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.call(la)
    except TYPED as error:
        return "refused", error
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        # The frame of the caller, or that of a decorator of ours right below it.
        at_the_call = where.filename in (wrong_calls.__file__, wrong_values.__file__) or (
            where.filename == linalg.__file__ and where.name == "run"
        )
        return ("signature" if isinstance(error, TypeError) and at_the_call else "raw"), error
    return "accepted", None


def state(la: Any) -> dict[str, Any]:
    """What an estimator holds, but for what it makes again on demand."""
    kept = {
        name: value
        for name, value in vars(la).items()
        if name not in ("_posterior_cache", "_backend", "_random_weights")
    }
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in kept.items()}


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    if before.keys() != after.keys():
        return False
    pairs = [(value, after[name]) for name, value in before.items()]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a is b or a == b for a, b in pairs)


def predictions(la: Any, **keywords: Any) -> list[Tensor]:
    result = la(inputs(), **keywords)
    return [result] if isinstance(result, Tensor) else list(result)


def why_legitimate(call: Call) -> str | None:
    return next((why for pattern, why in LEGITIMATE.items() if fnmatch.fnmatch(call.name, pattern)), None)


def check(chosen: list[Call], la: Any) -> None:
    """Every call is refused and leaves no trace; `la` is what they are made on."""
    complaints: list[str] = []
    predicted = predictions(la)
    before = state(la)
    for call in chosen:
        if why_legitimate(call) is not None:
            continue
        with model_untouched(la._network):
            found, error = outcome(call, la)
        if found in ("raw", "accepted"):
            complaints.append(f"{call}: {found}, {type(error).__name__}: {error}")
        if not same(before, state(la)):
            complaints.append(f"{call}: the estimator is not what it was")
    assert not complaints, f"{len(complaints)} of {len(chosen)}:\n" + "\n".join(complaints)
    for now, then in zip(predictions(la), predicted, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_wrong_calls_are_refused_in_words_and_change_nothing(subject: Subject) -> None:
    every = list(calls(subject))
    check(every[SUBJECTS.index(subject) * 7 % STRIDE :: STRIDE], subject.fitted())


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_all_wrong_calls_are_refused_in_words_and_change_nothing(subject: Subject) -> None:
    check(list(calls(subject)), subject.fitted())


def test_wrong_calls_of_marglik_training_are_refused() -> None:
    found = {call.name: outcome(call, None) for call in list(of_training())[::11]}
    assert {name: result for name, result in found.items() if result[0] != "refused"} == {}


@pytest.mark.slow
def test_all_wrong_calls_of_marglik_training_are_refused() -> None:
    found = {call.name: outcome(call, None) for call in of_training()}
    assert {name: result for name, result in found.items() if result[0] != "refused"} == {}


@pytest.mark.parametrize(
    "subject",
    [pytest.param(s, marks=[] if n % 4 == 0 else pytest.mark.slow, id=str(s)) for n, s in enumerate(SUBJECTS)],
)
def test_the_same_calls_with_right_values_are_none_of_these(subject: Subject) -> None:
    """What is refused is refused for the value that was replaced: the other arguments make sense."""
    la = subject.fitted()
    for method in METHODS:
        if method == "load_state_dict" or not hasattr(takes(subject), method):
            continue
        for arguments in base_arguments(subject, method):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if never(subject, method):
                    with pytest.raises(errors.UnsupportedError):
                        getattr(la, method)(**arguments)
                else:
                    getattr(la, method)(**arguments)


class Named(Swallows):
    """A model with an option of its own that is near one of ours."""

    def forward(self, x: Tensor, n_sample: int = 1, **kwargs: Any) -> Tensor:
        return super().forward(x, **kwargs) * n_sample


PREDICTORS = [subject for subject in SUBJECTS if subject.name in ("last-kron", "all-full", "subnet-diag", "all-gp")]


@pytest.mark.parametrize("subject", PREDICTORS, ids=str)
def test_a_misspelt_option_is_not_swallowed_by_a_model_that_takes_any_keyword(subject: Subject) -> None:
    la = subject.make(Swallows())
    la.fit(batches(subject.likelihood))
    options = [name for name in keywords_of(takes(subject).__call__) if name != "x"]
    for wrong, meant in misspelt(options).items():
        with pytest.raises(errors.UnknownOptionError, match=f"no option '{wrong}'. Did you mean '{meant}'") as caught:
            la(inputs(), **{wrong: 1})
        assert isinstance(caught.value, TypeError)
    expected = predictions(la)
    for now, then in zip(predictions(la, attention_mask=None, output_attentions=False), expected, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("subject", PREDICTORS[:1], ids=str)
def test_what_the_model_names_is_its_own_however_near(subject: Subject) -> None:
    la = subject.make(Named(), last_layer_name="body.2")
    la.fit(batches(subject.likelihood))
    for now, then in zip(predictions(la, n_sample=1), predictions(la), strict=True):
        assert torch.equal(now, then)
    with pytest.raises(errors.UnknownOptionError, match=r"'num_samples'.*'n_samples'"):
        la(inputs(), num_samples=3)


class Around(nn.Module):
    """A wrapper that passes keywords on."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.body(x, **kwargs)


def test_what_a_model_inside_wrappers_names_is_its_own() -> None:
    subject = PREDICTORS[0]
    la = subject.make(Around(Around(Named())), last_layer_name="body.body.body.2")
    la.fit(batches(subject.likelihood))
    for now, then in zip(predictions(la, n_sample=1), predictions(la), strict=True):
        assert torch.equal(now, then)
    with pytest.raises(errors.UnknownOptionError, match=r"'num_samples'.*'n_samples'"):
        la(inputs(), num_samples=3)


def test_there_are_more_than_four_hundred() -> None:
    count = sum(len(list(calls(subject))) for subject in SUBJECTS)
    assert count // STRIDE >= 400


def test_no_public_method_and_no_keyword_is_forgotten() -> None:
    for subject in SUBJECTS:
        functions = {n: f for n, f in inspect.getmembers(takes(subject), inspect.isfunction) if not n.startswith("_")}
        assert functions.keys() <= {*METHODS, "save", "load", "state_dict", "accept_untuned", "forget_data"}
        for function in (*functions.values(), takes(subject), takes(subject).__call__):
            assert set(keywords_of(function)) <= SORTS.keys()


def count() -> Counter[tuple[str, str]]:
    """All wrong calls, by kind and by what comes of them."""
    found: Counter[tuple[str, str]] = Counter()
    for subject in SUBJECTS:
        la = subject.fitted()
        for call in calls(subject):
            result = "legitimate" if why_legitimate(call) is not None else outcome(call, la)[0]
            found[call.kind, result] += 1
    return found + Counter(("training", outcome(call, None)[0]) for call in of_training())


if __name__ == "__main__":
    for (kind, result), number in sorted(count().items()):
        print(f"{kind:12} {result:10} {number:6}")
