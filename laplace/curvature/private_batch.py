"""What a package gets to compute with: a private copy of the model, and the rows of a batch that count."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace.errors import UnsupportedError
from laplace.network.batches import count_rows, items_of, rows_of
from laplace.network.structural_copy import Uses, structural_copy
from laplace.network.whole_network import WholeNetwork
from laplace.types import Inputs


@dataclass(frozen=True)
class PrivateBatch:
    """A batch for a package."""

    model: nn.Module
    """A private copy as a module from inputs to outputs ``[rows, C]``."""
    bare: nn.Module
    """The copy itself, inside what brings inputs and outputs in shape."""
    x: Inputs
    y: Tensor
    labels: Tensor
    """The same for what does not depend on targets: class labels also where probabilities were given."""
    f: Float[Tensor, "rows outputs"]
    """Their outputs."""
    datum: Int[Tensor, " rows"]
    """Which of the ``n_data`` rows of the loader each belongs to."""
    n_data: int
    """Their number."""
    items: int = 1
    """How many rows of layers belong to a row of outputs: 2 where pairs are compared."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the package, from the user."""

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the copy that hold random weights, in public order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @cached_property
    def one_row_a_datum(self) -> bool:
        """Whether no two rows belong to the same datum."""
        return len(self.datum.unique()) == len(self.datum)

    def zeros(self, n_axes: int) -> Tensor:
        """``[P]`` or ``[P, P]``."""
        return self.f.new_zeros([sum(parameter.numel() for parameter in self.parameters)] * n_axes)

    def sum_positions(self, rows: Float[Tensor, "rows params"]) -> Float[Tensor, "data params"]:
        """Add the gradients of the rows of each datum."""
        return rows.new_zeros(self.n_data, rows.shape[1]).index_add_(0, self.datum, rows)


def flat(values: Sequence[Tensor], n_leading: int = 0) -> Tensor:
    """Tensors in the shapes of parameters, behind ``n_leading`` further axes, side by side as ``[..., P]``."""
    return torch.cat([value.detach().flatten(n_leading) for value in values], -1)


class PrivateNetwork(nn.Module):
    """A structural copy of a whole network, as a module from inputs of any nesting to outputs ``[rows, C]``."""

    def __init__(self, network: WholeNetwork, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = structural_copy(network.model, dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in network.names)
        twin = WholeNetwork(
            self.model, dict_key_x=network.dict_key_x, dict_key_y=network.dict_key_y, reading=network.reading
        )
        # In a tuple, so that its submodules are not registered a second time.
        self._network = (twin,)

    def forward(self, x: Inputs) -> Tensor:
        """Outputs."""
        return self._network[0](x)


class PrivatePairs(nn.Module):
    """A private network as a module from pairs to their two scores, ``[pairs, 2]``; layers see items as rows."""

    def __init__(self, network: PrivateNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Inputs) -> Tensor:
        """Scores."""
        return self.network(items_of(x)).reshape(-1, 2)


def scored_items(model: nn.Module, pairs: tuple[Inputs, None]) -> tuple[Inputs, Tensor | None]:
    """The items of pairs as rows, and their scores in pairs; a row with two scores is the pair itself, without any."""
    x, _ = pairs
    items, scores = items_of(x), model(x)
    one_by_one = scores.numel() == count_rows(items) == 2 * count_rows(x)
    return (items, scores) if one_by_one else pairs


class PrivateHead(nn.Module):
    """A private last layer as a module from features of rows to outputs ``[rows, C]`` that the likelihood takes."""

    def __init__(self, layer: nn.Module, of_head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.of_head = layer, of_head

    def forward(self, phi: Tensor) -> Tensor:
        """Outputs."""
        return self.of_head(self.layer(phi))


def private_head(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A copy of a last layer, all of whose weights are random."""
    # A plain layer, without the hooks of a user: that outputs are those of the weights is checked with the features.
    twin = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    twin.weight = nn.Parameter(weight.detach().to(dtype))
    if bias is not None:
        twin.bias = nn.Parameter(bias.detach().to(dtype))
    return twin


Objection = Callable[[nn.Module, Tensor], "str | None"]
"""Says why a package cannot take a layer with some input, or ``None``."""


def outputs_of_known(
    model: nn.Module,
    x: Inputs,
    known: frozenset[type[nn.Module]] | None,
    originals: Sequence[Tensor],
    objection: Objection,
    backend: str,
    able: str,
) -> Tensor:
    """Outputs of a private network, after a check that hooks on its layers see all that its random weights do."""

    def refuse(name: str, reason: str) -> NoReturn:
        msg = (
            f"{backend} cannot take {shown(name)}: {reason}. Leave its weights out with requires_grad_(False), or use "
            f"one of {able}."
        )
        raise UnsupportedError(msg)

    random = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in random}
    for name, layer in layers.items():
        if known is not None and type(layer) not in known:
            choices = ", ".join(sorted(cls.__name__ for cls in known))
            refuse(name, f"it is a {type(layer).__name__}, and known are the weights of {choices}")
        others = sorted({key for key, _ in layer.named_parameters(recurse=False)} - {"weight", "bias"})
        if known is not None and others:
            refuse(name, f"it has further parameters ({', '.join(others)})")
        if known is not None and vars(layer)["_forward_hooks"]:
            refuse(name, "a forward hook on it may change its outputs unseen")
    uses = Uses([*random.values(), *originals])
    with inputs_of(layers if known is not None else {}) as whole, uses:
        f = model(x)
    if any(uses.counts[id(parameter)] for parameter in originals):
        msg = (
            f"{backend} works on a copy of the model's modules, and a function that is an attribute of this one still "
            f"uses the weights of the original. Make it a method, or use one of {able}."
        )
        raise UnsupportedError(msg)
    for name, parameter in random.items():
        if not uses.counts[id(parameter)]:
            refuse(name, "the outputs of the batch do not depend on it")
    if known is None:
        return f
    with inputs_of(layers) as single:
        model(rows_of(x, slice(0, 1), len(f)))
    for name, layer in layers.items():
        own = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
        if len(whole[name]) != 1 or any(uses.counts[id(parameter)] != 1 for parameter in own):
            refuse(name, "it is not called once in a forward pass, with all uses of its weights")
        if not begins_with(whole[name][0], single[name], len(f)):
            refuse(name, "the rows of its input are not the data in their order")
        reason = objection(layer, whole[name][0])
        if reason is not None:
            refuse(name, reason)
    return f


@contextmanager
def inputs_of(layers: Mapping[str, nn.Module]) -> Generator[dict[str, list[Tensor]], None, None]:
    """Collect the inputs of layers while a model runs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        # What is given by keyword only is not seen, and the layer then refused.
        return lambda _module, inputs: seen[name].extend(value.detach() for value in inputs[:1])

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def begins_with(whole: Tensor, single: Sequence[Tensor], n_rows: int) -> bool:
    """Whether the first row of a layer's input is that of the first datum alone, up to rounding."""
    if len(single) != 1 or len(whole) != n_rows or single[0].shape != whole[:1].shape:
        return False
    size = float(whole[:1].abs().max()) if whole[:1].numel() else 0.0
    return torch.allclose(whole[:1], single[0], rtol=0, atol=1e-3 * size)


def shown(name: str) -> str:
    """A layer's or weight's name as the user knows it."""
    return repr(name.removeprefix("model").removeprefix(".") or "the model itself")
