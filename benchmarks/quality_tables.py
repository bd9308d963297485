"""What the networks of ``quality.py`` say together, beside the bars of the default recipe."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from measuring import markdown

KINDS = ("near", "mid", "far")
Run = dict[str, Any]
NAN = float("nan")


def data_of(run: Run) -> str:
    """The data set, which may be there as it is and as features."""
    return run["data"].partition(",")[0]


def mean_and_error(runs: Sequence[Run], values: Sequence[float]) -> dict[str, float]:
    """Mean over networks, its standard error where networks of one data set are not independent, and their number."""
    if not values:
        return {"mean": NAN, "standard error": NAN, "networks": 0}
    mean, sums = statistics.fmean(values), defaultdict(float)
    for run, value in zip(runs, values, strict=True):
        sums[data_of(run)] += value - mean
    n = len(sums)
    error = (n / (n - 1) * sum(one**2 for one in sums.values())) ** 0.5 / len(values) if n > 1 else NAN
    return {"mean": mean, "standard error": error, "networks": len(values)}


def over(runs: Sequence[Run], value: Callable[[Run], float | None]) -> dict[str, float]:
    """Mean and error of what networks have; ``None`` where one has it not."""
    pairs = [(run, found) for run in runs if (found := value(run)) is not None]
    return mean_and_error([run for run, _ in pairs], [found for _, found in pairs])


def auroc(method: str, kind: str, what: str = "ood", minus: str | None = "TS") -> Callable[[Run], float | None]:
    """AUROC of a method at inputs of a kind, less that of another."""

    def value(run: Run) -> float | None:
        methods = run["methods"]
        if method not in methods or kind not in methods[method][what]:
            return None
        return methods[method][what][kind] - (methods[minus]["ood"][kind] if minus else 0.0)

    return value


def difference(method: str, against: str | None = None) -> Callable[[Run], float | None]:
    """NLL of a method less that of temperature scaling; of the default, less that of another."""

    def value(run: Run) -> float | None:
        one = run["methods"].get(method)
        return None if one is None else (one["against"][against] if against else one)["d"]

    return value


def counted(rows: Sequence[dict[str, float]], smallest: float, errors: float = 2) -> tuple[int, int]:
    """How many networks are better, and how many worse, by more than so many standard errors over rows."""
    bounds = [(row["d"], max(errors * row["standard error"], smallest)) for row in rows]
    return sum(d < -bound for d, bound in bounds), sum(d > bound for d, bound in bounds)


def summarize(runs: list[Run], smallest: float) -> dict[str, Any]:
    """Every method over networks."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(name for run in runs for name in run["methods"]):
        rows = [run["methods"][method] for run in runs if method in run["methods"]]
        better, worse = counted(rows, smallest)
        keys = ("nll", "ece", "brier", "accuracy", "coverage", "set size", "evaluations")
        found[method] = {
            "networks": len(rows),
            "d": over(runs, difference(method)),
            "median": statistics.median(row["d"] for row in rows),
            "better": better,
            "worse": worse,
            "much worse": counted(rows, smallest, 4)[1],
            **{key: statistics.fmean(row[key] for row in rows) for key in keys},
            "auroc": {kind: over(runs, auroc(method, kind, minus=None)) for kind in KINDS},
            "ood": {kind: over(runs, auroc(method, kind)) for kind in KINDS},
        }
    found["ood_score of the default"] = {
        "networks": len(runs),
        "auroc": {kind: over(runs, auroc("default", kind, "score", None)) for kind in KINDS},
        "ood": {kind: over(runs, auroc("default", kind, "score")) for kind in KINDS},
    }
    return found


def usual(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Networks that have a best temperature, and those where it is at an end of its range."""
    apart = [run for run in runs if run["methods"]["TS"]["at an end"]]
    return [run for run in runs if not run["methods"]["TS"]["at an end"]], apart


def is_frozen(run: Run) -> bool:
    """Whether the network is a new head on features of a pretrained one."""
    return run["architecture"].startswith("frozen")


def bars(runs: list[Run], summary: dict[str, Any], config: dict[str, float]) -> list[dict[str, Any]]:
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
    gap = over([run for run in runs if is_frozen(run)], difference("default", "retrained head, T"))
    enough = gap["mean"] < -2 * gap["standard error"]
    found.append(("frozen features: NLL minus that of the retrained head", "< −2 standard errors", signed(gap), enough))
    gap = over(runs, difference("default", "ensemble, T"))
    enough = gap["mean"] <= 2 * gap["standard error"]
    found.append(("NLL minus that of the ensemble", "≤ 2 standard errors", signed(gap), enough))
    for kind in ("near", "far"):
        gap = over(runs, auroc("default", kind, minus="ensemble, T"))
        enough = gap["mean"] >= -2 * gap["standard error"]
        found.append((f"AUROC, {kind}, minus that of the ensemble", "≥ −2 standard errors", signed(gap), enough))
    alone, theirs = (max(run["methods"][name]["evaluations"] for run in runs) for name in ("default", "ensemble, T"))
    shown = f"{alone:.2f} of {theirs:.2f}"
    found.append(("network evaluations per predicted row", "≤ ⅓ of the ensemble's", shown, 3 * alone <= theirs))
    costs = [run["methods"]["default"]["cost"] for run in runs]
    passes = max(cost[f"`tune`: passes of the {name} loader"] for cost in costs for name in ("training", "validation"))
    found.append(("passes of `tune` over a loader, at most", "≤ 2", str(passes), passes <= 2))
    return [dict(zip(("what", "bar", "measured", "kept"), row, strict=True)) for row in found]


# -- tables ------------------------------------------------------------------------------------------------------------


def signed(value: dict[str, float], digits: int = 4) -> str:
    """Mean ± standard error; no-break spaces keep them on one line."""
    if not value["networks"]:
        return ""
    return f"{value['mean']:+.{digits}f}\u00a0±\u00a0{value['standard error']:.{digits}f}"


def losses(summary: dict[str, Any]) -> str:
    """A row for each method: what its probabilities are worth."""
    lines = []
    for method, one in summary.items():
        if "d" in one:
            told = [f"{one['nll']:.4f}", signed(one["d"]), f"{one['median']:+.4f}", f"{one['better']}/{one['worse']}"]
            figures = [f"{one[key]:.4f}" for key in ("ece", "brier", "accuracy", "coverage")]
            lines.append(
                [method, one["networks"], *told, *figures, f"{one['set size']:.2f}", f"{one['evaluations']:.0f}"]
            )
    columns = [
        "networks",
        "NLL",
        "d",
        "median d",
        "better/worse",
        "ECE",
        "Brier",
        "accuracy",
        "coverage",
        "classes",
        "passes",
    ]
    return markdown(["", *columns], lines)


def foreign(summary: dict[str, Any]) -> str:
    """A row for each method: how well it knows what is foreign."""
    lines = []
    for method, one in summary.items():
        each = [[f"{one['auroc'][kind]['mean']:.3f}", signed(one["ood"][kind], 3)] for kind in KINDS]
        lines.append([method, *(cell for pair in each for cell in pair)])
    return markdown(["AUROC", *(name for kind in KINDS for name in (kind, f"Δ {kind}"))], lines)


def groups(runs: list[Run], smallest: float) -> str:
    """The default recipe over networks that have something in common."""
    kinds: list[tuple[str, Callable[[Run], Any]]] = [
        ("", lambda _: "all"),
        ("", lambda run: "frozen features" if is_frozen(run) else "trained"),
        ("", lambda run: run["architecture"]),
        ("labels: ", lambda run: "noisy" if run["noise"] else "clean"),
        ("wrong labels: ", lambda run: f"{100 * run['noise']:.0f} %"),
        ("weight decay: ", lambda run: f"{run['weight decay']:g}"),
        ("training: ", lambda run: run["training"]),
    ]
    lines = []
    for prefix, of in kinds:
        for value in sorted({of(run) for run in runs}):
            some = [run for run in runs if of(run) == value]
            rows = [run["methods"]["default"] for run in some]
            better, worse = counted(rows, smallest)
            told = [signed(over(some, difference("default"))), f"{statistics.median(row['d'] for row in rows):+.4f}"]
            against = [
                f"{signed(over(some, difference('default', name)))} ({'/'.join(map(str, wins))})"
                for name in ("retrained head, T", "ensemble, T")
                for wins in [counted([row["against"][name] for row in rows], smallest)]
            ]
            gains = [signed(over(some, auroc("default", kind)), 3) for kind in KINDS]
            lines.append([prefix + value, len(some), *told, f"{better}/{worse}", *against, *gains])
    columns = ["networks", "d", "median d", "better/worse", "minus retrained head", "minus ensemble"]
    return markdown(["default recipe", *columns, *(f"Δ {kind}" for kind in KINDS)], lines)


def costs(runs: list[Run]) -> str:
    """What the default recipe takes, as ranges over networks."""
    rows = [run["methods"]["default"]["cost"] for run in runs]
    lines = []
    for name in rows[0]:
        values = sorted(row[name] for row in rows)
        lines.append([name, *(f"{value:.2f}" for value in (values[0], statistics.median(values), values[-1]))])
    return markdown(["default recipe", "least", "median", "most"], lines)


def each(runs: list[Run], smallest: float) -> str:
    """A row for each network, over its seeds."""
    keys = ("data", "architecture", "noise", "training", "weight decay")
    found: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        found[tuple(run[key] for key in keys)].append(run)
    lines = []
    for (data, architecture, noise, training, decay), some in found.items():
        about = [data, f"{architecture}, {training}, {decay:g}", f"{100 * noise:.0f} %"]
        names = ("MAP", "TS", "retrained head, T", "ensemble, T", "default")
        nll = [f"{statistics.fmean(run['methods'][name]['nll'] for run in some):.3f}" for name in names]
        rows = [run["methods"]["default"] for run in some]
        d = f"{statistics.fmean(row['d'] for row in rows):+.4f}"
        ends = sum(run["methods"]["TS"]["at an end"] for run in some)
        wins = "/".join(map(str, counted(rows, smallest))) + (f" ({ends} at an end)" if ends else "")
        lines.append([*about, *nll, d, wins])
        for kind in KINDS:
            values = [auroc("TS", kind, minus=None), auroc("default", kind, minus=None)]
            values = [over(some, value) for value in (*values, auroc("default", kind, "score", None))]
            lines[-1].append(" ".join(f"{value['mean']:.3f}" for value in values if value["networks"]))
    names = ["MAP", "TS", "retrained head", "ensemble", "default", "d", "better/worse"]
    return markdown(["", "network", "wrong", *names, *(f"{kind}: TS, p, score" for kind in KINDS)], lines)


def text(runs: list[Run], config: dict[str, Any], kept: list[dict[str, Any]]) -> str:
    """Everything that a page shows."""
    smallest, (some, apart) = config["smallest_difference"], usual(runs)
    lines = [[row["what"], row["bar"], row["measured"], "kept" if row["kept"] else "**missed**"] for row in kept]
    counts = f"{len(some)} networks of {len({data_of(run) for run in some})} data sets"
    clean = sum(not run["noise"] for run in some)
    about = f"{counts}, {clean} with clean labels; of {len(apart)} others the temperature is at an end of its range."
    summary = summarize(some, smallest)
    parts = [about, losses(summary), foreign(summary), markdown(["default recipe", "bar", "measured", ""], lines)]
    parts += [groups(some, smallest), costs(some)]
    if apart:
        parts += ["Networks whose temperature is at an end of its range:", losses(summarize(apart, smallest))]
    detail = f'<details markdown="1"><summary>Every network</summary>\n\n{each(runs, smallest)}\n\n</details>'
    return "\n\n".join([*parts, detail])
