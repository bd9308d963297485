"""Many threads and one model: what each of them gets is what it would get alone, bit for bit."""

import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from laplace import Laplace
from laplace.network import FeatureExtractor
from laplace.network.modes import attributes_restored, evaluating, training
from laplace.network.threads import alone, together
from tests.contracts import model_untouched

N_THREADS = 8
N_CALLS = 2 * N_THREADS
KINDS = (
    {"pred_type": "glm"},
    {"pred_type": "glm", "link_approx": "mc", "n_samples": 3},
    {"pred_type": "nn", "n_samples": 3},
)
"""How the threads predict."""


def network(*, stateful: bool = False) -> nn.Module:
    """With dropout, which shows the mode, and maybe a weight that a hook makes again before each pass."""
    torch.manual_seed(0)
    first = nn.Linear(4, 16)
    if stateful:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old kind, which assigns the weight to the module
            first = weight_norm(first)
    return nn.Sequential(first, nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).train()


def batches(n_rows: int = 24) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_rows, 4, generator=generator)
    return list(zip(x.split(12), torch.randint(3, (n_rows,), generator=generator).split(12), strict=True))


def fitted(model: nn.Module, subset: str, structure: str):
    la = Laplace(model, "classification", subset, structure)
    la.fit(batches())
    return la


def predictions(la, seed: int) -> list[Tensor]:
    """One of each kind, with random numbers of its own."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    return [la(x, generator=torch.Generator().manual_seed(seed), **options) for options in KINDS]


def in_threads(work, n_calls: int = N_THREADS, n_threads: int = N_THREADS) -> list:
    """What `work(0)`, `work(1)`, … return, or raise, each called by some thread; all threads start at once."""
    barrier = threading.Barrier(n_threads)

    def run(number: int):
        if number < n_threads:
            barrier.wait()
        try:
            return work(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(run, range(n_calls)))


def lost(found: list, expected: list) -> list[str]:
    """The calls that raised or returned other bits."""
    wrong = []
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if isinstance(ours, Exception):
            wrong.append(f"call {number}: {type(ours).__name__}: {ours}")
        elif not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            wrong.append(f"call {number}: other numbers")
    return wrong


@pytest.mark.parametrize(("structure", "stateful"), [("kron", False), ("full", False), ("diag", False), ("kron", True)])
@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_eight_threads_with_one_object_get_what_one_gets(subset, structure, stateful):
    model = network(stateful=stateful)
    la = fitted(model, subset, structure)
    expected = [predictions(la, seed) for seed in range(N_CALLS)]
    la.prior_precision = la.prior_precision  # the threads factorize
    before = nullcontext() if stateful else model_untouched(model)
    with before:
        wrong = lost(in_threads(lambda number: predictions(la, number), N_CALLS), expected)
    assert not wrong, f"{len(wrong)} of {N_CALLS}: {wrong[:3]}"
    assert all(module.training for module in model.modules())


def test_threads_with_two_objects_over_one_model_do_not_disturb_each_other():
    model = network()
    both = [fitted(model, "last_layer", "kron"), fitted(model, "all", "kron")]
    expected = [predictions(both[seed % 2], seed) for seed in range(N_CALLS)]
    with model_untouched(model):
        wrong = lost(in_threads(lambda number: predictions(both[number % 2], number), N_CALLS), expected)
    assert not wrong, f"{len(wrong)} of {N_CALLS}: {wrong[:3]}"


@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_predictions_while_another_thread_fits_and_assigns_are_those_of_one_fit(subset):
    model = network()
    la = fitted(model, subset, "kron")
    one = predictions(la, 0)
    la.prior_precision = 5.0
    other = predictions(la, 0)
    la.prior_precision = 1.0

    def work(number: int):
        if number:
            return [predictions(la, 0) for _ in range(5)]
        for k in range(6):
            la.fit(batches())
            la.prior_precision = (5.0, 1.0)[k % 2]
        return []

    with model_untouched(model):
        results = in_threads(work, 4, 4)
    assert not [result for result in results if isinstance(result, Exception)]
    for found in (prediction for result in results for prediction in result):
        for ours, *allowed in zip(found, one, other, strict=True):
            assert any(torch.equal(ours, value) for value in allowed)
    assert not lost([predictions(la, 0)], [one]), "nothing of an earlier fit or prior is left"


@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_a_thread_in_inference_mode_leaves_nothing_behind_that_another_cannot_differentiate(subset):
    model = network()
    la = fitted(model, subset, "kron")
    la.enable_backprop = True

    def work(number: int):
        if number % 2:
            with torch.inference_mode():
                return [la(batches()[0][0])]
        x = batches()[0][0].clone().requires_grad_()
        la(x).sum().backward()
        return [x.grad]

    expected = [work(number) for number in range(N_THREADS)]
    la.prior_precision = la.prior_precision
    assert not lost(in_threads(work), expected)


def test_threads_find_one_last_layer():
    x = batches()[0][0]
    for _ in range(5):
        extractor = FeatureExtractor(network().eval())
        found = in_threads(lambda _, extractor=extractor: extractor.forward_with_features(x))
        assert not lost(found, [extractor.forward_with_features(x)] * N_THREADS)
        assert extractor.last_layer_name == "5"


# -- modes and passes -------------------------------------------------------------------------------------------------


class Evaluator:
    """Another thread that evaluates a model from `start` to `stop`."""

    def __init__(self, model: nn.Module):
        self.model, self.inside, self.go_on = model, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.evaluate)

    def evaluate(self) -> None:
        with evaluating(self.model):
            self.inside.set()
            self.go_on.wait(60)

    def start(self) -> None:
        self.thread.start()
        self.inside.wait(60)

    def stop(self) -> None:
        self.go_on.set()
        self.thread.join(60)


@pytest.mark.parametrize("first_out", [0, 1])
def test_the_last_thread_out_restores_modes(first_out):
    model = network()
    model[1].eval()
    both = [Evaluator(model), Evaluator(model)]
    with model_untouched(model):
        for other in both:
            other.start()
        both[first_out].stop()
        assert not any(module.training for module in model.modules()), "the other still evaluates"
        both[1 - first_out].stop()


def test_evaluation_within_training_ends_in_training():
    model = network().eval()
    with model_untouched(model), training(model):
        with evaluating(model):
            assert not any(module.training for module in model.modules())
        assert all(module.training for module in model.modules())


def test_a_part_that_another_thread_evaluates_stays_as_it_is():
    seen = []

    class Dropout(nn.Dropout):
        def train(self, mode: bool = True):
            seen.append(mode)
            return super().train(mode)

    model = network()
    model[2] = Dropout()
    part = Evaluator(model[2])
    with model_untouched(model):
        part.start()
        with evaluating(model):
            pass
        assert model.training
        assert not model[2].training
        assert True not in seen, "not even for a moment"
        part.stop()


def test_passes_with_other_weights_run_alone_and_others_together():
    model, log = network(), []
    inside, go_on = threading.Event(), threading.Event()

    def reader():
        with together(model):
            log.append("reads")
            inside.set()
            go_on.wait()
            log.append("has read")

    def writer():
        inside.wait()
        with alone(model[3]):  # a part of it
            log.append("writes")

    threads = [threading.Thread(target=target) for target in (reader, writer)]
    for thread in threads:
        thread.start()
    inside.wait()
    with together(model[5]):
        log.append("reads, too")
    go_on.set()
    for thread in threads:
        thread.join()
    assert log == ["reads", "reads, too", "has read", "writes"]


def test_a_thread_in_a_pass_may_start_another():
    model = network()
    with alone(model), together(model), alone(model), alone(model[0]):
        pass
    with together(model), together(model):
        pass
    with alone(model):  # nobody is left
        pass


def test_attributes_are_restored_without_a_moment_in_which_they_are_missing():
    model, stop, missing = network(), threading.Event(), []

    def look():
        while not stop.is_set():
            missing.extend(name for name in ("training", "_modules") if name not in vars(model))

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(2000):
        with attributes_restored(model):
            model.cached = torch.full((), number)
    stop.set()
    thread.join()
    assert not missing
    assert not hasattr(model, "cached")


def test_a_forked_process_does_not_wait_for_threads_that_it_has_not():
    model, inside, done = network(), threading.Event(), threading.Event()

    def work() -> None:
        with evaluating(model), alone(model):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork beside threads
        child = os.fork()
    if not child:
        status = 1
        try:
            with evaluating(model), alone(model):
                status = 2
            status = 0 if model.training else 3
        finally:
            os._exit(status)
    ended, code = os.waitpid(child, os.WNOHANG)
    for _ in range(1000):
        if ended:
            break
        time.sleep(0.02)
        ended, code = os.waitpid(child, os.WNOHANG)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    done.set()
    thread.join()
    assert ended == child
    assert code == 0
    assert model.training
