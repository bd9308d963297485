"""Labels of causal language models, which are the tokens of their inputs: shifted by one, as their own loss shifts them."""

import pytest
import torch
import transformers
from torch import nn

from laplace import Laplace, marglik_training
from laplace.errors import InputError
from laplace.network.batches import iterate
from tests.network.test_failures import CPU, estimator, every_kind

TOKENS = torch.randint(0, 7, (2, 6), generator=torch.Generator().manual_seed(0))


def read(*batches, **keys):
    return list(iterate(batches, dict_key_y="labels", device=CPU, **keys))


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


def shifted(labels):
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


SHIFTS = r"labels are the tokens of the inputs.*shifted by one.*shift_labels=True.*shift_labels=False"


@pytest.mark.filterwarnings("ignore:The best prior precision")
@every_kind
def test_labels_that_are_the_tokens_of_the_inputs_are_shifted(kind):
    told = estimator(kind, Language())
    told.fit(3 * [{"input_ids": TOKENS, "labels": shifted(TOKENS)}])
    for batch in ((TOKENS, TOKENS.clone()), {"input_ids": TOKENS, "labels": TOKENS.clone()}):
        la = estimator(kind, Language())
        la.model.load_state_dict(told.model.state_dict())
        with pytest.warns(UserWarning, match=SHIFTS):
            la.fit(3 * [batch])
        torch.testing.assert_close(la(TOKENS), told(TOKENS))
    if kind != "ella":
        with pytest.warns(UserWarning, match=SHIFTS):
            la.optimize_prior_precision(method="gridsearch", val_loader=[(TOKENS, TOKENS)], grid_size=3)


def test_tokens_of_any_name_are_tokens():
    for y in (TOKENS, TOKENS.clone()):  # also of one object under both names
        with pytest.warns(UserWarning, match=SHIFTS):
            (found,) = read({"pad": torch.ones_like(TOKENS), "tokens": TOKENS, "labels": y})
        assert torch.equal(found.y, shifted(TOKENS))
    (found,) = read({"tokens": TOKENS, "labels": shifted(TOKENS)})
    assert torch.equal(found.y, shifted(TOKENS))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wanted", [True, False])
def test_who_says_it_is_not_warned(wanted):
    model = Language()
    la = Laplace(model, "classification", "all", "diag", shift_labels=wanted)
    la.fit([(TOKENS, TOKENS)])
    at = model(TOKENS)
    f, y = (at[:, :-1], TOKENS[:, 1:]) if wanted else (at, TOKENS)
    own = nn.functional.cross_entropy(f.reshape(-1, 7), y.reshape(-1), reduction="sum")
    torch.testing.assert_close(la.loss, own.detach())
    assert la.shift_labels is wanted
    assert la.n_data == 2


@pytest.mark.filterwarnings("error")
def test_training_by_the_evidence_shifts_labels_where_that_is_said():
    found = []
    for labels, told in ((TOKENS, {"shift_labels": True}), (shifted(TOKENS), {})):
        torch.manual_seed(0)
        la, *_ = marglik_training(Language(), [(TOKENS, labels)], hessian_structure="diag", n_epochs=2, **told)
        found.append(la.mean)
    torch.testing.assert_close(*found)


def test_the_loss_is_that_of_the_language_model_itself():
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(2))
    labels = tokens.where(torch.arange(8) < 6, -100)
    la = Laplace(model, "classification", "last_layer", "diag", last_layer_name="lm_head", shift_labels=True)
    batch = {"input_ids": tokens, "labels": labels}
    la.fit([batch])
    torch.testing.assert_close(float(la.loss), 15 * float(model(**batch).loss.detach()))


def test_targets_that_cannot_be_shifted():
    with pytest.raises(InputError, match="shift_labels=True moves labels"):
        read((torch.zeros(3, 2), torch.arange(3)), shift_labels=True)
    with pytest.raises(InputError, match="shift_labels=True moves labels"):
        read((torch.zeros(3, 2), torch.zeros(3, 2)), shift_labels=True)
    with (
        pytest.raises(InputError, match="labels of earlier batches are the tokens"),
        pytest.warns(UserWarning, match=SHIFTS),
    ):
        read((TOKENS, TOKENS.clone()), (TOKENS, shifted(TOKENS)))
    with pytest.raises(InputError, match="shift_labels"):
        Laplace(Language(), "classification", shift_labels="yes")


def labels(**changes) -> torch.Tensor:
    """The tokens with some positions at another value."""
    y = TOKENS.clone()
    for position, value in changes.items():
        y.view(-1)[int(position[1:])] = value
    return y


KEPT = {
    "masked tokens, some of them unchanged": labels(**{f"p{i}": -100 for i in range(5, 12)}),
    "another label at one position": labels(p3=(int(TOKENS.view(-1)[3]) + 1) % 7),
    "shifted": shifted(TOKENS),
    "all masked": torch.full_like(TOKENS, -100),
}


@pytest.mark.parametrize("name", KEPT)
def test_labels_that_may_be_meant(name):
    (batch,) = read((TOKENS, KEPT[name]))
    assert torch.equal(batch.y, KEPT[name])


def test_tokens_of_another_integer_type_are_tokens():
    with pytest.warns(UserWarning, match=SHIFTS):
        (found,) = read((TOKENS.int(), TOKENS))
    assert torch.equal(found.y, shifted(TOKENS))


def test_few_labels_a_batch_tell_together():
    short = [(TOKENS[:1], TOKENS[:1].where(torch.arange(6) > 3, -100)) for _ in range(20)]
    with pytest.raises(InputError, match=r"those before were too few to tell.*shift_labels=True"):
        read(*short)
    assert torch.equal(read(*short, shift_labels=True)[3].y[0, 3:5], TOKENS[0, 4:])


def test_a_batch_without_labels_tells_nothing():
    nothing = torch.full_like(TOKENS, -100)
    with pytest.warns(UserWarning, match=SHIFTS):
        found = read((TOKENS, nothing), (TOKENS, TOKENS))
    assert torch.equal(found[1].y, shifted(TOKENS))


def test_labels_that_count_at_some_positions_of_padded_text():
    x = torch.cat([TOKENS, torch.zeros(2, 3, dtype=torch.long)], 1)
    y = torch.cat([TOKENS, torch.full((2, 3), -100)], 1)
    for batch in ((x, y), (x, (x != 0).long(), y), {"ids": x, "labels": y}, {"input_ids": x, "labels": y}):
        with pytest.warns(UserWarning, match=SHIFTS):
            (found,) = read(batch, dict_key_x="ids" if isinstance(batch, dict) and "ids" in batch else "input_ids")
        assert torch.equal(found.y, shifted(y))


@pytest.mark.parametrize("x", [torch.arange(4), torch.arange(4).unsqueeze(1), TOKENS.float()])
def test_inputs_that_are_no_text(x):
    assert len(read((x, x.clone()))) == 1


@pytest.mark.parametrize("x", [torch.zeros(6, 5), torch.zeros(0, 5), torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2]])])
def test_few_or_equal_tokens_are_the_labels_by_chance(x):
    assert len(read((x.long(), x.long()))) == (len(x) > 0)


def test_labels_that_differ_once_are_no_copies():
    assert len(read((TOKENS, shifted(TOKENS)), (TOKENS, TOKENS.clone()))) == 2
    with pytest.raises(InputError, match=r"Batch 1 of.*labels of this batch are the tokens"):
        read((torch.zeros_like(TOKENS), torch.zeros_like(TOKENS)), (TOKENS, TOKENS.clone()))
