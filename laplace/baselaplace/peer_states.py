"""States that laplace-torch 0.2.2 and 0.3 save: what is in them, and the same as a state of this library.

They are dictionaries of tensors and plain values. They have no fingerprint of the model; that the weights in them are
those of the model is checked instead. A last layer's holds a batch of the training data, of which the layer is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laplace.errors import StateError
from laplace.schema import Check, Known, Table, anything, check_entries, check_tree, flag, optional, tensor, text, whole

PEER_STRUCTURES = ("full", "kron", "diag")
"""Structures whose states can be read."""


def _real(value: Any, where: str, known: Known) -> None:
    """A number, as a tensor or not."""
    if not isinstance(value, (int, float)):
        tensor((), (1,))(value, where, known)


ENTRIES: dict[str, Check] = {
    "cls_name": text,
    "likelihood": text,
    "n_data": whole(1),
    "n_outputs": whole(1, "C"),
    "mean": tensor(("all",)),
    "H": anything,
    "loss": _real,
    "prior_mean": tensor((), (1,), ("all",)),
    "prior_precision": tensor((), ("values",), above=0),
    "sigma_noise": tensor((), (1,), ("C",), above=0),
    "temperature": _real,
    "enable_backprop": flag,
}
"""What such a state holds."""
LAST_LAYER: Table = {"data": anything, "_last_layer_name": optional(text)}
"""And that of a last layer."""


def is_peer(state: Any) -> bool:
    """Whether something looks like a state of laplace-torch, complete or not."""
    if not isinstance(state, Mapping) or {"schema_version", "fingerprint", "digest"} & state.keys():
        return False
    return len(ENTRIES.keys() & state.keys()) > len(ENTRIES) // 2


def check_peer(state: Mapping[str, Any], expected: Mapping[str, Any], known: Known, *, last_layer: bool) -> None:
    """Raise unless a state of laplace-torch can be read for an object."""
    check_tree({key: value for key, value in state.items() if key != "data"})  # a batch may be of any kind
    check_entries(state, {**ENTRIES, **(LAST_LAYER if last_layer else {})}, known)
    for key in ("cls_name", "likelihood"):
        if state[key] != expected[key]:
            msg = (
                f"The state was saved by laplace-torch for another object: {key} is {state[key]!r} there, "
                f"{expected[key]!r} here. Construct the object with what was saved."
            )
            raise StateError(msg)


def curvature_state(matrix: Any, structure: str, n_data: int) -> dict[str, Any]:
    """The curvature of such a state, as the structures here save it."""
    if structure != "kron":
        return {"matrix": matrix} if structure == "full" else {"vector": matrix}
    blocks = [matrix] if not isinstance(matrix, list) else matrix
    if not all(
        isinstance(block, (list, tuple)) and all(isinstance(side, Tensor) for side in block) for block in blocks
    ):
        msg = "The state is damaged: 'H' must be a list with the Kronecker factors of each parameter group."
        raise StateError(msg)
    sums = [[*block[:1], *(side * n_data for side in block[1:])] for block in blocks]
    return {"sums": sums, "counts": [n_data] * len(sums), "resolution": 0.0}


def translated(state: Mapping[str, Any], own: Mapping[str, Any], mean: Tensor, structure: str) -> dict[str, Any]:
    """The state as one of this library, without a digest."""
    loss, temperature = state["loss"], float(state["temperature"])
    return {
        **own,
        "temperature": temperature,
        "output_temperature": 1.0,
        "enable_backprop": state["enable_backprop"],
        "prior_precision": state["prior_precision"].reshape(-1),
        "prior_mean": state["prior_mean"],
        "sigma_noise": state["sigma_noise"] if state["sigma_noise"].numel() > 1 else state["sigma_noise"].reshape(()),
        "mean": mean,
        "loss": loss.reshape(()) if isinstance(loss, Tensor) else mean.new_tensor(float(loss)),
        "n_data": state["n_data"],
        "n_positions": state["n_data"],
        "n_outputs": state["n_outputs"],
        "output_loss": None,
        "noise_shape": None,
        "H": curvature_state(state["H"], structure, state["n_data"]),
    }
