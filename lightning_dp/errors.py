"""The exceptions that this library defines. Imports nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence


class PrivacyConfigurationError(ValueError):
    """Something about the Trainer, the data or the optimizer cannot be combined with private training."""


class UnsupportedModelError(ValueError):
    """The model does something whose per-example gradients cannot be bounded; the message says what, and what to do."""


class SharedOutputShaped(UnsupportedModelError):
    """Outputs of layers whose input all examples share are shaped in a way that copies for every example cannot be.

    Args:
        message: The message.
        layers: Names of the layers.
    """

    def __init__(self, message: str, layers: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.layers = tuple(layers)


#: Message of the `UnsupportedModelError` for activation checkpointing.
ACTIVATION_CHECKPOINTING = (
    "The model uses activation checkpointing, which runs layers again within the backward pass, where they are not "
    "recorded. Turn it off and use max_physical_batch_size to save memory, or use engine='per_example'."
)


class PrivacyLimitReached(RuntimeError):
    """A private step, or the release of a statistic, was attempted that the budget does not allow."""


class JournalError(RuntimeError):
    """The journal cannot be used; the message says why, and what to do."""


class RecipeError(ValueError):
    """A recipe cannot be read, or there is none of that name."""


class ReplicasDiverged(RuntimeError):
    """The processes no longer hold the same parameters."""


class FormChanged(UnsupportedModelError):
    """A training step does what it did not do when the model was examined: another layer call, code or loss."""
