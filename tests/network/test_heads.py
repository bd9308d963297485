"""Each kind of last layer against its own forward pass, and what cannot be one."""

import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from laplace import Laplace
from laplace.errors import UnsupportedError
from laplace.network.feature_extractor import FeatureExtractor
from laplace.network.heads import HEADS, check_head, head_in_table, head_of, is_head, n_outputs
from laplace.network.parameters import ParameterSubset
from tests.tools import assert_close


class Adapted(nn.Module):
    """A linear layer and what a low-rank adapter adds to its weight, with the attributes that those of peft have."""

    def __init__(self, n_inputs, n_outputs, rank=2):
        super().__init__()
        self.base_layer = nn.Linear(n_inputs, n_outputs)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n_inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, n_outputs, bias=False)})
        self.active_adapters = ["default"]

    def get_delta_weight(self, name):
        return 0.5 * self.lora_B[name].weight @ self.lora_A[name].weight

    def forward(self, x):
        return self.base_layer(x) + 0.5 * self.lora_B["default"](self.lora_A["default"](x))


def features_first(x):
    return torch.randn(4, 3, *x, dtype=torch.float64)


EXAMPLES = {
    "linear": (nn.Linear(3, 2), torch.randn(4, 3)),
    "linear at positions": (nn.Linear(3, 2), torch.randn(4, 5, 3)),
    "linear without bias": (nn.Linear(3, 2, bias=False), torch.randn(4, 3)),
    "linear with a parametrized weight": (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), torch.randn(4, 3)),
    "linear with spectral norm": (nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)), torch.randn(4, 3)),
    "convolution with a parametrized weight": (
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 2)),
        features_first((3, 4)),
    ),
    "1×1 convolution": (nn.Conv2d(3, 2, 1), features_first((3, 4))),
    "convolution of sequences": (nn.Conv1d(3, 2, 3, stride=2, padding=2, dilation=2), features_first((7,))),
    "convolution of images": (nn.Conv2d(3, 2, (2, 3), stride=(2, 1), padding=(0, 2)), features_first((4, 5))),
    "convolution of the same size": (nn.Conv2d(3, 2, (2, 3), padding="same", dilation=2), features_first((4, 5))),
    "convolution without padding": (nn.Conv2d(3, 2, 2, padding="valid", bias=False), features_first((4, 5))),
    "reflecting": (nn.Conv2d(3, 2, 3, padding=(1, 2), padding_mode="reflect"), features_first((4, 5))),
    "circular": (nn.Conv1d(3, 2, 3, padding="same", padding_mode="circular"), features_first((5,))),
    "replicating": (nn.Conv3d(3, 2, 2, padding=1, padding_mode="replicate"), features_first((2, 3, 2))),
    "convolution of volumes": (nn.Conv3d(3, 2, (1, 2, 2), stride=(1, 2, 1)), features_first((2, 3, 4))),
    "transposed of sequences": (
        nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1, output_padding=1, dilation=2),
        features_first((4,)),
    ),
    "transposed of images": (
        nn.ConvTranspose2d(3, 2, (2, 3), stride=(2, 1), padding=(0, 2), bias=False),
        features_first((3, 4)),
    ),
    "transposed that is cropped": (nn.ConvTranspose2d(3, 2, 2, stride=2, padding=2), features_first((3, 4))),
    "transposed of volumes": (nn.ConvTranspose3d(3, 2, 2, stride=(1, 2, 2)), features_first((2, 2, 3))),
    "Conv1D of transformers": (Conv1D(2, 3), torch.randn(4, 5, 3)),
    "LoRA": (Adapted(3, 2), torch.randn(4, 3)),
}
every_layer = pytest.mark.parametrize(
    ("layer", "x"), [(layer.double().eval(), x.double()) for layer, x in EXAMPLES.values()], ids=EXAMPLES
)


@every_layer
def test_outputs_are_those_of_the_layer_and_linear_in_its_weights(layer, x):
    head = head_of(layer)
    phi = head.features(layer, x)
    expected = layer(x).movedim(head.channels, -1)
    assert_close(head.outputs(layer, phi), expected)
    weight, *bias = head.parameters(layer)
    assert [tuple(p.shape) for p in (weight, *bias)] == head.groups(layer) == ParameterSubset.last_layer(layer).shapes
    assert_close(phi @ weight.T + (bias[0] if bias else 0), expected)
    assert n_outputs(layer) == expected.shape[-1]


@every_layer
def test_a_layer_at_other_weights_is_of_the_same_kind(layer, x):
    head = head_of(layer)
    weight, *bias = (torch.randn_like(part) for part in head.parameters(layer))
    new = head.at(layer, weight, bias[0] if bias else None)
    assert isinstance(new, nn.Linear) or isinstance(layer, type(new)) or hasattr(layer, "parametrizations")
    expected = head.features(layer, x) @ weight.T + (bias[0] if bias else 0)
    assert_close(new(x).movedim(head.channels, -1), expected)
    assert_close(head_of(new).weight(new), weight)


IN_ORDER = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@pytest.mark.parametrize("name", [name for name, (layer, _) in EXAMPLES.items() if type(layer) in IN_ORDER])
def test_derivatives_in_the_weights_are_features(name):
    """By autograd, in the order of the parameter itself."""
    layer, x = EXAMPLES[name][0], EXAMPLES[name][1].double()
    head = head_of(layer)
    phi, weight = head.features(layer, x), head.weight(layer)
    made = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)).movedim(head.channels, -1),
        layer.weight.detach(),
    )
    made = made.reshape(-1, weight.shape[0], weight.numel())
    rows, eye = phi.reshape(-1, weight.shape[1]), torch.eye(weight.shape[0]).to(phi)
    assert_close(made, torch.einsum("nd,ck->nkcd", rows, eye).reshape(made.shape))


def test_every_kind_has_an_example():
    assert {id(head_in_table(layer)) for layer, _ in EXAMPLES.values()} == {id(head) for head in HEADS.values()}


def test_the_old_weight_norm_is_read_as_an_attribute():
    with pytest.warns(FutureWarning, match="deprecated"):
        layer = nn.utils.weight_norm(nn.Linear(3, 2).double())
    with torch.no_grad():
        layer.weight_g.mul_(2)
    x = torch.randn(4, 3, dtype=torch.float64)
    model = nn.Sequential(nn.Identity(), layer)
    f, phi = FeatureExtractor(model).forward_with_features(x)
    assert_close(phi @ layer.weight.T + layer.bias, f)


class Linear4bit(nn.Linear):
    """Named as the layers of packages that quantize."""


def quantized():
    with warnings.catch_warnings():  # PyTorch will move them to another package
        warnings.simplefilter("ignore")
        return torch.ao.nn.quantized.dynamic.Linear(3, 2)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: nn.Conv2d(4, 2, 1, groups=2), "groups=2.*subset_of_weights"),
        (lambda: nn.ConvTranspose1d(4, 2, 1, groups=2), "groups=2.*subset_of_weights"),
        (lambda: Linear4bit(3, 2), r"quantized \(Linear4bit\).*without quantization"),
        (quantized, r"quantized \(Linear\).*modules_to_not_convert"),
    ],
    ids=["groups", "groups of a transposed one", "a package", "PyTorch"],
)
def test_what_cannot_be_a_head_is_refused_by_name(build, says):
    layer = build()
    with pytest.raises(UnsupportedError, match=says):
        check_head("head", layer)
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(UnsupportedError, match="'1'.*" + says):
        FeatureExtractor(model, last_layer_name="1")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_quantized_layer_that_runs_last_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3).float(), quantized())
    with pytest.raises(UnsupportedError, match=r"'1' \(Linear\).*quantized"):
        FeatureExtractor(model).find_last_layer(torch.randn(4, 3, dtype=torch.float32))


def test_adapters_that_are_no_sum_are_refused():
    layer = Adapted(3, 2)
    layer.use_dora = {"default": True}
    with pytest.raises(UnsupportedError, match=r"DoRA.*merge"):
        check_head("head", layer)
    layer.use_dora, layer.base_layer = {}, nn.Conv2d(3, 2, 1)
    with pytest.raises(UnsupportedError, match=r"another kind.*merge"):
        check_head("head", layer)


def test_weights_that_are_not_made_yet_are_refused():
    with pytest.raises(UnsupportedError, match="first forward pass"):
        Laplace(nn.Sequential(nn.LazyLinear(2)), "regression")
    assert not is_head(nn.Bilinear(2, 2, 2))
