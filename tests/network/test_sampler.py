"""A random subset of the data."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset

from laplace.errors import InputError
from laplace.utils import SoDSampler


def test_a_subset_has_m_different_indices_the_same_in_every_pass():
    sampler = SoDSampler(20, 7)
    assert isinstance(sampler, Sampler)
    assert len(sampler) == 7
    assert len(set(sampler)) == 7
    assert set(sampler) <= set(range(20))
    assert list(sampler) == list(sampler)
    assert {type(index) for index in sampler} == {int}


def test_a_subset_is_that_of_numpys_generator_for_the_seed():
    for seed in (0, 5):
        expected = np.random.default_rng(seed).choice(range(20), 7, replace=False)
        assert list(SoDSampler(20, 7, seed)) == expected.tolist()
    assert list(SoDSampler(20, 7)) == list(SoDSampler(20, 7, 0)) != list(SoDSampler(20, 7, 5))


def test_no_global_source_of_randomness_is_touched():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    SoDSampler(20, 7)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_loader_with_it_yields_the_subset():
    data = TensorDataset(torch.arange(20))
    batches = [batch for (batch,) in DataLoader(data, batch_size=3, sampler=SoDSampler(20, 7))]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.cat(batches).tolist() == list(SoDSampler(20, 7))
    assert sorted(SoDSampler(20, 20)) == list(range(20))


@pytest.mark.parametrize("M", [0, -1, 21])
def test_sizes_that_are_none_are_refused(M):
    with pytest.raises(InputError, match=f"between 1 and 20 data; got {M}"):
        SoDSampler(20, M)
