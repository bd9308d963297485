"""Batches that no model takes: the message says which batch, what was in it, what was taken for what, and what to do."""

import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace import Laplace
from laplace.errors import InputError, MissingKeyError, ModelError, OutOfMemoryError, UnsupportedError
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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError("full")])
def test_a_model_that_runs_out_of_memory_is_told_what_takes_less(error):
    la = estimator("all", Fussy(error))
    with pytest.raises(OutOfMemoryError, match=r"full.*smaller batches") as caught:
        la.fit([(100 * torch.ones(2, 3), Y[:2])])
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, (torch.OutOfMemoryError, MemoryError))  # loops that try smaller batches see it


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk")])
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
