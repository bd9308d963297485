"""Hugging Face models as they come: tiny random configurations, real batches, outputs with `logits`."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from laplace import Laplace
from laplace.errors import MissingKeyError
from laplace.network.feature_extractor import FeatureExtractor
from tests import reference
from tests.cases import EVERYTHING, STRUCTURES
from tests.contracts import model_untouched
from tests.estimators import dense
from tests.tools import assert_close

VOCABULARY, LENGTH, ROWS = 23, 5, 6
CLASSES = 3


def seeded(cls, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).double().eval()


def distilbert(cls=DistilBertForSequenceClassification):
    sizes = {"n_layers": 1, "n_heads": 2, "dim": 8, "hidden_dim": 8, "max_position_embeddings": LENGTH}
    return seeded(cls, DistilBertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **sizes))


def bert():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return seeded(BertForSequenceClassification, BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **sizes))


def gpt2(cls=GPT2ForSequenceClassification):
    sizes = {"n_positions": LENGTH, "n_embd": 8, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return seeded(cls, GPT2Config(vocab_size=VOCABULARY, num_labels=CLASSES, **sizes, **ends))


def encode(*, padded: bool = True, rows: int = ROWS, seed: int = 0) -> BatchEncoding:
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, LENGTH), generator=noise)
    mask = torch.ones_like(ids)
    if padded:
        mask[::2, -2:] = 0
        ids[mask == 0] = 0
    return BatchEncoding({"input_ids": ids, "attention_mask": mask})


def batches(labels: torch.Tensor, **options) -> list[BatchEncoding]:
    """The rows in two batches of different size."""
    encoded = {**encode(**options), "labels": labels}
    return [
        BatchEncoding({key: value[part] for key, value in encoded.items()}) for part in (slice(0, 4), slice(4, ROWS))
    ]


def row_labels() -> torch.Tensor:
    return torch.arange(ROWS) % CLASSES


def token_labels() -> torch.Tensor:
    labels = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % CLASSES
    return labels.masked_fill(encode()["attention_mask"] == 0, -100)


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Labels of a causal language model: the token after each position, which the last one lacks."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)


MODELS = {
    "distilbert": (distilbert, "classifier", row_labels, True, {}),
    "bert": (bert, "classifier", row_labels, True, {}),
    "gpt2": (gpt2, "score", row_labels, False, {"feature_reduction": "pick_last"}),
    "gpt2 with padding": (gpt2, "score", row_labels, True, {"feature_reduction": "pick_last"}),
    "token classifier": (lambda: distilbert(DistilBertForTokenClassification), "classifier", token_labels, True, {}),
}
rows = pytest.mark.parametrize(("build", "head", "labels", "padded", "options"), MODELS.values(), ids=MODELS)


def logits(model, x):
    return model(**{key: value for key, value in x.items() if key != "labels"}).logits


def problem(model, head, labels, padded) -> reference.Problem:
    names = tuple(name for name, _ in model.named_parameters() if name.startswith(head + "."))
    return reference.Problem(model, logits, names, dict(encode(padded=padded)), labels(), "classification", CLASSES)


@pytest.mark.every(2)
@rows
@pytest.mark.parametrize("structure", STRUCTURES)
def test_hugging_face_models_are_fitted_as_they_come(build, head, labels, padded, options, structure):
    model = build()
    la = Laplace(model, "classification", hessian_structure=structure, **EVERYTHING.get(structure, {}), **options)
    with model_untouched(model):
        la.fit(batches(labels(), padded=padded))
    truth = problem(model, head, labels, padded)
    expected = truth.curvature(structure)
    assert_close(dense(la.posterior_precision), expected + torch.eye(len(expected)))
    assert_close(torch.as_tensor(la.loss), truth.nll())
    assert la.n_data == ROWS


@rows
def test_hugging_face_models_predict_on_encodings_with_and_without_labels(build, head, labels, padded, options):
    model = build()
    la = Laplace(model, "classification", hessian_structure="full", **options)
    la.fit(DataLoader(batches(labels(), padded=padded), batch_size=None))
    x = encode(padded=padded, rows=4, seed=1)
    J = problem(model, head, labels, padded).jacobian(dict(x))
    with torch.no_grad():
        f = logits(model, x)
    with model_untouched(model):
        probabilities = la(x)
    cov = reference.output_covariance(J.flatten(0, 1), la.posterior_precision)
    assert_close(probabilities, reference.probit(f.reshape(-1, CLASSES), cov).reshape(f.shape))
    assert_close(la(BatchEncoding({**x, "labels": labels()[:4]})), probabilities)


def test_the_main_input_is_what_the_model_calls_so():
    """Of image models ``pixel_values``; ``dict_key_x=`` is left alone."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=CLASSES, **sizes)
    model = seeded(ViTForImageClassification, config)
    images = torch.randn(ROWS, 1, 4, 4, dtype=torch.float64)
    la = Laplace(model, "classification")
    la.fit([{"pixel_values": images, "labels": row_labels()}])
    assert la.last_layer_name == "classifier"
    assert_close(la({"pixel_values": images}).sum(-1), torch.ones(ROWS, dtype=torch.float64))
    with pytest.raises(MissingKeyError, match=r"'pixel_values'.*expected under 'images'"):
        Laplace(model, "classification", dict_key_x="images").fit([{"pixel_values": images, "labels": row_labels()}])


def test_a_language_model_with_a_tied_head_warns():
    with pytest.warns(UserWarning, match="'lm_head' is tied to 'transformer.wte.weight'"):
        FeatureExtractor(gpt2(GPT2LMHeadModel)).find_last_layer(encode(padded=False))


def test_a_language_model_is_a_classifier_of_tokens():
    model = gpt2(GPT2LMHeadModel)
    la = Laplace(model, "classification", hessian_structure="diag")
    with pytest.warns(UserWarning, match="tied"):
        la.fit(batches(next_tokens(encode(padded=False)["input_ids"]), padded=False))
    x = encode(padded=False, rows=2, seed=1)
    probabilities = la(x)
    assert probabilities.shape == (2, LENGTH, VOCABULARY)
    assert_close(probabilities.sum(-1), torch.ones(2, LENGTH))
