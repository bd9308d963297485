"""Recurrent layers, unrolled: their weights have derivatives and factors like those of layers at every step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from laplace import Laplace
from laplace.curvature import AutogradGGN, recurrent
from laplace.errors import PerformanceWarning
from tests.cases import labels, normal
from tests.networks import Applied, Network, named, parameter
from tests.tools import assert_close

C3 = labels(3)
KINDS = (nn.LSTM, nn.GRU, nn.RNN)
MANY = {"num_layers": 2, "bidirectional": True, "dropout": 0.3}


def sequences(cls: Any, *, batch_first: bool = True, **options: Any) -> Network:
    """Every hidden state and the last ones enter the outputs."""
    directions = 2 if options.get("bidirectional") else 1

    def forward(m: Any, x: Tensor) -> Tensor:
        h, last = m.recurrent(x if batch_first else x.transpose(0, 1))
        last = torch.cat(last, -1) if isinstance(last, tuple) else last
        return m.head(torch.cat([h.mean(1 if batch_first else 0), last.transpose(0, 1).flatten(1)], 1))

    def build() -> nn.Module:
        width = 4 * directions * (1 + (2 if cls is nn.LSTM else 1) * options.get("num_layers", 1))
        return Applied(forward, recurrent=cls(3, 4, batch_first=batch_first, **options), head=nn.Linear(width, 3))

    return Network(f"{cls.__name__} {options}", build, normal(4, 3), C3)


def packed(cls: Any, **options: Any) -> Network:
    """Sequences of different lengths, which end in zeros."""
    directions = 2 if options.get("bidirectional") else 1

    def forward(m: Any, x: Tensor) -> Tensor:
        lengths = (x != 0).any(-1).sum(1)
        h, last = m.recurrent(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        last = last[0] if isinstance(last, tuple) else last
        h = pad_packed_sequence(h, batch_first=True, total_length=4)[0].sum(1)
        return m.head(torch.cat([h, last.transpose(0, 1).flatten(1)], 1))

    def build() -> nn.Module:
        width = 4 * directions * (1 + options.get("num_layers", 1))
        return Applied(forward, recurrent=cls(3, 4, batch_first=True, **options), head=nn.Linear(width, 3))

    def inputs(n: int) -> Tensor:
        lengths = torch.tensor([2, 4, 1, 3, 4])[:n]
        return torch.randn(n, 4, 3) * (torch.arange(4) < lengths.unsqueeze(1)).unsqueeze(-1)

    return Network(f"packed {cls.__name__}", build, inputs, C3)


def cells(cls: Any) -> Network:
    """A step at a time, in a loop of the user."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state = None
        for x_t in x.unbind(1):
            state = m.cell(x_t, state)
        return m.head(state[0] if isinstance(state, tuple) else state)

    return Network(cls.__name__, lambda: Applied(forward, cell=cls(3, 4), head=nn.Linear(4, 3)), normal(4, 3), C3)


def learned_state() -> Network:
    return Network(
        "learned",
        lambda: Applied(
            lambda m, x: m.head(m.recurrent(x, m.start.expand(1, len(x), 4).contiguous())[0][:, -1]),
            recurrent=nn.GRU(3, 4, batch_first=True), start=parameter(1, 1, 4), head=nn.Linear(4, 3),
        ),
        normal(4, 3), C3, slow=("start",),
    )  # fmt: skip


CASES = [
    *(sequences(cls, **options) for cls in KINDS for options in ({}, MANY)),
    sequences(nn.LSTM, batch_first=False, bias=False),
    sequences(nn.GRU, batch_first=False, bias=False),
    sequences(nn.RNN, nonlinearity="relu"),
    *(packed(cls, **options) for cls, options in ((nn.LSTM, {}), (nn.GRU, {"num_layers": 2, "bidirectional": True}))),
    *map(cells, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)),
    learned_state(),
]


def ggn(network: Network) -> Tensor:
    """Σ Jᵀ Λ J by autograd, one datum and output at a time; packed sequences do not run under ``torch.func``."""
    model, (x, _), total = network.model(), network.data(), torch.zeros(())
    weights = list(model.parameters())
    for b in range(len(x)):
        f = model(x[b : b + 1])[0]
        rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in f]
        J, p = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]), f.detach().softmax(0)
        total = total + J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    return total


@pytest.mark.parametrize("network", CASES, ids=str)
def test_the_curvature_is_exact_without_differentiating_data_one_by_one(network):
    engine, (x, y), truth = AutogradGGN(network.model(), "classification"), network.data(), ggn(network)
    assert engine.network is not None
    slow = engine._engine.record(x).verdict.slow
    assert {engine.network.names[group] for group in slow} == set(network.slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PerformanceWarning)
        assert_close(engine.full(x, y)[1], truth)
        assert_close(engine.diag(x, y)[1], truth.diagonal())


class ByHand(nn.Module):
    """An LSTM of linear layers, one for the inputs of all steps and one for the states of each."""

    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self.of_inputs, self.of_hidden = nn.Linear(3, 16), nn.Linear(4, 16)
        self.of_inputs.weight, self.of_inputs.bias = layer.weight_ih_l0, layer.bias_ih_l0
        self.of_hidden.weight, self.of_hidden.bias = layer.weight_hh_l0, layer.bias_hh_l0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        h = c = x.new_zeros(len(x), 4)
        outputs = []
        for p in self.of_inputs(x).unbind(1):
            i, f, g, o = (p + self.of_hidden(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), None


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_kronecker_factors_are_those_of_linear_layers_at_every_step(approx):
    model, by_hand, (x, y) = named("lstm").model(), named("lstm").model(), named("lstm").data()
    by_hand.recurrent = ByHand(by_hand.recurrent)
    ours, theirs = (
        AutogradGGN(m, "classification", kfac_approx=approx).kron(x, y, 1)[1] for m in (model, by_hand.double())
    )
    for own, other in enumerate((0, 2, 1, 3, 4, 5)):  # by hand each bias follows its weight
        assert ours.counts[own] == theirs.counts[other]
        for side, expected in zip(ours.kfacs[own], theirs.kfacs[other], strict=True):
            assert_close(side, expected)
    assert ours.counts[:2] == ([20, 20] if approx == "expand" else [5, 5])


def test_one_step_from_zero_has_the_factors_of_a_linear_layer():
    x, y = torch.randn(6, 1, 3), torch.randint(3, (6,))
    layer, head = nn.RNN(3, 4, batch_first=True), nn.Linear(4, 3)
    linear = nn.Linear(3, 4)
    linear.weight, linear.bias = layer.weight_ih_l0, nn.Parameter(layer.bias_ih_l0 + layer.bias_hh_l0)
    rnn = Applied(lambda m, x: m.head(m.layer(x)[0][:, 0]), layer=layer, head=head)
    plain = Applied(lambda m, x: m.head(torch.tanh(m.linear(x[:, 0]))), linear=linear, head=head)
    ours, theirs = (AutogradGGN(m, "classification").kron(x, y, 1)[1].kfacs for m in (rnn, plain))
    for side, expected in zip(ours[0], theirs[0], strict=True):
        assert_close(side, expected)
    assert_close(ours[1][1], torch.zeros(4, 4), "A of the first state, which is zero")


@pytest.mark.parametrize("network", [named("lstm"), named("gru_two_layers")], ids=str)
def test_what_does_not_agree_with_the_layer_is_differentiated_one_by_one(network, monkeypatch):
    """Predictions and their derivatives in the inputs are the same on both ways."""

    def predictions() -> list[Tensor]:
        la = Laplace(network.model(), "classification", "all", "diag", enable_backprop=True)
        la.fit([network.data()])
        x = network.data(2)[0].requires_grad_()
        found = la(x)
        return [found, torch.autograd.grad(found[:, 0].sum(), x)[0], la.H]

    fast = predictions()
    monkeypatch.setattr(recurrent, "agree", lambda *_: False)
    engine = AutogradGGN(network.model(), "classification")
    assert len(engine._engine.record(network.data()[0]).verdict.slow) == len(engine.params) - 2
    for ours, slow in zip(fast, predictions(), strict=True):
        assert_close(ours, slow)


def test_a_layer_that_computes_otherwise_is_noticed():
    one = torch.ones(3, dtype=torch.float64)
    assert recurrent.agree((one, one), (one, one + 1e-12))
    assert not recurrent.agree((one, one), (one, 1.1 * one))
    assert not recurrent.agree((one, one), (one,))
    assert not recurrent.agree(one, one.float())
    assert not recurrent.agree(one, torch.full_like(one, torch.nan))
