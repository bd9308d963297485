"""Whether tests notice faults: small changes of the code, one at a time, and the tests of their room.

    python benchmarks/mutants.py --count 300 --jobs 2 --output mutants.json

Draws mutants of `laplace/structures`, `laplace/likelihoods` and `laplace/predictive` with a fixed seed (another
operator, comparison or number, a dropped term or sign, another axis), runs those of `tests/<room>` that execute the
changed statement until one fails, the quickest first, and lists the mutants that no test noticed. Which tests execute
a statement is watched once, in a run in which all must pass; a statement that none executes is a survivor at once. A
test that failed with a mutant is run once more without any: if it fails by itself, it has noticed nothing.

The tests of a room are collected once. Each mutant is a fork of that process in which the changed function gets its
new code; what is executed while modules are imported is instead imported again, from a copy of the checkout, which
itself stays as it is. A `reason` that somebody wrote beside a survivor in the output file is kept when it is written
again. After tests were added, `--again` tries the survivors of that file alone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import inspect
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.machinery import SourceFileLoader
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import pytest
from mutations import Mutant, mutants_of

ROOT = Path(__file__).parents[1]
ROOMS = ("structures", "likelihoods", "predictive")
SHARED = ("torch", "torch.func", "torch.nn.attention", "numpy", "beartype")
"""What all forks share once it is imported: nothing of the library, of its tests, or that pytest rewrites."""
FORKING = multiprocessing.get_context("fork")
PATIENCE = 60, 10
"""A mutant hangs, and is noticed, after so many seconds and so many times what its tests take without it."""
IMPORTED, NO_END, NO_START = ["imported"], ["no end, or a crash"], "no import, or other tests"
"""In the place of tests that failed: the mutant has to be imported; the process did not end as it should, or could not
collect the tests as it can without the mutant."""


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


def in_a_fork(function: Callable[..., None], *arguments: Any, seconds: float | None = None) -> Any:
    """What a function sends; ``None`` where its process dies, or has not ended after so many seconds.

    Parameters
    ----------
    function, *arguments, seconds
        What to call, with a pipe before its arguments, and for how long.
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


class Room(NamedTuple):
    """Its tests without a mutant: which fail, how long each takes, and which execute a line of a file."""

    failed: list[str]
    seconds: dict[str, float]
    tests: dict[tuple[str, int], list[str]]

    def executing(self, mutant: Mutant) -> list[str]:
        """The tests of a changed statement, the quickest first; "" first of all where an import executes it.

        Parameters
        ----------
        mutant
            In this room.
        """
        lines = statement(ROOT / mutant.path, mutant.line)
        found = {test for line in lines for test in self.tests.get((mutant.path, line), [])}
        return sorted({"", *self.seconds} if "" in found else found, key=lambda test: self.seconds.get(test, -1.0))

    def patience(self, tests: list[str]) -> float:
        """Seconds after which tests hang."""
        return PATIENCE[0] + PATIENCE[1] * sum(self.seconds.get(test, 0.0) for test in tests)


class Tests:
    """A plugin of pytest that runs chosen tests, or gives the collected ones to a function; notes what they do."""

    def __init__(self, chosen: Sequence[str] = (), *, stop: bool = False, serve: Callable[[Tests], None] | None = None):
        self.chosen, self.stop, self.serve = chosen, stop, serve
        self.items: dict[str, pytest.Item] = {}
        self.failed: list[str] = []
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, set[tuple[str, int]]] = {"": set()}
        """By test; of none: what is executed while modules are imported and tests are made."""
        self.now = self.lines[""]

    def start(self, tree: Path, *files: str) -> None:
        """In this process, which is a fork, and silently; pytest failing otherwise than by a test counts as one."""
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        status = pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *files], plugins=[self])
        if status in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
            self.failed.append(NO_START)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        if session.testsfailed or not set(self.chosen) <= set(self.items):
            self.failed.append(NO_START)
        elif self.serve is not None:
            self.serve(self)
        else:
            self.run(self.chosen)
        return True

    def run(self, tests: Sequence[str]) -> None:
        """Some of the collected tests."""
        items = [self.items[test] for test in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            started, self.now = time.perf_counter(), self.lines.setdefault(item.nodeid, set())
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self.seconds[item.nodeid] = time.perf_counter() - started
            if self.stop and self.failed:
                return

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def trace(self, folder: str, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        """For `sys.settrace`: lines of a folder."""
        name, lines = frame.f_code.co_filename, self.now
        if not name.startswith(folder):
            return None

        def line(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
            lines.add((name, frame.f_lineno))
            return line

        return line


def functions_in(code: CodeType) -> Iterator[CodeType]:
    """Functions of a module and of its classes."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and inner.co_flags & inspect.CO_OPTIMIZED:
            yield inner
        elif isinstance(inner, CodeType):
            yield from functions_in(inner)


def changed(mutant: Mutant, tree: Path, known: list[FunctionType]) -> bool:
    """Give the function that a mutant changes its new code; whether that was possible.

    Parameters
    ----------
    mutant, tree, known
        What, in which copy, and all functions that exist.
    """
    path, name = tree / mutant.path, ".".join(Path(mutant.path).with_suffix("").parts).removesuffix(".__init__")
    source, loader = path.read_bytes(), sys.modules[name].__loader__
    assert isinstance(loader, SourceFileLoader)
    versions = (loader.source_to_code(text, str(path)) for text in (source, mutant.applied(source)))
    before, after = (list(functions_in(code)) for code in versions)
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    if len(pairs) != 1 or pairs[0][0].co_freevars != pairs[0][1].co_freevars:
        return False
    old, new = pairs[0]
    found = [function for function in known if function.__code__ == old and function.__code__.co_filename == str(path)]
    for function in found:
        function.__code__ = new
    return bool(found)


def watched(pipe: Connection, tests: Tests, tree: Path, room: str) -> None:
    """In a fork: run all tests; sends a Room."""
    by_line: dict[tuple[str, int], list[str]] = {}
    sys.settrace(partial(tests.trace, str(tree / "laplace" / room)))
    tests.run(list(tests.items))
    sys.settrace(None)
    for test, lines in tests.lines.items():
        for name, line in lines:
            by_line.setdefault((str(Path(name).relative_to(tree)), line), []).append(test)
    pipe.send(Room(tests.failed, tests.seconds, by_line))


def with_code(
    pipe: Connection, tests: Tests, tree: Path, known: list[FunctionType], mutant: Mutant, some: list[str]
) -> None:
    """In a fork of the collected tests: a mutant as new code; sends what failed, nothing if it has to be imported."""
    tests.stop = True
    possible = changed(mutant, tree, known)
    if possible:
        tests.run(some)
    pipe.send(tests.failed if possible else IMPORTED)


def with_file(pipe: Connection, tree: Path, some: list[str], mutant: Mutant | None) -> None:
    """In a fork: tests, with a mutant as a changed file until one fails; sends what failed."""
    if mutant is not None:
        sys.dont_write_bytecode, path = True, tree / mutant.path
        path.write_bytes(mutant.applied(path.read_bytes()))
        os.utime(path, (0, 0))  # of which time no compiled file is
    tests = Tests(some, stop=mutant is not None)
    tests.start(tree, *sorted({test.partition("::")[0] for test in some}))
    pipe.send(tests.failed)


def collected(pipe: Connection, tree: Path, room: str, mutants: list[Mutant], jobs: int) -> None:
    """In a fork: collect the tests of a room once; sends the Room, then what they say of each mutant."""

    def serve(tests: Tests) -> None:
        sys.settrace(None)
        found: Room = in_a_fork(watched, tests, tree, room)
        pipe.send(found)
        functions = [thing for thing in gc.get_objects() if type(thing) is FunctionType]
        gc.freeze()  # what is collected anew in each fork is less

        def outcome(mutant: Mutant, _: int) -> list[str]:
            some = found.executing(mutant)
            if not some or "" in some:
                return IMPORTED if some else []
            return in_a_fork(with_code, tests, tree, functions, mutant, some, seconds=found.patience(some))

        if not found.failed:
            for_each(pipe, mutants, jobs, outcome)

    tests = Tests(serve=serve)
    sys.settrace(partial(tests.trace, str(tree / "laplace" / room)))
    tests.start(tree, f"tests/{room}")


def imported(pipe: Connection, trees: list[Path], mutants: list[Mutant], rooms: dict[str, Room]) -> None:
    """In a fork: sends what tests say of each mutant that has to be imported."""

    def outcome(mutant: Mutant, job: int) -> list[str]:
        room, path = rooms[mutant.room], trees[job] / mutant.path
        some = [test for test in room.executing(mutant) if test]
        try:
            return in_a_fork(with_file, trees[job], some, mutant, seconds=room.patience(some))
        finally:
            shutil.copy2(ROOT / mutant.path, path)

    for_each(pipe, mutants, len(trees), outcome)


def for_each(pipe: Connection, mutants: list[Mutant], jobs: int, outcome: Callable[[Mutant, int], Any]) -> None:
    """Send each mutant with its outcome, from so many forks.

    Parameters
    ----------
    pipe, mutants, jobs, outcome
        Where, what, how many; from a mutant and the number of a fork to the tests that fail.
    """

    def work(job: int) -> None:
        for mutant in mutants[job::jobs]:
            failed = outcome(mutant, job)
            pipe.send((mutant, NO_END if failed is None else failed))

    running = [FORKING.Process(target=work, args=(job,)) for job in range(jobs)]
    for process in running:
        process.start()
    for process in running:
        process.join()


def messages(function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """All that a function sends from a fork.

    Parameters
    ----------
    function, *arguments
        What to call, with a pipe before its arguments.
    """
    here, there = FORKING.Pipe(duplex=False)
    process = FORKING.Process(target=function, args=(there, *arguments))
    process.start()
    there.close()
    with contextlib.suppress(EOFError):
        while True:
            yield here.recv()
    process.join()


def main() -> int:
    """Print survivors, and the share that was noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    started, chosen = time.monotonic(), drawn(arguments.count, arguments.seed)
    known = reasons_in(arguments.output)
    if arguments.again and not known.keys() <= {mutant.change for mutant in chosen}:
        parser.error("--again is for an output file of the same count, seed and code.")
    if arguments.again and (arguments.output is None or not arguments.output.exists()):
        parser.error("--again is for what is in an output file: run it without first.")
    tried = [mutant for mutant in chosen if not arguments.again or mutant.change in known]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    for name in SHARED:
        importlib.import_module(name)
    rooms: dict[str, Room] = {}
    failed: dict[Mutant, list[str]] = {}

    def note(found: Iterator[tuple[Mutant, list[str]]]) -> None:
        for mutant, tests in found:
            failed[mutant] = tests
            result = "imported" if tests == IMPORTED else "noticed " if tests else "survived"
            change = f"{mutant.kind}: {mutant.before} -> {mutant.after}"
            print(result, f"{mutant.path}:{mutant.line}", change, *tests, sep="  ", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder, str(job)).resolve() for job in range(arguments.jobs)]
        for tree in trees:
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "site"))
        for room in ROOMS:
            here = [mutant for mutant in tried if mutant.room == room]
            if not here:
                continue
            found = messages(collected, trees[0], room, here, arguments.jobs)
            rooms[room] = next(found, Room([NO_START], {}, {}))
            if rooms[room].failed:
                print(f"The tests of {room} fail without any mutant, so nothing can be learned:", *rooms[room].failed)
                return 1
            note(found)
            if not set(here) <= set(failed):
                print(f"The process that collected the tests of {room} ended early: nothing was learned.")
                return 1
        rest = [mutant for mutant in tried if failed.get(mutant, IMPORTED) == IMPORTED]
        note(messages(imported, trees, rest, rooms))
        unreliable: set[str] = set()
        for room in ROOMS:
            tests = sorted({test for m in tried if m.room == room for test in failed[m]} - {*NO_END, NO_START})
            again = in_a_fork(with_file, trees[0], tests, None) if tests else []
            unreliable.update([*tests, NO_START] if again is None else again)
        if unreliable:
            print("Failed by themselves:", *sorted(unreliable))
    lost = {mutant for mutant in tried if not failed[mutant] or unreliable.intersection(failed[mutant])}
    return report(arguments, chosen, [mutant not in lost for mutant in chosen], time.monotonic() - started)


def reasons_in(output: Path | None) -> dict[tuple[str, ...], str]:
    """The reason of each survivor in an output file, "" where none was written.

    Parameters
    ----------
    output
        The file, if there is one.
    """
    rows = json.loads(output.read_text())["survivors"] if output is not None and output.exists() else []
    return {(row["path"], row["code"], row["kind"], row["before"], row["after"]): row.get("reason", "") for row in rows}


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
        reasons = reasons_in(output)
        rows = [{**m._asdict(), "code": m.code, "reason": reasons.get(m.change, "")} for m in survivors]
        figures = {
            "seed": arguments.seed,
            "count": len(chosen),
            "noticed": share,
            "with_reason": sum(bool(row["reason"]) for row in rows),
            "rooms": rooms,
            "survivors": rows,
        }
        output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
