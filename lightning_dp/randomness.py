"""Where sampling and noise draw their randomness from: secret streams that nothing else shares.

Whoever knows the randomness of a private step can subtract its noise. So the streams are seeded from the operating
system's entropy at the start of every fit, never from `seed_everything`, and neither seed nor state is ever saved.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

Stream = Literal["sampling", "noise", "query", "denoising"]
_STREAMS: dict[Stream, int] = {"sampling": 0, "noise": 1, "query": 2, "denoising": 3}


class Randomness:
    """A family of random streams, one per purpose and private step: pure functions of a secret and the step's number.

    Because a step's draws depend on its number alone, a run resumed under an explicit ``seed`` repeats exactly what
    the uninterrupted run would have drawn, and no generator state has to be kept for it.

    Args:
        seed: ``None`` draws 256 bits of secret entropy. An integer is for tests and debugging: the privacy guarantee
            then holds only against those who do not know it.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be a non-negative integer or None, got {seed}.")
        self.seed = seed
        self.renew()

    def renew(self) -> None:
        """Draws a new secret; without effect under an explicit seed."""
        self._entropy = secrets.randbits(256) if self.seed is None else self.seed

    def share(self, broadcast: Callable[[int], int]) -> None:
        """Takes the secret of the first process, with which all draw the same samples.

        Args:
            broadcast: Returns its argument of the first process, in every process.
        """
        self._entropy = broadcast(self._entropy)

    def numpy(self, stream: Stream, step: int) -> np.random.Generator:
        """The generator of this stream at this step, for index sampling."""
        return np.random.Generator(np.random.PCG64(self._sequence(stream, step)))

    def torch(self, stream: Stream, step: int, device: torch.device, block: int = 0) -> torch.Generator:
        """The generator of this stream at this step, on this device; independent ones for parts of a long draw."""
        sequence = self._sequence(stream, step, block)
        generator = torch.Generator(device)
        generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
        if device.type == "cpu":
            _fill_mersenne_twister(generator, sequence)
        return generator

    def _sequence(self, stream: Stream, step: int, block: int = 0) -> np.random.SeedSequence:
        return np.random.SeedSequence(self._entropy, spawn_key=(_STREAMS[stream], step, block), pool_size=8)

    def __getstate__(self) -> dict[str, int | None]:
        # Pickled into worker processes, or by accident into a file: the secret stays here.
        return {"seed": self.seed}

    def __setstate__(self, state: dict[str, int | None]) -> None:
        self.seed = state["seed"]
        self.renew()


#: Offset and length, in bytes, of the 624 state words in the state of torch's CPU generator (each stored in 8 bytes).
_WORDS_OFFSET, _WORDS = 24, 624


def _fill_mersenne_twister(generator: torch.Generator, sequence: np.random.SeedSequence) -> None:
    """Gives torch's CPU generator a full-size seed: `manual_seed` uses 32 bits only, few enough to try them all."""
    state = generator.get_state()
    words = sequence.generate_state(_WORDS + 2, np.uint32)[2:].astype(np.uint64)
    words[0] |= np.uint64(1 << 31)  # never the all-zero state
    state.numpy()[_WORDS_OFFSET : _WORDS_OFFSET + 8 * _WORDS] = words.view(np.uint8)
    generator.set_state(state)
