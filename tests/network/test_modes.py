"""Evaluation and training mode, and back."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.network.modes import evaluating, training
from tests.contracts import model_untouched
from tests.tools import assert_close


def mixed_model() -> nn.Module:
    """Some modules train, some do not: a flag for the whole model would not bring this back."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model.train()
    model[2][0].eval()
    return model


def test_every_module_evaluates_inside_and_is_restored_after():
    model = mixed_model()
    with model_untouched(model), evaluating(model):
        assert not any(module.training for module in model.modules())


def test_a_model_that_evaluates_is_not_asked_to():
    class Counted(nn.Linear):
        calls = 0

        def train(self, mode=True):
            self.calls += 1
            return super().train(mode)

    model = nn.Sequential(Counted(2, 2))
    with evaluating(model), evaluating(model):
        pass
    assert model[0].calls == 2, "once there and once back"
    model.eval()
    with evaluating(model):
        pass
    la = Laplace(model, "classification", "last_layer", "full")
    la.fit([(torch.ones(2, 2), torch.tensor([0, 1]))])
    la(torch.ones(2, 2))
    assert model[0].calls == 3


def test_modes_are_restored_when_the_body_raises():
    model = mixed_model()
    with model_untouched(model), pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")


@pytest.mark.parametrize("enable_backprop", [False, True])
def test_a_graph_is_built_only_on_request(enable_backprop):
    model, x = nn.Linear(2, 2), torch.randn(3, 2, requires_grad=True)
    with evaluating(model, enable_backprop=enable_backprop):
        assert model(x).requires_grad == enable_backprop
    assert torch.is_grad_enabled()


def test_results_made_under_inference_mode_can_take_part_in_autograd():
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        with evaluating(model):
            f = model(torch.ones(3, 2))
        assert not f.is_inference()
        assert torch.is_inference_mode_enabled()


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_model_in_evaluation_mode_trains_inside_and_is_restored_after():
    model = mixed_model().eval()
    with model_untouched(model), training(model):
        assert all(module.training for module in model.modules())


def test_a_model_in_training_mode_is_taken_as_it_is():
    model = mixed_model()
    with model_untouched(model), training(model):
        assert model.training
        assert not model[2][0].training


def test_modes_are_restored_when_training_raises():
    model = mixed_model().eval()
    with model_untouched(model), pytest.raises(RuntimeError, match="inside"), training(model):
        raise RuntimeError("inside")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_has_gradients_wherever_it_is_called(context):
    model = nn.Linear(2, 2)
    with context():
        with training(model):
            model(torch.ones(3, 2)).sum().backward()
        assert not torch.is_grad_enabled()
    assert_close(model.bias.grad, torch.full((2,), 3.0))
