"""One pass of the step through a shadow, and what two passes show of the same records: the same, or not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import SharedOutputShaped, UnsupportedModelError
from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.engine import set_aside
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.gradients.forms import CallForms
from lightning_dp.gradients.layer_call import LayerCall
from lightning_dp.gradients.precision import wide
from lightning_dp.training.independence.shadow import AlignedRandomness, seed_everything
from lightning_dp.training.independence.subject import Subject, loss_of, reduced

WAY_OUT = "or use engine='per_example', which is slow but takes any layer"


@dataclass
class Seen:
    """What one pass through a shadow showed."""

    calls: dict[str, list[LayerCall]]
    #: Per-example norms of the gradients of every parameter.
    norms: dict[str, Tensor]
    #: Whether random numbers were drawn, and whether some cannot be told apart by rows.
    drew: bool
    unaligned: bool
    #: Rows of the calls that belong to each example, and number of examples.
    copies: int
    size: int

    def has_gradient(self, example: int) -> bool:
        """Whether an example's gradient is anything but zero."""
        return any(bool(norms[example] > 0) for norms in self.norms.values())

    def gradient_norms(self) -> Tensor:
        """The norm of every example's gradient, over all parameters."""
        return torch.stack([wide(norms) for norms in self.norms.values()]).norm(dim=0)

    def typical_gradient(self) -> float:
        """The median, over examples, of the norm of the gradient."""
        return self.gradient_norms().median().item()

    def shapes(self) -> dict[str, list[torch.Size]]:
        """The shapes of what layers saw, of one example."""
        return {name: [call.input.shape[1:] for call in made] for name, made in self.calls.items()}


def run_pass(
    subject: Subject,
    forms: CallForms,
    records: Sequence[list[Any]],
    compare_with_autograd: bool = False,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    keep_calls: bool = True,
    edit: Callable[[Any], Any] | None = None,
    surrounding: AbstractContextManager[Any] | None = None,
) -> Seen:
    """Runs the step on a batch of records, in a shadow, and records every layer.

    Args:
        subject: The step.
        forms: How its layers are called.
        records: What to run it on.
        compare_with_autograd: Whether the engine's gradients must add up to autograd's.
        seed: Of all random numbers.
        streams: Which stream of random numbers each record draws from; by default its own number.
        keep_calls: Whether what layers saw is kept for comparison.
        edit: Changes the batch before the step sees it.
        surrounding: What else surrounds the step; what it runs then need not be what was examined.

    Raises:
        UnsupportedModelError: The engine does not explain autograd's gradients.
        FormChanged: The step runs code that was not examined.
    """
    shadow = subject.shadow().module
    engine = BookKeeping(shadow)
    engine.copies, engine.forms = subject.copies, forms
    recorder = engine.make_recorder(None if keep_calls else engine.consume)
    rows = len(records) * subject.copies
    aligned = AlignedRandomness(rows, seed, rows_in(streams, subject.copies))
    with warnings.catch_warnings(), set_aside(engine.parameters.values()), subject.stand_in(shadow):
        warnings.simplefilter("ignore")
        seed_everything(seed)
        with aligned:
            batch = subject.transfer(subject.collated(records, seed))
            batch = batch if edit is None else edit(batch)
            recording = recorder.forward(rows, keep_requires_grad=compare_with_autograd)
            watch = subject.watch(rows, hold=surrounding is None)
            with recording, watch, subject.context(), surrounding or nullcontext():
                output = _with_shared_outputs(forms, lambda: shadow.training_step(batch, *subject.arguments))
            loss = reduced(loss_of(output), subject.loss_reduction)
            for parameter in engine.parameters.values():
                parameter.grad = None  # the step may have run backward passes of its own
            with recorder.backward():
                shadow.backward(loss)
        calls = recorder.take() if keep_calls else {}
        for layer, made in calls.items():
            for call in made:
                engine.consume(layer, call)
        gradients = engine.gradients()
        if compare_with_autograd:
            _compare_with_autograd(engine, gradients, calls, len(records))
    return Seen(
        calls,
        {name: gradient.squared_norms().sqrt() for name, gradient in gradients.items()},
        aligned.drew,
        aligned.unaligned,
        subject.copies,
        len(records),
    )


def _with_shared_outputs(forms: CallForms, step: Callable[[], Any]) -> Any:
    """Runs a step; explains an error that comes of outputs with one row per example where the model has one for all."""
    try:
        return step()
    except RuntimeError as error:
        shared = [name for name, form in forms.layers.items() if any(form.is_shared)]
        if not shared:
            raise
        raise SharedOutputShaped(
            f"Layers {', '.join(map(repr, shared[:4]))} see an input that all examples share (leading dimension 1), of "
            "which every example gets its own copy here, and training_step shapes their outputs in a way that is not "
            f"followed: {str(error).splitlines()[0][:300]} Freeze these layers (requires_grad_(False)), expand their "
            "output to the batch first, or use engine='per_example', which is slow but takes any layer.",
            shared,
        ) from None


def rows_in(examples: Sequence[int] | None, copies: int) -> list[int] | None:
    """The rows of these examples."""
    return None if examples is None else [i * copies + k for i in examples for k in range(copies)]


def _compare_with_autograd(
    engine: BookKeeping, gradients: Mapping[str, PerExampleGradient], calls: dict[str, list[LayerCall]], size: int
) -> None:
    """The engine's gradients with weights of one must add up to what autograd found."""
    largest = max((p.grad.norm().item() for p in engine.parameters.values() if p.grad is not None), default=0.0)
    low_precision = any(is_low_precision(c.grad_output) for made in calls.values() for c in made)
    for name, parameter in engine.parameters.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if not expected.isfinite().all():
            continue
        found = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        scale = 1e-3 * largest  # next to that, a gradient that should be zero is rounding
        if name in gradients:
            gradients[name].add_weighted_sum_(found, torch.ones(size, device=parameter.device))
            scale = max(scale, gradients[name].squared_norms().sum().sqrt().item())
        if not close(found, expected, scale, low_precision):
            raise UnsupportedModelError(
                f"Parameter '{name}': its gradient is not explained by its layer's calls. It is used outside the "
                "layer's forward (a weight passed to a function, a penalty on weights in the loss: use the "
                "optimizer's weight_decay), through a function stored on the module that a copy cannot follow, or the "
                f"layer is re-run in the backward (activation checkpointing). Call the layer itself, {WAY_OUT}."
            )


#: Relative error of what bfloat16 adds up over a batch.
_LOW_TOLERANCE = 0.2


def is_low_precision(tensor: Tensor | None) -> bool:
    """Whether a tensor's numbers have so few digits that sums of them differ by their order."""
    return tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)


#: Relative error between passes of one size, which run the same kernels, and of different sizes: these round
#: differently, and an activation that is zero but for rounding (a kink of ReLU, a tie of max) may count on one side.
SAME_SIZE, OTHER_SIZE = 1e-3, 2e-2


def close(
    found: Tensor, expected: Tensor, scale: float = 0.0, low_precision: bool = False, tolerance: float = SAME_SIZE
) -> bool:
    """Equal up to rounding, in Euclidean norm; entries that are not finite on either side do not count.

    ``scale`` is the norm of what was added up to give these, when they may have cancelled.
    """
    tolerance = _LOW_TOLERANCE if low_precision or is_low_precision(expected) else tolerance
    found, expected = wide(found), wide(expected)
    difference, size = (found - expected).norm().item(), expected.norm().item()
    if not (math.isfinite(difference) and math.isfinite(size)):
        finite = found.isfinite() & expected.isfinite()
        found, expected = found.double().where(finite, 0), expected.double().where(finite, 0)
        difference, size = (found - expected).norm().item(), expected.norm().item()
    return difference <= tolerance * max(size, scale) + 1e-12


def first_difference(
    first: Seen, second: Seen, kept: Sequence[int], places: Sequence[int], factor: float = 1.0
) -> str | None:
    """Where the ``kept`` examples of a pass differ from what another has in their ``places``.

    The first pass's gradients are multiplied by ``factor``. Names the first layer whose input differs, else the layer
    nearest to the loss whose upstream gradient does. What has another length (padding) is compared by the norm of the
    gradient.
    """
    low = any(is_low_precision(c.grad_output) for made in first.calls.values() for c in made)
    tolerance = SAME_SIZE if first.size == second.size else OTHER_SIZE
    rows = torch.tensor(rows_in(list(kept), first.copies))
    others = torch.tensor(rows_in(list(places), first.copies))

    uppermost = max(
        (wide(c.grad_output).norm().item() for made in first.calls.values() for c in made if c.grad_output is not None),
        default=0.0,
    )
    uppermost = uppermost if math.isfinite(uppermost) else 0.0

    def same(one: Tensor | None, other: Tensor | None, factor: float, scale: float = 0.0) -> bool:
        if one is None or other is None or one.shape[1:] != other.shape[1:]:
            return True
        a, b = one[rows.to(one.device)], other[others.to(other.device)]
        if a.is_floating_point() and not torch.equal(a.isfinite(), b.isfinite()):
            return False
        return close(b, a * factor if factor != 1 else a, scale, low, tolerance)

    def pairs(name: str) -> list[tuple[LayerCall, LayerCall]]:
        made, remade = first.calls[name], second.calls.get(name, [])
        return list(zip(made, remade, strict=True)) if len(made) == len(remade) else []

    # Padding that is longer makes rows of padding: what is seen there is nobody's, and only gradients count.
    same_lengths = bool(second.calls) and first.shapes() == second.shapes()
    for name in first.calls if same_lengths else ():
        if not all(same(a.input, b.input, 1.0) for a, b in pairs(name)):
            return f"Layer '{name}'"
    for name in reversed(first.calls) if same_lengths else ():
        if not all(same(a.grad_output, b.grad_output, factor, 1e-3 * uppermost * factor) for a, b in pairs(name)):
            return f"Layer '{name}'"
    kept_index, place_index = torch.tensor(list(kept)), torch.tensor(list(places))
    # Next to the largest, a gradient that should be zero (of a bias before a normalisation) is rounding.
    largest = max((norms[kept_index.to(norms.device)].norm().item() for norms in first.norms.values()), default=0.0)
    for name in {**first.norms, **second.norms}:
        zeros = next(iter({**first.norms, **second.norms}.values()))
        one, other = first.norms.get(name), second.norms.get(name)
        a = zeros.new_zeros(len(kept)) if one is None else one[kept_index.to(one.device)]
        b = zeros.new_zeros(len(places)) if other is None else other[place_index.to(other.device)]
        if not close(b, a * factor, 1e-3 * factor * largest, low, tolerance):
            return f"Parameter '{name}'"
    return None


def has_common_factor(
    first: Seen, second: Seen, kept: Sequence[int], places: Sequence[int], factor: float = 1.0
) -> bool:
    """Whether all of the ``kept`` examples' gradients grew from one pass to another, or all shrank.

    By more than `SAME_SIZE`. Rounding makes some gradients larger and others smaller; a divisor that depends on the
    size of the batch moves all of them one way, however little.
    """
    if any(is_low_precision(c.grad_output) for made in first.calls.values() for c in made):
        return False
    if not first.norms or not second.norms:
        return False
    before = first.gradient_norms().cpu()[list(kept)] * factor
    after = second.gradient_norms().cpu()[list(places)]
    counted = (before > 1e-3 * before.max()) & before.isfinite() & after.isfinite()
    if len({example for example, counts in zip(kept, counted.tolist(), strict=True) if counts}) < 4:
        return False
    ratio = (after / before)[counted]
    return bool((ratio > 1 + SAME_SIZE).all()) or bool((ratio < 1 - SAME_SIZE).all())
