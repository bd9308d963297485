"""How much memory is free on a device, whoever limits it: the machine, a container, the process, or the GPU.

Nothing here knows about models. What is read are small files of Linux; where there are none, ``sysconf`` and, if it is
installed, ``psutil`` are asked.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from laplace.errors import OutOfMemoryError

try:
    import resource
except ImportError:  # Windows has no limits of this kind
    resource = None

CHUNK_ELEMENTS = 2**24
"""Largest temporary that chunked computations make, in numbers: 64 MB in float32."""
SHARE = 16
"""A chunk takes no more than the free memory divided by this: several are alive at a time."""
WIDEST = 8
"""Bytes of a number in float64."""
LOOKED_FOR = 0.5
"""Seconds for which free memory, once looked up, decides the size of chunks."""
ROOT = Path("/")


@dataclass(frozen=True, order=True)
class Memory:
    """Free memory, in bytes, and what limits it, in words."""

    free: int
    limit: str


def of_device(device: torch.device) -> Memory | None:
    """Memory that is free on a device; ``None`` where it is not known."""
    if device.type == "cuda":
        return _of_cuda(device)
    if device.type == "mps":
        recommended = getattr(torch.mps, "recommended_max_memory", None)
        return None if recommended is None else Memory(recommended() - torch.mps.current_allocated_memory(), "the GPU")
    return of_host() if device.type == "cpu" else None


def _of_cuda(device: torch.device) -> Memory:
    """What the driver calls free, and what PyTorch holds and does not use."""
    free = torch.cuda.mem_get_info(device)[0]
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Memory(free + cached, str(device))


def of_host(root: Path = ROOT, limits: Mapping[str, int] | None = None) -> Memory | None:
    """Memory of the machine that this process may take: the least that machine, containers and limits allow.

    Parameters
    ----------
    root
        Where the files of the system are.
    limits
        Limits of the process in bytes, by ``RLIMIT_AS`` and ``RLIMIT_DATA``; those of this process when ``None``.
    """
    return min((*_of_machine(root), *_of_groups(root), *_of_process(root, limits)), default=None)


# -- the machine ------------------------------------------------------------------------------------------------------


def _of_machine(root: Path) -> Iterator[Memory]:
    """What can be had without swapping."""
    told = _table(root / "proc/meminfo")
    name = "this machine"
    if "MemAvailable" in told:
        yield Memory(told["MemAvailable"] * 1024, name)
    elif "MemFree" in told:  # Linux before 3.14
        yield Memory((told["MemFree"] + told.get("Cached", 0)) * 1024, name)
    elif root == ROOT:
        pages = _pages()
        if pages is not None:
            yield Memory(pages, name)


def _pages() -> int | None:
    """Free memory where there is no ``/proc``: by ``psutil`` if it is there, else by ``sysconf`` where that says it."""
    with contextlib.suppress(ImportError):
        return int(importlib.import_module("psutil").virtual_memory().available)
    if {"SC_PAGE_SIZE", "SC_AVPHYS_PAGES"} <= set(getattr(os, "sysconf_names", ())):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return None


def _table(path: Path) -> dict[str, int]:
    """The numbers in lines such as ``MemFree:  1024 kB`` or ``inactive_file 1024``."""
    found: dict[str, int] = {}
    for line in _text(path).splitlines():
        name, *rest = line.split()
        if rest and rest[0].isdigit():
            found[name.rstrip(":")] = int(rest[0])
    return found


def _text(path: Path) -> str:
    """A file, or nothing where there is none or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in a file; ``None`` of ``max``, or without one."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


# -- containers -------------------------------------------------------------------------------------------------------

FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By the controller in ``/proc/self/cgroup`` (none: version 2): limit, use, and the entry of the cache in the use."""


def _of_groups(root: Path) -> Iterator[Memory]:
    """What the control groups of this process leave, and those above them."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        for controller in set(controllers.split(",")) & set(FILES):
            mount = root / "sys/fs/cgroup" / controller
            here = mount / path.strip("/")
            # In a container the files of its own group may be at the mount, whatever the path says.
            for group in (here, *here.parents) if here.exists() else (mount,):
                yield from _of_group(group, *FILES[controller])
                if group == mount:
                    break


def _of_group(group: Path, limit: str, use: str, cache: str) -> Iterator[Memory]:
    """What one control group leaves, if it limits memory; cached files are given up when there is need."""
    most, used = _number(group / limit), _number(group / use)
    if most is not None and used is not None and most < 2**60:
        free = most - used + min(used, _table(group / "memory.stat").get(cache, 0))
        yield Memory(max(0, free), "the memory limit of this container (cgroup)")


# -- the process ------------------------------------------------------------------------------------------------------

USED = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}
"""Limits of a process, and what its status calls the memory that counts."""


def limits_of_process() -> dict[str, int]:
    """Limits of this process, in bytes."""
    found: dict[str, int] = {}
    if resource is None:
        return found
    for name in USED:
        if hasattr(resource, name):
            soft = resource.getrlimit(getattr(resource, name))[0]
            if soft != resource.RLIM_INFINITY:
                found[name] = soft
    return found


def _of_process(root: Path, limits: Mapping[str, int] | None) -> Iterator[Memory]:
    """What limits of this process leave."""
    limits = limits_of_process() if limits is None else limits
    if limits:
        used = _table(root / "proc/self/status")
        for name, most in limits.items():
            free = max(0, most - used.get(USED[name], 0) * 1024)
            yield Memory(free, f"the memory limit of this process ({name})")


# -- what follows from it ---------------------------------------------------------------------------------------------

_LOOKED: dict[str, tuple[float, int]] = {}
"""Sizes of chunks by device, and when they were found."""


def chunk_elements(device: torch.device, most: int = CHUNK_ELEMENTS) -> int:
    """How many numbers a temporary may hold: ``most`` where memory is plenty, else a share of what is free."""
    if torch.compiler.is_compiling():
        return most
    key, now = str(device), time.monotonic()
    when, size = _LOOKED.get(key, (-LOOKED_FOR, 0))
    if now - when >= LOOKED_FOR:
        memory = of_device(device)
        size = CHUNK_ELEMENTS if memory is None else min(CHUNK_ELEMENTS, memory.free // (SHARE * WIDEST))
        _LOOKED[key] = now, size
    return max(1, min(most, size))


SMALL = 2**26
"""Bytes for which nobody asks how much is free: 64 MB."""


def require(needed: float, device: torch.device, what: str, advice: str | Callable[[], str]) -> None:
    """Raise if something cannot fit the memory that is free.

    Parameters
    ----------
    needed
        Bytes.
    device
        Where they would be.
    what
        What takes them, as the subject of a sentence.
    advice
        What takes less.

    Raises
    ------
    OutOfMemoryError
        If it cannot.
    """
    memory = of_device(device) if needed > SMALL else None
    if memory is not None and needed > memory.free:
        msg = (
            f"{what} takes about {amount(needed)}, and {amount(memory.free)} are free (limited by "
            f"{memory.limit}). {advice if isinstance(advice, str) else advice()}"
        )
        raise OutOfMemoryError(msg)


FAILED = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "bad_alloc")
"""What messages of a failed allocation hold."""


@contextmanager
def explained(what: str, advice: Callable[[], str]) -> Generator[None]:
    """Say of an allocation that fails in the body what it was for and what takes less, by an ``OutOfMemoryError``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not _is_allocation(error):
            raise
        msg = f"There is not enough memory for {what}: {str(error) or type(error).__name__} {advice()}"
        raise OutOfMemoryError(msg) from error


FOR_PREDICTIONS = (
    "Predict fewer rows at a time, or with variances alone (diagonal_output=True, link_approx='probit'); "
    "la.plan(loader) says what predictions take."
)
"""What takes less memory in predictions."""


def explained_predictions() -> AbstractContextManager[None]:
    """The same of predictions; nothing while they are compiled."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return explained("these predictions", lambda: FOR_PREDICTIONS)


def _is_allocation(error: BaseException) -> bool:
    """Whether an error is that of an allocator."""
    own = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return own or any(text in str(error) for text in FAILED)


def limited_by(device: torch.device) -> str:
    """What limits the memory of a device, for the end of a sentence."""
    memory = of_device(device)
    return "" if memory is None else f" (limited by {memory.limit})"


def amount(n_bytes: float) -> str:
    """Bytes, to read."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.0f} B"


__all__ = [
    "CHUNK_ELEMENTS",
    "FOR_PREDICTIONS",
    "Memory",
    "amount",
    "chunk_elements",
    "explained",
    "explained_predictions",
    "limited_by",
    "limits_of_process",
    "of_device",
    "of_host",
    "require",
]
