"""What loaders yield, and how inputs enter a model."""

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from laplace import Laplace
from laplace.errors import InputError
from laplace.network.batches import call, iterate, signature, split, to_device
from laplace.network.signatures import takes_several
from tests.cases import stream

CPU = torch.device("cpu")
X, Y = torch.randn(5, 3), torch.arange(5)
BATCHES = [(X[:3], Y[:3]), (X[3:], Y[3:])]


@pytest.mark.parametrize(
    "loader",
    [BATCHES, tuple(BATCHES), stream(BATCHES), DataLoader(TensorDataset(X, Y), batch_size=3), [list(b) for b in BATCHES]],
    ids=["list", "tuple", "stream without length", "DataLoader", "lists as batches"],
)  # fmt: skip
def test_any_iterable_of_batches_is_a_loader(loader):
    seen = list(iterate(loader, dict_key_y="labels", device=CPU))
    assert torch.equal(torch.cat([batch.x for batch in seen]), X)
    assert torch.equal(torch.cat([batch.y for batch in seen]), Y)


def test_a_generator_is_read_once_and_lazily():
    pulled = []
    batches = iterate((pulled.append(b) or b for b in BATCHES), dict_key_y="labels", device=CPU)
    next(batches)
    assert len(pulled) == 1


@pytest.mark.parametrize("progress_bar", [False, True])
def test_a_loader_is_asked_once_for_a_pass(progress_bar):
    class Counted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    loader = Counted([(torch.ones(2), torch.ones(2))] * 3)
    assert len(list(iterate(loader, dict_key_y="labels", device=CPU, progress_bar=progress_bar))) == 3
    assert loader.passes == 1


def test_the_bar_knows_the_number_of_batches_where_there_is_one(capsys):
    batches = [(torch.ones(2), torch.ones(2))] * 3
    for loader, shown in ((batches, "3/3"), (stream(batches), "3it"), (iter(batches), "3it")):
        assert len(list(iterate(loader, dict_key_y="labels", device=CPU, progress_bar=True))) == 3
        assert shown in capsys.readouterr().err


def test_several_inputs_come_before_the_target():
    x, y = split((X, X + 1, Y), "labels", CPU)
    assert isinstance(x, tuple)
    assert len(x) == 2
    assert torch.equal(y, Y)


def test_nested_inputs_keep_their_structure():
    Pair = namedtuple("Pair", "a b")
    x, _ = split(([X, {"deep": (X, "text", 3)}, Pair(X, None)], Y), "labels", CPU)
    assert isinstance(x, list)
    assert x[1]["deep"][1:] == ("text", 3)
    assert isinstance(x[2], Pair)


@pytest.mark.parametrize("kind", [dict, UserDict, BatchEncoding])
def test_mappings_keep_their_type_and_give_up_their_target(kind):
    batch = kind({"input_ids": X, "labels": Y})
    x, y = split(batch, "labels", CPU)
    assert type(x) is kind
    assert torch.equal(x["input_ids"], X)
    assert torch.equal(y, Y)
    assert set(batch) == {"input_ids", "labels"}, "the loader's own batch is left alone"


def test_packed_sequences_are_inputs():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.layer(x)[1][-1])

    model, y = Recurrent(), torch.tensor([0, 1, 0])
    x = nn.utils.rnn.pack_sequence([torch.randn(n, 3) for n in (4, 3, 2)])
    la = Laplace(model, "classification", "last_layer", "full")
    la.fit([(x, y)])
    torch.testing.assert_close(la.loss, nn.functional.cross_entropy(model(x), y, reduction="sum").detach())
    assert la(x).shape == (3, 2)
    assert signature(x, 9)[0] == (x.data.dtype, (3,))


def test_moving_does_not_write_to_the_batch():
    batch = {"a": X, "b": [X]}
    moved = to_device(batch, torch.device("meta"))
    assert batch["a"] is X
    assert batch["b"][0] is X
    assert moved["a"].is_meta
    assert moved["b"][0].is_meta


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"input_ids": X, "target": Y}, "'input_ids', 'target'.*'labels'.*dict_key_y"),
        (X, r"\(x, y\).*Tensor"),
        ((X,), r"\(x, y\).*tuple"),
        ((X, [0, 1]), "Targets must be a tensor.*list"),
        ("text", r"\(x, y\).*str"),
    ],
    ids=["key missing", "bare tensor", "no target", "targets as a list", "text"],
)
def test_batches_that_are_none_are_explained(batch, says):
    with pytest.raises(InputError, match=says):
        list(iterate([batch], dict_key_y="labels", device=CPU))


def test_what_cannot_be_looped_over_is_no_loader():
    with pytest.raises(InputError, match="iterable"):
        list(iterate(3, dict_key_y="labels", device=CPU))


class Whole(nn.Module):
    def forward(self, batch):
        return batch


class Keywords(nn.Module):
    def forward(self, input_ids, attention_mask=None, labels=None, **options):
        return input_ids, attention_mask, labels, options


class Several(nn.Module):
    def forward(self, first, second=None):
        return first, second


class Any_(nn.Module):
    def forward(self, *inputs):
        return inputs


class KeywordOnly(nn.Module):
    def forward(self, x, *, scale=1.0):
        return x, scale


KEYS = {"dict_key_x": "input_ids", "dict_key_y": "labels"}


def test_mappings_are_unpacked_when_forward_names_their_main_entry():
    batch = {"input_ids": X, "attention_mask": Y, "labels": Y, "extra": 1}
    assert call(Keywords(), batch, **KEYS) == (X, Y, None, {"extra": 1})
    assert call(Whole(), batch, **KEYS) is batch


def test_the_main_entry_is_found_where_forward_names_it_or_there_is_one():
    class Images(nn.Module):
        def forward(self, pixels, mask=None):
            return pixels, mask

    assert call(Images(), {"mask": Y, "pixels": X, "labels": Y}, **KEYS) == (X, Y)
    alone = {"image": X, "labels": Y}
    assert call(Whole(), alone, **KEYS) is alone
    with pytest.raises(InputError, match=r"'image', 'other'.*'input_ids'.*dict_key_x"):
        call(Whole(), {"image": X, "other": X}, **KEYS)
    with pytest.raises(InputError, match=r"'pixels'.*'image'.*dict_key_x"):
        call(Images(), {"pixels": X}, dict_key_x="image", dict_key_y="labels")


def test_a_mapping_without_its_main_entry_is_explained():
    with pytest.raises(InputError, match=r"'pixels'.*'input_ids'.*dict_key_x"):
        call(Keywords(), {"pixels": X}, **KEYS)


def test_sequences_are_unpacked_when_forward_takes_several():
    assert call(Several(), (X, Y), **KEYS) == (X, Y)
    assert call(Any_(), [X, Y], **KEYS) == (X, Y)
    pair = (X, Y)
    assert call(Whole(), pair, **KEYS) is pair
    assert call(KeywordOnly(), pair, scale=2.0, **KEYS) == (pair, 2.0)
    assert call(Several(), X, **KEYS) == (X, None)


def test_model_kwargs_are_passed_on():
    assert call(Keywords(), {"input_ids": X}, attention_mask=Y, **KEYS)[1] is Y
    assert call(KeywordOnly(), X, scale=3.0, **KEYS) == (X, 3.0)


def test_counting_positional_parameters():
    assert [takes_several(m) for m in (Whole(), Keywords(), Several(), Any_(), KeywordOnly())] == [
        False,
        True,
        True,
        True,
        False,
    ]
