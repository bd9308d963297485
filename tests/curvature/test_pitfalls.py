"""Situations that once were, or could be, silently wrong: each against autograd, after passes that could mislead."""

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradEF, AutogradGGN
from laplace.errors import InputError, UnsupportedError
from tests.networks import Applied, parameter
from tests.tools import assert_close


def jacobian(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Datum by datum."""
    parameters, rows = list(model.parameters()), []
    for b in range(len(x)):
        f = model(x[b : b + 1])[0]
        grads = [torch.autograd.grad(v, parameters, retain_graph=True, materialize_grads=True) for v in f]
        rows.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]))
    return torch.stack(rows)


def repeated() -> nn.Module:
    """A bias that is repeated for the batch before it meets data: its use has no formula of a datum."""
    return Applied(
        lambda m, x: m.head(torch.tanh(m.first(x) + m.shift.repeat(len(x), 1))),
        first=nn.Linear(3, 4), shift=parameter(1, 4), head=nn.Linear(4, 3),
    )  # fmt: skip


mixing = pytest.mark.filterwarnings(
    "ignore:Some weights are differentiated one datum:laplace.errors.PerformanceWarning"
)


@mixing
def test_a_first_batch_of_one_row_does_not_decide_for_later_ones():
    model, x, y = repeated(), torch.randn(6, 3), torch.randint(3, (6,))
    engine = AutogradGGN(model, "classification")
    engine.diag(x[:1], y[:1])
    assert_close(engine.jacobians(x)[0], jacobian(model, x))
    one, many = (Laplace(model, "classification", "all", "diag") for _ in range(2))
    one.fit([(x[b : b + 1], y[b : b + 1]) for b in range(6)])
    many.fit([(x, y)])
    assert_close(one(x), many(x))


@mixing
@pytest.mark.parametrize("masked", [6, 5])
def test_a_first_batch_that_is_masked_does_not_decide_for_later_ones(masked):
    model, x, y = repeated(), torch.randn(6, 3), torch.randint(3, (6,))
    engine, fresh = AutogradGGN(model, "classification"), AutogradGGN(model, "classification")
    engine.diag(x, torch.cat([torch.full((masked,), -100), y[masked:]]))
    assert_close(engine.diag(x, y)[1], fresh.diag(x, y)[1])
    assert_close(engine.jacobians(x)[0], jacobian(model, x))


def test_rows_that_depend_on_each_other_are_found_also_after_a_batch_of_one():
    model = Applied(lambda m, x: m.head(m.first(x) - m.first(x).mean(0)), first=nn.Linear(3, 3), head=nn.Linear(3, 3))
    engine, x, y = AutogradGGN(model, "classification"), torch.randn(5, 3), torch.randint(3, (5,))
    engine.diag(x[:1], y[:1])
    with pytest.raises(InputError, match=r"depend on the other rows"):
        engine.diag(x, y)


def test_statistics_of_the_batch_are_refused_in_words():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).eval()
    with pytest.raises(InputError, match=r"depend on the other rows"):
        AutogradGGN(model, "classification").diag(torch.randn(5, 3), torch.randint(3, (5,)))


def test_rows_that_come_one_by_one_count_once_each():
    """Ragged and looped layers fill up with rows that are not there."""
    loop = Applied(
        lambda m, x: m.head(torch.tanh(torch.stack([m.first(row) for row in x]))),
        first=nn.Linear(3, 4),
        head=nn.Linear(4, 3),
    )
    plain = nn.Sequential(loop.first, nn.Tanh(), loop.head)
    x, y = torch.randn(5, 3), torch.randint(3, (5,))
    ours, theirs = (AutogradGGN(m, "classification").kron(x, y, N=5)[1] for m in (loop, plain))
    assert_close(ours.to_matrix(), theirs.to_matrix())


class Experts(nn.Module):
    """Rows go to one of two layers, by their sign."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        first = (x[:, 0] > 0).nonzero().flatten()
        second = (x[:, 0] <= 0).nonzero().flatten()
        h = x.new_zeros(len(x), 4).index_add(0, first, self.one(x[first])).index_add(0, second, self.two(x[second]))
        return self.head(torch.tanh(h))


def test_each_expert_counts_the_rows_that_it_got():
    model, x, y = Experts(), torch.randn(9, 3), torch.randint(3, (9,))
    engine = AutogradGGN(model, "classification")
    assert_close(engine.jacobians(x)[0], jacobian(model, x))
    n = int((x[:, 0] > 0).sum())
    assert engine.kron(x, y, N=1)[1].counts == [n, 0, 9 - n, 0, 9, 0]


def test_dead_rows_are_inputs_of_their_layer():
    def loop(m, x):
        return m.head(torch.relu(torch.stack([m.first(row) for row in x])))

    model = Applied(loop, first=nn.Linear(3, 2), head=nn.Linear(2, 3))
    plain = nn.Sequential(model.first, nn.ReLU(), model.head)
    x, y = torch.randn(12, 3), torch.randint(3, (12,))
    assert bool((plain[1](plain[0](x)) == 0).all(1).any())
    ours, theirs = (AutogradGGN(m, "classification").kron(x, y, N=12)[1] for m in (model, plain))
    assert_close(ours.to_matrix(), theirs.to_matrix())


@pytest.mark.parametrize("cls", [AutogradGGN, AutogradEF])
def test_branches_that_meet_transposed_have_sums_of_their_own(cls):
    model = Applied(
        lambda m, x: m.head(torch.tanh(m.a(x) + m.b(x.mT).mT).mean(1)),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        head=nn.Linear(4, 1),
    )
    x, y = torch.randn(5, 4, 4), torch.randn(5, 1)
    kron = cls(model, "regression").kron(x, y, N=1)[1]
    h = (model.a(x) + model.b(x.mT).mT).detach().requires_grad_()
    f = model.head(torch.tanh(h).mean(1))
    (g,) = torch.autograd.grad(f.sum(), h)
    g = g * (f.detach() - y).unsqueeze(-1) if cls is AutogradEF else g
    assert_close(kron.kfacs[0][0], torch.einsum("bto,btp->op", g, g))
    assert_close(kron.kfacs[2][0], torch.einsum("bot,bpt->op", g, g))
    assert kron.kfacs[0][0] is kron.kfacs[1][0], "a weight and its bias share theirs"


def test_reduced_factors_average_the_positions_that_count():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
    x, y = torch.randn(3, 4, 2), torch.randint(3, (3, 4))
    y[0, 1:], y[2] = -100, -100  # one position, all, none
    engine = AutogradGGN(model, "classification", kfac_approx="reduce")
    kron = engine.kron(x, y, N=1)[1]
    a = torch.stack([x[0, 0], x[1].mean(0)])
    assert kron.counts[0] == 2
    assert_close(kron.kfacs[0][1], a.T @ a)
    assert_close(kron.to_matrix(), engine.kron(x[:2], y[:2], N=1)[1].to_matrix())


def test_an_order_that_depends_on_the_data_is_read_in_every_batch():
    def forward(m, x):
        order = x[:, 0].argsort()
        return m.head(torch.tanh(m.first(x[order]))[order.argsort()])

    model = Applied(forward, first=nn.Linear(3, 4), head=nn.Linear(4, 3))
    engine, x = AutogradGGN(model, "classification"), torch.randn(6, 3)
    engine.jacobians(x[x[:, 0].argsort()])  # sorted already
    assert_close(engine.jacobians(x)[0], jacobian(model, x))


def test_a_first_batch_without_gradients_does_not_decide_the_layout():
    model = Applied(
        lambda m, x: m.head(torch.relu(m.first(x.transpose(0, 1))).mean(0)), first=nn.Linear(3, 4), head=nn.Linear(4, 3)
    )
    with torch.no_grad():
        model.first.weight.abs_()
        model.first.bias.zero_()
    engine, x = AutogradGGN(model, "classification"), torch.randn(3, 3, 3)
    engine.jacobians(-x.abs())  # all units are dead
    assert_close(engine.jacobians(x)[0], jacobian(model, x))


@pytest.mark.parametrize("seed", range(8))
def test_layouts_are_told_apart_in_bfloat16(seed):
    torch.manual_seed(seed)
    model = Applied(
        lambda m, x: m.head(torch.tanh(m.first(x.transpose(0, 1))).mean(0)), first=nn.Linear(3, 4), head=nn.Linear(4, 3)
    )
    x = torch.randn(3, 3, 3)
    expected = jacobian(model, x)
    found = AutogradGGN(model.bfloat16(), "classification").jacobians(x.bfloat16())[0].double()
    assert float((found - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("multiply", [torch.mm, lambda x, w: x.mm(w), lambda x, w: torch.mm(input=x, mat2=w)])
def test_products_of_matrices_are_read_however_they_are_written(multiply):
    model, x = (
        Applied(
            lambda m, x: multiply(torch.tanh(multiply(x, m.first)), m.second),
            first=parameter(3, 4),
            second=parameter(4, 3),
        ),
        torch.randn(5, 3),
    )
    engine = AutogradGGN(model, "classification")
    assert_close(engine.jacobians(x)[0], jacobian(model, x))
    assert not engine.derivatives(x).verdict.slow


def test_sparse_embeddings_are_like_others_and_scaled_ones_are_refused():
    x, y = torch.randint(5, (4, 3)), torch.randint(3, (4,))

    def build(**options):
        return Applied(
            lambda m, x: m.head(m.embed(x).mean(1)), embed=nn.Embedding(5, 3, **options), head=nn.Linear(3, 3)
        )

    sparse, plain = build(sparse=True), build()
    plain.load_state_dict(sparse.state_dict())
    ours, theirs = (AutogradGGN(m, "classification").diag(x, y)[1] for m in (sparse, plain))
    assert_close(ours, theirs)
    with pytest.raises(UnsupportedError, match=r"scale_grad_by_freq"):
        AutogradGGN(build(scale_grad_by_freq=True), "classification").diag(x, y)


def test_keywords_of_the_model_are_cut_to_rows_with_the_inputs():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x, mask=None):
            h = self.recurrent(x)[0]
            return self.head((h if mask is None else h * mask.unsqueeze(-1)).mean(1))

    model, x, y = Masked(), torch.randn(4, 5, 3), torch.randint(3, (4,))
    la = Laplace(model, "classification", "all", "diag")
    la.fit([(x, y)])
    mask = (torch.rand(4, 5) > 0.3).double()
    whole = la(x, mask=mask)
    assert_close(whole, torch.cat([la(x[b : b + 1], mask=mask[b : b + 1]) for b in range(4)]))


def test_outputs_that_only_see_frozen_weights_through_the_inputs():
    def forward(m, x):
        with torch.no_grad():
            w = m.weight * 1
        return x @ w

    model = Applied(forward, weight=parameter(3, 3))
    with pytest.raises(UnsupportedError, match=r"do not depend on any weight"):
        AutogradGGN(model, "classification").diag(torch.randn(4, 3, requires_grad=True), torch.randint(3, (4,)))


def test_rows_of_a_derived_table_are_not_taken_for_rows_of_the_parameter():
    model = Applied(
        lambda m, x: m.head(torch.tanh(x + nn.functional.embedding(torch.arange(2), 2 * m.table)).sum(1)),
        table=parameter(4, 3), head=nn.Linear(3, 3),
    )  # fmt: skip
    x = torch.randn(5, 2, 3)
    assert_close(AutogradGGN(model, "classification").jacobians(x)[0], jacobian(model, x))


@pytest.mark.parametrize("masked", [[0], [0, 1, 2], [0, 1, 2, 3]])
def test_masks_send_no_weight_the_slow_way(masked):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
    x, y = torch.randn(4, 5, 2), torch.randint(3, (4, 5))
    y[masked] = -100
    engine = AutogradGGN(model, "classification")
    with engine._engine.sums(x, y) as (_, sums):
        sums.kron()
        recording = sums.kron.args[0]
        assert recording.mask is not None
        assert not recording.verdict.slow
