"""An untuned posterior says so: once, with numbers, and with the line that repairs it."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from laplace import FunctionalLLLaplace, KronLaplace, KronLLLaplace, Laplace
from laplace.errors import UntunedWarning

SEEN = r"Nobody has tuned.*mean confidence is 0\.\d\d where the network has \d\.\d\d.*la\.tune\(val_loader\)"


def confident(n_outputs: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network that is sure of its labels, with few data: at a precision of 1 the posterior is wide."""
    noise = torch.Generator().manual_seed(0)
    model = nn.Linear(4, n_outputs)
    with torch.no_grad():
        model.weight.copy_(2 * torch.randn(n_outputs, 4, generator=noise))
    x = torch.randn(20, 4, generator=noise)
    f = model(x).detach()
    return model, x, (f[:, :1] > 0).double() if n_outputs == 1 else f.argmax(-1)


def fitted(cls=KronLLLaplace, n_outputs=3, **options):
    model, x, y = confident(n_outputs)
    la = cls(model, "binary" if n_outputs == 1 else "classification", **options)
    la.fit([(x, y)])
    return la, x, y


def silent(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (KronLLLaplace, {}),
        (KronLaplace, {}),
        (FunctionalLLLaplace, {"n_subset": 20}),
    ],
)
def test_the_first_prediction_warns_and_the_second_does_not(cls, options):
    la, x, _ = fitted(cls, **options)
    with pytest.warns(UntunedWarning, match=SEEN):
        first = la(x)
    assert torch.equal(silent(lambda: la(x)), first)


def test_the_numbers_are_those_of_the_batch():
    la, x, _ = fitted()
    with pytest.warns(UntunedWarning) as caught:
        p = la(x)
    q = la.model(x).softmax(-1)
    text = str(caught[0].message)
    assert (
        f"mean confidence is {p.max(-1).values.mean():.2f} where the network has {q.max(-1).values.mean():.2f}" in text
    )
    assert f"{(p.argmax(-1) != q.argmax(-1)).double().mean():.1%} of the decisions" in text
    assert f"On these {len(x)} predictions" in text
    assert caught[0].filename == __file__


def test_a_single_logit_is_compared_as_two_classes():
    la, x, _ = fitted(n_outputs=1)
    with pytest.warns(UntunedWarning, match=SEEN):
        la(x)


@pytest.mark.parametrize(
    "choose",
    [
        lambda la: setattr(la, "prior_precision", 1.0),
        lambda la: setattr(la, "output_temperature", 1.0),
        lambda la: setattr(la, "temperature", 1.0),
        lambda la: setattr(la, "prior_mean", 0.0),
        lambda la: la.accept_untuned(),
        lambda la: la.optimize_prior_precision(),
        lambda la: la.load_state_dict(la.state_dict()),
    ],
    ids=["prior_precision", "output_temperature", "temperature", "prior_mean", "accept_untuned", "marglik", "state"],
)
def test_whoever_has_chosen_is_not_told(choose):
    la, x, _ = fitted()
    choose(la)
    silent(lambda: la(x))


def test_a_precision_of_the_constructor_is_a_choice_unless_it_is_1():
    la, x, _ = fitted(prior_precision=3.0)
    silent(lambda: la(x))
    la, x, _ = fitted(prior_precision=1.0)
    with pytest.warns(UntunedWarning):
        la(x)


@pytest.mark.slow
def test_where_predictions_are_those_of_the_network_there_is_nothing_to_say():
    model, x, y = confident()
    with torch.no_grad():
        model.weight.mul_(0.1)  # a network that doubts learns from every label
    la = Laplace(model, "classification", hessian_structure="diag")
    la.fit([(x, y)] * 1_000)
    silent(lambda: la(x))


def test_regression_predicts_the_mean_of_the_network():
    model, x, _ = confident()
    la = Laplace(model, "regression")
    la.fit([(x, model(x).detach())])
    silent(lambda: la(x))


def test_a_model_that_is_moved_stays_untuned_and_a_copy_as_well():
    la, x, _ = fitted()
    la.model.float()
    with pytest.warns(UntunedWarning):
        copy.deepcopy(la)(x.float())
    with pytest.warns(UntunedWarning):
        la(x.float())


def test_classifiers_tuned_by_evidence_get_one_hint_in_a_process():
    code = """
import torch
from torch import nn
from laplace import Laplace
torch.manual_seed(0)
x, y = torch.randn(20, 4), torch.randint(3, (20,))
for likelihood, y in (("regression", torch.randn(20, 3)), ("classification", y), ("classification", y)):
    la = Laplace(nn.Linear(4, 3), likelihood)
    la.fit([(x, y)])
    la.optimize_prior_precision()
    print(likelihood)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["regression", "classification", "classification"]
    assert done.stderr.count("Hint: method='marglik'") == 1
    assert "la.tune(val_loader)" in done.stderr
