"""Tables of what the back ends can do, from their declarations.

    python docs/extensions/capabilities.py [--check]

Writes ``benchmarks/results/capabilities.md``, which the page on back ends includes, and prints it; ``--check`` only
compares, and fails where the file is not what the declarations say.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from laplace.curvature import BACKENDS, AsdlInterface, BackPackInterface, CurvlinopsInterface, GGNInterface
from laplace.curvature.package import PackageInterface
from laplace.enums import HessianStructure, SubsetOfWeights

if TYPE_CHECKING:
    from laplace.curvature import CurvatureInterface

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "capabilities.md"
STRUCTURES = (
    HessianStructure.FULL,
    HessianStructure.DIAG,
    HessianStructure.KRON,
    HessianStructure.BLOCKDIAG,
    HessianStructure.EKFAC,
    HessianStructure.LOWRANK,
)
OF_PACKAGES = STRUCTURES[:3]
"""Those that packages compute."""
PACKAGES: tuple[type[PackageInterface], ...] = (BackPackInterface, AsdlInterface, CurvlinopsInterface)
COLUMNS = (
    "`backend=`",
    "matrix",
    "all weights",
    "last layer",
    "subnetwork",
    "likelihoods",
    "positions",
    "`stochastic`",
    "`columns`",
    "`asdl_fisher_kwargs`",
    "extra",
)


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def yes(value: bool) -> str:
    """A cell that says yes or nothing much."""
    return "yes" if value else "–"


def structures(backend: type[CurvatureInterface], subset: SubsetOfWeights) -> str:
    """What a back end provides for a choice of weights."""
    return ", ".join(s.value for s in STRUCTURES if backend.can(s, subset)) or "–"


def row(backend: type[CurvatureInterface]) -> list[str]:
    """What a back end declares."""
    return [
        f"`{backend.__name__}`",
        backend.matrix,
        structures(backend, SubsetOfWeights.ALL),
        structures(backend, SubsetOfWeights.LAST_LAYER),
        structures(backend, SubsetOfWeights.SUBNETWORK),
        ", ".join(sorted(likelihood.value for likelihood in backend.likelihoods)),
        yes(backend.takes_positions),
        yes(issubclass(backend, GGNInterface)),
        yes(backend.takes_columns),
        yes(backend.accepts_fisher_kwargs),
        f"`{backend.extra}`" if issubclass(backend, PackageInterface) else "–",
    ]


def layers(package: type[PackageInterface], structure: HessianStructure | None) -> str:
    """The layers whose weights a package knows."""
    known = package.known_layers(structure)
    return "any" if known is None else ", ".join(f"`{cls.__name__}`" for cls in sorted(known, key=lambda c: c.__name__))


def text() -> str:
    """Both tables."""
    uses = {"predictions": None, **{structure.value: structure for structure in OF_PACKAGES}}
    known: list[list[str]] = []
    for package in PACKAGES:
        groups: dict[str, list[str]] = {}
        for use, structure in uses.items():
            groups.setdefault(layers(package, structure), []).append(use)
        known += [[f"`{package.package}`", ", ".join(group), names] for names, group in groups.items()]
    return f"""{table(COLUMNS, [row(backend) for backend in BACKENDS])}

Layers whose weights may be random, with all weights (those of a last layer are always taken):

{table(("package", "for", "layers"), known)}
"""


def main() -> None:
    """Write the file, or compare it."""
    if "--check" in sys.argv[1:]:
        sys.exit(0 if FILE.read_text(encoding="utf-8") == text() else f"{FILE.name} is not what the back ends declare")
    FILE.write_text(text(), encoding="utf-8")
    print(text())


if __name__ == "__main__":
    main()
