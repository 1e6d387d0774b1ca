"""What the library raises when something cannot be trained privately."""


class PrivacyConfigurationError(ValueError):
    """Something about the Trainer, the data or the optimizer cannot be combined with private training."""


class UnsupportedModelError(ValueError):
    """The model does something whose per-example gradients cannot be bounded; the message names the layer."""
