"""States as values and as files: fingerprint of a model, digest of a state, writing, reading, copying.

What a class saves is in ``baselaplace/states.py``, what entries must be in ``schema.py``.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import secrets
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from laplace.errors import StateError, StateNotFoundError, warn
from laplace.schema import check_tree, describe

SCHEMA_VERSION = 5
"""Version of the layout of a state; raised when it changes."""
READABLE = (3, 4, SCHEMA_VERSION)
"""Versions that can be read: before 4 states had no digest, before 5 no refitted head and no density."""
DIGEST_VERSION = "sha256-1"
"""How the digest is made."""

Path_ = str | os.PathLike[str]


def _bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, shapes, dtypes and values of everything in ``model.state_dict()``, in hexadecimal.

    A model that was trained further has another one. Buffers that are not persistent, such as caches, do not count.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of all entries of a state but ``"digest"``, whatever their order, with the version of this recipe."""
    found = hashlib.sha256()
    for part in _parts({name: value for name, value in state.items() if name != "digest"}):
        found.update(part)
    return f"{DIGEST_VERSION}:{found.hexdigest()}"


def signed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the entries of a state, and their digest."""
    copies = move(state)
    return {**copies, "digest": digest(copies)}


def _parts(value: Any) -> Iterable[bytes | memoryview]:
    """What a digest is made of: each value with its type, and lengths first, so that no two states look alike."""
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {list(value.shape)}:".encode()
        yield _bytes(value)
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}:".encode()
        for name in sorted(value, key=repr):
            yield from _parts(name)
            yield from _parts(value[name])
    elif isinstance(value, (list, tuple)):
        yield f"{'list' if isinstance(value, list) else 'tuple'} {len(value)}:".encode()
        for item in value:
            yield from _parts(item)
    else:
        content = value.hex() if isinstance(value, float) else repr(value)
        yield f"{type(value).__name__} {len(content)}:{content}".encode(errors="surrogatepass")


def check_origin(state: Any, expected: Mapping[str, Any]) -> None:
    """Raise unless a state is one of a release that can be read, undamaged, and made by the same kind of object."""
    if not isinstance(state, Mapping) or "schema_version" not in state:
        msg = "This is no state of a Laplace approximation: it has no 'schema_version'. Save one with la.save(path)."
        raise StateError(msg)
    version = state["schema_version"]
    if type(version) is not int or version not in READABLE:
        msg = (
            f"The state has schema version {describe(version)}, this release reads "
            f"{' and '.join(map(str, READABLE))}. Load it with the release that saved it, or fit again."
        )
        raise StateError(msg)
    check_tree(dict(state))
    if "digest" in state:
        _check_digest(state)
    for key, value in expected.items():
        there = state.get(key)
        if type(there) is not type(value) or there != value:
            advice = "Construct the object with what was saved."
            if key == "fingerprint":
                advice = "The weights of the model differ: give it those it had when it was fitted, or fit again."
                there, value = str(there)[:12], value[:12]
            said = repr(there) if isinstance(there, str) else describe(there)
            msg = f"The state was saved for another object: {key} is {said} there, {value!r} here. {advice}"
            raise StateError(msg)


def warn_without_digest(state: Mapping[str, Any]) -> None:
    """Warn if a state has no digest."""
    if "digest" not in state:
        msg = (
            "The state has no digest, like those of earlier releases, so that damage to a number in it would not be "
            "noticed. Save it again with la.save(path), which adds one."
        )
        warn(msg, UserWarning)


def _check_digest(state: Mapping[str, Any]) -> None:
    """Raise unless the digest of a state is that of its entries."""
    there = state["digest"]
    if not isinstance(there, str) or not there.startswith(f"{DIGEST_VERSION}:"):
        msg = (
            f"The digest of the state is {describe(there)}; this release makes those that begin with "
            f"{DIGEST_VERSION!r}. The state is damaged, or of a later release."
        )
        raise StateError(msg)
    if there != digest(state):
        msg = (
            "The state is damaged: by its digest the entries are not those that were saved. Copy the file again from "
            "where it was saved, or fit and save again. If you changed an entry on purpose: load the state as it was "
            "and assign hyperparameters afterwards (la.prior_precision = …), or delete the entry 'digest' as well."
        )
        raise StateError(msg)


def save(state: Mapping[str, Any], path: Path_ | IO[bytes]) -> None:
    """Write a state atomically: the file is complete or not there, whatever happens meanwhile."""
    if not isinstance(path, (str, os.PathLike)):
        torch.save(dict(state), path)
        return
    target = Path(path)
    if not target.parent.is_dir():
        msg = f"{os.fspath(path)!r} cannot be written: there is no folder {os.fspath(target.parent)!r}. Make it first."
        raise StateNotFoundError(msg)
    if target.is_dir():
        msg = f"{os.fspath(path)!r} is a folder: name a file in it to save the state to."
        raise StateError(msg)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Any, location: Any) -> Any:
    """What a file holds, without executing anything in it."""
    name = repr(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else f"of the {type(path).__name__}"
    try:
        # A file that looks like one of older formats makes torch warn before it fails.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=location, weights_only=True)
    except FileNotFoundError as error:
        msg = f"There is no file {name}. States are written by la.save(path)."
        raise StateNotFoundError(msg) from error
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        msg = (
            f"The file {name} cannot be read as a state: {reason} It is damaged, or something else: states are written "
            "by la.save(path)."
        )
        if isinstance(error, pickle.UnpicklingError):
            msg += (
                " If it is a state of laplace-torch that holds other objects, and you trust it: "
                "la.load_state_dict(torch.load(path, weights_only=False))."
            )
        raise StateError(msg) from error


def move(value: Any, device: torch.device | None = None, known: dict[int, Tensor] | None = None) -> Any:
    """Copies of the tensors of nested mappings and lists, on a device if one is given, each in its own precision.

    A tensor that occurs twice (the factor that weight and bias share) stays one tensor.
    """
    known = {} if known is None else known
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.detach().to(value.device if device is None else device, copy=True)
        return known[id(value)]
    if isinstance(value, Mapping):
        return {key: move(item, device, known) for key, item in value.items()}
    if isinstance(value, list):
        return [move(item, device, known) for item in value]
    return value
