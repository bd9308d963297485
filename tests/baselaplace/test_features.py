"""What ELLA and VaLLA share: models that change, batches that are overwritten, options that would have no effect."""

import numpy as np
import pytest
import torch

from laplace import Laplace
from laplace.curvature import AutogradEF, AutogradHessian
from laplace.errors import InputError, NotFittedError, ShapeError, UnsupportedError
from tests.functions import batches, build, new_inputs
from tests.networks import named
from tests.tools import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
OPTIONS = {
    "nystrom": {"subsample_size": 4, "n_eigenvalues": 3},
    "variational": {"inducing_locations": "random", "num_inducing": 4},
}
FIT = {"nystrom": {}, "variational": {"iterations": 2, "train_hyperparameters": False}}
both = pytest.mark.parametrize("approximation", ["nystrom", "variational"])


def fitted(approximation: str, model=None, loader=None, **options):
    thing = named("mlp")
    la = build(thing, approximation, model, **{**OPTIONS[approximation], **options})
    la.fit(batches(thing, 2) if loader is None else loader, **FIT[approximation])
    return la


class OneBuffer:
    """A loader that yields the same tensors again and again, filled with other data."""

    def __iter__(self):
        buffer = torch.empty(2, 3), torch.empty(2, dtype=torch.int64)
        for x, y in self.batches():
            buffer[0].copy_(x)
            buffer[1].copy_(y)
            yield buffer

    @staticmethod
    def batches():
        x = named("mlp").data()[0]
        return [(x[:2], torch.tensor([2, 0])), (x[2:4], torch.tensor([1, 1]))]


@both
@pytest.mark.parametrize("subset_of_weights", ["all", "last_layer"])
def test_loaders_may_fill_one_tensor_again_and_again(approximation, subset_of_weights):
    """Also as validation data, and where the head is the whole network, so that inputs are features."""
    thing, x = named("mlp"), new_inputs(named("mlp"))
    head = torch.nn.Sequential(torch.nn.Linear(3, 3))
    for model in (thing.model(), head):
        found = []
        for loader in (OneBuffer(), OneBuffer.batches()):
            la = Laplace(
                model,
                "classification",
                subset_of_weights,
                "gp",
                functional_approximation=approximation,
                **OPTIONS[approximation],
            )
            la.fit(
                loader, val_loader=loader, **({"iterations": 6, "lr": 0.1} if approximation == "variational" else {})
            )
            found.append((la.predictive_moments(x, joint=True)[1], torch.tensor(la.fit_history_["val_nll"])))
        assert_close(found[0][0], found[1][0])
        assert_close(found[0][1], found[1][1])


@both
def test_a_second_fit_is_that_of_a_new_object(approximation):
    model, x = named("mlp").model(), new_inputs(named("mlp"))
    la = fitted(approximation, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
    la.fit(batches(named("mlp"), 2), **FIT[approximation])
    other = fitted(approximation, model)
    assert torch.equal(la.mean, torch.nn.utils.parameters_to_vector(model.parameters()))
    assert_close(la(x), other(x))


# -- bad input --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": AutogradHessian}, "AutogradHessian computes a Hessian. Pass a GGN back end, or backend=None"),
        ({"backend": AutogradEF}, "AutogradEF computes an empirical Fisher. Pass a GGN back end"),
        ({"backend_kwargs": {"stochastic": True}}, "leave stochastic=True out of backend_kwargs"),
    ],
)
def test_back_ends_of_another_matrix_are_refused(approximation, options, says):
    with pytest.raises(UnsupportedError, match=says):
        build(named("mlp"), approximation, **OPTIONS[approximation], **options)
    build(named("mlp"), approximation, **OPTIONS[approximation], backend_kwargs={"stochastic": False})


@both
@pytest.mark.parametrize("seed", [-1, None, "a", 1.5, True])
def test_seeds_are_whole_numbers(approximation, seed):
    with pytest.raises(InputError, match="seed must be a whole number that is not negative; got"):
        build(named("mlp"), approximation, **OPTIONS[approximation], seed=seed)


@both
def test_whole_numbers_of_numpy_are_whole_numbers(approximation):
    numbers = {k: np.int64(v) if isinstance(v, int) else v for k, v in OPTIONS[approximation].items()}
    la = fitted(approximation, **numbers, seed=np.int64(3))
    assert_close(la(new_inputs(named("mlp"))), fitted(approximation, seed=3)(new_inputs(named("mlp"))))
    assert all(type(value) is not np.int64 for value in la.state_dict().values())


@both
def test_a_prior_mean_of_another_length_is_refused_when_the_last_layer_is_found(approximation):
    la = Laplace(
        named("mlp").model(),
        "classification",
        "last_layer",
        "gp",
        functional_approximation=approximation,
        prior_mean=torch.zeros(7),
        **OPTIONS[approximation],
    )
    with pytest.raises(ShapeError, match=r"prior mean must be .* got \[7\]"):
        la.fit(batches(named("mlp"), 2))
    with pytest.raises(NotFittedError):
        la(new_inputs(named("mlp")))
