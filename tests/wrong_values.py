"""What people pass that makes no sense: wrong values by the sort of keyword, and the sort of each keyword."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NAN, INF = float("nan"), float("inf")
N_IN, N_OUT = 3, 2


def model(n_out: int = N_OUT, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network with two layers, trained or not: it is the calls that are wrong."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N_IN, 4), nn.Tanh(), nn.Linear(4, n_out)).to(dtype).eval()


def inputs(n: int = 4) -> Tensor:
    return torch.randn(n, N_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


class NoModule:
    """Looks like a model, and is none."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


NOT_A_FLAG = {
    "no": "no",
    "yes": "yes",
    "2": 2,
    "half": 0.5,
    "list": [True],
    "nan": NAN,
    "mapping": {},
    "bools": torch.ones(2, dtype=torch.bool),
}
NO_NUMBER = {
    "text": "1",
    "true": True,
    "list": [],
    "mapping": {},
    "object": object(),
    "complex": 1j,
    "complex tensor": torch.ones(1, dtype=torch.complex64),
    "empty": torch.zeros(0),
    "bool tensor": torch.tensor(True),
    "meta": torch.ones(1, device="meta"),
    "nan": NAN,
    "inf": INF,
    "nan tensor": torch.tensor([NAN]),
    "texts": np.array(["a"]),
    "three axes": torch.ones(2, 2, 2),
    "sparse": torch.ones(1).to_sparse(),
}
NOT_POSITIVE = {**NO_NUMBER, "zero": 0, "negative": -1.0, "negative tensor": torch.tensor([-1.0])}
NO_COUNT = {
    "text": "3",
    "true": True,
    "none": None,
    "half": 2.5,
    "nan": NAN,
    "inf": INF,
    "list": [3],
    "tensor": torch.tensor([1, 2]),
    "complex": 1j,
    "negative": -1,
}
NO_NAME = {"text": "nope", "number": 3, "list": ["glm"], "mapping": {}, "true": True, "empty": "", "class": nn.Module}
NO_LOADER = {
    "none": None,
    "number": 42,
    "text": "data",
    "empty": [],
    "empty batches": [[]],
    "numbers": [3],
    "no targets": [(inputs(),)],
    "missing targets": [(inputs(), None)],
    "a tensor": inputs(),
    "mapping": {"x": inputs()},
    "function": len,
    "model": model(),
    "texts": [("a", "b")],
    "arrays": [(inputs().numpy(), np.zeros(4))],
    "lists": [([1.0, 2.0, 3.0], [0])],
}
NO_INPUTS = {
    "none": None,
    "text": "x",
    "number": 3,
    "array": inputs().numpy(),
    "list": inputs().tolist(),
    "empty list": [],
    "mapping": {},
    "no rows": inputs()[:0],
    "wide": torch.ones(2, N_IN + 1),
    "scalar": torch.tensor(1.0),
    "integers": torch.ones(2, N_IN, dtype=torch.long),
    "double": inputs().double(),
    "half": inputs().half(),
    "complex": inputs().to(torch.complex64),
    "bools": torch.ones(2, N_IN, dtype=torch.bool),
    "meta": inputs().to("meta"),
    "sparse": inputs().to_sparse(),
    "nan": torch.full((2, N_IN), NAN),
    "function": len,
}
NO_JACOBIANS = {
    "none": None,
    "number": 3,
    "text": "J",
    "array": np.ones((1, 2, 3)),
    "list": [[[1.0]]],
    "matrix": torch.ones(2, 3),
    "other length": torch.ones(1, 2, 7),
    "complex": torch.ones(1, 2, 3, dtype=torch.complex64),
    "empty": torch.zeros(0),
    "bools": torch.ones(1, 2, 3, dtype=torch.bool),
    "meta": torch.ones(1, 2, 3, device="meta"),
    "mapping": {},
}
NO_WEIGHTS = {
    "none": None,
    "number": 3,
    "text": "θ",
    "array": np.ones(3),
    "list": [1.0],
    "other length": torch.ones(7),
    "complex": torch.ones(3, dtype=torch.complex64),
    "empty": torch.zeros(0),
    "scalar": torch.tensor(1.0),
    "mapping": {},
}
NO_GENERATOR = {
    "seed": 42,
    "text": "seed",
    "numpy": np.random.default_rng(0),
    "class": torch.Generator,
    "true": True,
    "state": torch.get_rng_state(),
}
NO_INDICES = {
    "none": None,
    "list of text": ["a"],
    "text": "0",
    "floats": torch.ones(2),
    "outside": torch.tensor([10**6]),
    "negative": torch.tensor([-1]),
    "twice": torch.tensor([1, 1]),
    "empty": torch.zeros(0, dtype=torch.long),
    "two axes": torch.zeros(1, 1, dtype=torch.long),
    "number": 3,
    "mask": torch.ones(5, dtype=torch.bool),
}

WRONG: dict[str, dict[str, Any]] = {
    "flag": {**NOT_A_FLAG, "none": None},
    "flag or none": NOT_A_FLAG,
    "positive": {**NOT_POSITIVE, "none": None},
    "positive or none": NOT_POSITIVE,
    "finite": {**NO_NUMBER, "none": None},
    "number": {**NO_NUMBER, "none": None, "two": torch.ones(2)},
    "positive number": {**NOT_POSITIVE, "none": None, "two": torch.ones(2)},
    "number from 0": {**NO_NUMBER, "none": None, "two": torch.ones(2), "negative": -1.0},
    "grid": {"none": None, "empty": [], "text": "1", "texts": ["a"], "negative": [-1.0], "nan": [NAN], "zero": [0.0], "true": True, "mapping": {}},
    "count": {**NO_COUNT, "zero": 0},
    "count or zero": NO_COUNT,
    "count or none": {name: value for name, value in NO_COUNT.items() if value is not None} | {"zero": 0},
    "folds": {**NO_COUNT, "zero": 0, "one": 1},
    "share": {"text": "1", "true": True, "zero": 0.0, "above": 1.5, "nan": NAN, "negative": -0.1, "list": [0.5]},
    "share from 0": {"text": "1", "true": True, "above": 1.5, "nan": NAN, "negative": -0.1, "list": [0.5], "none": None},
    "name": {**NO_NAME, "none": None},
    "name or none": NO_NAME,
    "loader": NO_LOADER,
    "loader or none": {name: value for name, value in NO_LOADER.items() if value is not None},
    "inputs": NO_INPUTS,
    "jacobians": NO_JACOBIANS,
    "weights": NO_WEIGHTS,
    "samples": {**NO_WEIGHTS, "vector": torch.ones(5)},
    "generator": NO_GENERATOR,
    "key": {"number": 3, "none": None, "list": ["x"], "true": True, "bytes": b"x", "mapping": {}},
    "dtype": {"text": "float64", "half": torch.float16, "whole": torch.int64, "class": float, "numpy": np.float64, "true": True},
    "back end": {"text": "AutogradGGN", "object": object(), "class": nn.Module, "number": 3, "true": True},
    "back end options": {"text": "x", "list": [1], "number": 3, "unknown": {"nope": 1}, "keys": {3: 4}, "true": True, "misspelt": {"stochastik": True}},
    "fisher options": {"text": "x", "list": [1], "number": 3, "unknown": {"nope": 1}, "true": True},
    "layer": {"unknown": "nope", "number": 3, "list": ["2"], "no linear": "1", "empty": "", "true": True},
    "indices": NO_INDICES,
    "model": {"none": None, "text": "model", "function": len, "class": nn.Linear, "likeness": NoModule(), "state": model().state_dict(), "no weights": nn.Tanh()},
    "loss": {"text": "nope", "number": 3, "list": ["nll"], "mapping": {}, "true": True, "class": nn.Module},
    "limits": {"text": "x", "number": 3, "unknown": {"nope": (1, 2)}, "one": {"prior_precision": 1.0}, "reversed": {"prior_precision": (2.0, 1.0)}, "texts": {"prior_precision": ("a", "b")}, "negative": {"prior_precision": (-1.0, 1.0)}, "true": True, "list": [1, 2]},
    "bounds": {"none": None, "text": "ab", "number": 3, "reversed": (2.0, 1.0), "one": (1.0,), "nan": (NAN, 1.0), "negative": (-1.0, 1.0), "true": True, "flags": (True, 2.0)},
    "locations": {"none": None, "text": "nope", "number": 3, "empty": inputs()[:0], "list": [1.0], "wide": torch.ones(3, N_IN + 2), "mapping": {}, "scalar": torch.tensor(1.0), "array": inputs(3).numpy(), "nan": torch.full((3, N_IN), NAN)},
    "classes": {"floats": torch.ones(3), "negative": torch.tensor([-1, 0, 0]), "short": torch.zeros(1, dtype=torch.long), "text": "abc", "number": 3, "bools": [True, False, True], "outside": [9, 0, 0]},
    "average": {"nope": "nope", "number": 3, "none": None, "true": True, "list": []},
    "structure": {"nope": "nope", "number": 3, "none": None, "true": True},
    "optimizer": {"text": "adam", "none": None, "number": 3, "module": nn.Linear},
    "keywords": {"text": "x", "list": [1], "number": 3, "unknown": {"nope": 1}, "true": True},
    "scheduler": {"text": "step", "number": 3, "module": nn.Linear},
    "device": {"none": None, "text": "nowhere", "number": -7, "list": [], "true": True, "float": 0.5, "meta": "meta"},
    "output key": {"list": [0], "true": True, "float": 1.0, "class": dict, "tensor": torch.ones(1)},
    "output function": {"text": "logits", "number": 3, "list": [], "true": True},
    "axis": {"zero": 0, "text": "1", "true": True, "float": 1.0, "list": [1]},
    "estimator": {"none": None, "text": "x", "number": 3, "mapping": {}, "model": nn.Linear(2, 2), "true": True},
    "state": {"none": None, "text": "x", "empty": {}, "list": [], "number": 3, "other keys": {"a": 1}},
}  # fmt: skip
"""Wrong values by the sort of keyword."""

SORTS = {
    "model": "model", "likelihood": "name", "subset_of_weights": "name", "hessian_structure": "structure",
    "functional_approximation": "name", "sigma_noise": "positive", "prior_precision": "positive", "prior_mean": "finite",
    "temperature": "positive number", "enable_backprop": "flag", "dict_key_x": "key", "dict_key_y": "key",
    "backend": "back end", "backend_kwargs": "back end options", "asdl_fisher_kwargs": "fisher options",
    "curvature_dtype": "dtype", "feature_reduction": "name or none", "last_layer_name": "layer", "damping": "flag",
    "rank": "count or none", "captured_trace": "share", "subnetwork_indices": "indices", "n_subset": "count",
    "independent_outputs": "flag", "diagonal_hessian": "flag", "seed": "count or zero", "subsample_size": "count",
    "n_eigenvalues": "count", "inducing_locations": "locations", "num_inducing": "count or none",
    "inducing_classes": "classes", "alpha": "share from 0", "mc_softmax_samples": "count or zero",
    "train_loader": "loader", "val_loader": "loader", "override": "flag", "progress_bar": "flag",
    "val_steps": "count or none", "balanced": "flag", "iterations": "count", "lr": "positive number",
    "train_hyperparameters": "flag", "x": "inputs", "X": "inputs", "pred_type": "name", "joint": "flag",
    "link_approx": "name", "n_samples": "count", "diagonal_output": "flag", "generator": "generator", "fitting": "flag",
    "Js": "jacobians", "Js_star": "jacobians", "jacobians": "jacobians", "value": "weights", "normalized": "flag",
    "subnet_samples": "samples", "method": "name", "n_steps": "count or zero", "init_prior_prec": "positive",
    "prior_structure": "name", "loss": "loss", "score": "loss", "log_prior_prec_min": "number",
    "log_prior_prec_max": "number", "grid_size": "count", "log_prior_prec_base": "positive number", "verbose": "flag",
    "noise": "name", "bounds": "bounds", "n_folds": "folds", "refit": "flag or none", "average": "average",
    "distance_aware": "flag or none", "max_rows": "count or none", "kind": "name or none",
    "output_temperature": "flag or none", "limits": "limits",
    "grid": "grid", "optimizer_cls": "optimizer", "optimizer_kwargs": "keywords", "scheduler_cls": "scheduler",
    "scheduler_kwargs": "keywords", "n_epochs": "count", "lr_hyp": "number from 0", "n_epochs_burnin": "count or zero",
    "n_hypersteps": "count", "marglik_frequency": "count", "prior_prec_init": "positive",
    "sigma_noise_init": "positive", "fix_sigma_noise": "flag", "device": "device", "state_dict": "state",
    "other": "estimator", "tune": "flag", "data": "loader",
    "output_key": "output key", "output_fn": "output function", "output_dim": "axis", "shift_labels": "flag or none",
}  # fmt: skip
"""The sort of each keyword, wherever it stands; exceptions follow."""
EXCEPTIONS = {
    ("optimize_prior_precision", "temperature"): "flag",
    ("log_marginal_likelihood", "prior_precision"): "positive or none",
    ("log_marginal_likelihood", "sigma_noise"): "positive or none",
    ("fit", "val_loader"): "loader or none",
    ("tune", "noise"): "name or none",
    ("tune", "train_loader"): "loader or none",
    ("marglik_training", "scheduler_cls"): "scheduler",
    ("optimize_prior_precision", "loss"): "loss",
}
UNCHECKED = {"self", "args", "kwargs", "model_kwargs", "further", "path", "map_location"}
"""No keywords, or files, which have tests of their own."""

UNREAD = {"marglik": ("val_loader", "train_loader", "loss"), "gridsearch": ("train_loader",)}
"""What a method of tuning does not look at: code written for several passes all of it."""

METHODS = (
    "__call__", "assemble_full_samples", "export_module", "fit", "functional_covariance", "functional_samples", "functional_variance",
    "functional_variance_fast", "load_state_dict", "log_marginal_likelihood", "log_prob", "merge", "optimize_hyperparameters",
    "ood_score", "optimize_prior_precision", "plan", "predict", "predict_std", "predictive", "predictive_moments", "predictive_samples", "sample", "square_norm",
    "subtract", "to", "tune",
)  # fmt: skip


def sort_of(method: str, keyword: str) -> str:
    return EXCEPTIONS.get((method, keyword), SORTS[keyword])
