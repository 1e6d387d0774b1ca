from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_dp import BackpropClipping, PerLayerClipping
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import PrivacyLimitReached
from lightning_dp.gradients.base import Dense
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.mechanism import sums as sums_module
from lightning_dp.mechanism.clipping import Bounding, FlatClipping
from lightning_dp.mechanism.noise import GaussianNoise
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.mechanism.step import PrivateStep
from tests.mechanism.test_noise import is_gaussian_of_std
from tests.steps import make_step

pytestmark = pytest.mark.on_device


def private_step(model: nn.Module, ledger: PrivacyLedger, max_norm: float = 0.5) -> PrivateStep:
    return make_step(BookKeeping(model), FlatClipping(max_norm), GaussianNoise(), ledger, Randomness())


def take(step: PrivateStep, multiplier: float, divisor: float = 1.0, limit: Any = None, others: Any = ()) -> None:
    """A step in which nobody was drawn."""
    step.begin(multiplier, 0.1, divisor, limit)
    step.release(others)


def test_the_noise_of_one_step_has_std_zC_over_qN() -> None:
    """Also for parameters that no example's gradient reached, and when nobody was drawn."""
    model = nn.Linear(100, 100)
    step = private_step(model, PrivacyLedger(), max_norm=0.5)
    z, expected_batch_size = 3.0, 20.0
    take(step, z, expected_batch_size)
    assert model.weight.grad is not None
    sample = model.weight.grad.flatten().double()
    std = z * 0.5 / expected_batch_size
    assert is_gaussian_of_std(sample, std)
    assert not is_gaussian_of_std(sample, std * 2 / 3)
    assert not is_gaussian_of_std(sample, std * 3 / 2)


def test_noise_is_fresh_in_every_step() -> None:
    model = nn.Linear(3, 3)
    step = private_step(model, PrivacyLedger())
    seen = set()
    for _ in range(5):
        model.zero_grad()
        take(step, 1.0)
        assert model.weight.grad is not None
        seen.add(model.weight.grad[0, 0].item())
    assert len(seen) == 5


def test_the_ledger_is_charged_before_any_gradient_is_visible() -> None:
    model = nn.Linear(3, 3)
    visible_at_charge = []

    class Watching(PrivacyLedger):
        def record(self, event: object, count: int = 1) -> None:
            visible_at_charge.append(any(p.grad is not None for p in model.parameters()))
            super().record(event, count)  # type: ignore[arg-type]

    ledger = Watching()
    take(private_step(model, ledger), 1.5)
    assert visible_at_charge == [False]
    assert list(ledger) == [(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.5)), 1)]


def test_a_step_without_noise_is_recorded_as_not_private() -> None:
    ledger = PrivacyLedger()
    take(private_step(nn.Linear(3, 3), ledger), 0.0)
    assert list(ledger) == [(NonPrivateDpEvent(), 1)]
    assert ledger.epsilon(1e-5) == float("inf")


def test_nothing_is_released_beyond_the_limit() -> None:
    model = nn.Linear(3, 3)
    ledger = PrivacyLedger()
    step = private_step(model, ledger)
    take(step, 1.0, limit=lambda event: 1)
    model.zero_grad()
    with pytest.raises(PrivacyLimitReached):
        take(step, 1.0, limit=lambda event: 1)
    assert len(ledger) == 1 and model.weight.grad is None


def test_a_gradient_of_a_parameter_that_is_not_bounded_stops_the_release() -> None:
    stray = nn.Parameter(torch.zeros(3))
    ledger = PrivacyLedger()
    step = private_step(nn.Linear(3, 3), ledger)
    take(step, 1.0, others=[stray])
    stray.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="does not bound"):
        take(step, 1.0, others=[stray])
    assert len(ledger) == 1


def test_an_interrupted_step_leaves_nothing_for_the_next() -> None:
    model = nn.Linear(3, 1)
    step = private_step(model, PrivacyLedger())
    step.begin(0.0, 0.1, 1.0)
    with step.engine.forward(1):
        loss = model(torch.ones(1, 3)).sum()
    with step.backward(1.0):
        loss.backward()
    take(step, 0.0)
    assert model.weight.grad is not None
    assert (model.weight.grad == 0).all()


def test_parameters_of_two_precisions_get_independent_noise() -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False).double())
    take(private_step(model, PrivacyLedger(), max_norm=0.5), 2.0)
    first, second = (layer.weight.grad.flatten().double() for layer in model)
    assert is_gaussian_of_std(first, 1.0)
    assert is_gaussian_of_std(second, 1.0)
    assert abs((first * second).mean()) < 5 / 100


# -- several processes -------------------------------------------------------------------------------------------------


def one_of_several(
    rule: Bounding,
    model: nn.Module,
    add_up: Any = lambda tensor: lambda: None,
    charge: Any = lambda event, at_most: None,
    **arguments: Any,
) -> PrivateStep:
    """The step of a process of several, whose others are not there."""
    bound = rule.for_module(model)
    engine = bound.make_engine("bookkeeping", model)
    noise, ledger = GaussianNoise(), PrivacyLedger()
    return make_step(engine, bound, noise, ledger, Randomness(1), add_up, charge, **arguments)


def sent_by(rule: Bounding, sizes: list[int], bucket: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """The step of a first process of several, and what happens in it: charges, tensors sent by their length, ends of
    backward passes."""
    monkeypatch.setattr(sums_module, "BUCKET", bucket)
    model = nn.Sequential(*(nn.Linear(one, other, bias=False) for one, other in pairwise(sizes)))
    happened: list[str] = []

    def add_up(tensor: Tensor) -> Any:
        happened.append(str(len(tensor)))
        return lambda: happened.append(f"got {len(tensor)}")

    step = one_of_several(rule, model, add_up, lambda event, at_most: happened.append("charged"), world_size=2)
    step.begin(1.0, 0.1, 1.0)
    for last in (False, True):
        with step.engine.forward(3):
            loss = model(torch.randn(3, sizes[0])).sum()
        with step.backward(1.0, last):
            loss.backward()
        happened.append("end of backward")
    step.release()
    return step, happened


@pytest.mark.parametrize("rule", [PerLayerClipping(1.0), BackpropClipping(1.0, 1.0)], ids=repr)
def test_sums_travel_during_the_last_backward_pass_once_they_are_charged(
    rule: Bounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, happened = sent_by(rule, [7, 5, 3, 1], 4, monkeypatch)
    end = "end of backward"
    assert happened == [end, "charged", "3", "15", "35", end, "got 3", "got 15", "got 35"]
    assert len(step.ledger) == 1


@pytest.mark.parametrize("rule", [FlatClipping(1.0), PerLayerClipping(1.0), BackpropClipping(1.0, 1.0)], ids=repr)
def test_a_bucket_travels_when_all_of_it_is_known(rule: Bounding, monkeypatch: pytest.MonkeyPatch) -> None:
    _, happened = sent_by(rule, [7, 5, 3, 1], 4 * 18, monkeypatch)
    end = "end of backward"
    early = ["charged", "18", "35", end] if not isinstance(rule, FlatClipping) else [end, "charged", "18", "35"]
    assert happened == [end, *early, "got 18", "got 35"]


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8),
    st.integers(1, 400),
    st.lists(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), min_size=8, max_size=8),
)
def test_buckets_hold_every_parameter_once_and_no_stream_twice(
    sizes: list[int], size: int, dtypes: list[torch.dtype]
) -> None:
    parameters = {f"p{i}": torch.zeros(n, dtype=d) for i, (n, d) in enumerate(zip(sizes, dtypes, strict=False))}
    found = sums_module.make_buckets(parameters, size)
    assert sorted(name for bucket in found for name in bucket.names) == sorted(parameters)
    streams = []
    for bucket in found:
        assert bucket.sizes == tuple(parameters[name].numel() for name in bucket.names)
        assert all(parameters[n].dtype in (bucket.dtype, torch.bfloat16) for n in bucket.names)
        assert sum(bucket.sizes[:-1]) * bucket.dtype.itemsize < size
        streams += [
            bucket.first_block + i for i in range(-(-sum(bucket.sizes) // sums_module.block_size(bucket.device)))
        ]
    assert len(set(streams)) == len(streams)


@pytest.mark.parametrize("rule", [PerLayerClipping(1.0), BackpropClipping(1.0, 1.0)], ids=repr)
@pytest.mark.parametrize("fails", ["charge", "send"])
def test_an_error_within_the_backward_pass_that_is_ignored_stops_the_release(rule: Bounding, fails: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    once = [True]

    def fail(what: str) -> None:
        if what == fails and once:
            once.pop()
            raise RuntimeError("out of memory")

    def add_up(tensor: Tensor) -> Any:
        fail("send")
        return lambda: None

    step = one_of_several(rule, model, add_up, lambda event, at_most: fail("charge"))
    step.begin(1.0, 0.1, 1.0)
    with step.engine.forward(2):
        loss = model(torch.randn(2, 3)).sum()
    with step.backward(1.0, last=True), suppress(RuntimeError):
        loss.backward()
    with pytest.raises(RuntimeError, match="was ignored"):
        step.release()
    assert all(p.grad is None for p in model.parameters())


def test_several_backward_passes_through_one_parameter_are_refused_among_several_processes() -> None:
    layer = nn.Linear(2, 2)
    step = one_of_several(BackpropClipping(1.0, 1.0), layer)
    step.begin(1.0, 0.1, 1.0)
    with step.engine.forward(2):
        first, second = layer(torch.randn(2, 2)).sum(), layer(torch.randn(2, 2)).sum()
    with pytest.raises(RuntimeError, match="in two parts"), step.backward(1.0, last=True):
        first.backward()
        second.backward()


@pytest.mark.parametrize("world_size", [2, 3])
def test_noise_is_shared_out(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes of layers, and each coordinate's is drawn by one process."""
    monkeypatch.setattr(sums_module, "BUCKET", 400)
    monkeypatch.setattr(sums_module, "block_size", lambda device: 100)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 4))
    drawn = []
    for rank in range(world_size):
        step = one_of_several(FlatClipping(1.0), model, rank=rank, world_size=world_size)
        take(step, 1.0)
        drawn.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) != 0)
    assert (torch.stack(drawn).sum(0) == 1).all()
    shares = [float(mask.float().mean()) for mask in drawn]
    assert max(shares) < 1.5 / world_size, shares


def test_a_gradient_that_comes_in_two_parts_is_not_clipped_twice() -> None:
    model = nn.Linear(3, 2)
    step = private_step(model, PrivacyLedger())
    step.begin(0.0, 0.1, 1.0)
    with pytest.raises(RuntimeError, match="two parts"), step.backward():
        step.contributions.add_clipped({"weight": Dense(torch.ones(2, 2, 3))}, [0])
        step.contributions.add_clipped({"bias": Dense(torch.ones(2, 2))}, [0])


def test_norms_are_kept_also_among_several_processes() -> None:
    model, inputs = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), torch.randn(5, 3)
    kept = []
    for add_up in (None, lambda tensor: lambda: None):
        step = one_of_several(PerLayerClipping(0.1), model, add_up)
        step.contributions.keep_norms = True
        step.begin(0.0, 0.1, 1.0)
        with step.engine.forward(5):
            loss = model(inputs).pow(2).sum()
        with step.backward(1.0, last=True):
            loss.backward()
        step.release()
        kept.append(torch.stack([*step.contributions.norms, *step.contributions.weights]))
    assert kept[0].shape == (2, 5, 2) and (kept[0] > 0).all()
    assert torch.allclose(kept[0], kept[1])


def test_the_kept_norm_of_an_example_that_is_left_out_is_zero() -> None:
    model = nn.Linear(3, 2)
    step = private_step(model, PrivacyLedger())
    step.contributions.keep_norms = True
    inputs = torch.ones(3, 3)
    inputs[1] = torch.nan
    step.begin(1.0, 0.1, 3.0)
    with step.engine.forward(3):
        loss = model(inputs).pow(2).sum(1).mean()
    with step.backward(3.0):
        loss.backward()
    [norms] = step.contributions.norms
    step.release()
    assert norms[1, 0] == 0
    assert (norms[[0, 2], 0] > 0).all()
    assert step.nonfinite_examples == 1


def test_a_step_is_released_once() -> None:
    """A second release would have the same noise: the difference of the two is the sum itself."""
    model = nn.Linear(3, 2)
    step = private_step(model, PrivacyLedger())
    with pytest.raises(RuntimeError, match="No private step is under way"):
        step.release()
    take(step, 1.0)
    for later in (step.release, step.backward):
        with pytest.raises(RuntimeError, match="No private step is under way"):
            later()
    assert len(step.ledger) == 1


def test_a_step_beyond_the_limit_cannot_go_on() -> None:
    step = private_step(nn.Linear(3, 2), PrivacyLedger())
    with pytest.raises(PrivacyLimitReached):
        step.begin(1.0, 0.1, 1.0, limit=lambda event: 0)
    with pytest.raises(RuntimeError, match="under way"):
        step.backward()
    with pytest.raises(RuntimeError, match="under way"):
        step.release()
    assert not len(step.ledger)
