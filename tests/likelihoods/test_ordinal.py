"""The likelihood that the page on likelihoods writes: every structure, choice of weights, tuning and predictive."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from laplace import Laplace
from laplace.enums import LinkApprox
from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods import register
from tests import likelihood_kinds
from tests.contracts import check_likelihood, generator
from tests.examples.test_docs import run
from tests.likelihood_kinds import Kind, gaussian_grid
from tests.likelihoods import situations, test_estimators
from tests.likelihoods.situations import N_OUTPUTS, build, cut, data, inputs, pairwise
from tests.likelihoods.test_estimators import METHODS, PRED_TYPES, STRUCTURES, SUBSETS, check_situation, exists
from tests.tools import assert_close, assert_within

pytestmark = [
    pytest.mark.filterwarnings("ignore:The validation score is best"),
    pytest.mark.filterwarnings("ignore:The best "),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no temperature is best"),
]
CUTS = (-1.1, 0.0, 1.1)
AXES = (["ordinal"], STRUCTURES, SUBSETS, PRED_TYPES, METHODS)
COVERING = pairwise(AXES, exists)
REST = [values for values in itertools.product(*AXES) if exists(*values) and values not in COVERING]


def probabilities(f: Tensor) -> Tensor:
    """Differences of the distribution of a logistic number around f, at the cut points."""
    below = torch.special.expit(torch.tensor(CUTS) - f)
    edge = torch.zeros_like(f)
    return torch.cat([below, edge + 1], -1) - torch.cat([edge, below], -1)


def every_grade(f: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(4), probabilities(f)


ORDINAL = Kind(
    "ordinal",
    log_density=lambda f, y: probabilities(f).gather(-1, y.unsqueeze(-1)).squeeze(-1).log(),
    mean=probabilities,
    numbers=lambda y, _: likelihood_kinds.one_hot(y, 4),
    support=every_grade,
    n_outputs=(1,),
    links={"probit": 0.03, "mc": 0.0},
    classes=lambda y: y,
    of_logits=True,
    joint=("mc",),
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the page defines, in which its code ran."""
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        names = run("likelihoods.md", tmp_path_factory.mktemp("page"), patch)
        torch.set_default_dtype(before)
        register(names["OrdinalLikelihood"])
        for table in (likelihood_kinds.KINDS, test_estimators.KINDS, situations.KINDS):
            patch.setitem(table, "ordinal", ORDINAL)
        patch.setitem(N_OUTPUTS, "ordinal", 1)
        yield names


def test_the_page_defines_it_in_about_forty_lines():
    text = (Path(__file__).parents[2] / "docs" / "likelihoods.md").read_text(encoding="utf-8")
    code = text[text.index("class OrdinalLikelihood") : text.index("ordinal = OrdinalLikelihood()")]
    assert len([line for line in code.splitlines() if line.strip()]) <= 55


@pytest.mark.slow
def test_the_page_predicts_what_it_says(page):
    assert page["probabilities"].shape == (142, 4)
    assert_close(page["probabilities"].sum(-1), torch.ones(142, dtype=torch.float32))
    correct = (page["probabilities"].argmax(-1) == page["grades"][300:]).float().mean()
    assert float(correct) > 0.35, "a quarter is chance"
    assert page["mean"].shape == page["told"].epistemic_variance.shape == page["total"].shape == (142, 1)
    assert page["rates"].shape == (142, 1)
    assert bool((page["total"] > page["told"].aleatoric_variance).all())


def test_the_contract_holds(page):
    f = ORDINAL.outputs(4, 1)
    check_likelihood(page["OrdinalLikelihood"](), f, ORDINAL.targets(f))


def test_predictions_are_integrals(page):
    mean, cov = ORDINAL.moments(3, 1)
    nodes, mass = gaussian_grid(mean, cov)
    for T, (link, error) in itertools.product((1.0, 2.5), ORDINAL.links.items()):
        likelihood = page["OrdinalLikelihood"](output_temperature=T)
        found = likelihood.predict(mean, cov, likelihood.link(LinkApprox(link), 20_000, generator(0)))
        truth, square = (torch.tensordot(mass, probabilities(nodes / T) ** power, 1) for power in (1, 2))
        if link == "mc":
            assert_within(found, truth, ((square - truth**2).clamp(min=0) / 20_000).sqrt())
        else:
            assert float((found - truth).abs().max()) < error
        y = torch.tensor([0, 2, 3])
        nll = likelihood.predictive_nll(mean, cov, y, likelihood.link(LinkApprox.PROBIT, 1, None))
        by_link = likelihood.predict(mean, cov, likelihood.link(LinkApprox.PROBIT, 1, None))
        assert_close(nll, -by_link.gather(1, y[:, None]).log().sum())


@pytest.mark.parametrize(("name", "structure", "subset", "pred_type", "method"), COVERING)
def test_every_situation_takes_it(page, name, structure, subset, pred_type, method):
    check_situation(name, structure, subset, pred_type, method)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "structure", "subset", "pred_type", "method"), REST)
def test_every_other_situation_takes_it(page, name, structure, subset, pred_type, method):
    check_situation(name, structure, subset, pred_type, method)


def test_what_it_does_not_say_is_refused_by_name(page):
    variational = Laplace(
        situations.network(1), "ordinal", "all", "gp", functional_approximation="variational",
        inducing_locations=inputs(ORDINAL, 4, 9),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"ordinal.*no objective for variational inference"):
        variational.fit(cut(*data(ORDINAL)), iterations=2)
    la = build(ORDINAL, "last_layer", "full")
    la.fit(cut(*data(ORDINAL)))
    with pytest.raises(UnsupportedError, match=r"density of the features.*ordinal"):
        la.ood_score(inputs(ORDINAL, 3, 3))
    with pytest.raises(UnsupportedError, match="bridge"):
        la(inputs(ORDINAL, 3, 3), link_approx="bridge")


def test_its_state_knows_the_cut_points(page, tmp_path):
    ordinal, model = page["OrdinalLikelihood"], situations.network(1)
    la = Laplace(model, ordinal(cuts=(-1.0, 0.5, 2.0)))
    la.fit(cut(*data(ORDINAL)))
    la.save(tmp_path / "state")
    with pytest.raises(InputError, match=r"cuts=\(-1\.0, 0\.5, 2\.0\).*cuts=\(-1\.1"):
        Laplace(model, "ordinal").load(tmp_path / "state")
