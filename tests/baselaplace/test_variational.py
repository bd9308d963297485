"""How VaLLA is trained: on a model that has changed since, from data that are overwritten, and what is refused."""

import io
from collections import UserDict

import pytest
import torch

from laplace import VaLLA
from laplace.errors import InputError, StateError, UnsupportedError
from laplace.network.batches import plain
from tests.functions import DELTA, batches, build, new_inputs
from tests.networks import named
from tests.tools import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def approximation(thing=None, model=None, **options):
    thing = named("mlp") if thing is None else thing
    return build(thing, "variational", model, **{"inducing_locations": thing.data(n_rows=4, shift=4)[0], **options})


def trained_further(model: torch.nn.Module) -> None:
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype)


# -- models that change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", [False, True])
def test_a_fit_after_the_model_was_trained_is_of_the_new_weights(override):
    thing = named("mlp_regression")
    model = thing.model()
    la = approximation(thing, model, alpha=0.0)
    fit = {"iterations": 2, "train_hyperparameters": False}
    la.fit(batches(thing, 2), **fit)
    trained_further(model)
    la.fit(batches(thing, 2), override=override, **fit)  # and nothing warns that weights have moved
    x, z = new_inputs(thing), la.inducing_locations
    names = list(dict(model.named_parameters()))

    def derivatives(at):
        def outputs(*values):
            return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (at,))

        found = torch.autograd.functional.jacobian(outputs, tuple(model.parameters()))
        return torch.cat([part.flatten(2) for part in found], 2)

    Z = derivatives(z)[torch.arange(4), la.inducing_classes]
    learned = la.state_dict()["learned"]
    R, A = learned["kernel_root"], learned["root"] @ learned["root"].T
    assert_close(R @ R.T, Z @ Z.T)
    assert torch.equal(la.mean, torch.nn.utils.parameters_to_vector(model.parameters()))
    flat = derivatives(x).reshape(-1, Z.shape[1])
    phi = flat @ Z.T @ R.inverse().T
    prior = flat @ flat.T / DELTA
    expected = prior - phi @ phi.T / DELTA + phi @ (A + DELTA * torch.eye(4)).inverse() @ phi.T
    covariance = la.predictive_moments(x, joint=True)[1]
    assert_close(covariance, expected)
    assert float(torch.linalg.eigvalsh(covariance).min()) > -1e-8


# -- what belongs to the user -----------------------------------------------------------------------------------------


def test_inducing_points_are_copies():
    thing = named("mlp")
    z, x = thing.data(n_rows=4, shift=4)[0], new_inputs(thing)
    la = approximation(inducing_locations=z)
    expected = z.clone()
    z.mul_(3)
    la.fit(batches(thing, 2), iterations=2)
    assert torch.equal(la.inducing_locations, expected)
    before = la(x)
    la.inducing_locations.zero_()
    la.inducing_classes.zero_()
    z.zero_()
    la.to("cpu")  # forgets the derivatives of the inducing points, which are made again
    assert torch.equal(la(x), before)


class Named(torch.nn.Module):
    """A model of mappings."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = named("mlp").model()

    def forward(self, input_ids):
        return self.inside(input_ids)


def test_states_hold_inducing_inputs_of_any_mapping():
    """Such as those of a tokenizer, which are no dictionaries."""
    x, y = named("mlp").data()
    z, model, file = UserDict(input_ids=x[:4]), Named(), io.BytesIO()
    la = VaLLA(model, "classification", z)
    la.fit([UserDict(input_ids=x, labels=y)], iterations=2)
    torch.save(la.state_dict(), file)
    file.seek(0)
    other = VaLLA(model, "classification", "random", 2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other({"input_ids": x}), la({"input_ids": x}))
    with pytest.raises(UnsupportedError, match="to be saved hold a object"):
        plain({"more": object()})


# -- hyperparameters and states ---------------------------------------------------------------------------------------


def test_another_temperature_needs_another_training():
    """It trains, so that assigning it before has an effect; after, it is refused and not ignored."""
    thing = named("mlp")
    x, la = new_inputs(thing), approximation(thing)
    la.temperature = 0.5
    la.fit(batches(thing, 2), iterations=2)
    constructed = approximation(thing, temperature=0.5)
    constructed.fit(batches(thing, 2), iterations=2)
    assert torch.equal(la(x), constructed(x))
    with pytest.raises(UnsupportedError, match=r"belongs to temperature=0\.5 .* Construct with temperature=2, and fit"):
        la.temperature = 2.0
    la.temperature = 0.5
    assert torch.equal(la(x), constructed(x))
    other = approximation(thing)
    other.fit(batches(thing, 2), iterations=2)
    before = other(x)
    with pytest.raises(StateError):
        other.load_state_dict({**la.state_dict(), "learned": {}})
    assert torch.equal(other(x), before)
    other.load_state_dict(la.state_dict())
    assert other.temperature == 0.5
    assert torch.equal(other(x), la(x))


# -- bad input --------------------------------------------------------------------------------------------------------


def test_messages_name_the_cause():
    thing = named("mlp")
    data = batches(thing, 2)
    with pytest.raises(InputError, match=r"outputs of the model.*NaN"):
        approximation(thing, inducing_locations=torch.full((3, 3), torch.nan)).fit(data)
    chosen = {"inducing_locations": "random", "num_inducing": 3}
    with pytest.raises(InputError, match="The training loader is empty: there is nothing to choose"):
        approximation(thing, **chosen).fit([])
    with pytest.raises(InputError, match=r"this loader can be used once only\. Pass a DataLoader"):
        approximation(thing, **chosen).fit(iter(data))
    with pytest.raises(InputError, match=r"alpha must lie in \[0, 1\].*got 'a'"):
        approximation(thing, alpha="a")
    with pytest.raises(InputError, match="indices of outputs, whole numbers from 0 on; got 'abcd'"):
        approximation(thing, inducing_classes="abcd")
