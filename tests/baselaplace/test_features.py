"""What ELLA and VaLLA share: models that change, batches that are overwritten, options that would have no effect."""

import pytest
import torch

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
