"""Scores of probabilities, compared with SciPy and exact fractions."""

from __future__ import annotations

from decimal import Decimal, getcontext

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from laplace.density import entropy, log_one_minus_max, max_prob, mutual_information

LOGITS = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_one_minus_max_is_what_the_largest_probability_leaves():
    probs = LOGITS.softmax(-1)
    assert_close(log_one_minus_max(LOGITS).exp(), 1 - probs.amax(-1))
    assert_close(log_one_minus_max(probs.log()), log_one_minus_max(LOGITS))
    assert_close(log_one_minus_max(LOGITS.view(2, 3, 4)), log_one_minus_max(LOGITS).view(2, 3))
    assert_close(max_prob(probs), 1 - probs.amax(-1))


@pytest.mark.parametrize("gap", [1.0, 40.0, 800.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_minus_max_is_exact_where_probabilities_are_saturated(gap, dtype):
    getcontext().prec = 60
    others = Decimal(2) * (-Decimal(gap)).exp()
    expected = float((others / (1 + others)).ln())
    found = log_one_minus_max(torch.tensor([[-gap, 0.0, -gap]], dtype=dtype))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_one_minus_max_of_equal_logits_and_of_one():
    assert_close(log_one_minus_max(torch.zeros(1, 4)).exp(), torch.tensor([0.75]))
    f = torch.tensor([[-2.0], [0.5], [60.0]])
    assert_close(log_one_minus_max(f), torch.nn.functional.logsigmoid(-f.abs()).squeeze(1))


def test_max_prob_of_saturated_probabilities():
    assert_close(max_prob(torch.tensor([[1.0, 1e-30, 2e-30]])), torch.tensor([3e-30]), rtol=1e-9, atol=0)


def test_entropy_is_that_of_scipy():
    probs = LOGITS.softmax(-1)
    probs[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert_close(entropy(probs), torch.from_numpy(stats.entropy(probs.numpy(), axis=-1)))


def test_mutual_information_is_that_of_the_joint_table():
    samples = torch.randn(5, 3, 4).softmax(-1)
    expected = []
    for row in samples.unbind(1):
        joint = row / 5  # of the sample and the class
        independent = joint.sum(0) / 5
        expected.append(float((joint * (joint / independent).log()).sum()))
    assert_close(mutual_information(samples), torch.tensor(expected))
    assert not mutual_information(samples[:1].repeat(4, 1, 1)).gt(1e-12).any()
    assert (mutual_information(samples[:1].repeat(4, 1, 1)) >= 0).all()
