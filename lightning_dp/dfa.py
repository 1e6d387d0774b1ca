"""Direct feedback alignment: hidden layers learn from the output's error, sent to each through a fixed random matrix.

No gradient passes backwards through weights: the input of every layer is cut off the graph, and what was cut receives
``B_l e`` for the gradient ``e`` at the output. Autograd then runs every layer's own small backward pass. Nothing here
knows about privacy; because every layer still has an input and an upstream gradient per example, all bounding rules
apply to it. Sources: Nøkland 2016, "Direct Feedback Alignment Provides Learning in Deep Neural Networks"; Lee & Kifer
2020, "Differentially Private Deep Learning with Direct Feedback Alignment".
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.model import layers_with_parameters


class FeedbackMatrices(nn.Module):
    """The matrices ``B_l``: made when they are first needed, saved in the state_dict, and loaded where it has them.

    Each is semi-orthogonal, so that ``‖B_l‖₂ = 1``, and follows from the seed and the layer's name alone: never from
    data, nor from any other random state. They are not registered as buffers: weight averaging needs as many buffers in
    its copy as in the module, and matrices appear only in the first step.
    """

    def __init__(self) -> None:
        super().__init__()
        #: By `_key`; the n-th further tensor of the same call has n times "'" appended.
        self.matrices: dict[str, Tensor] = {}

    def matrix(self, key: str, rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
        """``B_l`` of shape ``(rows, columns)``, on this device.

        Raises:
            UnsupportedModelError: The matrix exists already, with another shape.
        """
        if key not in self.matrices:
            digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self.matrices[key] = nn.init.orthogonal_(torch.empty(rows, columns, device="cpu"), generator=generator)
        found = self.matrices[key] = self.matrices[key].to(device)
        if found.shape != (rows, columns):
            raise UnsupportedModelError(
                f"The feedback to the input of layer '{_layer_of(key)}' is {tuple(found.shape)}, and {rows} features "
                f"with {columns} outputs would need ({rows}, {columns}): direct feedback alignment needs inputs of one "
                "size. Pad them, or choose feedback_layers behind the pooling."
            )
        return found

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + key: matrix for key, matrix in self.matrices.items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for key, value in state_dict.items():
            if key.startswith(prefix):
                self.matrices[key.removeprefix(prefix)] = value.detach().clone()


def _key(layer: str, call: int) -> str:
    """A matrix's name: the layer's with "/" for dots, and from the second call on ":" and the call's number."""
    return layer.replace(".", "/") + (f":{call}" if call else "")


def _layer_of(key: str) -> str:
    return key.rstrip("'").partition(":")[0].replace("/", ".")


class DFAMixin(pl.LightningModule):
    """Trains a LightningModule by direct feedback alignment.

    Example::

        class Net(DFAMixin, L.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))
            ...

    Nothing else is needed for networks whose last layer, in the order of their definition, gives the output: fully
    connected, convolutional, or residual (where the identity still carries what later blocks receive). The gradient of
    layer l is ``δ_l a_lᵀ`` with ``δ_l = (B_l e) ⊙ φ'(z_l)``, and of the output layer the ordinary one. It can be
    combined with a plain Trainer, and with every bounding rule of a private one.

    ``B_l`` is semi-orthogonal, of the size of one example's features by that of its outputs; where both are sequences
    of the same length, ``(B, T, d)``, one matrix serves every position.

    Class attributes, which a subclass or ``__init__`` may set:
        feedback_layers: Names of the modules whose input is cut; between two of them, ordinary backpropagation.
            ``None``: every module with parameters of its own.
        output_layer: Name of the module whose output's gradient is sent as the error. ``None``: the last module with
            parameters, in the order of their definition.
        feedback_seed: Seed of the feedback matrices, which are public. It does not matter that all runs share them.

    Raises:
        UnsupportedModelError: In the training step, when a named layer does not exist or none has parameters, the
            output layer is not the last one called, the batch is not the first dimension of a layer's input and of the
            output, or the size of an input changes.
    """

    feedback_layers: Sequence[str] | None = None
    output_layer: str | None = None
    feedback_seed: int = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.feedback_matrices = FeedbackMatrices()
        self._feedback_is_on = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.training_step is not pl.LightningModule.training_step and not hasattr(
            cls.training_step, "sends_feedback"
        ):
            cls.training_step = _with_feedback(cls.training_step)  # type: ignore[method-assign]

    def alignment_angles(self, *step_arguments: Any) -> dict[str, float]:
        """Degrees between the gradient by feedback and that by backpropagation, by parameter name.

        Below 90, a step along one is also a descent along the other. **Computed from the batch without noise.**

        Args:
            step_arguments: What ``training_step`` takes: a batch, and its number.
        """
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}

        def gradients(step: Callable[..., Any]) -> Sequence[Tensor | None]:
            with torch.random.fork_rng():
                output = step(*step_arguments)
            loss = output["loss"] if isinstance(output, Mapping) else output
            return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

        by_feedback = gradients(self.training_step)
        self._feedback_is_on = True  # training_step then installs no hooks, and plain backpropagation runs
        try:
            by_backpropagation = gradients(self.training_step)
        finally:
            self._feedback_is_on = False
        angles = {}
        for name, one, other in zip(parameters, by_feedback, by_backpropagation, strict=True):
            if one is not None and other is not None:
                cosine = torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0)
                angles[name] = math.degrees(math.acos(min(1.0, max(-1.0, cosine.item()))))
        return angles


def _with_feedback(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def training_step(self: DFAMixin, *args: Any, **kwargs: Any) -> Any:
        if self._feedback_is_on or not torch.is_grad_enabled():
            return step(self, *args, **kwargs)
        self._feedback_is_on = True
        try:
            with _Feedback(self).hooks():
                return step(self, *args, **kwargs)
        finally:
            self._feedback_is_on = False

    training_step.sends_feedback = True  # type: ignore[attr-defined]
    return training_step


class _Feedback:
    """Detaches layers' inputs during one training step, and makes the output's gradient flow to them (`_Send`)."""

    def __init__(self, module: DFAMixin) -> None:
        layers = {name: layer for name, layer in layers_with_parameters(module).items() if name}
        if not layers:
            raise UnsupportedModelError("Direct feedback alignment found no layer with parameters.")
        self._output_layer = module.output_layer or next(reversed(layers))
        names = list(layers) if module.feedback_layers is None else list(module.feedback_layers)
        self._modules = {name: _submodule(module, name) for name in dict.fromkeys([*names, self._output_layer])}
        self._matrices, self._seed = module.feedback_matrices, module.feedback_seed
        self._cut: list[tuple[str, Tensor]] = []
        self._replaced: dict[int, Tensor] = {}
        self._calls: Counter[str] = Counter()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for name, module in self._modules.items():
            # Prepended: hooks that record or clip the input must see the detached one.
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True))
        handles.append(self._modules[self._output_layer].register_forward_hook(self._after_output))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self._cut:
            raise UnsupportedModelError(
                f"Layer '{_layer_of(self._cut[-1][0])}': no feedback reaches its input, because the output layer "
                f"'{self._output_layer}' was not called after it. Set output_layer to the layer that gives the output."
            )

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not torch.is_grad_enabled():
                return None
            call = self._calls[name]
            self._calls[name] += 1
            return (
                tuple(self._cut_off(value, name, call) for value in args),
                {key: self._cut_off(value, name, call) for key, value in kwargs.items()},
            )

        return hook

    def _cut_off(self, value: Any, name: str, call: int) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        if id(value) not in self._replaced:  # a tensor that several layers take is cut once
            self._replaced[id(value)] = value.detach()
            taken = sum(key == _key(name, call) for key, _ in self._cut)
            self._cut.append((_key(name, call) + "'" * taken, value))
        return self._replaced[id(value)]

    def _after_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled() or not self._cut:
            return None
        senders = []
        for key, hidden in self._cut:
            if hidden.dim() < 2 or hidden.shape[0] != output.shape[0]:
                raise UnsupportedModelError(
                    f"Layer '{_layer_of(key)}': its input has the shape {tuple(hidden.shape)} and the output "
                    f"{tuple(output.shape)}: direct feedback alignment needs the batch first in both."
                )
            by_position = hidden.dim() == output.dim() == 3 and hidden.shape[1] == output.shape[1]
            start = 2 if by_position else 1
            rows, columns = math.prod(hidden.shape[start:]), math.prod(output.shape[start:])
            matrix = self._matrices.matrix(key, rows, columns, self._seed, output.device)
            senders.append((matrix, start))
        sent: Tensor = _Send.apply(output, senders, *(hidden for _, hidden in self._cut))
        self._cut, self._replaced, self._calls = [], {}, Counter()
        return sent


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"Direct feedback alignment: there is no module '{name}'. Names are those of named_modules()."
        ) from error


class _Send(torch.autograd.Function):
    """The identity on the output; its backward pass also gives every detached input ``B_l e``, in its shape."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, senders: Sequence[tuple[Tensor, int]], *hidden: Tensor) -> Tensor:
        ctx.senders = senders
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in hidden]
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (error,) = grads
        sent = [
            (error.flatten(start) @ matrix.to(error.dtype).T).view(shape).to(dtype)
            for (matrix, start), (shape, dtype) in zip(ctx.senders, ctx.like, strict=True)
        ]
        return error, None, *sent
