"""Features before the last linear layer, on models small enough to check by eye."""

import pytest
import torch
from torch import nn

from laplace.enums import FeatureReduction
from laplace.errors import ShapeError, UnsupportedError
from laplace.network.feature_extractor import FeatureExtractor
from laplace.network.heads import head_of
from tests.cases import CASES, KeywordInputs, Net, Reduced, Squeezed
from tests.contracts import model_untouched
from tests.tools import assert_close

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Then(nn.Module):
    """A model followed by a function."""

    def __init__(self, function, model=None):
        super().__init__()
        self.net, self.function = model or Net(3, 5, 2), function

    def forward(self, x):
        return self.function(self.net(x))


class Backwards(nn.Module):
    """Registers its layers in the opposite order of their use."""

    def __init__(self):
        super().__init__()
        self.head, self.unused, self.first = nn.Linear(5, 2), nn.Linear(5, 2), nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.first(x).tanh())


class TwoHeads(Backwards):
    """A side output is computed after the main one."""

    def forward(self, x):
        features = self.first(x).tanh()
        f = self.head(features)
        self.unused(features)
        return f


class Twice(Backwards):
    def forward(self, x):
        return self.head(self.first(x)) + self.head(self.first(-x))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_the_head_applied_to_the_features(case):
    model, x = case.model(), case.test_inputs()
    extractor = case.extractor(model)
    with model_untouched(model), torch.no_grad():
        f, phi = extractor.forward_with_features(x)
        expected = case.forward(model, x)
    assert extractor.last_layer is model.head
    assert_close(f, expected.reshape(*f.shape), "outputs")
    assert f.shape[:-1] == phi.shape[:-1]
    assert_close(head_of(model.head).outputs(model.head, phi), f, "head applied to the features")
    assert_close(extractor(x), f)


def test_the_last_layer_is_the_last_to_run_not_the_last_registered():
    extractor = FeatureExtractor(Backwards().double())
    assert extractor.last_layer is None
    f = extractor.find_last_layer(X)
    assert extractor.last_layer_name == "head"
    assert_close(f, extractor.model(X))


def test_the_layer_that_produces_the_outputs_is_found_when_another_runs_last():
    model = TwoHeads().double()
    extractor = FeatureExtractor(model)
    assert_close(extractor.find_last_layer(X), model(X))
    assert extractor.last_layer_name == "head"
    assert_close(FeatureExtractor(model, last_layer_name="head")(X), model(X))


def test_a_name_that_the_model_lacks_is_a_key_error_whose_message_has_no_quotes():
    with pytest.raises(KeyError) as error:
        FeatureExtractor(Backwards().double(), last_layer_name="heat")
    assert str(error.value).startswith("The model has no module 'heat'")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("heat", "no module 'heat'.*Did you mean 'head'.*'first' \\(3 → 5\\)"),
        ("", "Backwards"),
        ("unused", "'unused' does not run.*'head'"),
        ("first", "not those of its last linear layer 'first'|'first' maps features"),
    ],
)
def test_a_wrong_name_lists_the_candidates(name, says):
    with pytest.raises((UnsupportedError, ShapeError), match=says):
        FeatureExtractor(Backwards().double(), last_layer_name=name).find_last_layer(X)


@pytest.mark.parametrize(
    "function",
    [lambda f: f.softmax(-1), lambda f: f / 2, torch.tanh, lambda f: f + 1, lambda f: f.flip(-1)],
    ids=["softmax", "temperature", "tanh", "shift", "flip"],
)
def test_outputs_that_are_not_those_of_the_head_are_refused(function):
    with pytest.raises(UnsupportedError, match=r"not those of its last linear layer 'net.head'.*logits"):
        FeatureExtractor(Then(function).double()).find_last_layer(X)


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.Linear(3, 5), nn.Conv1d(5, 2, 1)), nn.Identity()],
    ids=["no linear layer", "convolution after it", "nothing"],
)
def test_models_without_a_linear_last_layer_are_refused(model):
    x = torch.randn(5, 3) if len(list(model.children())) == 2 else torch.randn(2, 3, 3)
    with pytest.raises((UnsupportedError, ShapeError), match="linear layer"):
        FeatureExtractor(model.double()).find_last_layer(x)


def test_a_head_that_runs_twice_is_refused():
    with pytest.raises(UnsupportedError, match="'head' runs 2 times"):
        FeatureExtractor(Twice().double()).find_last_layer(X)


# -- reductions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", list(FeatureReduction))
def test_a_reduction_that_the_model_makes_must_be_named(reduction):
    model = Reduced(reduction.value, 3, 5, 2).double()
    with pytest.raises(ShapeError, match=f"feature_reduction.*{reduction.value!r} reproduces"):
        FeatureExtractor(model).find_last_layer(SEQUENCE)
    for name in (reduction, reduction.value):
        f, phi = FeatureExtractor(model, feature_reduction=name).forward_with_features(SEQUENCE)
        assert phi.shape == (4, 5)
        assert_close(f, model(SEQUENCE))


@pytest.mark.parametrize("reduction", list(FeatureReduction))
def test_a_reduction_that_the_model_does_not_make_is_refused(reduction):
    for other in set(FeatureReduction) - {reduction}:
        model = Reduced(other.value, 3, 5, 2).double()
        with pytest.raises(UnsupportedError, match="feature_reduction"):
            FeatureExtractor(model, feature_reduction=reduction).find_last_layer(SEQUENCE)


class LastToken(Net):
    """Picks the last position that is not padding (all zeros), as sequence classifiers do."""

    def forward(self, x):
        last = (x.abs().sum(-1) > 0).sum(1) - 1
        return super().forward(x)[torch.arange(len(x)), last]


@pytest.mark.parametrize("first", ["whole", "padded"])
def test_the_position_that_is_picked_is_found_by_value(first):
    """Padding moves it, on the first batch as on later ones."""
    model = LastToken(3, 5, 2).double()
    padded = SEQUENCE.clone()
    padded[0, -1], padded[2, 2:] = 0.0, 0.0
    extractor = FeatureExtractor(model, feature_reduction="pick_last")
    extractor.find_last_layer(SEQUENCE if first == "whole" else padded)
    f, phi = extractor.forward_with_features(padded)
    tokens = model.body(padded)
    assert_close(phi, torch.stack([tokens[0, -2], tokens[1, -1], tokens[2, 1], *tokens[3:, -1]]))
    assert_close(f, model.head(phi))
    padded[:, 1:] = 0.0  # a token each: the first is the last
    assert_close(extractor.forward_with_features(padded)[1], model.body(padded)[:, 0])


def test_a_reduction_that_stops_being_the_models_own_is_noticed_on_a_later_batch():
    model = Reduced("pick_last", 3, 5, 2).double()
    extractor = FeatureExtractor(model, feature_reduction="pick_last")
    extractor.find_last_layer(SEQUENCE)
    model.reduction = "average"
    with pytest.raises(UnsupportedError, match="feature_reduction"):
        extractor.forward_with_features(SEQUENCE)


def test_a_reduction_without_anything_to_reduce_is_reported():
    with pytest.warns(UserWarning, match="nothing to reduce"):
        FeatureExtractor(Net(3, 5, 2).double(), feature_reduction="average").find_last_layer(X)
    with pytest.raises(UnsupportedError, match="leave it out"):
        FeatureExtractor(Net(3, 5, 2).double(), feature_reduction="average").find_last_layer(SEQUENCE)


def test_unknown_reductions_list_the_choices():
    with pytest.raises(UnsupportedError, match="'pick_first', 'pick_last', 'average'"):
        FeatureExtractor(Net(3, 5, 2), feature_reduction="mean")


# -- kinds of outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 4])
def test_a_missing_output_axis_comes_back(n_rows):
    f, phi = FeatureExtractor(Squeezed(3, 5, 1).double()).forward_with_features(X[:n_rows])
    assert f.shape == (n_rows, 1)
    assert phi.shape == (n_rows, 5)


def test_one_row_squeezed_to_a_number_is_one_row():
    model = Then(torch.squeeze, Net(3, 5, 1)).double()
    assert FeatureExtractor(model)(X[:1]).shape == (1, 1)


def test_flattened_positions_are_positions():
    """A head applied to [B, T, D] whose outputs are flattened: [B·T, C]."""
    model = Then(lambda f: f.flatten(0, 1)).double()
    f, phi = FeatureExtractor(model).forward_with_features(SEQUENCE)
    assert f.shape == (20, 2)
    assert phi.shape == (20, 5)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda f: {"scores": f}, "without 'logits'.*'scores'"),
        (lambda f: (f, f), "tuple"),
        (lambda f: None, "NoneType"),
    ],
    ids=["mapping without logits", "tuple", "nothing"],
)
def test_outputs_that_are_no_tensor_are_explained(function, says):
    with pytest.raises(UnsupportedError, match=says):
        FeatureExtractor(Then(function).double()).find_last_layer(X)


# -- the user's model -------------------------------------------------------------------------------------------------


def test_hooks_are_gone_also_when_the_model_raises():
    def fail(f):
        raise RuntimeError("in the model")

    model = Then(fail).double()
    with model_untouched(model), pytest.raises(RuntimeError, match="in the model"):
        FeatureExtractor(model).find_last_layer(X)


@pytest.mark.parametrize("enable_backprop", [False, True])
def test_features_keep_their_graph_only_on_request(enable_backprop):
    extractor = FeatureExtractor(Net(3, 5, 2).double(), enable_backprop=enable_backprop)
    _, phi = extractor.forward_with_features(X.clone().requires_grad_())
    assert phi.requires_grad == enable_backprop


def test_a_tied_head_is_reported():
    model = Net(3, 5, 2).double()
    model.twin = nn.Linear(5, 2)
    model.twin.weight = model.head.weight
    with pytest.warns(UserWarning, match=r"'head' is tied to 'twin.weight'"):
        FeatureExtractor(model).find_last_layer(X)


def test_model_kwargs_reach_the_model():
    model = KeywordInputs(3, 5, 2).double()
    extractor = FeatureExtractor(model)
    assert_close(extractor({"input_ids": X}, scale=2 * torch.ones(4, 1)), model(2 * X)["logits"])
