"""What outputs mean: channels are found where the model has them, probabilities are refused, whichever weights are random."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laplace import Laplace
from laplace.errors import UnsupportedError
from laplace.likelihoods import chosen
from laplace.likelihoods.categorical import check_logits
from laplace.network.axes import Axes
from tests.network.test_failures import KINDS, X, Y, estimator, net
from tests.tools import assert_close

WHOLE = [kind for kind in KINDS if "last layer" not in kind]
SIZE = 4
CLASSES, NUMBERS = chosen("classification"), chosen("regression")
IMAGES = torch.randn(6, 2, SIZE, SIZE, dtype=torch.float64)


class Then(nn.Module):
    """A model and a function of its outputs."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        return self.function(self.model(x))


class UNet(nn.Module):
    """One level down and up, and the inputs beside it."""

    def __init__(self, n_outputs):
        super().__init__()
        self.down, self.norm = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.up, self.head = nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Conv2d(4, n_outputs, 1)

    def forward(self, x):
        inside = F.relu(self.norm(self.down(x)))
        return self.head(torch.cat([x, self.up(inside)], 1))


class Tokens(nn.Module):
    """Attention over positions and a linear head."""

    def __init__(self, n_outputs):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, n_outputs)

    def forward(self, x):
        return self.head(self.layer(x))


class Product(nn.Module):
    """A linear layer that is written out."""

    def __init__(self, n_outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, n_outputs))

    def forward(self, x):
        return x @ self.weight


class Bilinear(nn.Bilinear):
    """A bilinear form of the inputs and themselves."""

    def forward(self, x):
        return super().forward(x, x)


def channels_first(n_outputs=SIZE):
    """Networks whose outputs have their channels on axis 1."""
    conv = nn.Conv2d(2, n_outputs, 3, padding=1)
    return {
        "convolution": (conv, IMAGES),
        "u-net": (UNet(n_outputs), IMAGES),
        "upsampled": (nn.Sequential(nn.Conv2d(2, n_outputs, 2, stride=2), nn.Upsample(scale_factor=2)), IMAGES),
        "normalized": (nn.Sequential(conv, nn.BatchNorm2d(n_outputs), nn.ReLU()), IMAGES),
        "residual": (Then(conv, lambda f: f + f.mean((2, 3), keepdim=True)), IMAGES),
        "moved there and back": (Then(conv, lambda f: f.permute(0, 2, 3, 1).transpose(1, -1).mT), IMAGES),
        "sequence": (nn.Conv1d(2, n_outputs, 3, padding=1), IMAGES[:, :, 0]),
        "pixels of an image": (Then(conv, lambda f: f.flatten(2)), IMAGES),
        "a linear layer, then moved": (
            nn.Sequential(nn.Linear(SIZE, n_outputs), Then(nn.Identity(), lambda f: f.movedim(-1, 1))),
            IMAGES,
        ),
    }


def channels_last(n_outputs=SIZE):
    """Networks whose outputs have their channels on the last axis."""
    conv = nn.Conv2d(2, n_outputs, 3, padding=1)
    return {
        "a linear layer": (nn.Linear(SIZE, n_outputs), IMAGES),
        "a product": (Product(n_outputs), IMAGES),
        "a bilinear layer": (Bilinear(SIZE, SIZE, n_outputs), IMAGES[:, 0]),
        "a convolution, then moved": (Then(conv, lambda f: f.movedim(1, -1)), IMAGES),
        "permuted": (Then(conv, lambda f: f.permute(0, 2, 3, 1).contiguous()), IMAGES),
        "tokens": (Tokens(n_outputs), IMAGES.flatten(1, 2).transpose(1, 2)[:, :SIZE, :SIZE].contiguous()),
        "pixels as tokens": (Then(UNet(n_outputs), lambda f: f.flatten(2).transpose(1, 2)), IMAGES),
        "a convolution of sequences, then moved": (
            Then(nn.Conv1d(2, n_outputs, 1), lambda f: f.mT),
            IMAGES[:, :, 0],
        ),
        "joined rows": (Then(nn.Linear(SIZE, n_outputs), lambda f: f.reshape(-1, n_outputs).view(f.shape)), IMAGES),
        "said so": (Then(nn.Flatten(), lambda f: f.unflatten(1, (2, SIZE, SIZE)).movedim(-1, -1)), IMAGES),
    }


@pytest.mark.parametrize("name", channels_first())
def test_channels_after_the_batch_are_seen(name):
    model, x = channels_first(5)[name]
    with torch.no_grad(), Axes() as axes:
        f = model.eval()(x)
    assert axes.of(f) == 1
    assert f.shape[1] == 5


@pytest.mark.parametrize("name", channels_last())
def test_channels_at_the_end_are_seen(name):
    model, x = channels_last(5)[name]
    with torch.no_grad(), Axes() as axes:
        f = model.eval()(x)
    assert axes.of(f) == f.dim() - 1
    assert f.shape[-1] == 5 or name == "said so"


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("name", ["convolution", "u-net", "sequence"])
def test_channels_after_the_batch_are_found_where_all_sizes_agree(kind, name):
    model, x = channels_first()[name]
    y, moved = model(x).argmax(1), Then(model, lambda f: f.movedim(1, -1))
    found, expected = estimator(kind, model), estimator(kind, moved)
    for la in (found, expected):
        la.fit([(x, y)])
    assert (found.output_dim, expected.output_dim) == (1, x.dim() - 1)
    assert_close(found(x), expected(x).movedim(-1, 1))


@pytest.mark.parametrize("name", ["convolution", "upsampled", "sequence"])
@pytest.mark.parametrize("n_outputs", [1, 3, SIZE])
def test_so_they_are_in_a_regression_whose_targets_have_them_there_as_well(name, n_outputs):
    model, x = channels_first(n_outputs)[name]
    f = model(x).detach()
    la = Laplace(model, "regression", "all", "diag")
    la.fit([(x, f + 1)])
    assert_close(la.loss, torch.tensor(0.5 * f.numel(), dtype=f.dtype))
    mean, cov = la(x)
    assert_close(mean, f)
    assert cov.shape == (len(x), n_outputs, *f.shape[1:])


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("name", ["convolution", "sequence"])
def test_moved_by_the_model_they_are_fitted_as_pixels(name, likelihood):
    model, x = channels_first()[name]
    f = model(x).detach()
    y = f.argmax(1) if likelihood == "classification" else torch.zeros_like(f).movedim(1, -1)
    la = Laplace(Then(model, lambda f: f.movedim(1, -1)), likelihood, "all", "diag")
    la.fit([(x, y)])
    expected = F.cross_entropy(f, y, reduction="sum") if likelihood == "classification" else 0.5 * f.square().sum()
    torch.testing.assert_close(la.loss, expected)
    predicted = la(x)
    mean = predicted if likelihood == "classification" else predicted[0]
    assert mean.shape == f.movedim(1, -1).shape


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("name", ["a linear layer", "tokens", "a product", "a bilinear layer"])
def test_channels_at_the_end_are_fitted_where_all_sizes_agree(name, likelihood):
    model, x = channels_last()[name]
    f = model.eval()(x).detach()
    la = Laplace(model, likelihood, "all", "diag")
    la.fit([(x, f.argmax(-1) if likelihood == "classification" else f)])
    assert la.n_outputs == SIZE


def test_outputs_that_nothing_is_known_of():
    for shape in ([2, 4, 5], [2, 5, 4], [2, 4]):
        CLASSES.check_axes(shape, None)
        NUMBERS.check_axes(shape, None)
    for shape, likelihood in (([2, 4, 4], CLASSES), ([2, 4, 4, 4], CLASSES), ([2, 1, 8, 8], NUMBERS)):
        with pytest.raises(UnsupportedError, match=r"neither their shape nor.*output_dim=1 if.*output_dim=-1"):
            likelihood.check_axes(shape, None)
    decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    la = Laplace(decoder, "regression", "all", "diag")
    with pytest.raises(UnsupportedError, match="neither their shape nor"):
        la.fit([(X.double(), torch.zeros(len(X), 1, 4, 4))])


# -- probabilities ----------------------------------------------------------------------------------------------------

SOFT = {"labels": Y, "soft labels": F.one_hot(Y, 3).double()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", SOFT)
def test_probabilities_are_refused_whichever_weights_are_random(kind, targets):
    dtype = torch.float64 if targets == "soft labels" else torch.float32
    la = estimator(kind, nn.Sequential(net(dtype), nn.Softmax(-1)))
    with pytest.raises(UnsupportedError, match=r"are probabilities.*logits|something follows that layer .a softmax"):
        la.fit([(X.to(dtype), SOFT[targets])])


def test_validation_data_of_probabilities():
    model = Then(net(), lambda f: f)
    la = Laplace(model, "classification", "all", "diag")
    la.fit([(X.float(), Y)])
    model.function = lambda f: f.softmax(-1)
    with pytest.raises(UnsupportedError, match="are probabilities"):
        la.optimize_prior_precision(method="gridsearch", val_loader=[(X.float(), Y)], grid_size=3)


def test_log_probabilities_are_logits():
    plain, normalized = (
        Laplace(model, "classification", "all", "full") for model in (net(), nn.Sequential(net(), nn.LogSoftmax(-1)))
    )
    for la in (plain, normalized):
        la.fit([(X.float(), Y)])
    torch.testing.assert_close(plain.loss, normalized.loss)
    torch.testing.assert_close(plain.H, normalized.H, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_outputs", [2, 10, 1000])
@pytest.mark.parametrize("widened", [False, True])
def test_probabilities_are_known_in_every_precision(dtype, n_outputs, widened):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 100.0):
        p = (scale * torch.randn(20, n_outputs, generator=generator)).to(dtype).softmax(-1)
        with pytest.raises(UnsupportedError, match="are probabilities"):
            check_logits(p.double() if widened else p)


NO_PROBABILITIES = {
    "one row that does not sum to one": torch.tensor([[0.5, 0.5], [0.5, 0.6]]),
    "one negative entry": torch.tensor([[0.5, 0.5], [1.1, -0.1]]),
    "zeros": torch.zeros(3, 4),
    "independent probabilities": torch.tensor([[0.9, 0.8], [0.1, 0.3]]),
    "close in float32": torch.tensor([[0.5, 0.5001]]),
    "no row": torch.zeros(0, 3),
    "one row in bfloat16": torch.tensor([[0.25, 0.78]]).bfloat16(),
    "one row of small fractions": torch.tensor([[0.25, 0.75]]),
}


@pytest.mark.parametrize("name", NO_PROBABILITIES)
def test_logits_that_only_look_alike(name):
    check_logits(NO_PROBABILITIES[name])


@pytest.mark.parametrize("kind", KINDS)
def test_one_logit_is_no_classifier(kind):
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    with pytest.raises(UnsupportedError, match=r"softmax is always 1.*likelihood=\"binary\""):
        estimator(kind, model).fit([(X.double(), Y % 2)])
