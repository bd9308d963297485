"""Whether tests notice faults: small changes of the code, one at a time, and the tests of their room.

    python benchmarks/mutants.py --count 300 --jobs 2 --output mutants.json

Draws mutants of `laplace/structures`, `laplace/likelihoods` and `laplace/predictive` with a fixed seed (another
operator, comparison or number, a dropped term or sign, another axis), runs `tests/<room>` with each until a test fails,
and lists those that no test noticed. Every job works in a copy of its own; the checkout stays as it is.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ROOMS = ("structures", "likelihoods", "predictive")
OPERATORS: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.Pow: "*"}
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
}  # fmt: skip
TRANSPOSED = {"T", "mT"}
TIMEOUT = 600
"""Seconds after which a mutant that hangs counts as noticed."""


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


def noticed(mutant: Mutant | None, tree: Path, rooms: tuple[str, ...] = ()) -> bool:
    """Whether the tests of its room fail; without a mutant those of rooms.

    Parameters
    ----------
    mutant, tree, rooms
        What, and in which copy of the checkout.
    """
    tests = [f"tests/{room}" for room in (rooms if mutant is None else (mutant.room,))]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    path = None if mutant is None else tree / mutant.path
    original = b"" if path is None else path.read_bytes()
    try:
        if mutant is not None and path is not None:
            path.write_bytes(original[: mutant.start] + mutant.after.encode() + original[mutant.stop :])
        done = subprocess.run(command, check=False, cwd=tree, env=environment, capture_output=True, timeout=TIMEOUT)
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        if path is not None:
            path.write_bytes(original)


def main() -> int:
    """Print survivors, and the share that was noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    started, chosen = time.monotonic(), drawn(arguments.count, arguments.seed)
    trees: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as folder:
        for job in range(arguments.jobs):
            tree = Path(folder, str(job))
            ignored = shutil.ignore_patterns(".*", "__pycache__", "site")
            shutil.copytree(ROOT, tree, ignore=ignored)
            trees.put(tree)
        tree = trees.get()
        if noticed(None, tree, ROOMS):
            print("The tests fail without any mutant: nothing can be learned.")
            return 1
        trees.put(tree)

        def run(mutant: Mutant) -> bool:
            tree = trees.get()
            try:
                seen = noticed(mutant, tree)
                print("noticed " if seen else "survived", f"{mutant.path}:{mutant.line}", mutant.kind, flush=True)
                return seen
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            results = list(pool.map(run, chosen))
    for room in ROOMS:
        here = [seen for mutant, seen in zip(chosen, results, strict=True) if mutant.room == room]
        print(f"{room:12} {sum(here):4} of {len(here):4} noticed")
    survivors = [mutant for mutant, seen in zip(chosen, results, strict=True) if not seen]
    for mutant in sorted(survivors):
        print(f"survived  {mutant.path}:{mutant.line}  {mutant.kind}: {mutant.before}  ->  {mutant.after}")
    share = sum(results) / len(results)
    print(f"{sum(results)} of {len(results)} noticed, {share:.1%}, in {(time.monotonic() - started) / 60:.0f} minutes")
    if arguments.output:
        figures = {"seed": arguments.seed, "noticed": share, "survivors": [mutant._asdict() for mutant in survivors]}
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
