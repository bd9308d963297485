"""What the networks of ``quality.py`` say together, beside the bars of the default recipe."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from measuring import markdown

KINDS = ("near", "mid", "far")


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Mean over networks, its standard error, and how many there are."""
    if not values:
        return {"mean": float("nan"), "standard error": float("nan"), "networks": 0}
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": statistics.fmean(values), "standard error": error, "networks": len(values)}


def gains(runs: list[dict[str, Any]], method: str, kind: str, what: str = "ood") -> list[float]:
    """AUROC minus that of temperature scaling, of networks that have such inputs."""
    methods = [run["methods"] for run in runs]
    return [one[method][what][kind] - one["TS"]["ood"][kind] for one in methods if kind in one["TS"]["ood"]]


def summarize(runs: list[dict[str, Any]], smallest: float) -> dict[str, Any]:
    """Every method over all networks."""
    found: dict[str, Any] = {}
    for method in runs[0]["methods"]:
        rows = [run["methods"][method] for run in runs]
        beyond = [(row["d"], max(2 * row["standard error"], smallest)) for row in rows]
        far_beyond = [(row["d"], max(4 * row["standard error"], smallest)) for row in rows]
        found[method] = {
            "d": mean_and_error([row["d"] for row in rows]),
            "median": statistics.median(row["d"] for row in rows),
            "better": sum(d < -bound for d, bound in beyond),
            "worse": sum(d > bound for d, bound in beyond),
            "much worse": sum(d > bound for d, bound in far_beyond),
            **{key: statistics.fmean(row[key] for row in rows) for key in ("nll", "ece", "accuracy")},
            "ood": {kind: mean_and_error(gains(runs, method, kind)) for kind in KINDS},
        }
    found["ood_score of the default"] = {
        "ood": {kind: mean_and_error(gains(runs, "default", kind, "score")) for kind in KINDS}
    }
    return found


def between(runs: list[dict[str, Any]], kind: str | None) -> dict[str, float]:
    """The default minus the ensemble of three: NLL, or the AUROC of a kind of inputs."""
    pairs = [(run["methods"]["default"], run["methods"]["ensemble"]) for run in runs]
    if kind is None:
        return mean_and_error([ours["nll"] - theirs["nll"] for ours, theirs in pairs])
    return mean_and_error([ours["ood"][kind] - theirs["ood"][kind] for ours, theirs in pairs if kind in ours["ood"]])


def bars(runs: list[dict[str, Any]], summary: dict[str, Any], config: dict[str, float]) -> list[dict[str, Any]]:
    """What was asked of the default recipe, what was measured, and whether that is enough."""
    ours, n = summary["default"], len(runs)
    mean, error = ours["d"]["mean"], ours["d"]["standard error"]
    most = round(config["worse"] * n)
    found = [
        ("mean d", f"≤ {config['mean']}", signed(ours["d"]), mean <= config["mean"]),
        ("mean d + 2 standard errors", "< 0", f"{mean + 2 * error:+.4f}", mean + 2 * error < 0),
        ("median d", f"≤ {config['median']}", f"{ours['median']:+.4f}", ours["median"] <= config["median"]),
        ("worse beyond 2 standard errors", f"≤ {most} of {n}", str(ours["worse"]), ours["worse"] <= most),
        ("worse beyond 4 standard errors", "0", str(ours["much worse"]), ours["much worse"] == 0),
    ]
    for kind in KINDS:
        gain, bar = ours["ood"][kind], config[kind]
        found.append((f"AUROC of 1 − max p, {kind}", f"≥ {bar:+}", signed(gain), gain["mean"] >= bar))
    for kind in ("near", "far"):
        gain, bar = summary["ood_score of the default"]["ood"][kind], config[f"score {kind}"]
        found.append((f"AUROC of ood_score, {kind}", f"≥ {bar:+}", signed(gain), gain["mean"] >= bar))
    gap = between(runs, None)
    enough = gap["mean"] <= 2 * gap["standard error"]
    found.append(("NLL minus that of the ensemble", "≤ 2 standard errors", signed(gap), enough))
    for kind in ("near", "far"):
        gap = between(runs, kind)
        enough = gap["mean"] >= -2 * gap["standard error"]
        found.append((f"AUROC, {kind}, minus that of the ensemble", "≥ −2 standard errors", signed(gap), enough))
    alone, theirs = (max(run["methods"][name]["evaluations"] for run in runs) for name in ("default", "ensemble"))
    shown = f"{alone:.2f} of {theirs:.2f}"
    found.append(("network evaluations per predicted row", "≤ ⅓ of the ensemble's", shown, 3 * alone <= theirs))
    return [dict(zip(("what", "bar", "measured", "kept"), row, strict=True)) for row in found]


def signed(value: dict[str, float]) -> str:
    """Mean ± standard error; no-break spaces keep them on one line."""
    return f"{value['mean']:+.4f}\u00a0±\u00a0{value['standard error']:.4f}"


def overview(summary: dict[str, Any]) -> str:
    """A row for each method."""
    lines = []
    for method, one in summary.items():
        ood = [signed(one["ood"][kind]) for kind in KINDS]
        if "d" not in one:
            lines.append([method, *[""] * 6, *ood])
            continue
        told = [f"{one['nll']:.4f}", signed(one["d"]), f"{one['median']:+.4f}", f"{one['better']}/{one['worse']}"]
        lines.append([method, *told, f"{one['ece']:.4f}", f"{one['accuracy']:.4f}", *ood])
    columns = ["NLL", "d", "median d", "better/worse", "ECE", "accuracy", *(f"Δ AUROC, {kind}" for kind in KINDS)]
    return markdown(["", *columns], lines)


def groups(runs: list[dict[str, Any]]) -> str:
    """The default recipe over networks that have something in common."""
    lines = []
    for what in ("noise", "training", "architecture"):
        for value in sorted({run[what] for run in runs}):
            d = [run["methods"]["default"]["d"] for run in runs if run[what] == value]
            former = [run["methods"]["former recipe"]["d"] for run in runs if run[what] == value]
            name = f"{100 * value:.0f} %" if what == "noise" else value
            lines.append([f"{what}: {name}", len(d), signed(mean_and_error(d)), f"{statistics.median(d):+.4f}"])
            lines[-1].append(signed(mean_and_error(former)))
    return markdown(["", "networks", "d", "median d", "d of the former recipe"], lines)


def costs(runs: list[dict[str, Any]]) -> str:
    """What the default recipe takes, as ranges over networks."""
    rows = [run["methods"]["default"]["cost"] for run in runs]
    lines = []
    for name in rows[0]:
        values = sorted(row[name] for row in rows)
        lines.append([name, *(f"{value:.2f}" for value in (values[0], statistics.median(values), values[-1]))])
    return markdown(["default recipe", "least", "median", "most"], lines)


def each(runs: list[dict[str, Any]]) -> str:
    """A row for each network."""
    lines = []
    for run in runs:
        of = run["methods"]
        about = [run["data"], run["architecture"], f"{100 * run['noise']:.0f} %", run["training"]]
        told = [f"{of[name]['nll']:.3f}" for name in ("MAP", "TS", "ensemble", "default")]
        ours, plain = of["default"], of["TS"]["ood"]
        gap = f"{ours['d']:+.4f}\u00a0±\u00a0{ours['standard error']:.4f}"
        ood = [
            f"{plain[kind]:.3f} {ours['ood'][kind]:.3f} {ours['score'][kind]:.3f}" if kind in plain else ""
            for kind in KINDS
        ]
        lines.append([*about, *told, gap, f"{of['former recipe']['d']:+.4f}", *ood])
    names = ["MAP", "TS", "ensemble", "default", "d", "d of the former recipe"]
    return markdown(["", "network", "noise", "training", *names, *(f"{kind}: TS, p, score" for kind in KINDS)], lines)


def text(runs: list[dict[str, Any]], summary: dict[str, Any], kept: list[dict[str, Any]]) -> str:
    """Everything that a page shows."""
    lines = [[row["what"], row["bar"], row["measured"], "kept" if row["kept"] else "**missed**"] for row in kept]
    checked = markdown(["default recipe", "bar", "measured", ""], lines)
    parts = [f"{len(runs)} networks.", overview(summary), checked, groups(runs), costs(runs)]
    detail = f'<details markdown="1"><summary>Every network</summary>\n\n{each(runs)}\n\n</details>'
    return "\n\n".join([*parts, detail])
