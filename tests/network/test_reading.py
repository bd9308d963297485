"""What a model returns beside its outputs: ``output_key=``, ``output_fn=``, and which layer produced them."""

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from laplace import Laplace
from laplace.errors import MissingKeyError, UnsupportedError
from laplace.network.feature_extractor import FeatureExtractor
from laplace.network.outputs import Reading
from tests.tools import assert_close

X, Y = torch.randn(7, 3).double(), torch.arange(7) % 2
KINDS = {
    "last layer": ("last_layer", "kron", {}),
    "all": ("all", "diag", {}),
    "subnetwork": ("subnetwork", "full", {"subnetwork_indices": torch.tensor([0, 5, 9])}),
    "process": ("all", "gp", {"n_subset": 5}),
    "process of a last layer": ("last_layer", "gp", {"n_subset": 5}),
    "low rank": ("last_layer", "lowrank", {"rank": 2}),
    "ella": ("all", "gp", {"functional_approximation": "nystrom", "n_eigenvalues": 3, "subsample_size": 5}),
    "ella of a last layer": (
        "last_layer",
        "gp",
        {"functional_approximation": "nystrom", "n_eigenvalues": 3, "subsample_size": 5},
    ),
}
Pair = namedtuple("Pair", ["out", "features"])


@dataclass
class Result:
    """An object that holds outputs."""

    out: Tensor
    features: Tensor
    name: str = "result"


RETURNED = {
    "a mapping": (lambda f, phi: {"out": f, "aux": phi}, "out"),
    "logits": (lambda f, phi: {"logits": f, "aux": phi}, None),
    "a mapping with numbers": (lambda f, phi: {0: phi, 1: f}, 1),
    "a tuple": (lambda f, phi: (phi, f), 1),
    "a list, from its end": (lambda f, phi: [phi, f], -1),
    "a named tuple": (lambda f, phi: Pair(f, phi), "out"),
    "an object": (lambda f, phi: Result(f, phi), "out"),
}


class Returns(nn.Module):
    """A network that returns more than its outputs."""

    def __init__(self, function=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.function = function

    def forward(self, x):
        phi = self.body(x).tanh()
        f = self.head(phi)
        return f if self.function is None else self.function(f, phi)


def fitted(kind, model, **options):
    weights, structure, further = KINDS[kind]
    la = Laplace(model, "classification", weights, structure, **further, **options)
    la.fit([(X, Y)])
    return la


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RETURNED)
def test_outputs_are_read_from_what_the_model_returns(kind, name):
    function, key = RETURNED[name]
    expected = fitted(kind, Returns())(X)
    la = fitted(kind, Returns(function), output_key=key)
    assert_close(la(X), expected)
    assert (la.output_key, la.output_fn) == (key, None)
    if key is None:
        return

    def chosen(returned):
        return returned[key] if isinstance(returned, (dict, list)) or isinstance(key, int) else getattr(returned, key)

    la = fitted(kind, Returns(function), output_fn=chosen)
    assert_close(la(X), expected)
    assert (la.output_key, la.output_fn) == (None, chosen)


def logits_of(returned):
    return returned["out"]


@pytest.mark.parametrize("kind", ["last layer", "all", "process of a last layer"])
@pytest.mark.parametrize("options", [{"output_key": "out"}, {"output_fn": logits_of}], ids=["key", "function"])
def test_copies_know_where_outputs_are_and_states_do_not_hold_it(kind, options, tmp_path):
    model = Returns(as_mapping)
    la = fitted(kind, model, **options)
    for other in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        assert_close(other(X), la(X))
    assert not {"output_key", "output_fn", "output_dim"} & la.state_dict().keys()
    la.save(tmp_path / "state")
    weights, structure, further = KINDS[kind]
    again = Laplace(model, "classification", weights, structure, **further, **options)
    again.load(tmp_path / "state")
    assert_close(again(X), la(X))
    la.model = Returns(as_mapping)
    assert_close(la(X), again(X))


def as_mapping(f, phi):
    return {"out": f, "aux": phi}


@pytest.mark.parametrize("kind", ["last layer", "all"])
@pytest.mark.parametrize(
    ("name", "key", "error", "says"),
    [
        ("a mapping", None, UnsupportedError, "without 'logits'.*'out', 'aux'.*output_key="),
        ("a mapping", "logit", MissingKeyError, "nothing under output_key='logit'.*'out', 'aux'"),
        ("a tuple", None, UnsupportedError, "a tuple of 2 .output_key=0 is the first.*output_fn="),
        ("a tuple", 2, MissingKeyError, "output_key=2.*a tuple of 2"),
        ("a tuple", "out", MissingKeyError, "output_key='out'.*a tuple of 2"),
        ("a named tuple", None, UnsupportedError, "a Pair of 2.*named 'out', 'features'.*output_key="),
        ("an object", None, UnsupportedError, "an object of type Result with tensors 'features', 'out'.*output_key="),
        ("an object", 0, MissingKeyError, "output_key=0.*Result"),
        ("an object", "name", UnsupportedError, "Under output_key='name' the model must return a tensor"),
    ],
)
def test_what_is_not_there_is_said(kind, name, key, error, says):
    with pytest.raises(error, match=says):
        fitted(kind, Returns(RETURNED[name][0]), output_key=key)


def test_a_tensor_has_no_entries():
    with pytest.raises(MissingKeyError, match=r"it returns a tensor, which is taken as it is"):
        fitted("last layer", Returns(), output_key="out")


@pytest.mark.parametrize("function", [lambda f: None, lambda f: f.long(), lambda f: (f, f)])
def test_a_function_must_return_a_tensor_of_real_numbers(function):
    with pytest.raises(UnsupportedError, match=r"output_fn must return"):
        fitted("all", Returns(), output_fn=function)


def test_keys_and_functions_are_checked_when_they_are_given():
    with pytest.raises(UnsupportedError, match=r"output_key= and output_fn= both"):
        Laplace(Returns(), "classification", output_key="out", output_fn=logits_of)
    with pytest.raises(UnsupportedError, match=r"output_key must be"):
        Laplace(Returns(), "classification", "all", output_key=1.0)
    with pytest.raises(UnsupportedError, match=r"output_fn must be a function"):
        Laplace(Returns(), "classification", output_fn="out")


def test_an_extractor_that_was_told_is_asked_and_overruled():
    extractor = FeatureExtractor(Returns(as_mapping), reading=Reading("out"))
    la = Laplace(extractor, "classification")
    la.fit([(X, Y)])
    assert la.output_key == "out"
    assert Laplace(extractor, "classification", output_key="aux").output_key == "aux"


class Auxiliary(nn.Module):
    """Several layers run, and that of the outputs is not the last of them."""

    def __init__(self, n_heads=2):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 2) for _ in range(n_heads)])
        self.other = nn.Conv1d(4, 2, 1)

    def forward(self, x):
        phi = self.body(x).tanh()
        made = [head(phi) for head in self.heads]
        self.other(phi.unsqueeze(-1))
        return {"logits": made[0], "auxiliary": made[1:]}


def test_the_head_is_the_layer_that_produces_the_outputs():
    model = Auxiliary().double()
    la = Laplace(model, "classification")
    la.fit([(X, Y)])
    assert la.last_layer_name == "heads.0"
    assert_close(la.mean, nn.utils.parameters_to_vector(model.heads[0].parameters()))


def test_at_most_five_candidates_are_listed():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(8)), nn.Softmax(-1)).double()
    with pytest.raises(UnsupportedError, match=r"The last 5 of the 8 linear layers.*last_layer_name=") as error:
        Laplace(model, "regression").fit([(X, X)])
    assert [f"'{i}' (3 → 3)" in str(error.value) for i in range(8)] == [False] * 3 + [True] * 5


class Tied(nn.Module):
    """A head that shares its weight with the embedding of its inputs."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x).tanh())


def test_a_tied_weight_is_random_in_its_role_as_a_head():
    model, x = Tied().double(), torch.arange(5)
    la = Laplace(model, "classification", hessian_structure="full")
    with pytest.warns(UserWarning, match=r"tied to 'embedding.weight'.*features do not change"):
        la.fit([(x, x)])
    phi = model.embedding(x).tanh().detach()
    p = model(x).softmax(-1).detach()
    H = sum(torch.kron(q.diag() - torch.outer(q, q), torch.outer(row, row)) for q, row in zip(p, phi, strict=True))
    assert_close(la.H, H)


@pytest.mark.parametrize("norm", ["parametrized", "old", "spectral"])
def test_wrapped_weights_are_read_as_they_multiply_features(norm):
    head = nn.Linear(4, 2).double()
    if norm == "old":
        with pytest.warns(FutureWarning, match="deprecated"):
            head = nn.utils.weight_norm(head)
    else:
        wrap = {
            "parametrized": nn.utils.parametrizations.weight_norm,
            "spectral": nn.utils.parametrizations.spectral_norm,
        }
        head = wrap[norm](head)
    model = nn.Sequential(nn.Linear(3, 4).double(), nn.Tanh(), head).eval()
    with torch.no_grad():
        model(X)
        plain = nn.Linear(4, 2).double()
        plain.weight.copy_(head.weight)
        plain.bias.copy_(head.bias)
    expected, found = (
        Laplace(net, "classification", hessian_structure="full")
        for net in (nn.Sequential(model[0], model[1], plain), model)
    )
    for la in (expected, found):
        la.fit([(X, Y)])
    assert_close(found.mean, expected.mean)
    assert_close(found.H, expected.H)
    assert_close(found(X), expected(X))
    assert_close(found.head_(model[:2](X)), model(X))
