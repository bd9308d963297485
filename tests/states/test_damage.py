"""Damaged files and odd entries: each is refused as ``StateError``, changes nothing, and none gives other numbers.

The counts are printed (``pytest -rP``, or ``-s``).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from laplace.baselaplace import statefile
from laplace.errors import NotFittedError, StateError
from tests.states.situations import SITUATIONS, build, fitted, seen

SMALL = (
    "last_layer_kron",
    "all_full",
    "all_ekfac",
    "last_layer_lowrank",
    "all_sod",
    "last_layer_variational",
    "subnetwork_diag",
)
FLIPS = 15
"""In each file of ``SMALL``; all 900 are in the slow test."""


@functools.cache
def _fitted_state(name: str) -> dict[str, Any]:
    return fitted(name).state_dict()


def state_of(name: str) -> dict[str, Any]:
    """The state of a situation, fitted once."""
    return copy.deepcopy(_fitted_state(name))


# -- bits of a file ---------------------------------------------------------------------------------------------------


def flipped(content: bytes, n_flips: int, seed: int) -> Iterator[io.BytesIO]:
    """The content with one bit turned, at random places."""
    draw = random.Random(seed)
    for _ in range(n_flips):
        damaged, where = bytearray(content), draw.randrange(8 * len(content))
        damaged[where // 8] ^= 1 << where % 8
        yield io.BytesIO(bytes(damaged))


def counts_of_flips(name: str, n_flips: int, seed: int) -> Counter[str]:
    """How many flips were refused, did not matter, gave other numbers in silence, or ended in another exception."""
    saved, target = state_of(name), build(name)
    target.load_state_dict(saved)
    target.prior_precision = 0.25
    digest, before = saved["digest"], target.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    counts: Counter[str] = Counter(refused=0, harmless=0, silent=0, raw=0, changed=0)
    for damaged in flipped(file.getvalue(), n_flips, seed):
        try:
            target.load(damaged)
        except StateError:
            counts["refused"] += 1
            counts["changed"] += target.state_dict()["digest"] != before["digest"]
        except Exception:
            counts["raw"] += 1
        else:
            counts["harmless" if target.state_dict()["digest"] == digest else "silent"] += 1
            target.load_state_dict(before)
    print(f"{n_flips} flipped bits of {name}: {dict(counts)}")
    return counts


@pytest.mark.parametrize("name", SMALL)
def test_a_flipped_bit_is_noticed_or_does_not_matter(name):
    counts = counts_of_flips(name, FLIPS, seed=len(name))
    assert counts["silent"] == counts["raw"] == counts["changed"] == 0
    assert counts["refused"] > 0


@pytest.mark.slow
def test_nine_hundred_flipped_bits_are_noticed_or_do_not_matter():
    total: Counter[str] = Counter()
    for number, name in enumerate(list(SITUATIONS)[:30]):
        total.update(counts_of_flips(name, 30, seed=number))
    print(f"900 flipped bits in all: {dict(total)}")
    assert total["silent"] == total["raw"] == total["changed"] == 0
    assert total["refused"] + total["harmless"] == 900


def test_the_digest_is_that_of_numbers_wherever_they_are(device):
    state = fitted("last_layer_kron").state_dict()
    elsewhere = statefile.move(state, device)
    assert statefile.digest(elsewhere) == state["digest"]
    assert statefile.digest(dict(reversed(state.items()))) == state["digest"], "the order of entries does not count"
    transposed = {
        **state,
        "H": {**state["H"], "sums": [[side.T.contiguous().T for side in block] for block in state["H"]["sums"]]},
    }
    assert statefile.digest(transposed) == state["digest"], "nor does the layout in memory"


@pytest.mark.parametrize(
    "change",
    [
        {"mean": torch.zeros(8)}, {"temperature": 1}, {"temperature": 1.5}, {"enable_backprop": 0}, {"n_data": 9},
        {"likelihood": "regression"}, {"more": None}, {"loss": torch.zeros(1)},
    ],
    ids=str,
)  # fmt: skip
def test_the_digest_is_another_for_every_change(change):
    state = fitted("last_layer_kron").state_dict()
    assert statefile.digest({**state, **change}) != state["digest"]


def test_an_entry_that_was_changed_on_purpose_is_refused_with_what_to_do(tmp_path):
    la = fitted("last_layer_kron")
    state = la.state_dict()
    state["prior_precision"].mul_(2)
    with pytest.raises(StateError, match=r"by its digest.*la\.prior_precision = .*delete the entry 'digest'"):
        la.load_state_dict(state)
    del state["digest"]
    with pytest.warns(UserWarning, match="no digest"):
        la.load_state_dict(state)
    assert float(la.prior_precision) == 3.0
    with pytest.raises(StateError, match=r"digest of the state is 'md5:0'.*later release"):
        la.load_state_dict({**state, "digest": "md5:0"})


# -- odd entries ------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where entries are, containers included; of long lists the first ones."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def odd_values(value: Any) -> dict[str, Any]:
    """What an entry should not be."""
    odd = {
        "None": None, "text": "odd", "bytes": b"odd", "object": object(), "negative": -1, "large": 10**30, "fraction": 3.5,
        "NaN": float("nan"), "infinite": float("inf"), "flag": True, "list": [], "list of None": [None], "mapping": {},
        "mapping of text": {"odd": 1}, "tensor": torch.ones(2, 3, 5), "empty tensor": torch.zeros(0),
        "expanded": torch.zeros(()).expand(10**9), "expanded square": torch.zeros(()).expand(10**5, 10**5),
    }  # fmt: skip
    if isinstance(value, Tensor):
        odd |= {
            "all NaN": torch.full(value.shape, float("nan")), "all infinite": torch.full(value.shape, float("inf")),
            "beyond": torch.full(value.shape, 1e300), "below": torch.full(value.shape, -1e6),
            "longer": torch.cat([value, value[-1:]]) if value.dim() else value.repeat(2), "row": value.unsqueeze(0),
            "complex": value.to(torch.complex128), "half": value.half(), "flags": value.bool(), "bytes of it": value.to(torch.uint8),
            "sparse": value.double().to_sparse(), "meta": value.to("meta"), "list of numbers": value.tolist(),
        }  # fmt: skip
    return odd


FREE = {"mean", "prior_mean", "vectors", "directions", "root", "phi", "inputs", "inducing_locations"}
"""Entries whose numbers may be negative."""
OPTIONAL = {
    "loss", "output_loss", "noise_shape", "trace", "rank", "captured_trace", "feature_reduction", "trained", "density",
    "excess", "reference", "mixture",
}  # fmt: skip


def plausible(path: tuple[Any, ...], kind: str, before: Any) -> bool:
    """Whether an odd value is one that the entry may have."""
    names = {part for part in path if isinstance(part, str)}
    return (
        (kind == "None" and bool(names & OPTIONAL))
        or (kind in ("None", "list of None") and "eigenvectors" in names)  # the identity
        or (kind == "below" and bool(names & FREE))
        or kind == "beyond"  # in single precision it is not finite
        or (kind == "row" and path == ("prior_mean",))
        or (kind in ("longer", "row") and path in (("sigma_noise",), ("prior_precision",)))  # one for each of two
        or (kind in ("all infinite", "beyond") and bool(names & {"inputs", "inducing_locations"}))  # as in masks
        or (kind == "fraction" and isinstance(before, float))
        or (kind in ("NaN", "infinite") and path[:2] in (("fit_history", "val_nll"), ("fit_history", "objective")))
        or (kind == "flag" and isinstance(before, bool))
        or (kind == "list" and path[0] == "fit_history")
    )


def substituted(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A state with another entry, and the digest of that."""
    odd = copy.deepcopy(state)
    inner: Any = odd
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    giant = isinstance(value, Tensor) and value.numel() > 10**6
    if path != ("digest",) and not giant:
        with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):  # what has no bytes has no digest
            odd["digest"] = statefile.digest(odd)
    return odd


def outcome(target: Any, name: str, odd: dict[str, Any], before: str) -> str:
    """What comes of loading an odd state."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights that moved, sums that are badly conditioned
            target.load_state_dict(odd)
    except StateError:
        return "refused" if target.state_dict()["digest"] == before else "changed"
    except Exception:
        return "raw"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights that moved
            seen(target, name)
    except NotFittedError:  # a loss of None is not known, and evidence says so
        return "accepted"
    except Exception:
        return "failing later"
    return "accepted"


def counts_of_odd_values(name: str, share: float) -> tuple[Counter[str], list[str]]:
    """What comes of odd values everywhere in a state, and those that should have been refused."""
    state, target, draw = state_of(name), build(name), random.Random(name)
    target.load_state_dict(state)
    target.prior_precision = 0.25
    own = target.state_dict()
    counts: Counter[str] = Counter(refused=0, accepted=0, changed=0, raw=0)
    wrong: list[str] = []
    for path in places(state):
        before: Any = state
        for key in path:
            before = before[key]
        for kind, value in odd_values(before).items():
            if draw.random() > share or (kind == "text" and isinstance(before, str)):
                continue
            found = outcome(target, name, substituted(state, path, value), own["digest"])
            if found != "refused":
                target = build(name)
                target.load_state_dict(own)
            counts[found] += 1
            if found in ("raw", "changed") or (found != "refused" and not plausible(path, kind, before)):
                wrong.append(f"{path} {kind}: {found}")
    print(f"{counts.total()} odd values in {name}: {dict(counts)}")
    return counts, wrong


@pytest.mark.parametrize("name", SMALL)
def test_odd_entries_are_refused(name):
    counts, wrong = counts_of_odd_values(name, share=0.1)
    assert wrong == []
    assert counts["refused"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_all_odd_entries_of_all_classes_are_refused(name):
    _, wrong = counts_of_odd_values(name, share=1.0)
    assert wrong == []


@pytest.mark.parametrize("name", SMALL)
def test_missing_and_unknown_entries_are_named(name):
    la, state = build(name), state_of(name)
    la.load_state_dict(state)
    for path in [
        path for path in places(state) if isinstance(path[-1], str) and path[0] not in ("digest", "schema_version")
    ]:
        odd = copy.deepcopy(state)
        inner: Any = odd
        for key in path[:-1]:
            inner = inner[key]
        free = {"inputs", "inducing_locations"} & set(path[:-1])
        inner["a" + path[-1]] = inner.pop(path[-1])
        odd["digest"] = statefile.digest(odd)
        if not free:
            with pytest.raises(StateError, match=path[-1]):
                la.load_state_dict(odd)
    state["more"] = 1
    state["digest"] = statefile.digest(state)
    with pytest.raises(StateError, match=r"entries that this release does not know: 'more'"):
        la.load_state_dict(state)
    assert la.state_dict()["digest"] == state_of(name)["digest"]
