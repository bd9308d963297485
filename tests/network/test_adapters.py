"""All weights of real Hugging Face models and of PEFT adapters: exact against brute force, for every structure."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from laplace import Laplace
from laplace.curvature import AutogradGGN
from tests import reference
from tests.cases import BY_GROUP, EVERYTHING
from tests.contracts import model_untouched
from tests.estimators import dense, every_structure
from tests.network.test_huggingface import (
    CLASSES,
    VOCABULARY,
    batches,
    bert,
    distilbert,
    encode,
    gpt2,
    row_labels,
    seeded,
)
from tests.tools import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    ),  # peft asks transformers
]


def llama():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_labels=CLASSES, pad_token_id=0, **sizes)
    return seeded(LlamaForSequenceClassification, config)


TARGETS = {"bert": (bert, ["query", "value"]), "gpt2": (gpt2, ["c_attn"]), "llama": (llama, ["q_proj", "down_proj"])}


def adapted(name: str, config=None):
    """A model with trained adapters (LoRA starts with B = 0, where its curvature is zero) and a trainable head."""
    build, targets = TARGETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"fan_in_fan_out": True} if name == "gpt2" else {}
        lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, **options)
        model = get_peft_model(build(), lora if config is None else config).double().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora" in key:
                    parameter.copy_(torch.randn(parameter.shape))
    return model


def precise(model, value: torch.Tensor) -> torch.Tensor:
    """Norms of Llama work in float32 whatever the model is: so do comparisons with it."""
    return value.float() if "LlamaRMSNorm" in repr(model) else value


def problem(model) -> reference.Problem:
    names = tuple(key for key, p in model.named_parameters() if p.requires_grad)

    def forward(m, x):
        return m(**x)["logits"]

    return reference.Problem(model, forward, names, dict(encode()), row_labels(), "classification", CLASSES)


@pytest.mark.parametrize("build", [distilbert, bert, gpt2, llama], ids=lambda build: build.__name__)
def test_all_weights_of_a_model_are_exact(build):
    """Fused and separate attention, position tables, norms of their own making, weights stored inputs first."""
    model = build()
    truth, engine = problem(model), AutogradGGN(model, "classification")
    with model_untouched(model):
        J, _ = engine.jacobians(encode())
        loss, diagonal = engine.diag(encode(), row_labels())
    assert_close(precise(model, J), truth.jacobian(truth.x).flatten(0, 1))
    assert_close(precise(model, loss), truth.nll())
    assert_close(precise(model, diagonal), truth.ggn().diagonal())
    recording = engine.derivatives(encode())
    assert [recording.names[group] for group in recording.verdict.slow] == []


@pytest.mark.every(3)
@every_structure
@pytest.mark.parametrize("name", TARGETS)
def test_adapters_and_heads_are_all_that_is_random(name, structure):
    model = adapted(name)
    truth = problem(model)
    la = Laplace(model, "classification", "all", structure, **EVERYTHING.get(structure, {}))
    with model_untouched(model):
        la.fit(batches(row_labels()))
        probabilities, sampled = la(encode(seed=1)), la(encode(seed=1), "nn", n_samples=3)
    assert la.n_params == len(truth.theta())
    ggn = truth.ggn()
    if structure not in BY_GROUP:
        meanings = {"diag": ggn.diagonal().diag(), "blockdiag": torch.block_diag(*truth.groups(ggn))}
        assert_close(precise(model, dense(la.H)), meanings.get(structure, ggn))
    P = dense(la.posterior_precision)
    x = dict(encode(seed=1))
    cov = reference.output_covariance(truth.jacobian(x).flatten(0, 1), P)
    assert_close(precise(model, probabilities), reference.probit(truth.outputs(truth.theta(), x).flatten(0, 1), cov))
    assert_close(sampled.sum(-1), torch.ones(len(sampled)))


def test_adapters_that_scale_activations_get_their_exact_block():
    config = IA3Config(task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[])
    model = adapted("bert", config)
    truth, engine = problem(model), AutogradGGN(model, "classification")
    assert_close(engine.full(encode(), row_labels())[1], truth.ggn())
    kron = engine.kron(encode(), row_labels(), N=1)[1].to_matrix()
    size = next(p.numel() for p in model.parameters() if p.requires_grad)
    assert_close(kron[:size, :size], truth.ggn()[:size, :size])


class Adaptable(torch.nn.Module):
    """A head that adapters can wrap."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(3, 5), torch.nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).tanh())


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_an_adapted_head_is_the_head_that_it_is_merged_into(structure):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["head"], r=2, init_lora_weights=False)
        model = get_peft_model(Adaptable(), config).double().eval()
        x, y = torch.randn(9, 3).double(), torch.arange(9) % CLASSES
    adapted = Laplace(model, "classification", hessian_structure=structure)
    with model_untouched(model):
        adapted.fit([(x, y)])
    assert adapted.last_layer_name == "base_model.model.head"
    found, mean, head = adapted(x), adapted.mean, adapted.head_
    merged = Laplace(model.merge_and_unload(), "classification", hessian_structure=structure)
    merged.fit([(x, y)])
    assert_close(mean, merged.mean)
    assert_close(found, merged(x))
    phi = merged.model.model.body(x).tanh()
    assert_close(head(phi), merged.model.model(x))
