from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_dp import FlatClipping, GaussianNoise, GradientEncoding, LaplaceNoise, PrivateStrategy
from lightning_dp.mechanism.randomness import Randomness
from tests.conftest import Net, fit, loader, trainer
from tests.mechanism.test_noise import is_gaussian_of_std

CPU = torch.device("cpu")


def normals(randomness: Randomness, step: int, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=randomness.torch("noise", step, CPU))


def test_streams_differ_between_steps_purposes_and_runs() -> None:
    randomness = Randomness()
    assert not torch.equal(normals(randomness, 0), normals(randomness, 1))
    assert not torch.equal(normals(randomness, 0), normals(Randomness(), 0))
    blocks = [torch.randn(50, generator=randomness.torch("noise", 0, CPU, block)) for block in (0, 1)]
    assert not torch.equal(*blocks)
    sampling, noise = randomness.numpy("sampling", 0), randomness.numpy("noise", 0)
    assert not np.array_equal(sampling.random(10), noise.random(10))


def test_the_global_seed_has_no_influence() -> None:
    torch.manual_seed(1)
    first = normals(Randomness(), 0)
    torch.manual_seed(1)
    assert not torch.equal(first, normals(Randomness(), 0))


def test_renewing_changes_a_secret_and_keeps_an_explicit_seed() -> None:
    secret, explicit = Randomness(), Randomness(seed=3)
    before = normals(secret, 0), normals(explicit, 0)
    secret.renew()
    explicit.renew()
    assert not torch.equal(before[0], normals(secret, 0))
    assert torch.equal(before[1], normals(explicit, 0))
    assert torch.equal(before[1], normals(Randomness(seed=3), 0))


def test_the_whole_generator_state_is_seeded() -> None:
    """torch's manual_seed keeps 32 bits of a seed: two states that agree in the first word must still differ."""
    state = Randomness(seed=1).torch("noise", 0, CPU).get_state()
    words = state.numpy()[24 : 24 + 624 * 8].view(np.uint64)
    assert words.max() < 2**32
    assert len(set(words.tolist())) > 600
    seeded_by_torch = {tuple(torch.Generator().manual_seed(s).get_state().numpy()[32:64]) for s in (int(words[0]), 0)}
    assert tuple(state.numpy()[32:64]) not in seeded_by_torch


def test_the_secret_is_not_pickled() -> None:
    randomness = Randomness()
    copy = pickle.loads(pickle.dumps(randomness))
    assert str(randomness._entropy) not in str(vars(copy)) and copy._entropy != randomness._entropy
    assert randomness._entropy.to_bytes(32, "little") not in pickle.dumps(randomness)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        Randomness(-1)


# -- secure ------------------------------------------------------------------------------------------------------------


def test_secure_streams_are_those_of_chacha_and_differ() -> None:
    randomness = Randomness(secure=True)
    device = torch.device("cpu")
    streams = [
        randomness.numpy("sampling", 0),
        randomness.numpy("sampling", 1),
        randomness.torch("noise", 0, device),
        randomness.torch("noise", 0, device, 1),
        randomness.torch("noise", 1, device),
        randomness.torch("query", 0, device),
        Randomness(secure=True).numpy("sampling", 0),
    ]
    assert all(type(stream.bit_generator).__name__ == "ChaCha" for stream in streams)  # type: ignore[union-attr]
    assert len({tuple(stream.integers(2**63, size=4)) for stream in streams}) == len(streams)  # type: ignore[union-attr]
    again = [randomness.numpy("sampling", 3).random(), randomness.numpy("sampling", 3).random()]
    assert again[0] == again[1], "a function of the step's number"


def test_a_secure_secret_is_neither_given_nor_kept() -> None:
    with pytest.raises(ValueError, match="leave seed out"):
        Randomness(seed=1, secure=True)
    randomness = Randomness(secure=True)
    copied = pickle.loads(pickle.dumps(randomness))
    assert copied.secure
    assert copied.numpy("sampling", 0).random() != randomness.numpy("sampling", 0).random()
    before = randomness.numpy("sampling", 0).random()
    randomness.renew()
    assert randomness.numpy("sampling", 0).random() != before


def test_secure_noise_has_the_std_that_is_asked_for_and_is_a_sum_of_four() -> None:
    out = torch.empty(200_000)
    randomness, device = Randomness(secure=True), torch.device("cpu")
    GaussianNoise().fill_(out, 3.0, lambda block: randomness.torch("noise", 0, device, block))
    assert is_gaussian_of_std(out.double(), 3.0)
    assert not is_gaussian_of_std(out.double(), 2.0) and not is_gaussian_of_std(out.double(), 4.5)
    asked: list[tuple[int, ...]] = []

    class Counting(np.random.Generator):
        def standard_normal(self, size: Any = None, *args: Any, **kwargs: Any) -> Any:
            asked.append(size)
            return super().standard_normal(size, *args, **kwargs)

    GaussianNoise().fill_(out[:100], 1.0, lambda block: Counting(np.random.PCG64(0)))
    assert asked == [(4, 100)]


def test_secure_training(tmp_path: Path) -> None:
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0), secure_rng=True)
    run = trainer(strategy=strategy, default_root_dir=tmp_path)
    fit(run, Net(), loader())
    assert len(strategy.ledger) == 5
    assert strategy.public_configuration()["secure_rng"] is True
    with pytest.raises(ValueError, match="hardens Gaussian noise"):
        PrivateStrategy(GradientEncoding(), LaplaceNoise(1.0), secure_rng=True)
