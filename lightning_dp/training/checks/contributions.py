"""Checks the bounding on a few examples, one by one and together: sensitivity, and additivity."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.engine import set_aside
from lightning_dp.gradients.forms import CallForms
from lightning_dp.mechanism.clipping import Bounding, Group, State
from lightning_dp.mechanism.mechanism import Mechanism
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.training.independence.shadow import AlignedRandomness, random_state_kept, seed_everything
from lightning_dp.training.independence.subject import Subject, loss_of, reduced

#: Examples that pass through the bounding one by one.
_BOUNDED_EXAMPLES = 2


#: The most pairs of examples that are tried; and the relative error beyond which rounding is no explanation.
_PAIRS, _NO_ROUNDING = 4, 0.05


def _on_one_record(error: Exception) -> UnsupportedModelError:
    if isinstance(error, UnsupportedModelError):
        return error
    return UnsupportedModelError(
        f"training_step fails on a batch of one or two records, as a Poisson draw may be: {str(error)[:300]} "
        "(squeeze() "
        "takes a batch of one away as well: use squeeze(-1).)"
    )


def check_contributions(subject: Subject, clipping: Bounding, state: State, forms: CallForms) -> list[str]:
    """Runs a few examples through the clipping rule, in a copy of the model, one by one and together.

    Every example's contribution must stay within the sensitivity of every group, and the contributions must add up to
    the sum that the batch gives.

    Args:
        subject: The step and the records.
        clipping, state: The rule, and its state.
        forms: How layers are called, as the examination found it.

    Returns:
        Sentences on what could not be checked; empty if all was.

    Raises:
        UnsupportedModelError: A contribution exceeds its sensitivity, or contributions do not add up, with the
            parameters' names; or ``training_step`` fails on a batch of one or two records.
    """
    mechanism = Mechanism(clipping, augmentation_multiplicity=subject.copies)
    bounds: dict[Group, float] = {}
    copies, mean = subject.copies, subject.loss_reduction == "mean"
    unaligned = False

    def contribution(examples: list[int]) -> tuple[PrivateStep, dict[str, Tensor]]:
        nonlocal unaligned
        shadow = subject.shadow().module.eval()
        step = PrivateStep.of(mechanism, shadow)
        engine, rule = step.engine, step.clipping
        engine.forms = forms
        if state:
            step.clipping_state = state
        rows = len(examples) * copies
        aligned = AlignedRandomness(rows, 0, [e * copies + k for e in examples for k in range(copies)])
        with warnings.catch_warnings(), set_aside(engine.parameters.values()), subject.stand_in(shadow):
            warnings.simplefilter("ignore")
            seed_everything(0)
            with aligned:
                batch = subject.transfer(subject.collated([subject.records[e] for e in examples]))
                step.begin(0.0, 1.0, 1.0)
                with engine.forward(rows), subject.watch(rows), subject.context():
                    output = shadow.training_step(batch, *subject.arguments)
                loss = reduced(loss_of(output), subject.loss_reduction)
                with step.backward(float(len(examples)) if mean else 1.0 / copies):
                    shadow.backward(loss)
            unaligned |= aligned.unaligned
            bounds.update(zip(step.groups, rule.group_sensitivities(step.groups, step.clipping_state), strict=True))
            step.release()
            return step, {n: p.grad.double() for n, p in engine.parameters.items() if p.grad is not None}

    def pair(examples: list[int]) -> tuple[str, float]:
        """The parameter whose single contributions differ most from the batch's sum, and that relative error."""
        step, together = contribution(examples)
        alone = [contribution([example])[1] for example in examples]
        low = any(p.dtype in (torch.bfloat16, torch.float16) for p in step.engine.parameters.values())
        for group, bound in bounds.items():
            for found in alone:
                norm = torch.stack([found[name].norm() for name in group if name in found]).norm().item()
                if not norm <= bound * (1 + (5e-2 if low else 1e-3)):
                    raise UnsupportedModelError(
                        f"Parameters {list(group)}: one example contributes {norm:.3g}, and its bound is {bound:.3g}. "
                        "This is a defect of the rule or of a layer's rule: report it, and use engine='per_example'."
                    )
        worst = "", 0.0
        largest = max(found[name].norm().item() for found in alone for name in found)
        for name, whole in together.items():
            parts = torch.stack([found[name] for found in alone])
            scale = max(parts.norm().item(), 1e-3 * largest) + 1e-12
            error = (whole - parts.sum(0)).norm().item() / scale
            worst = (name, error) if not error <= worst[1] else worst
        return worst[0], worst[1] / 50 if low else worst[1]

    with random_state_kept():
        try:
            # A ReLU input that is zero up to rounding may be positive in a batch of two and not in a batch of one: then
            # another pair is tried. A wrong rule is wrong for every pair.
            for attempt in range(_PAIRS):
                count = len(subject.records)
                examples = sorted({(2 * attempt + i) % count for i in range(_BOUNDED_EXAMPLES)})
                name, error = pair(examples)
                if error <= 1e-3 or error > _NO_ROUNDING or unaligned:
                    break
        except RuntimeError as problem:
            if "backward can only be called in training mode" in str(problem):  # cuDNN's recurrent layers
                return ["the bounding of single records: a recurrent kernel has no backward pass in eval mode"]
            raise _on_one_record(problem) from None
        except (ValueError, IndexError) as problem:
            raise _on_one_record(problem) from None
    if unaligned:
        return ["whether single contributions add up: random numbers that depend on the whole batch were drawn"]
    if not error <= 1e-3:
        raise UnsupportedModelError(
            f"Parameter '{name}': the bounded gradients of single examples do not add up to that of the batch: "
            "an example's contribution depends on who else is there. Make training_step treat every example "
            "by itself, or use engine='per_example'."
        )
    return []
