"""Leading eigenpairs of a curvature that is only multiplied with."""

import pytest
import torch

from laplace import linalg
from laplace.enums import HessianStructure
from laplace.errors import NumericalWarning, StateError, UnsupportedError
from laplace.schema import check_entries
from laplace.structures import lowrank
from laplace.structures.lowrank import LowRankCurvature, Truncation
from laplace.structures.subspace import nystrom, ritz
from tests.contracts import check_curvature, generator
from tests.structures.samples import PER_LAYER, PER_WEIGHT, SCALAR, P, prior, psd
from tests.tools import assert_close

ALL = Truncation(captured_trace=1.0)


class Matrix:
    """A back end whose data are matrices; it counts what it was asked."""

    def __init__(self, size: int, *, trace: bool = True):
        self.size, self.has_trace, self.asked = size, trace, []

    diag = kron = blockdiag = ekfac = None
    is_sampled = False
    gives_matrix = False

    def provides(self, structure):
        assert structure is HessianStructure.FULL
        return self.gives_matrix

    def full(self, x, y):
        self.asked.append("matrix")
        return y.sum() * 0, x

    def zeros(self):
        return torch.zeros(self.size).double()

    def repeatable(self, batches, structure):
        assert structure is HessianStructure.LOWRANK
        return batches

    def count(self, y):
        return len(y)

    def lowrank(self, x, y, directions):
        self.asked.append(directions.shape[1])
        assert_close(directions.T @ directions, torch.eye(directions.shape[1]), "orthonormal directions")
        return y.sum() * 0, x @ directions, x.trace() if self.has_trace else None


def fit(matrices, truncation, **options):
    backend = Matrix(len(matrices[0]), **options)
    _, curvature = LowRankCurvature.accumulate(backend, [(m, torch.zeros(1)) for m in matrices], truncation=truncation)
    return backend, curvature


def decaying(size: int) -> torch.Tensor:
    """Eigenvalues 1, 1/2, 1/4, … in a random basis."""
    Q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator(7))).Q
    return (Q * 0.5 ** torch.arange(size)) @ Q.T


@pytest.mark.parametrize("precision", [SCALAR, PER_LAYER, PER_WEIGHT], ids=["scalar", "per layer", "per weight"])
def test_lowrank_satisfies_the_contract(precision):
    first, second = psd(P, 1, rank=3), psd(P, 2, rank=4)
    found = [fit([matrix], ALL)[1] for matrix in (first, second)]
    assert [len(curvature.values) for curvature in found] == [3, 4]
    check_curvature(*found, first + second, (first, second), prior(precision))


def test_the_sum_over_batches_is_what_is_decomposed():
    _, curvature = fit([psd(P, 1), psd(P, 2), psd(P, 3)], ALL)
    assert_close(curvature.to_dense(), psd(P, 1) + psd(P, 2) + psd(P, 3))
    assert curvature.captured == pytest.approx(1.0)
    assert curvature.n_passes == 1  # fewer weights than directions


def test_a_rank_takes_three_passes_and_finds_the_leading_eigenpairs():
    matrix = decaying(200)
    backend, curvature = fit([matrix], Truncation(rank=6))
    assert backend.asked == [6 + lowrank.OVERSAMPLING] * lowrank.N_PASSES == [16] * curvature.n_passes
    values, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(curvature.values, values.flip(0)[:6], rtol=1e-9, atol=0)
    overlap = (curvature.vectors * vectors.flip(1)[:, :6]).sum(0).abs()
    torch.testing.assert_close(overlap, torch.ones(6), rtol=1e-7, atol=0)
    assert_close(curvature.vectors.T @ curvature.vectors, torch.eye(6))


class Formed(Matrix):
    """One that gives the matrix as well."""

    gives_matrix = True


def formed(matrices, truncation, **options):
    backend = Formed(len(matrices[0]), **options)
    _, curvature = LowRankCurvature.accumulate(backend, [(m, torch.zeros(1)) for m in matrices], truncation=truncation)
    return backend, curvature


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_where_a_few_directions_do_not_suffice_the_matrix_is_formed_once(share):
    """And eigenpairs are those of the matrix, whether it is decomposed or multiplied with again."""
    first, second = psd(400, 5, rank=120), psd(400, 6, rank=80)
    backend, curvature = formed([first, second], Truncation(captured_trace=share))
    assert backend.asked == [32, 32, "matrix", "matrix"]
    assert curvature.n_passes == 2
    held = torch.linalg.eigvalsh(first + second).flip(0)
    fewest = int((held.cumsum(0) / held.sum() >= share).int().argmax()) + 1
    assert curvature.captured >= share
    assert fewest <= len(curvature.values) <= 1.2 * fewest + 2
    others = fit([first, second], Truncation(captured_trace=share))[1]
    assert len(curvature.values) == pytest.approx(len(others.values), abs=2)
    assert_close(curvature.vectors.T @ curvature.vectors, torch.eye(len(curvature.values)))


def test_a_rank_of_many_directions_takes_the_matrix_in_one_pass():
    matrix = psd(90, 1, rank=50) - psd(90, 2, rank=30)
    backend, curvature = formed([matrix], Truncation(rank=20), trace=False)
    assert backend.asked == ["matrix"]
    values, vectors = torch.linalg.eigh(matrix)
    assert_close(curvature.values, values.flip(0)[:20])
    kept = vectors[:, -20:]
    assert_close(curvature.to_dense(), (kept * values[-20:]) @ kept.T)
    assert curvature.captured is None, "the trace of an indefinite matrix"
    assert formed([psd(90, 1, rank=50)], Truncation(rank=20))[1].captured == pytest.approx(0.68, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_cut_among_equal_eigenvalues_does_not_depend_on_rounding(dtype):
    """Those of outputs that share their curvature: the eigenpair of the first output is kept."""
    matrix = torch.kron(torch.eye(2), decaying(20)).to(dtype)
    matrix = matrix + 1e-12 * torch.randn(40, 40, generator=generator(5)).to(dtype)
    backend = Formed(40)
    backend.zeros = lambda: torch.zeros(40, dtype=dtype)
    _, curvature = LowRankCurvature.accumulate(
        backend, [((matrix + matrix.T) / 2, torch.zeros(1))], truncation=Truncation(rank=3)
    )
    assert curvature.vectors.dtype == dtype
    assert float(curvature.vectors[20:, 2].abs().max()) < 1e-4
    assert_close(curvature.values, torch.tensor([1.0, 1.0, 0.5], dtype=dtype))


def test_no_ritz_value_exceeds_the_eigenvalue_of_its_rank():
    matrix = psd(60, 3, rank=60)
    Q = torch.linalg.qr(torch.randn(60, 9).double()).Q
    assert bool((ritz(Q, matrix @ Q)[0] <= torch.linalg.eigvalsh(matrix).flip(0)[:9] * (1 + 1e-12)).all())


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_share_of_the_trace_is_held_by_as_few_eigenpairs_as_hold_it(share):
    matrix = psd(300, 5, rank=120)
    backend, curvature = fit([matrix], Truncation(captured_trace=share))
    assert curvature.captured >= share
    above = curvature.values[curvature.values > curvature.values[-1] * (1 + lowrank.TIE)]
    assert float(above.sum()) < share * float(matrix.trace())
    growing = [min(300, 32 * 2**k) for k in range(curvature.n_passes)]
    assert backend.asked in (growing, [*growing[:-1], growing[-2]])
    held = torch.linalg.eigvalsh(matrix).flip(0).cumsum(0) / matrix.trace()
    fewest = int((held >= share).int().argmax()) + 1
    assert fewest <= len(curvature.values) <= 1.2 * fewest + 2


def test_the_positive_part_of_an_indefinite_matrix_is_kept():
    matrix = psd(40, 1, rank=3) - psd(40, 2, rank=4)
    _, curvature = fit([matrix], Truncation(rank=20), trace=False)
    values, vectors = torch.linalg.eigh(matrix)
    positive = (vectors * values.clamp(min=0)) @ vectors.T
    assert_close(curvature.to_dense(), positive)
    assert curvature.captured is None


@pytest.mark.parametrize("rank", [1, 10, 30])
def test_negative_eigenvalues_do_not_hide_the_largest_positive_ones(rank):
    noise = generator(3)
    Q = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64, generator=noise)).Q
    values = torch.cat([0.8 ** torch.arange(100.0), -1.2 * 0.9 ** torch.arange(200.0)]).double()
    backend, curvature = fit([(Q * values) @ Q.T], Truncation(rank=rank), trace=False)
    assert len(curvature.values) == rank
    assert sum(backend.asked) <= lowrank.MOST_PASSES * (rank + lowrank.OVERSAMPLING)
    assert bool((curvature.values <= values[:rank] * (1 + 1e-9)).all())
    assert float(curvature.values.sum()) > 0.97 * float(values[:rank].sum())


def test_a_hessian_with_fewer_positive_eigenvalues_than_asked_for_says_so():
    matrix = psd(300, 1, rank=3) - 9 * psd(300, 2, rank=200)
    with pytest.warns(NumericalWarning, match=r"3 positive eigenvalues were found in 6 passes, fewer than rank=5"):
        _, curvature = fit([matrix], Truncation(rank=5), trace=False)
    values = torch.linalg.eigvalsh(matrix).flip(0)
    assert len(curvature.values) == 3 == int((values > 1e-9).sum())


class Sampled(Matrix):
    """Another matrix of the same rank in each pass."""

    is_sampled = True

    def lowrank(self, x, y, directions):
        return super().lowrank(psd(self.size, len(self.asked), rank=6), y, directions)


@pytest.mark.parametrize("truncation", [Truncation(rank=8), Truncation(captured_trace=0.999)], ids=["rank", "share"])
def test_a_sampled_curvature_is_that_of_one_sample(truncation):
    backend = Sampled(200)
    _, curvature = LowRankCurvature.accumulate(backend, [(torch.empty(0), torch.zeros(1))], truncation=truncation)
    last = psd(200, len(backend.asked) - 1, rank=6)
    torch.testing.assert_close(curvature.to_dense(), last, rtol=1e-6, atol=1e-6 * float(last.trace()))
    assert curvature.captured == pytest.approx(1.0)


def test_nystrom_is_exact_up_to_the_number_of_directions_and_never_above():
    Q = torch.linalg.qr(torch.randn(60, 9, generator=generator(0)).double()).Q
    low, high = psd(60, 1, rank=9), psd(60, 1, rank=60)
    values, vectors = nystrom(Q, low @ Q)
    torch.testing.assert_close((vectors * values) @ vectors.T, low, rtol=1e-7, atol=1e-9)
    values, vectors = nystrom(Q, high @ Q)
    assert float(torch.linalg.eigvalsh(high - (vectors * values) @ vectors.T).min()) > -1e-9
    assert float(values.sum()) > float(ritz(Q, high @ Q)[0].sum())
    assert float(nystrom(Q, 0 * Q)[0].sum()) == 0


def test_a_state_of_other_sizes_is_refused():
    state = fit([psd(P, 1)], ALL)[1].state()
    known = {"dtype": torch.float64, "P": P}
    check_entries(state, LowRankCurvature.entries, dict(known))
    with pytest.raises(StateError, match=r"'values' must be a tensor of the shape .*it is a tensor of the shape \[1\]"):
        check_entries({**state, "values": state["values"][:1]}, LowRankCurvature.entries, dict(known))


def test_a_share_of_an_unknown_trace_is_refused():
    with pytest.raises(UnsupportedError, match=r"indefinite.*pass rank="):
        fit([psd(5, 1)], Truncation(), trace=False)


def test_curvature_that_is_zero_leaves_the_prior():
    _, curvature = fit([torch.zeros(P, P).double()], Truncation())
    precision = curvature.posterior(prior(SCALAR))
    assert_close(precision.to_dense(), prior(SCALAR).diagonal().diag())
    assert_close(precision.logdet(), P * SCALAR.log().sum())


def test_adding_what_was_truncated_warns_with_what_is_left():
    first, second = (fit([decaying(50)], Truncation(rank=2))[1] for _ in range(2))
    with pytest.warns(NumericalWarning, match=r"rank 2, which holds 7\d.\d% of the trace"):
        merged = first.merge(second)
    assert_close(merged.values, 2 * first.values)
    assert_close(merged.vectors.T @ merged.vectors, torch.eye(2))


def test_directions_that_do_not_fit_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(linalg, "memory_of", lambda _: 1e5)
    with pytest.raises(UnsupportedError, match=r"directions for 200 weights.*Keep fewer eigenpairs"):
        fit([psd(200, 1)], Truncation(rank=190))
    monkeypatch.undo()
    assert fit([psd(200, 1)], Truncation(rank=190))[1].captured == pytest.approx(1.0)


def test_the_global_generator_does_not_move_and_fits_are_the_same():
    before = torch.get_rng_state()
    first, second = (fit([decaying(100)], Truncation(rank=3))[1] for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.vectors, second.vectors)


def test_a_choice_may_be_made_once_for_all():
    chosen = LowRankCurvature.choosing(Truncation(rank=2))
    backend = Matrix(P)
    _, curvature = chosen.from_batch(backend, psd(P, 1, rank=5), torch.zeros(1))
    assert type(curvature) is LowRankCurvature
    assert len(curvature.values) == 2
    assert LowRankCurvature.default == Truncation()


def test_equal_eigenvalues_are_kept_together():
    """Those of two outputs that share their curvature, say: which half is first is a matter of rounding."""
    matrix = torch.block_diag(decaying(20), decaying(20))
    for share in (0.5, 0.8, 0.95):
        _, curvature = fit([matrix], Truncation(captured_trace=share))
        assert len(curvature.values) % 2 == 0
