"""``columns=k``: the largest columns of the root of the output Hessian, and a random mixture of the others."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from laplace import Laplace
from laplace.curvature import AutogradEF, AutogradGGN, leading
from laplace.curvature.recording import Recording
from laplace.errors import InputError, UnsupportedError
from laplace.likelihoods.categorical import CategoricalLikelihood
from tests.cases import BASIC, Net, labels, normal
from tests.contracts import generator
from tests.networks import Network, named
from tests.test_subnetlaplace_cost import Counted, CountedBackward
from tests.tools import LargestTensor, assert_close

FIVE = Network("five_classes", lambda: Net(3, 4, 5), normal(3), labels(5), 5)
OUTPUTS = Network("outputs", lambda: Net(3, 4, 4), normal(3), normal(4), 4, "regression")
POSITIONS = named("positions")
NETWORKS = [FIVE, OUTPUTS, POSITIONS]
STRUCTURES = ("full", "diag", "kron", "blockdiag", "ekfac", "lowrank")


def backend(network: Network, k: int | None, seed: int | None = None, **options) -> AutogradGGN:
    noise = None if seed is None else generator(seed)
    return AutogradGGN(network.model(), network.likelihood, columns=k, generator=noise, **options)


def flat(engine: AutogradGGN, network: Network, structure: str) -> torch.Tensor:
    """What a structure asks for, as one tensor."""
    x, y = network.data()
    if structure == "kron":
        return torch.cat([side.flatten() for block in engine.kron(x, y, 1)[1].kfacs for side in block])
    if structure == "blockdiag":
        return torch.block_diag(*engine.blockdiag(x, y)[1])
    if structure == "ekfac":
        eye, shapes = [[None] * p.dim() for p in engine.params], [tuple(p.shape) for p in engine.params]
        return torch.cat([diagonal.flatten() for diagonal in engine.ekfac(x, y, eye, shapes)[1]])
    if structure == "lowrank":
        return engine.lowrank(x, y, torch.eye(len(engine.zeros())))[1]
    return getattr(engine, structure)(x, y)[1]


def hadamard(n: int) -> torch.Tensor:
    """Signs in at least ``n`` orthogonal columns: the mean of ε εᵀ over the rows is the identity."""
    signs = torch.ones(1, 1)
    while len(signs) < n:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs


@pytest.mark.every(4, each_value=False)
@pytest.mark.parametrize(
    ("structure", "network"),
    [("full", FIVE), ("full", OUTPUTS), ("full", POSITIONS), ("kron", FIVE)],
    ids=str,
)
def test_the_mean_over_signs_is_exact(structure, network, monkeypatch):
    exact, found, signs = flat(backend(network, None), network, structure), [], hadamard(32)
    for pattern in signs:
        monkeypatch.setattr(leading, "random_signs", lambda like, _, p=pattern: p[: like.numel()].view(like.shape))
        found.append(flat(backend(network, 1), network, structure))
    assert_close(torch.stack(found).mean(0), exact)
    assert not torch.allclose(found[1], exact)
    if structure == "full":
        assert_close(exact, network.problem().ggn())


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_structures_are_parts_of_one_matrix(network):
    whole = flat(backend(network, 1, 3), network, "full")
    for structure in ("diag", "ekfac"):
        assert_close(flat(backend(network, 1, 3), network, structure), whole.diagonal(), structure)
    assert_close(flat(backend(network, 1, 3), network, "lowrank"), whole)
    blocks = flat(backend(network, 1, 3), network, "blockdiag")
    assert_close(blocks, torch.where(blocks == 0, 0.0, whole))


@pytest.mark.parametrize(
    ("structure", "network"), [*((structure, FIVE) for structure in STRUCTURES), ("full", POSITIONS)], ids=str
)
def test_as_many_columns_as_there_are_is_exact(structure, network):
    engine = backend(network, 100)
    assert_close(flat(engine, network, structure), flat(backend(network, None), network, structure))
    assert engine.columns_error == 0


def test_columns_of_the_likeliest_classes_come_first():
    """Each column that is left out is shorter than any that is taken, for a datum over all of its positions."""
    f = torch.randn(7, 6, dtype=torch.float64) * 3
    root, datum = CategoricalLikelihood().lazy_root(f), torch.tensor([0, 0, 0, 2, 2, 3, 3])
    assert bool((root.sizes.diff(dim=1) <= 0).all())
    exact, rest, n_left = leading.split(root, datum, 4)
    assert n_left == 3 * 5 - 4
    for group in ([0, 1, 2], [3, 4], [5, 6]):
        sizes, left = root.sizes[group], rest[group]
        assert int((~left).sum()) == 4
        assert float(sizes[~left].min()) >= float(sizes[left].max())
        assert_close(exact[group].square().sum((0, 1)), sizes[~left].sort(descending=True).values)
    parts = sum(each @ each.mT for each in (exact[:, :, [n]] for n in range(4)))
    others = torch.stack([root.mix(torch.eye(5)[j].to(f) * rest) for j in range(5)], -1)
    assert_close(parts + others @ others.mT, CategoricalLikelihood().hessian(f).dense())


def test_a_confident_row_loses_no_digits():
    f = torch.tensor([[40.0, 0.0, -5.0, -30.0], [200.0, 0.0, -100.0, -200.0]])
    root = CategoricalLikelihood().lazy_root(f)
    p = f.double().softmax(-1)
    expected = p * (1 - p).where(p < 0.5, p.sum(-1, keepdim=True) - p.max(-1, keepdim=True).values)
    expected[:, 0] = p[:, 0] * p[:, 1:].sum(-1)
    columns = torch.stack([root.mix(torch.eye(3)[j].expand(2, 3)) for j in range(3)], -1)
    assert bool(torch.isfinite(columns).all())
    found = columns.double().square().sum(-1)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert float(found[1].sum()) < 1e-37


def test_backward_passes_are_counted_by_columns(capfd):
    """One for each exact column and one for the mixture; in batches 1, 4, 16 two mixtures."""
    model = nn.Sequential(nn.Linear(3, 6), Counted(), nn.Linear(6, 12))
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 11, 7]))] * 5

    def passes(**options) -> list[int]:
        la, seen = Laplace(model, "classification", "all", "diag", backend_kwargs=options), []
        for n in (1, 2, 3, 4, 5):
            CountedBackward.count = 0
            la.fit(batches[:n])
            seen.append(CountedBackward.count)
        return [later - earlier for earlier, later in pairwise(seen)]

    all_of_them = passes()
    # What layouts and checks take is the same for both.
    assert [few - every for few, every in zip(passes(columns=3), all_of_them, strict=True)] == [
        4 - 11,
        4 - 11,
        5 - 11,
        4 - 11,
    ]


@pytest.mark.parametrize("columns", [None, 3])
def test_no_root_of_all_columns_is_built(columns, monkeypatch):
    n, C = 16, 300
    monkeypatch.setattr(Recording, "n_columns_at_once", 5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C))
    engine = AutogradGGN(model, "classification", columns=columns)
    x, y = torch.randn(n, 3), torch.randint(C, (n,))
    with LargestTensor() as largest:
        engine.diag(x, y)
    assert largest.numel <= 5 * n * C, largest.operation


def test_the_estimated_error_is_the_error():
    """In root mean square over 50 passes; of three equal batches the first has two mixtures."""
    x, y = FIVE.data()
    engine, exact = backend(FIVE, 1, 0), 3 * flat(backend(FIVE, None), FIVE, "diag")
    errors, estimates = [], []
    for _ in range(50):
        assert engine.leading is not None
        engine.leading.begin_pass()
        found = sum(engine.diag(x, y)[1] for _ in range(3))
        errors.append((found - exact).norm() / exact.norm())
        estimates.append(engine.columns_error)
    ratio = float(torch.tensor(estimates).square().mean().sqrt() / torch.stack(errors).square().mean().sqrt())
    assert 0.8 < ratio < 1.25, ratio


@pytest.mark.parametrize("structure", ["diag", "kron", "ekfac", "lowrank"])
def test_a_fit_is_reproducible_and_says_its_error(structure, capfd):
    def fit(seed: int, **options):
        la = Laplace(
            FIVE.model(), "classification", "all", structure, backend_kwargs={**options, "generator": generator(seed)}
        )
        la.fit([FIVE.data(1, 4), FIVE.data(2)])
        return la

    first, same, other = fit(0, columns=1), fit(0, columns=1), fit(1, columns=1)
    x = FIVE.data(3)[0]
    assert torch.equal(first(x), same(x))
    assert not torch.equal(first(x), other(x))
    assert first.backend.made_with["columns"] == 1
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(
        "columns=1: the diagonal of the curvature has a relative standard error of about" in line for line in said
    )
    assert said[0] == said[1] != said[2]
    assert 0 < first.backend.columns_error < 1
    assert "all are exact" in str(fit(0, columns=4).backend.leading)


def test_a_subnetwork_takes_it_too():
    index = torch.tensor([1, 5, 14, 20])
    part = AutogradGGN(FIVE.model(), "classification", columns=1, generator=generator(0), subnetwork_indices=index)
    whole = flat(backend(FIVE, 1, 0), FIVE, "full")
    assert_close(flat(part, FIVE, "full"), whole[index][:, index])


def test_the_error_is_unknown_before_and_absent_without():
    assert backend(FIVE, None).columns_error is None
    assert math.isnan(backend(FIVE, 2).columns_error)


def test_what_has_no_meaning_is_refused():
    for wrong in (0, -1):
        with pytest.raises(InputError, match="columns must be a positive whole number"):
            backend(FIVE, wrong)
    with pytest.raises(UnsupportedError, match="pass one of them"):
        backend(FIVE, 2, stochastic=True)
    with pytest.raises(UnsupportedError, match="stochastic=True"):
        backend(FIVE, 2, num_samples=3)
    with pytest.raises(UnsupportedError, match="a last layer takes none"):
        AutogradGGN(BASIC[0].extractor(), "classification", last_layer=True, columns=2)
    assert not AutogradEF.takes_columns
    with pytest.raises(UnsupportedError, match="columns"):
        Laplace(FIVE.model(), "classification", "all", "diag", backend=AutogradEF, backend_kwargs={"columns": 2})
    ella = {"functional_approximation": "nystrom", "subsample_size": 4, "n_eigenvalues": 2}
    for options in ({"n_subset": 3}, ella):
        la = Laplace(FIVE.model(), "classification", "all", "gp", backend_kwargs={"columns": 2}, **options)
        with pytest.raises(UnsupportedError, match="leave columns out"):
            la.fit([FIVE.data()])
