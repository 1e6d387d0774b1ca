"""What the library raises when something cannot be trained privately."""


class PrivacyConfigurationError(ValueError):
    """Something about the Trainer, the data or the optimizer cannot be combined with private training."""


class UnsupportedModelError(ValueError):
    """The model does something whose per-example gradients cannot be bounded; the message names the layer."""


#: What is said where layers run again within the backward pass.
ACTIVATION_CHECKPOINTING = (
    "The model uses activation checkpointing, which runs layers again within the backward pass, where they are not "
    "recorded. Turn it off and use max_physical_batch_size to save memory, or use engine='per_example'."
)
