"""The comparison with other methods runs as a user would run it; what it writes belongs together."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CONFIG = json.loads((BENCHMARKS / "quality.json").read_text(encoding="utf-8"))
NETWORKS = [network for entry in CONFIG["sets"].values() for network in entry["networks"]]


def module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module(name)


@pytest.mark.slow
def test_one_network_in_every_way(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(BENCHMARKS / "quality.py"), "--count", "1"]
    command += ["--folder", str(tmp_path / "networks"), "--output", str(tmp_path / "a new folder"), "--minutes"]
    early = subprocess.run([*command, "-1"], capture_output=True, text=True, check=False, timeout=500)
    assert early.returncode == 1
    assert "1 of 1 networks are left" in early.stderr
    printed = subprocess.run([*command, "9"], capture_output=True, text=True, check=True, timeout=500).stdout
    written = (tmp_path / "a new folder" / "quality.json").read_text(encoding="utf-8")
    page = (tmp_path / "a new folder" / "quality.md").read_text(encoding="utf-8")
    assert printed.endswith(page)
    again = subprocess.run([*command, "-1"], capture_output=True, text=True, check=True, timeout=500).stdout
    assert again.strip() == page.strip(), "what was measured is read, and nothing is measured again"
    found = json.loads(written)
    (run,) = found["runs"]
    methods = run["methods"]
    for name, one in methods.items():
        assert one["d"] == pytest.approx(one["nll"] - methods["TS"]["nll"], abs=1e-6), name
        assert one["d"] == pytest.approx(found["summary"][name]["d"]["mean"], abs=1e-6)
        assert 0 < one["ece"] < 0.2 < 0.8 < one["accuracy"] < 1, name
        assert 0.8 < one["coverage"] <= 1 <= one["set size"] < run["classes"], name
        assert set(one["ood"]) == {"near", "mid", "far"}, name
    assert methods["TS"]["accuracy"] == methods["MAP"]["accuracy"] == methods["TS, prior on log T"]["accuracy"]
    names = ("TS", "retrained head, T", "default", "ensemble, T", "MC dropout, T")
    assert [methods[name]["evaluations"] for name in names] == [1, 1, 1, 3, CONFIG["dropout"]["samples"]]
    against = methods["default"]["against"]["ensemble, T"]
    assert against["d"] == pytest.approx(methods["default"]["nll"] - methods["ensemble, T"]["nll"], abs=1e-6)
    cost = methods["default"]["cost"]
    assert [cost[f"`tune`: passes of the {name} loader"] for name in ("training", "validation")] == [0, 1]
    by_name = {bar["what"]: bar["kept"] for bar in found["bars"]}
    assert by_name["mean d"] == (methods["default"]["d"] <= CONFIG["bars"]["mean"])
    gap = methods["default"]["ood"]["far"] - methods["TS"]["ood"]["far"]
    assert by_name["AUROC of 1 − max p, far"] == (gap >= CONFIG["bars"]["far"])
    assert not by_name["mean d + 2 standard errors"], "one network has no standard error"
    assert math.isnan(found["summary"]["default"]["d"]["standard error"])


def test_the_list_is_as_long_and_as_clean_as_the_page_says() -> None:
    assert CONFIG["seeds"] == 3
    assert len({entry.get("of", name) for name, entry in CONFIG["sets"].items()}) >= 30
    assert sum(not noise for _, noise, _, _ in NETWORKS) > len(NETWORKS) / 2
    assert {decay for *_, decay in NETWORKS} == {0.0, 1e-3}
    kinds = {architecture.partition(" ")[0] for architecture, *_ in NETWORKS}
    assert kinds == {"MLP", "CNN", "ResNet", "transformer", "frozen"}
    for name, entry in CONFIG["sets"].items():
        assert entry["validation"] >= 50, name
        assert len({tuple(network) for network in entry["networks"]}) == len(entry["networks"]), name


def a_run(data: str, d: float, at_end: bool = False) -> dict[str, Any]:
    return {"data": data, "methods": {"TS": {"at an end": at_end, "d": 0.0}, "default": {"d": d}}}


def test_networks_of_one_data_set_count_as_one_where_they_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = module(monkeypatch, "quality_tables")
    values = [0.3, -0.2, 0.5, 0.1]
    alone = tables.over([a_run(str(k), d) for k, d in enumerate(values)], tables.difference("default"))
    thrice = tables.over([a_run(str(k), d) for k, d in enumerate(values) for _ in "123"], tables.difference("default"))
    assert alone["standard error"] == pytest.approx(statistics.stdev(values) / 2)
    assert thrice["standard error"] == pytest.approx(alone["standard error"])
    assert (thrice["mean"], thrice["networks"]) == (pytest.approx(alone["mean"]), 12)


def test_networks_without_a_best_temperature_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = module(monkeypatch, "quality_tables")
    runs = [a_run("a", 0.1), a_run("b", 0.2, at_end=True)]
    assert tables.usual(runs) == ([runs[0]], [runs[1]])


def test_worse_is_beyond_the_error_and_the_smallest_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = module(monkeypatch, "quality_tables")
    rows = [{"d": d, "standard error": error} for d, error in [(0.01, 0.004), (0.01, 0.006), (0.001, 0), (-0.01, 0)]]
    assert tables.counted(rows, 0.002) == (1, 1)
    assert tables.counted(rows, 0.002, errors=4) == (1, 0)


def test_temperatures(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = module(monkeypatch, "quality_methods")
    logits = 3 * torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.distributions.Categorical(logits=logits / 2).sample()
    for prior in (False, True):
        t, at_end = methods.temperature(logits, y, prior)
        grid = torch.linspace(-1, 2, 3001, dtype=logits.dtype).exp()
        values = [torch.nn.functional.cross_entropy(logits / one, y) + prior * one.log() ** 2 / 400 for one in grid]
        assert not at_end
        assert t == pytest.approx(float(grid[torch.stack(values).argmin()]), rel=2e-3)
    assert methods.temperature(logits, logits.argmax(1)) == (1.0, True)
    with_prior, at_end = methods.temperature(5 * torch.eye(4, dtype=torch.float64), torch.arange(4), prior=True)
    assert not at_end
    assert 0.05 < with_prior < 1


def test_sets_hold_the_likeliest_classes_up_to_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = module(monkeypatch, "quality_methods")
    probs = torch.tensor([[0.6, 0.35, 0.05], [0.05, 0.92, 0.03], [0.3, 0.3, 0.4]], dtype=torch.float64)
    assert methods.prediction_sets(probs, torch.tensor([1, 0, 0]), 0.9) == (pytest.approx(2 / 3), pytest.approx(2))


def test_a_retrained_head_of_two_classes_has_their_odds(monkeypatch: pytest.MonkeyPatch) -> None:
    methods, tuning_data = module(monkeypatch, "quality_methods"), module(monkeypatch, "tuning_data")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator)
    y = (x[:, 0] + torch.randn(300, generator=generator) > 0).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=100)
    data = tuning_data.Split(loader, loader, loader, {}, 2, "classification")
    logits, _ = methods.retrained(torch.nn.Sequential(torch.nn.Linear(3, 2)), data)
    search = methods.LogisticRegressionCV(scoring="neg_log_loss", max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        search.fit(x.double().numpy(), y.numpy())
    probs = torch.tensor(search.predict_proba(x.double().numpy()))
    torch.testing.assert_close(logits(x).softmax(1), probs)
