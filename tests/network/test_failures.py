"""Batches that no model takes: the message says which batch, what was in it, what was taken for what, and what to do."""

import pickle
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace import Laplace, marglik_training
from laplace.errors import InputError, MissingKeyError, ModelError, UnsupportedError
from laplace.network.batches import iterate
from laplace.network.failures import described
from tests.contracts import model_untouched

X, Y, INDEX = torch.randn(12, 3), torch.arange(12) % 3, torch.arange(12)
CPU = torch.device("cpu")
KINDS = {
    "last layer": {"subset_of_weights": "last_layer", "hessian_structure": "kron"},
    "all": {"subset_of_weights": "all", "hessian_structure": "kron"},
    "subnetwork": {"subset_of_weights": "subnetwork", "hessian_structure": "full", "subnetwork_indices": [0, 5, 12]},
    "process": {"subset_of_weights": "all", "hessian_structure": "gp", "n_subset": 5},
    "process of the last layer": {"subset_of_weights": "last_layer", "hessian_structure": "gp", "n_subset": 5},
    "ella": {
        "hessian_structure": "gp",
        "subset_of_weights": "all",
        "functional_approximation": "nystrom",
        "subsample_size": 5,
        "n_eigenvalues": 3,
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def net(dtype=torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def estimator(kind: str, model=None):
    options = dict(KINDS[kind])
    if "subnetwork_indices" in options:
        options["subnetwork_indices"] = torch.tensor(options["subnetwork_indices"])
    return Laplace(net() if model is None else model, "classification", **options)


def batches(*data, size: int = 4) -> list:
    return [tuple(part[start : start + size] for part in data) for start in range(0, len(data[0]), size)]


class Fussy(nn.Module):
    """Fails on inputs that are large, with an exception of its own kind."""

    def __init__(self, error=None):
        super().__init__()
        self.body, self.error = net(), error or ValueError("too large")

    def forward(self, x):
        if bool((x > 50).any()):
            raise self.error
        return self.body(x)


# -- a model that fails -----------------------------------------------------------------------------------------------


@every_kind
def test_a_failing_model_is_named_with_the_batch_its_shapes_and_its_own_exception(kind):
    inputs = X.clone()
    inputs[6] = 99.0
    model, error = Fussy(), r"The model \(Fussy\) raised ValueError: too large. .*tensor \[\d+, 3\] of torch.float32"
    la = estimator(kind, model)
    with model_untouched(model), pytest.raises(ModelError, match=error) as caught:
        la.fit(batches(inputs, Y))
    if kind != "ella":  # which runs the model on a subsample first
        assert str(caught.value).startswith("Batch 1 of the loader (counting from 0): ")
    causes, cause = [], caught.value
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    assert model.error in causes
    la.fit(batches(X, Y))
    before = la(X)
    with pytest.raises(ModelError, match=error):
        la(inputs)
    with pytest.raises(ModelError, match=f"Batch 1 .*{error}"):
        la.optimize_prior_precision(method="gridsearch", val_loader=batches(inputs, Y), grid_size=3)
    assert torch.equal(la(X), before)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt(), OSError("disk")])
def test_exceptions_that_mean_something_else_pass(error):
    la = estimator("all", Fussy(error))
    with pytest.raises(type(error)) as caught:
        la.fit([(100 * torch.ones(2, 3), Y[:2])])
    assert caught.value is error


def test_errors_are_what_plain_code_would_have_raised():
    error = pickle.loads(pickle.dumps(MissingKeyError("no 'x'")))
    assert isinstance(error, (InputError, KeyError))
    assert str(error) == "no 'x'"  # a KeyError alone shows quotes
    assert issubclass(ModelError, (InputError, RuntimeError))


# -- what was taken for what ------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("index", [INDEX, INDEX % 3], ids=["any index", "an index that could be a label"])
def test_three_items_and_one_input(kind, index):
    says = r"were passed as one tuple.*|on one row of a batch"
    with pytest.raises(ModelError, match=says) as caught:
        estimator(kind).fit(batches(X, Y, index))
    if kind != "ella":
        said = r"3 items: the first 2 were taken for inputs of the model, the last one for the targets.*\(x, y, index\)"
        assert caught.match(said)


def test_three_items_where_the_last_is_no_target():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=torch.float32)

        def forward(self, x, mask=None):
            return self.layer(x) if mask is None else self.layer(x) * mask.unsqueeze(-1)

    la = Laplace(Two(), "classification", "all", "diag")
    with pytest.raises(InputError, match=r"Batch 0.*lie in 0\.\.2.*3 items.*the last one for the targets"):
        la.fit(batches(X, Y, INDEX))


@every_kind
def test_mappings_of_tensors_for_a_model_of_tensors(kind):
    loader = [{"data": x, "label": y, "index": i} for x, y, i in batches(X, Y, INDEX)]
    with pytest.raises(KeyError, match=r"Batch 0.*keys 'data', 'label', 'index'; the targets.*'labels'.*dict_key_y="):
        estimator(kind).fit(loader)
    model = net()
    for keys in ({}, {"dict_key_x": "data"}):
        la = Laplace(model, "classification", "all", "diag", dict_key_y="label", **keys)
        if keys:
            with pytest.raises(ModelError, match=r"'data': a tensor \[4, 3\].*passed whole.*dict_key_x=.*\(x, y\)"):
                la.fit(loader)
        else:
            with pytest.raises(KeyError, match=r"main input is expected under 'input_ids'.*dict_key_x="):
                la.fit(loader)


# -- what tensors hold ------------------------------------------------------------------------------------------------

INPUTS = {
    "float64": (X.double(), "weights are torch.float32, the inputs torch.float64: convert"),
    "half": (X.half(), "weights are torch.float32, the inputs torch.float16: convert"),
    "integers": ((9 * X).int(), "weights are torch.float32, the inputs torch.int32: convert"),
    "complex": (X + 0j, "the inputs torch.complex64: convert"),
    "NumPy": (X.numpy(), r"of type ndarray \[12, 3\].*torch.as_tensor"),
    "numbers": (X.tolist(), "a list of 12.*torch.as_tensor"),
    "nothing": (None, "input was None.*torch.as_tensor"),
    "text": ("flower", "of type str.*torch.as_tensor"),
    "other features": (X[:, :2], r"cannot be multiplied.*tensor \[12, 2\]"),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("kind", ["last layer", "all", "process"])
def test_inputs_that_the_model_does_not_take(kind, name):
    inputs, says = INPUTS[name]
    la = estimator(kind)
    with pytest.raises(ModelError, match=f"Batch 0.*{says}"):
        la.fit([(inputs, Y)])
    la.fit([(X, Y)])
    with pytest.raises(ModelError, match=says):
        la(inputs)


def test_weights_in_another_precision_than_the_inputs():
    with pytest.raises(ModelError, match=r"weights are torch\.float64, the inputs torch.float32: convert"):
        estimator("all", net(torch.float64)).fit([(X, Y)])


def test_integers_are_no_hint_where_tokens_are_looked_up():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.table(x).mean(1))

    with pytest.raises(ModelError, match="IndexError: index out of range") as caught:
        estimator("all", Tokens()).fit([(torch.full((2, 5), 9), Y[:2])])
    assert "convert" not in str(caught.value)


# -- targets and loaders ----------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return zip(X, Y, strict=True)


LOADERS = {
    "a stream of single data": (Stream(), r"Batch 0.*yields single data.*DataLoader\(dataset, batch_size="),
    "inputs alone": ([X, X], r"got Tensor.*TensorDataset\(x, y\).*\[\(x, y\)\]"),
    "a data set of inputs alone": (DataLoader(TensorDataset(X), batch_size=4), r"must yield \(x, y\).*got list"),
    "the inputs": (X, r"got a Tensor of the shape \[12, 3\].*TensorDataset\(x, y\)"),
    "an array": (X.numpy(), r"got a ndarray of the shape \[12, 3\].*TensorDataset\(x, y\)"),
    "targets as an array": (
        [(X, Y.numpy())],
        r"loader yields ndarray.*batch that is .*of type ndarray \[12\].*as_tensor",
    ),
    "a used iterator": (iter([]), "loader is empty.*iterator.*read before|yields 0 rows"),
    "an empty mapping": ([{}], "with no key; the targets"),
    "one datum": ([(X[0], Y[0])], "yields single data"),
    "fewer targets": ([(X, Y[:7])], r"shape \[12\].*got \[7\]"),
    "fewer inputs": ([(X[:7], Y)], r"shape \[7\].*got \[12\]"),
    "no inputs": ([(X[:0], Y)], r"shape \[0\].*got \[12\]|on one row"),
    "no targets": ([(X, Y[:0])], r"shape \[12\].*got \[0\]|yields 0 rows"),
    "targets without values": ([(X, Y.to("meta"))], "targets are on the meta device"),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("kind", ["last layer", "all", "process"])
def test_loaders_that_yield_no_batches(kind, name):
    loader, says = LOADERS[name]
    with pytest.raises(InputError, match=says):
        estimator(kind).fit(loader)


@pytest.mark.parametrize("loader", [X, X.numpy()])
def test_data_are_no_loader_wherever_one_is_read(loader):
    with pytest.raises(InputError, match=r"got (Tensor|ndarray)\. Data as tensors are one batch, \[\(x, y\)\]"):
        list(iterate(loader, dict_key_y="labels", device=CPU))


def test_a_batch_that_is_no_batch_is_numbered():
    with pytest.raises(InputError, match=r"Batch 1 of the loader \(counting from 0\): The loader must yield"):
        list(iterate([(X, Y), X], dict_key_y="labels", device=CPU))


@every_kind
def test_empty_batches_anywhere_change_nothing(kind):
    alone, among = estimator(kind), estimator(kind)
    alone.fit(batches(X, Y))
    empty = (X[:0], Y[:0])
    first, *others = batches(X, Y)
    among.fit([empty, first, empty, *others, empty])
    assert among.n_data == 12
    assert torch.equal(among(X), alone(X))
    with pytest.raises(InputError, match=r"empty|yields 0 rows"):
        estimator(kind).fit([empty, empty])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # labels are noise: the best is at an end of the grid
        alone.optimize_prior_precision(method="gridsearch", val_loader=[(X, Y)], grid_size=3)
        among.optimize_prior_precision(method="gridsearch", val_loader=[empty, (X, Y), empty], grid_size=3)
    assert torch.equal(among.prior_precision, alone.prior_precision)


@every_kind
def test_predictions_of_no_rows_are_refused(kind):
    la = estimator(kind)
    la.fit(batches(X, Y))
    for ask in (la, la.functional_samples, lambda x: la(x, joint=True, link_approx="mc")):
        with pytest.raises(InputError, match="empty batch: there is nothing to predict"):
            ask(X[:0])


# -- weights without values, compiled models --------------------------------------------------------------------------


@every_kind
def test_weights_on_the_meta_device(kind):
    with pytest.raises(UnsupportedError, match="has no parameters with values"):
        estimator(kind, net().to("meta"))
    model = net()
    model[0].to("meta")
    with pytest.raises((UnsupportedError, ModelError), match=r"on the meta device.*(Load|load) them"):
        estimator(kind, model).fit(batches(X, Y))


def test_a_head_without_values():
    model = net()
    model[2].to("meta")
    with pytest.raises(UnsupportedError, match=r"'2\.weight' are on the meta device"):
        Laplace(model, "classification", last_layer_name="2")


@pytest.mark.parametrize("how", ["script", "trace"])
def test_models_compiled_by_torchscript(how):
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.jit.script(model) if how == "script" else torch.jit.trace(model, X)
    with pytest.raises(UnsupportedError, match=r"layers are compiled.*module that it was made from.*\"all\""):
        estimator("last layer", compiled)
    with pytest.raises(UnsupportedError, match=r"cannot represent the parameter '0\.weight'.*\"diag\""):
        estimator("all", compiled).fit([(X, Y)])
    found, expected = (Laplace(m, "classification", "all", "diag") for m in (compiled, model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # datum by datum
        found.fit([(X, Y)])
    expected.fit([(X, Y)])
    torch.testing.assert_close(found.H, expected.H, rtol=1e-4, atol=1e-6)


def test_inputs_in_words():
    nested = {"a": X, "b": (Y, [1, 2, 3, 4])}
    assert described(nested) == (
        "a dict {'a': a tensor [12, 3] of torch.float32, 'b': a tuple (a tensor [12] of torch.int64, "
        "a list of 4: [of type int, of type int, of type int, …])}"
    )


# -- labels of causal language models ---------------------------------------------------------------------------------

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
