"""Whether tests notice faults: small changes of the code, one at a time, and the tests of their room.

    python benchmarks/mutants.py --count 300 --jobs 2 --output mutants.json

Draws mutants of `laplace/structures`, `laplace/likelihoods` and `laplace/predictive` with a fixed seed (another
operator, comparison or number, a dropped term or sign, another axis), runs those of `tests/<room>` that execute the
changed statement until one fails, the quickest first, and lists the mutants that no test noticed. Which tests execute
a statement is watched once, in a run in which all must pass; a statement that none executes is a survivor at once. A
test that failed with a mutant is run once more without any: if it fails by itself, it has noticed nothing.

PyTorch is imported once, each mutant is a fork of that process, and every job works in a copy of the checkout, which
stays as it is. A `reason` that somebody wrote beside a survivor in the output file is kept when it is written again.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("structures", "likelihoods", "predictive")
OPERATORS: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*"}
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
}  # fmt: skip
TRANSPOSED = {"T", "mT"}
SHARED = ("torch", "torch.func", "torch.nn.attention", "numpy", "beartype")
"""What all forks share once it is imported: nothing of the library, of its tests, or that pytest rewrites."""
FORKING = multiprocessing.get_context("fork")
PATIENCE = 60, 10
"""A mutant hangs, and is noticed, after so many seconds and so many times what its tests take without it."""


class Mutant(NamedTuple):
    """One change: file, line, which kind, and the text before and after."""

    path: str
    line: int
    kind: str
    start: int
    stop: int
    before: str
    after: str

    @property
    def room(self) -> str:
        """The room that it is in."""
        return Path(self.path).parts[1]


def mutants_of(path: Path) -> Iterator[Mutant]:
    """All mutants of a file.

    Parameters
    ----------
    path
        Of the file.
    """
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.expr) -> str:
        return source[slice(*span(node))].decode()

    for node in executed(ast.parse(source)):
        for kind, after in changes(node, text):
            start, stop = span(node)
            name = str(path.relative_to(ROOT))
            yield Mutant(name, node.lineno, kind, start, stop, text(node), f"({after})")


def executed(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions that compute something: no annotations, texts, errors or checks of types.

    Parameters
    ----------
    tree
        Where.
    """
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Raise, ast.JoinedStr, ast.Assert)):
                continue
            if isinstance(child, ast.Assign) and getattr(child.targets[0], "id", "") in ("msg", "__all__"):
                continue
            if isinstance(child, ast.expr):
                yield child
            yield from executed(child)


def changes(node: ast.expr, text: Callable[[ast.expr], str]) -> Iterator[tuple[str, str]]:
    """What an expression may become.

    Parameters
    ----------
    node
        The expression.
    text
        From an expression to its source.
    """
    if isinstance(node, ast.BinOp):
        # Of types and texts, sums are no arithmetic.
        if any(isinstance(side, (ast.List, ast.Tuple, ast.JoinedStr)) for side in (node.left, node.right)):
            return
        if other := OPERATORS.get(type(node.op)):
            yield "operator", f"({text(node.left)}) {other} ({text(node.right)})"
        if isinstance(node.op, (ast.Add, ast.Sub)):
            yield "dropped term", text(node.left)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        kind = "axis" if isinstance(node.operand, ast.Constant) and node.operand.value in (1, 2) else "sign"
        yield kind, "-3" if kind == "axis" else text(node.operand)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield "comparison", f"{text(node.left)} {COMPARISONS[type(node.ops[0])]} {text(node.comparators[0])}"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        yield "constant", repr(node.value + 1)
    elif isinstance(node, ast.Attribute) and node.attr in TRANSPOSED:
        yield "axis", text(node.value)


def drawn(count: int, seed: int) -> list[Mutant]:
    """As many mutants, equally many of each room, in random order.

    Parameters
    ----------
    count, seed
        How many, and which.
    """
    draw, found = random.Random(seed), []
    for index, room in enumerate(ROOMS):
        every = [m for path in sorted((ROOT / "laplace" / room).glob("*.py")) for m in mutants_of(path)]
        n = count * (index + 1) // len(ROOMS) - count * index // len(ROOMS)
        found += draw.sample(every, min(n, len(every)))
    draw.shuffle(found)
    return found


def statement(path: Path, line: int) -> range:
    """The lines of the innermost statement at a line, less those of statements inside it.

    Parameters
    ----------
    path, line
        Where.
    """
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.stmt)]
    node = max((n for n in nodes if n.lineno <= line <= (n.end_lineno or 0)), key=lambda node: node.lineno)
    body = getattr(node, "body", [])
    return range(node.lineno, max(node.lineno + 1, body[0].lineno) if body else (node.end_lineno or 0) + 1)


class Tests:
    """A plugin of pytest: runs chosen tests in their order, and notes what fails, its time, and lines of a folder."""

    def __init__(self, chosen: Sequence[str] | None = None, folder: Path | None = None):
        self.chosen, self.folder = chosen, str(folder)
        self.failed: list[str] = []
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, set[tuple[str, int]]] = {"": set()}
        """By test; of none: what is executed while modules are imported and tests are made."""
        self.now = self.lines[""]

    def run(self, tree: Path, files: Sequence[str], *options: str) -> None:
        """In this process, which is a fork, and silently; pytest failing otherwise than by a test counts as one."""
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        status = pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *options, *files], plugins=[self])
        sys.settrace(None)
        if status != pytest.ExitCode.OK and not self.failed:
            self.failed.append("")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.chosen is not None:
            place = {test: index for index, test in enumerate(self.chosen)}
            items[:] = sorted((i for i in items if i.nodeid in place), key=lambda item: place[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        started, self.now = time.perf_counter(), self.lines.setdefault(item.nodeid, set())
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.perf_counter() - started

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def trace(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        """For `sys.settrace`."""
        name, lines = frame.f_code.co_filename, self.now
        if not name.startswith(self.folder):
            return None

        def line(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
            lines.add((name, frame.f_lineno))
            return line

        return line


class Room(NamedTuple):
    """Its tests without a mutant: how long each takes, and which execute a line of a file."""

    failed: list[str]
    seconds: dict[str, float]
    tests: dict[tuple[str, int], list[str]]

    def executing(self, mutant: Mutant) -> list[str]:
        """The tests of a changed statement, the quickest first; all of them where it is executed by an import.

        Parameters
        ----------
        mutant
            In this room.
        """
        lines = statement(ROOT / mutant.path, mutant.line)
        found = {test for line in lines for test in self.tests.get((mutant.path, line), [])}
        return sorted(self.seconds if "" in found else found, key=self.seconds.__getitem__)


def watched(pipe: Connection, tree: Path, room: str) -> None:
    """In a fork: all tests of a room; sends a Room."""
    tests, by_line = Tests(folder=tree / "laplace" / room), {}
    sys.settrace(tests.trace)
    tests.run(tree, [f"tests/{room}"])
    for test, lines in tests.lines.items():
        for name, line in lines:
            by_line.setdefault((str(Path(name).relative_to(tree)), line), []).append(test)
    pipe.send(Room(tests.failed, tests.seconds, by_line))


def tried(pipe: Connection, tree: Path, chosen: Sequence[str], mutant: Mutant | None) -> None:
    """In a fork: tests, with a mutant until one fails; sends those that failed."""
    tests, options = Tests(chosen), []
    if mutant is not None:
        path, options, sys.dont_write_bytecode = tree / mutant.path, ["-x"], True
        source = path.read_bytes()
        path.write_bytes(source[: mutant.start] + mutant.after.encode() + source[mutant.stop :])
        os.utime(path, (0, 0))  # of which time no compiled file is
    tests.run(tree, sorted({test.partition("::")[0] for test in chosen}), *options)
    pipe.send(tests.failed)


def in_a_fork(function: Callable[..., None], *arguments: Any, seconds: float | None = None) -> Any:
    """What a function sends; ``None`` where its process dies, or has not ended after so many seconds.

    Parameters
    ----------
    function, *arguments, seconds
        What to call, and for how long.
    """
    here, there = FORKING.Pipe(duplex=False)
    process = FORKING.Process(target=function, args=(there, *arguments))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


TREE: Path
"""The copy of this job."""


def begin(trees: Any) -> None:
    """Take a copy; in each job."""
    global TREE  # noqa: PLW0603 - one for each job
    TREE = trees.get()


def watch(room: str) -> Room | None:
    """What its tests do without a mutant."""
    return in_a_fork(watched, TREE, room)


def alone(tests: list[str]) -> list[str]:
    """Which of these fail without a mutant."""
    return in_a_fork(tried, TREE, tests, None) if tests else []


def noticed(mutant: Mutant, chosen: list[str], seconds: float) -> list[str]:
    """The test that fails with a mutant, or "" where their process does not end as it should; none if it survives.

    Parameters
    ----------
    mutant, chosen, seconds
        What, the tests, and how long they take without it.
    """
    original, failed = TREE / mutant.path, []
    if chosen:
        try:
            limit = PATIENCE[0] + PATIENCE[1] * seconds
            failed = in_a_fork(tried, TREE, chosen, mutant, seconds=limit)
        finally:
            shutil.copy2(ROOT / mutant.path, original)
    failed = [""] if failed is None else failed
    where = f"{mutant.path}:{mutant.line}"
    print("noticed " if failed else "survived", where, mutant.kind, "by", *failed, f"of {len(chosen)}", flush=True)
    return failed


def main() -> int:
    """Print survivors, and the share that was noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    started, chosen = time.monotonic(), drawn(arguments.count, arguments.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    for name in SHARED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        trees = FORKING.Queue()
        for job in range(arguments.jobs):
            tree = Path(folder, str(job)).resolve()
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "site"))
            trees.put(tree)
        with ProcessPoolExecutor(arguments.jobs, FORKING, begin, (trees,)) as pool:
            rooms = dict(zip(ROOMS, pool.map(watch, ROOMS), strict=True))
            if any(room is None or room.failed or not room.tests for room in rooms.values()):
                print("The tests fail without any mutant: nothing can be learned.", rooms)
                return 1
            tests = [rooms[mutant.room].executing(mutant) for mutant in chosen]
            times = [sum(rooms[m.room].seconds[t] for t in some) for m, some in zip(chosen, tests, strict=True)]
            failed = list(pool.map(noticed, chosen, tests, times))
            suspects = [
                [t for t in sorted({t for some in failed for t in some}) if t.startswith(f"tests/{r}/")] for r in ROOMS
            ]
            unreliable = {test for found in pool.map(alone, suspects) for test in found}
    results = [bool(some) and not unreliable.intersection(some) for some in failed]
    return report(arguments, chosen, results, time.monotonic() - started)


def report(arguments: argparse.Namespace, chosen: list[Mutant], results: list[bool], seconds: float) -> int:
    """Print and write what was found.

    Parameters
    ----------
    arguments, chosen, results, seconds
        Of the command, the mutants, whether each was noticed, and after how long.
    """
    rooms = {}
    for room in ROOMS:
        here = [seen for mutant, seen in zip(chosen, results, strict=True) if mutant.room == room]
        rooms[room] = {"noticed": sum(here), "of": len(here)}
        print(f"{room:12} {sum(here):4} of {len(here):4} noticed")
    survivors = sorted(mutant for mutant, seen in zip(chosen, results, strict=True) if not seen)
    for mutant in survivors:
        print(f"survived  {mutant.path}:{mutant.line}  {mutant.kind}: {mutant.before}  ->  {mutant.after}")
    share = sum(results) / len(results)
    print(f"{sum(results)} of {len(results)} noticed, {share:.1%}, in {seconds / 60:.0f} minutes")
    output = arguments.output
    if output:
        same = ("path", "kind", "before", "after")
        before = json.loads(output.read_text())["survivors"] if output.exists() else []
        reasons = {tuple(one[name] for name in same): one.get("reason", "") for one in before}
        rows = [
            {**mutant._asdict(), "reason": reasons.get(tuple(getattr(mutant, name) for name in same), "")}
            for mutant in survivors
        ]
        figures = {"seed": arguments.seed, "count": len(chosen), "noticed": share, "rooms": rooms, "survivors": rows}
        output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
