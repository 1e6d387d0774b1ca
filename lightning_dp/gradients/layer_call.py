"""One call of a layer, as it is recorded, and where in its input the examples are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.forms import CallForms
from lightning_dp.gradients.rules.composite import LinearMap
from lightning_dp.gradients.source import here
from lightning_dp.torch_api import version_of


@dataclass(slots=True, eq=False)
class LayerCall:
    """One call of one layer: its input, and (after the backward) the gradient at its output."""

    input: Tensor
    version: int
    grad_output: Tensor | None = None
    #: All arguments, of layers whose forward is run once more.
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
    #: The parameters used, of layers that are made of several linear maps.
    linear: LinearMap | None = None
    #: The gradient at the output in a backward pass whose result the loss depends on.
    upstream: Tensor | None = None
    #: This stands for such a backward pass of a call with this input: `input` is then the gradient that it began with,
    #: and `grad_output` that at its result.
    backward_at: Tensor | None = None
    #: Whether input and gradient are ``(B, k, …)``: k inputs of every example, each as the layer saw one.
    is_split: bool = False

    def forget(self, keeps_input: bool) -> None:
        """Lets go of tensors, once the gradient is known; with ``keeps_input``, another may come."""
        if keeps_input:
            self.grad_output = None
        else:
            self.input = self.grad_output = self.input.new_empty(0)
            self.arguments = self.backward_at = None

    def unchanged_input(self, layer: str) -> Tensor:
        if version_of(self.input) != self.version:
            raise UnsupportedModelError(
                f"Layer '{layer}': its input was modified in place after the layer used it, so its gradient cannot be "
                "computed. Replace the in-place operation (`x += y`, `relu_`) on that tensor by an ordinary one."
            )
        return self.input


def with_batch(
    input: Tensor, batch_size: int, name: str, module: nn.Module, forms: CallForms | None = None, index: int = 0
) -> Tensor:
    """A layer's input with one entry per example; one that all examples share is expanded.

    Args:
        input: The layer's first argument.
        batch_size: Number of examples.
        name, module: The layer.
        forms: What is known of its calls. Without, an input with a leading dimension of 1 is taken for shared only
            where no gradient flows to it.
        index: How many calls there were before.

    Raises:
        FormChanged: The call has another form than those that were examined.
        UnsupportedModelError: The leading dimension is not the batch.
    """
    if forms is not None and (not input.dim() or input.shape[0] in (1, batch_size)):
        shared = forms.is_shared(name, module, index, input, batch_size)
        return input.expand(batch_size, *input.shape[1:]) if shared else input
    if input.dim() and input.shape[0] == batch_size:
        return input
    if forms is None and input.dim() and input.shape[0] == 1 and not input.requires_grad:
        return input.expand(batch_size, *input.shape[1:])
    raise no_batch(name, module, input, batch_size)


def no_batch(name: str, module: nn.Module, input: Tensor, batch_size: int) -> UnsupportedModelError:
    """The error for an input whose leading dimension is not the batch."""
    return UnsupportedModelError(
        f"Layer '{name}' ({type(module).__name__}) received an input of shape {tuple(input.shape)} for a batch of "
        f"{batch_size} examples: the leading dimension must be the batch (or 1, for an input that all examples share), "
        "or the examples cannot be told apart. Put the batch first (batch_first=True; no flattening of batch and time "
        "into one dimension; unsqueeze(0) on position numbers), or use engine='per_example', which is slow but takes "
        f"any layer. (Called at {here()}. A layer that is called on some records only, h[mask], can be called on all "
        "of them, and what is not wanted taken out of the loss: torch.where(mask, loss, 0).)"
    )
