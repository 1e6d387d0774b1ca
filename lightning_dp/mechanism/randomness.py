"""Where sampling and noise draw their randomness from: secret streams that nothing else shares.

Whoever knows the randomness of a private step can subtract its noise. So the streams are seeded from the operating
system's entropy at the start of every fit, never from `seed_everything`, and neither seed nor state is ever saved.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

Stream = Literal["sampling", "noise", "query", "denoising", "statistic"]


#: What noise is drawn from; numpy's, when it is secure.
NoiseGenerator = torch.Generator | np.random.Generator


_STREAMS: dict[Stream, int] = {"sampling": 0, "noise": 1, "query": 2, "denoising": 3, "statistic": 4}


class Randomness:
    """A family of random streams, one per purpose and private step: pure functions of a secret and the step's number.

    Because a step's draws depend on its number alone, a run resumed under an explicit ``seed`` repeats exactly what
    the uninterrupted run would have drawn, and no generator state has to be kept for it.

    Args:
        seed: ``None`` draws 256 bits of secret entropy. An integer is for tests and debugging: the privacy guarantee
            then holds only against those who do not know it.
        secure: Whether all numbers come from a cryptographic generator, ChaCha with 20 rounds: from any number of
            outputs, no other can be found but by trying 256-bit keys. Every stream has a key of its own, by keyed
            BLAKE2b from the secret. Noise is then drawn on the CPU.

    Raises:
        TypeError: The seed is not an integer.
        ValueError: The seed is negative, or given for a secure generator, whose secret must not be known.
        ImportError: The package ``randomgen``, which a secure generator comes from, is not installed.
    """

    def __init__(self, seed: int | None = None, secure: bool = False) -> None:
        if seed is not None and not isinstance(seed, int):
            raise TypeError(f"seed must be a non-negative integer or None, got {seed!r}.")
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be a non-negative integer or None, got {seed}.")
        if secure and seed is not None:
            raise ValueError("secure_rng=True draws its own secret: leave seed out.")
        self.seed, self.secure = seed, secure
        if secure:
            _chacha()
        self.renew()

    def renew(self) -> None:
        """Draws a new secret; without effect under an explicit seed."""
        self._entropy = secrets.randbits(256) if self.seed is None else self.seed

    def share(self, broadcast: Callable[[int], int]) -> None:
        """Takes the secret of the first process, with which all draw the same samples.

        Args:
            broadcast: Returns, in every process, the argument that it was called with in the first one.
        """
        self._entropy = broadcast(self._entropy)

    def numpy(self, stream: Stream, step: int) -> np.random.Generator:
        """The generator of this stream at this step, for index sampling."""
        if self.secure:
            return self._secure(stream, step, 0)
        return np.random.Generator(np.random.PCG64(self._sequence(stream, step)))

    def torch(self, stream: Stream, step: int, device: torch.device, block: int = 0) -> NoiseGenerator:
        """The generator of this stream at this step, on this device; independent ones for parts of a long draw."""
        if self.secure:
            return self._secure(stream, step, block)
        sequence = self._sequence(stream, step, block)
        generator = torch.Generator(device)
        generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
        if device.type == "cpu":
            _fill_mersenne_twister(generator, sequence)
        return generator

    def _secure(self, stream: Stream, step: int, block: int) -> np.random.Generator:
        key = hashlib.blake2b(
            f"{stream}/{step}/{block}".encode(),
            digest_size=32,
            key=self._entropy.to_bytes(32, "big"),
            person=b"lightning_dp",
        ).digest()
        return np.random.Generator(_chacha()(key=int.from_bytes(key, "big"), rounds=20))

    def _sequence(self, stream: Stream, step: int, block: int = 0) -> np.random.SeedSequence:
        return np.random.SeedSequence(self._entropy, spawn_key=(_STREAMS[stream], step, block), pool_size=8)

    def __getstate__(self) -> dict[str, Any]:
        # Pickled into worker processes, or by accident into a file: the secret stays here.
        return {"seed": self.seed, "secure": self.secure}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.seed, self.secure = state["seed"], state["secure"]
        self.renew()


def _chacha() -> Any:
    try:
        from randomgen import ChaCha
    except ImportError as error:
        raise ImportError("secure_rng=True needs the package randomgen: pip install 'lightning-dp[secure]'.") from error
    return ChaCha


#: Offset, in bytes, and number of the state words in the state of torch's CPU generator (each stored in 8 bytes).
_WORDS_OFFSET, _WORDS = 24, 624


def _fill_mersenne_twister(generator: torch.Generator, sequence: np.random.SeedSequence) -> None:
    """Gives torch's CPU generator a full-size seed: `manual_seed` uses 32 bits only, few enough to try them all."""
    state = generator.get_state()
    words = sequence.generate_state(_WORDS + 2, np.uint32)[2:].astype(np.uint64)
    words[0] |= np.uint64(1 << 31)  # never the all-zero state
    state.numpy()[_WORDS_OFFSET : _WORDS_OFFSET + 8 * _WORDS] = words.view(np.uint8)
    generator.set_state(state)
