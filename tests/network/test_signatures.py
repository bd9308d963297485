"""How inputs enter models inside wrappers: what the innermost signature takes, and errors in words where it does not."""

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from laplace import Laplace
from laplace.errors import InputError, ModelError
from laplace.network.batches import call
from laplace.network.signatures import innermost
from tests import reference
from tests.contracts import model_untouched
from tests.tools import assert_close

KEYS = {"dict_key_x": "x", "dict_key_y": "labels"}


class Layers(nn.Module):
    """A network; what it takes is up to its kinds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))

    def run(self, x):
        return self.head(torch.tanh(self.body(x)))


class OfMapping(Layers):
    def forward(self, data):
        return self.run(data["x"])


class OfKeywords(Layers):
    def forward(self, x, scale=None):
        return self.run(x if scale is None else x * scale)


class OfTuple(Layers):
    def forward(self, pair):
        return self.run(pair[0] * pair[1])


class OfSeveral(Layers):
    def forward(self, x, scale=None):
        return self.run(x * scale)


def lora(model, **options):
    config = LoraConfig(r=2, target_modules=["body.0", "body.2"], modules_to_save=["head"])
    model = get_peft_model(model, config, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero before training, and with it the curvature of the other factor
                parameter.normal_(std=0.3)
    return model


WRAPPERS = {
    "peft": lora,
    "mixed peft": lambda model: lora(model, mixed=True),
    "tuner": lambda model: lora(model).base_model,
    "average": AveragedModel,
    "average of peft": lambda model: AveragedModel(lora(model)),
    "parallel": nn.DataParallel,
    "compiled": torch.compile,
}


def wrapped(name: str, kind: type[Layers]) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inside = kind()
        return WRAPPERS[name](inside).double().eval(), inside


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("kind", [OfMapping, OfKeywords, OfTuple, OfSeveral], ids=lambda kind: kind.__name__)
def test_inputs_enter_a_wrapper_as_they_enter_what_it_wraps(kind, name, monkeypatch):
    model, inside = wrapped(name, kind)
    x, scale = torch.randn(3, 4, dtype=torch.float64), torch.full((3, 1), 2.0, dtype=torch.float64)
    batch = {"x": x, "labels": x[:, 0]} if kind in (OfMapping, OfKeywords) else (x, scale)
    assert isinstance(innermost(model), kind), "an average wraps a copy"
    if name == "compiled":  # no compiler is needed to see what arrives
        monkeypatch.setattr(model, "forward", inside.forward)
    assert_close(call(model, batch, **KEYS), call(inside, batch, **KEYS))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("kind", [OfMapping, OfKeywords], ids=lambda kind: kind.__name__)
def test_adapters_around_a_module_of_ones_own_are_exact(kind, subset, mixed):
    """The pattern of tutorials on adapters: the wrapper takes ``**kwargs``, the module inside one mapping."""
    model = wrapped("mixed peft" if mixed else "peft", kind)[0]
    assert isinstance(model, PeftMixedModel) == mixed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        rows = [
            {"x": torch.randn(4, dtype=torch.float64), "labels": torch.randn(1, dtype=torch.float64)} for _ in range(7)
        ]
    loader = DataLoader(rows, batch_size=4)
    everything = next(iter(DataLoader(rows, batch_size=7)))
    last = "base_model.model.head.modules_to_save.default.2"
    la = Laplace(
        model, "regression", subset, "full", prior_precision=0.5, dict_key_x="x", dict_key_y="labels",
        **({"last_layer_name": last} if subset == "last_layer" else {}),
    )  # fmt: skip
    with model_untouched(model):
        la.fit(loader)
        mean, variance = la(everything)
    names = tuple(key for key, p in model.named_parameters() if p.requires_grad and (subset == "all" or last in key))

    def forward(m, x):
        return m(x) if kind is OfMapping else m(x=x["x"])

    inputs = {"x": everything["x"]}
    truth = reference.Problem(model, forward, names, inputs, everything["labels"], "regression", 1)
    precision = truth.ggn() + 0.5 * torch.eye(len(truth.theta()), dtype=torch.float64)
    assert_close(mean, truth.outputs(truth.theta(), inputs).flatten(0, 1))
    assert_close(variance, reference.output_covariance(truth.jacobian(inputs).flatten(0, 1), precision))


class Wrapper(nn.Module):
    """One that nobody knows: whether it passes all on is not said by its signature."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


class Opener(Wrapper):
    def forward(self, *args, **kwargs):
        assert not args
        return self.inside(kwargs["x"])


def test_a_wrapper_of_ones_own_gets_keywords_and_an_error_in_words_where_they_do_not_fit():
    x = torch.randn(3, 4)
    assert call(Opener(nn.Linear(4, 2)), {"x": x, "labels": x[:, 0]}, **KEYS).shape == (3, 2)
    with pytest.raises(InputError, match=r"keyword arguments 'x'.*OfMapping.forward\(data\).*mapping whole") as raised:
        call(Wrapper(OfMapping()), {"x": x, "labels": x[:, 0]}, **KEYS)
    assert isinstance(raised.value.__cause__, TypeError)


def test_options_that_forward_does_not_take_are_named():
    with pytest.raises(InputError, match=r"'factor'.*OfKeywords.forward\(x, scale=None\)"):
        call(OfKeywords(), torch.randn(3, 4), factor=2.0, **KEYS)


class Failing(nn.Module):
    def forward(self, x):
        return x + "one"


class FailingInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x, x)


@pytest.mark.parametrize("kind", [Failing, FailingInside])
def test_a_type_error_of_the_models_own_is_not_taken_for_ours(kind):
    with pytest.raises(ModelError, match="raised TypeError: ") as raised:
        call(kind(), torch.randn(3, 4), **KEYS)
    assert type(raised.value.__cause__) is TypeError
