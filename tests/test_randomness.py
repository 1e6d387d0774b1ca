from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from lightning_dp.randomness import Randomness

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
