"""Free memory: read from files of the system, and refused by name where there is too little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laplace import free_memory
from laplace.errors import OutOfMemoryError
from laplace.free_memory import Memory, chunk_elements, explained, of_host, require

CPU = torch.device("cpu")
GB = 2**30
MEMINFO = "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nCached:  3145728 kB\n"


def system(root: Path, files: dict[str, str | int]) -> Path:
    """A root with these files."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))
    return root


def test_it_is_what_can_be_had_without_swapping(tmp_path: Path) -> None:
    assert of_host(system(tmp_path, {"proc/meminfo": MEMINFO}), {}) == Memory(8 * GB, "this machine")


def test_an_old_kernel_says_free_and_cached(tmp_path: Path) -> None:
    old = "".join(line + "\n" for line in MEMINFO.splitlines() if "Available" not in line)
    assert of_host(system(tmp_path, {"proc/meminfo": old}), {}) == Memory(4 * GB, "this machine")


def test_nothing_is_said_where_nothing_is_known(tmp_path: Path) -> None:
    assert of_host(tmp_path, {}) is None


SECOND = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/memory.max": 3 * GB,
    "sys/fs/cgroup/a/memory.current": 2 * GB,
    "sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {GB // 2}\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": GB,
}
"""Version 2: the group above limits it to 3 GB, of which 2 GB are used, a quarter of them by caches."""
FIRST = {
    "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/x\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": 3 * GB,
    "sys/fs/cgroup/memory/memory.usage_in_bytes": 2 * GB,
    "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GB // 2}\n",
}
"""Version 1, in a container that sees its own group at the mount."""


@pytest.mark.parametrize("files", [FIRST, SECOND], ids=["version 1", "version 2"])
def test_a_container_limits_it(files: dict[str, str | int], tmp_path: Path) -> None:
    found = of_host(system(tmp_path, {"proc/meminfo": MEMINFO, **files}), {})
    assert found is not None
    assert found.free == 3 * GB // 2
    assert "container" in found.limit


def test_a_group_without_a_limit_limits_nothing(tmp_path: Path) -> None:
    files = {**FIRST, "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712}
    assert of_host(system(tmp_path, {"proc/meminfo": MEMINFO, **files}), {}) == Memory(8 * GB, "this machine")


@pytest.mark.parametrize(("name", "used"), [("RLIMIT_AS", 5), ("RLIMIT_DATA", 3)])
def test_a_limit_of_the_process_limits_it(name: str, used: int, tmp_path: Path) -> None:
    status = f"Name:\tpython\nVmSize:\t{5 * 2**20} kB\nVmData:\t{3 * 2**20} kB\n"
    root = system(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/status": status})
    found = of_host(root, {name: 6 * GB})
    assert found == Memory((6 - used) * GB, f"the memory limit of this process ({name})")
    none = of_host(root, {name: GB})
    assert none is not None
    assert none.free == 0


def test_chunks_shrink_with_free_memory_and_never_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in ((64 * GB, 2**24), (2**20, 2**20 // 128), (0, 1), (None, 2**24)):
        monkeypatch.setattr(free_memory, "_LOOKED", {})
        memory = None if free is None else Memory(free, "this machine")
        monkeypatch.setattr(free_memory, "of_device", lambda device, memory=memory: memory)
        assert chunk_elements(CPU) == expected
        assert chunk_elements(CPU, 10) == min(10, expected)


def test_what_does_not_fit_is_refused_with_what_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "of_device", lambda device: Memory(2**27, "this machine"))
    require(2**27, CPU, "It", "Less.")
    with pytest.raises(OutOfMemoryError, match=r"It takes about 134 MB, and 134 MB are free .*this machine.* Less\."):
        require(2**27 + 1, CPU, "It", "Less.")


def test_a_failed_allocation_says_what_it_was_for() -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"not enough memory for it: .*allocate.* Take less\."),
        explained("it", lambda: "Take less."),
    ):
        torch.empty(2**55)
    with pytest.raises(RuntimeError, match="size") as found, explained("it", lambda: ""):
        torch.dot(torch.ones(2), torch.ones(3))
    assert not isinstance(found.value, OutOfMemoryError)


LIMITED = """
import resource, torch
from laplace import Laplace
from laplace.errors import OutOfMemoryError
torch.set_num_threads(1)
model = torch.nn.Linear(400, 10)
batch = torch.randn(4, 400), torch.arange(4)
big, small = Laplace(model, "classification", "all", "full"), Laplace(model, "classification", "all", "diag")
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
plan = big.plan(batch)
assert not plan.fit.fits and "'diag'" in plan.fit.instead[0], plan
assert "RLIMIT_AS" in plan.limited_by
try:
    big.fit([batch])
except OutOfMemoryError as error:
    assert "RLIMIT_AS" in str(error), error
else:
    raise AssertionError("fitted")
small.fit([batch])
model = torch.nn.Linear(4, 4000)
wide = Laplace(model, "regression", hessian_structure="diag")
wide.fit([(torch.randn(3, 4), torch.randn(3, 4000))])
wide(torch.randn(3, 4), diagonal_output=True)
try:
    wide(torch.randn(3, 4))
except OutOfMemoryError as error:
    assert "diagonal_output=True" in str(error), error
else:
    raise AssertionError("predicted")
print("refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process by Linux")
def test_a_process_with_little_memory_refuses_and_lives() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "refused", done.stderr
