"""What cannot be trained privately, and why: checks before the first step, each with the way out.

`check_trainer`, `check_model` and `check_optimizers` look at the configuration; `check_examples_are_independent` runs a
few examples through a shadow of the model and looks at what happens.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_dp.accounting import PrivacyLedger
from lightning_dp.clipping import Bounding, Group, State
from lightning_dp.denoising import Denoiser
from lightning_dp.engines import BookKeeping, Engine, SummingEngine, set_aside
from lightning_dp.gradients import PerExampleGradient, wide
from lightning_dp.layers import refusal_for, rule_for, trainable, trained_layers
from lightning_dp.noise import NOISES, GaussianNoise, Noise
from lightning_dp.pipeline import PrivateStep
from lightning_dp.randomness import Randomness
from lightning_dp.records import Call, UnsupportedModelError, getattr_path


class PrivacyConfigurationError(ValueError):
    """Something about the Trainer, the data or the optimizer cannot be combined with private training."""


_WAY_OUT = "or use engine='per_example', which is slow but takes any layer"


def check_trainer(trainer: Any) -> None:
    """Refuses Trainer settings under which a Lightning batch would not be one private step."""
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise PrivacyConfigurationError(
            "Manual optimization (automatic_optimization=False) decides by itself when gradients are computed and "
            "applied, so steps cannot be accounted for. Use automatic optimization."
        )
    check_no_accumulation(trainer)
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise PrivacyConfigurationError(
            "training_step(dataloader_iter) fetches batches by itself, so steps cannot be matched to samples. Take a "
            "batch instead: training_step(self, batch, batch_idx)."
        )
    if trainer.overfit_batches:
        raise PrivacyConfigurationError(
            "overfit_batches repeats the same batches, which are not Poisson samples. To train on few records, pass a "
            "torch.utils.data.Subset of them; for a quick trial, use fast_dev_run or limit_train_batches."
        )
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        raise PrivacyConfigurationError(
            "precision='16-mixed' scales the loss and skips steps depending on the data, which the accountant cannot "
            "see. Use precision='bf16-mixed', 'bf16-true' or '32-true'."
        )
    if trainer.precision == "16-true":
        raise PrivacyConfigurationError(
            "precision='16-true' overflows in per-example norms and noise. Use 'bf16-mixed', 'bf16-true' or '32-true'."
        )


def check_precision(trainer: pl.Trainer, clipping: Bounding) -> None:
    """Refuses precisions in which a rule's sums are rounded by more than its bound."""
    if not clipping.allows_low_precision and str(trainer.precision) not in ("32-true", "64-true"):
        raise PrivacyConfigurationError(
            f"precision='{trainer.precision}' with {type(clipping).__name__}: autograd adds up the batch in low "
            "precision, and rounds the sum by more than one record may move it. Use precision='32-true', or a rule "
            "that adds up in float32 (FlatClipping)."
        )


def check_mechanism(clipping: Bounding, noise: Noise, denoiser: Denoiser | None) -> None:
    """Refuses noise that cannot be accounted for with this rule, and denoisers that do not know this noise."""
    name = type(noise).__name__
    if type(noise) not in NOISES.values():
        raise PrivacyConfigurationError(
            f"{name} has no entry in lightning_dp.noise.NOISES, so that no ledger can store what it costs."
        )
    try:
        noise.event(1.0, clipping.magnitudes())
    except ValueError as error:
        raise PrivacyConfigurationError(f"{type(clipping).__name__} with {error}") from error
    if denoiser is not None:
        try:
            denoiser.check(noise)
        except ValueError as error:
            raise PrivacyConfigurationError(str(error)) from error
    if not np.isfinite(noise.log_moments(1.0, 2)).all():
        raise PrivacyConfigurationError(
            f"{name}: the ratio of its density and the same density shifted has no finite moment of order 2, so that "
            "no Rényi divergence bounds what it reveals. Use GaussianNoise, LaplaceNoise or StudentTNoise."
        )


def check_augmentations(engine: Engine, clipping: Bounding, multiplicity: int) -> None:
    """Refuses several augmentations of a record where they cannot be averaged before they are bounded."""
    if multiplicity > 1 and isinstance(engine, SummingEngine):
        raise PrivacyConfigurationError(
            f"augmentation_multiplicity={multiplicity}: {type(clipping).__name__} forms its sum within the backward "
            "pass, where every augmentation would count as a record of its own. Use a rule that bounds per-example "
            "gradients, such as FlatClipping, or augmentation_multiplicity=1."
        )


def check_no_accumulation(trainer: pl.Trainer) -> None:
    """Refuses gradient accumulation over Lightning batches."""
    if trainer.accumulate_grad_batches != 1:
        raise PrivacyConfigurationError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: a union of Poisson batches is not a Poisson "
            "batch. Give the DataLoader the whole (logical) batch size, and PrivateStrategy or DifferentialPrivacy "
            "max_physical_batch_size=… for what fits into memory; the result does not depend on it."
        )


def check_model(module: pl.LightningModule, engine: str) -> None:
    """Refuses modules whose per-example gradients are not defined, or that the engine has no rule for."""
    problems = []
    for name, child in module.named_modules():
        reason = refusal_for(child)
        if reason:
            problems.append(f"layer '{name}' ({type(child).__name__}): {reason}")
    if engine == "bookkeeping":
        for name, child in trained_layers(module).items():
            if not refusal_for(child):
                problems += _without_rule(name, child)
        problems += _compiled(module) + _tied(module)
    hooked = [name for name, p in module.named_parameters() if p.requires_grad and has_hooks(p)]
    if hooked:
        problems.append(
            f"parameters {hooked} have gradient hooks (register_hook, register_post_accumulate_grad_hook, "
            "wandb.watch), which would see gradients without noise; remove them, and look at p.grad in "
            "on_after_backward, where the noise is in"
        )
    if problems:
        listed = "\n  - ".join(problems)
        raise UnsupportedModelError(f"This model cannot be trained privately as it is:\n  - {listed}")
    if not any(p.requires_grad for p in module.parameters()):
        raise UnsupportedModelError("The model has no parameter that requires a gradient: there is nothing to train.")


def _without_rule(name: str, module: nn.Module) -> list[str]:
    """What no rule covers and cannot be run once more on its own."""
    own = trainable(module)
    if not own:
        return []
    if isinstance(module, pl.LightningModule) and not name:
        return [
            f"the {type(module).__name__} itself holds the parameters {own}: training_step uses them in a way that the "
            "engine cannot see; put them into a module of their own, with a forward that applies them, freeze them "
            f"(requires_grad_(False)), {_WAY_OUT}"
        ]
    if isinstance(module, nn.RNNBase):
        return [
            f"layer '{name}' ({type(module).__name__}): its fused kernel hides the gradients of the single steps; use "
            f"opacus.layers.DP{type(module).__name__}, which takes the same arguments and weights (or let "
            f"`opacus.validators.ModuleValidator.fix` exchange it), {_WAY_OUT}"
        ]
    if type(module).forward is nn.Module.forward:
        return [
            f"layer '{name}' ({type(module).__name__}) holds the parameters {own} and has no forward of its own (a "
            "ParameterList, a parametrization): what uses them cannot be seen; hold them in the module that uses them, "
            f"freeze them (requires_grad_(False)), {_WAY_OUT}"
        ]
    unknown = [p for p in own if p not in ("weight", "bias")] if rule_for(module) else []
    if unknown:
        return [
            f"layer '{name}' ({type(module).__name__}): its rule does not know the parameters {unknown} "
            f"(weight_norm?); remove them, {_WAY_OUT}"
        ]
    return []


def _compiled(module: pl.LightningModule) -> list[str]:
    names = [
        name or type(module).__name__
        for name, child in module.named_modules()
        if getattr(child, "_compiled_call_impl", None) is not None or type(child).__name__ == "OptimizedModule"
    ]
    if getattr(module, "_compiler_ctx", None) is not None:
        names = [type(module).__name__]
    if not names:
        return []
    return [
        f"{', '.join(names)}: torch.compile hides the layers from the engine; pass the uncompiled module, {_WAY_OUT}"
    ]


def _tied(module: nn.Module) -> list[str]:
    """Tied parameters are exact when every use is a linear map, a look-up, or of a kind that can be materialised."""
    uses: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, child in trained_layers(module).items():
        for own in trainable(child):
            uses.setdefault(id(getattr_path(child, own)), []).append((name, child, own))
    problems = []
    for shared in uses.values():
        roles = {own for _, _, own in shared}
        if len(shared) > 1 and len(roles) > 1:
            layers = ", ".join(f"'{name}.{own}'" for name, _, own in shared)
            problems.append(
                f"{layers} are one parameter in different roles, which no rule covers; untie them, {_WAY_OUT}"
            )
    return problems


def has_hooks(parameter: nn.Parameter) -> bool:
    """Whether something was registered that is called with the parameter's gradient."""
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module normalises over the batch when it is in training mode."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def check_optimizers(trainer: pl.Trainer, engine: Engine) -> None:
    """The parameters that are optimized and those that are bounded must be the same objects."""
    optimizers = trainer.strategy.optimizers
    if len(optimizers) != 1:
        raise PrivacyConfigurationError(
            f"configure_optimizers returned {len(optimizers)} optimizers; one private step feeds exactly one."
        )
    [optimizer] = optimizers
    if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.LBFGS):
        raise PrivacyConfigurationError(
            "LBFGS evaluates the gradient several times per step on one batch, each a further release. Use a "
            "first-order optimizer (SGD, Adam, …)."
        )
    optimized = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    bounded = {id(p): name for name, p in engine.parameters.items()}
    foreign = [tuple(p.shape) for key, p in optimized.items() if key not in bounded]
    if foreign:
        raise PrivacyConfigurationError(
            f"The optimizer holds parameters that are not (or no longer) the module's, of shapes {foreign}: they would "
            "be trained without privacy or not at all. Create the optimizer in configure_optimizers from "
            "self.parameters(), after all layers exist (adapters injected later, or layers made anew in "
            "configure_model, are other objects)."
        )
    missing = [name for key, name in bounded.items() if key not in optimized]
    if missing:
        raise PrivacyConfigurationError(
            f"Trainable parameters that the optimizer does not hold: {missing}. They would take a share of the "
            "clipping norm for nothing. Give them to the optimizer, or freeze them with requires_grad_(False)."
        )


def warn_about_delta(delta: float, num_records: int) -> None:
    """δ ≥ 1/N allows a mechanism that publishes one record at random."""
    if delta >= 1 / num_records:
        rank_zero_warn(
            f"delta={delta:g} is not below 1/N = {1 / num_records:.3g} for the {num_records} records of the train set: "
            "at such a δ, publishing a whole record chosen at random would count as private. Choose a smaller one."
        )


def check_examples_are_independent(
    module: pl.LightningModule,
    take: Callable[[list[int]], Any],
    size: int,
    step_arguments: tuple[Any, ...],
    context: Callable[[], AbstractContextManager[Any]],
    loss_reduction: str,
    copies: int = 1,
) -> None:
    """Runs a few examples through a shadow of the model, and refuses models whose examples influence one another.

    Three properties, each of which the sensitivity rests on:

    1. the engine's gradients add up to autograd's (nothing is trained that the engine does not see);
    2. exchanging half of the examples moves no record of the others (no batch statistics, no in-batch losses, nothing
       in the collate function, the transfer hooks or a buffer that depends on who else is in the batch);
    3. leaving them out moves none either, once the loss reduction is undone (no data-dependent normaliser).

    It sees these examples and this state of the model: it finds mistakes, and proves nothing. Every pass uses a fresh
    shadow, which shares the parameters and copies everything else, from the same random state; the user's module and
    random streams are left as they were. Nothing of this is released.

    Args:
        module: The user's module.
        take: Returns the batch that consists of the given examples, as a training step would receive it.
        size: How many examples ``take`` can draw from, at least 2.
        step_arguments: The arguments of ``training_step`` after the batch.
        context: The precision context of a training step.
        loss_reduction: ``"mean"`` or ``"sum"``.
        copies: How many rows of a batch from ``take`` belong to each example, one after another.

    Raises:
        UnsupportedModelError: With the layer's name.
    """
    run = _ShadowRun(module, take, step_arguments, context, copies)
    half = size // 2
    kept = list(range(half))
    everyone, exchanged = list(range(size)), [*kept, *[0] * (size - half)]
    with _random_state_kept():
        if not run.possible():
            return
        try:
            first = run(everyone, compare_with_autograd=True)
            difference = _difference(first, run(exchanged), half)
            if difference and first.was_random:  # did other examples change which random numbers were drawn?
                difference = _difference(run(everyone, dropout=False), run(exchanged, dropout=False), half)
            if difference:
                raise UnsupportedModelError(
                    f"{difference}: exchanging some examples of the batch changed what was seen of others. Batch "
                    "statistics, a loss over pairs within the batch, a softmax over dimension 0, a mean over all "
                    "tokens of the batch, or mixing in the collate function do that; make training_step treat every "
                    "example by itself (average per example first, then over examples)."
                )
            _check_reduction(run, first, size, loss_reduction)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error} (Found by the self-check; self_check=False turns it off.)") from None


def check_contributions(
    module: pl.LightningModule,
    take: Callable[[list[int]], Any],
    size: int,
    step_arguments: tuple[Any, ...],
    context: Callable[[], AbstractContextManager[Any]],
    loss_reduction: str,
    clipping: Bounding,
    state: State,
    copies: int = 1,
) -> None:
    """Runs a few examples through the bounding itself, in a shadow of the model, one by one and together.

    Every example's contribution must stay within the sensitivity of every group, and those of all must add up to what
    the batch gives. Arguments as for `check_examples_are_independent`, and the rule with its state.

    Raises:
        UnsupportedModelError: With the parameter's name.
    """

    was_random, bounds = False, dict[Group, float]()

    def contribution(examples: list[int]) -> tuple[PrivateStep, dict[str, Tensor]]:
        nonlocal was_random
        shadow = shadow_of(module).eval()
        rule = clipping.bind(shadow)
        engine = rule.make_engine("bookkeeping", shadow)
        engine.copies = copies
        step = PrivateStep(engine, rule, GaussianNoise(), PrivacyLedger(), Randomness())
        if state:
            step.clipping_state = state
        _set_random_state(random_state)
        with warnings.catch_warnings(), set_aside(engine.parameters.values()):
            warnings.simplefilter("ignore")
            batch, count = take(examples), len(examples)
            step.begin(0.0, 1.0, 1.0)
            with engine.forward(count * copies), context():
                loss = loss_of(shadow.training_step(batch, *step_arguments))
            was_random |= not _same_random_state(_random_state(), random_state)
            with step.backward(float(count) if loss_reduction == "mean" else 1.0 / copies):
                shadow.backward(loss)
            bounds.update(zip(step.groups, rule.group_sensitivities(step.groups, step.clipping_state), strict=True))
            step.release()
            return step, {n: p.grad.double() for n, p in engine.parameters.items() if p.grad is not None}

    examples, random_state = list(range(min(size, _BOUNDED_EXAMPLES))), _random_state()
    with _random_state_kept(), suppress(RuntimeError):  # some kernels have no backward in eval mode
        step, together = contribution(examples)
        alone = [contribution([example])[1] for example in examples]
        low = any(_is_low_precision(p) for p in step.engine.parameters.values())
        tolerance = 5e-2 if low else 1e-3
        for group, bound in bounds.items():
            for found in alone:
                norm = torch.stack([found[name].norm() for name in group]).norm().item()
                if not norm <= bound * (1 + tolerance):
                    raise UnsupportedModelError(
                        f"Parameters {list(group)}: one example contributes {norm:.3g}, and its bound is {bound:.3g}. "
                        "This is a defect of the rule or of a layer's rule: report it, and use engine='per_example'. "
                        "(Found by the self-check; self_check=False turns it off.)"
                    )
        if was_random:  # other batch sizes draw other random numbers
            return
        largest = max(found[name].norm().item() for found in alone for name in found)
        for name, whole in together.items():
            parts = torch.stack([found[name] for found in alone])
            scale = max(parts.norm().item(), 1e-3 * largest)
            if (whole - parts.sum(0)).norm().item() > tolerance * scale + 1e-12:
                raise UnsupportedModelError(
                    f"Parameter '{name}': the bounded gradients of single examples do not add up to that of the batch: "
                    "an example's contribution depends on who else is there. Make training_step treat every example "
                    "by itself, or use engine='per_example'. (Found by the self-check; self_check=False turns it off.)"
                )


def check_copies_stay_together(
    take: Callable[[list[int]], Any], rows_of: Callable[[Any, int, slice], Any], size: int, copies: int
) -> None:
    """Exchanges half of the examples, and looks whether the rows of the others stay where they were.

    For engines that take rows by their place, where nothing else would notice that collation reorders them.

    Args:
        take: As for `check_examples_are_independent`.
        rows_of: Some rows of a batch of so many.
        size, copies: Number of examples, and of the rows of each.

    Raises:
        PrivacyConfigurationError: They do not.
    """
    half, state = size // 2, _random_state()
    swapped = [
        (slice(0, half * copies), [*range(half), *[0] * (size - half)]),
        (slice(half * copies, size * copies), [*[size - 1] * half, *range(half, size)]),
    ]

    def leaves(examples: list[int], rows: slice) -> list[Tensor]:
        _set_random_state(state)
        part = rows_of(take(examples), size * copies, rows)
        return [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor) and leaf.dim()]

    with _random_state_kept():
        for rows, others in swapped:
            for one, other in zip(leaves(list(range(size)), rows), leaves(others, rows), strict=True):
                common = tuple(slice(0, min(a, b)) for a, b in zip(one.shape, other.shape, strict=True))
                if not torch.equal(one[common], other[common]):
                    raise PrivacyConfigurationError(
                        f"augmentation_multiplicity={copies}: exchanging some records of a batch changed the rows of "
                        "others, so that the augmentations of a record cannot be told from those of another. Collate "
                        "and transfer must keep the order of rows (no sorting by length), and treat each by itself. "
                        "(Found by the self-check; self_check=False turns it off.)"
                    )


#: Examples that pass through the bounding one by one.
_BOUNDED_EXAMPLES = 2


def _check_reduction(run: _ShadowRun, first: _Records, size: int, loss_reduction: str) -> None:
    """Property 3. Random models are compared by size only: other batch sizes draw other random numbers."""
    everyone, half = list(range(size)), size // 2
    reason = (
        "a smaller batch changed an example's gradient, which loss_reduction="
        f"'{loss_reduction}' does not explain. If training_step returns a sum over the examples, pass "
        "loss_reduction='sum'; if it returns a mean, 'mean'; otherwise the loss is normalised by something that "
        "depends on the data."
    )
    with suppress(RuntimeError):  # some kernels (cuDNN's recurrent layers) have no backward in eval mode
        whole = run(everyone, training=False) if first.was_random else first
        if whole.was_random:
            many, few = run([0] * 4 * size, training=False), run([0] * size, training=False)
            factor = 4.0 if loss_reduction == "mean" else 1.0
            larger, smaller = factor * many.typical_gradient(), few.typical_gradient()
            if larger > 2 * smaller or smaller > 2 * larger:
                raise UnsupportedModelError(f"The loss: {reason}")
            return
        factor = size / half if loss_reduction == "mean" else 1.0
        difference = _difference(whole, run(everyone[:half], training=whole is first), half, factor)
        if difference:
            raise UnsupportedModelError(f"{difference}: {reason}")


@dataclass
class _Records:
    """What one pass through a shadow showed."""

    calls: dict[str, list[Call]]
    #: Per-example norms of the gradients of every parameter.
    norms: dict[str, Tensor]
    #: Floating-point buffers after the pass.
    buffers: dict[str, Tensor]
    #: Whether the pass drew random numbers.
    was_random: bool
    #: Rows of the calls that belong to each example.
    copies: int

    def typical_gradient(self) -> float:
        """The median, over examples, of the norm of the gradient."""
        norms = torch.stack(list(self.norms.values())).norm(dim=0)
        return norms.median().item()


class _ShadowRun:
    """Passes examples through a fresh shadow of a module, from the same random state every time."""

    def __init__(
        self,
        module: pl.LightningModule,
        take: Callable[[list[int]], Any],
        step_arguments: tuple[Any, ...],
        context: Callable[[], AbstractContextManager[Any]],
        copies: int,
    ) -> None:
        self._module, self._take, self._copies = module, take, copies
        self._arguments, self._context = step_arguments, context
        self._state = _random_state()

    def possible(self) -> bool:
        """Whether the examples can be loaded and the module copied; warns when not."""
        try:
            self._take([0])
            shadow_of(self._module)
        except Exception as error:  # whatever a user's data set or attribute raises
            rank_zero_warn(f"The self-check was skipped: {type(error).__name__}: {error}")
            return False
        return True

    def __call__(
        self, examples: list[int], training: bool = True, dropout: bool = True, compare_with_autograd: bool = False
    ) -> _Records:
        shadow = shadow_of(self._module)
        if not training:
            shadow.eval()
        for child in shadow.modules():
            if not dropout and isinstance(child, nn.modules.dropout._DropoutNd):
                child.eval()
            if not dropout and isinstance(child, nn.MultiheadAttention):
                child.dropout = 0.0
        engine = BookKeeping(shadow)
        engine.copies = self._copies
        recorder = engine.make_recorder(None)
        _set_random_state(self._state)
        with warnings.catch_warnings(), set_aside(engine.parameters.values()):
            warnings.simplefilter("ignore")
            batch = self._take(examples)
            rows = len(examples) * self._copies
            with recorder.forward(rows, keep_requires_grad=compare_with_autograd), self._context():
                loss = loss_of(shadow.training_step(batch, *self._arguments))
            for parameter in engine.parameters.values():
                parameter.grad = None  # the step may have run backward passes of its own
            with recorder.backward():
                shadow.backward(loss)
            was_random = not _same_random_state(_random_state(), self._state)
            calls = recorder.take()
            for layer, made in calls.items():
                for call in made:
                    engine.consume(layer, call)
            gradients = engine.gradients()
            if compare_with_autograd:
                _compare_with_autograd(engine, gradients, calls, len(examples))
        return _Records(
            calls,
            {name: gradient.squared_norms().sqrt() for name, gradient in gradients.items()},
            {name: buffer for name, buffer in shadow.named_buffers() if buffer.is_floating_point()},
            was_random,
            self._copies,
        )


def _compare_with_autograd(
    engine: BookKeeping, gradients: dict[str, PerExampleGradient], calls: dict[str, list[Call]], size: int
) -> None:
    """Property 1: the engine's gradients with weights of one add up to what autograd found."""
    largest = max((p.grad.norm().item() for p in engine.parameters.values() if p.grad is not None), default=0.0)
    low_precision = any(_is_low_precision(c.grad_output) for made in calls.values() for c in made)
    for name, parameter in engine.parameters.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if not expected.isfinite().all():
            continue
        found = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        scale = 1e-3 * largest  # next to that, a gradient that should be zero is rounding
        if name in gradients:
            gradients[name].add_weighted_sum_(found, torch.ones(size, device=parameter.device))
            scale = max(scale, gradients[name].squared_norms().sum().sqrt().item())
        if not _close(found, expected, scale, low_precision):
            raise UnsupportedModelError(
                f"Parameter '{name}': its gradient is not explained by its layer's calls. It is used outside the "
                "layer's forward (a weight passed to a function, a penalty on weights in the loss: use the "
                "optimizer's weight_decay), through a function stored on the module that a copy cannot follow, or the "
                f"layer is re-run in the backward (activation checkpointing). Call the layer itself, {_WAY_OUT}."
            )


def _is_low_precision(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)


def _close(found: Tensor, expected: Tensor, scale: float = 0.0, low_precision: bool = False) -> bool:
    """Equal up to rounding, in Euclidean norm; entries that are not finite on either side do not count.

    ``scale`` is the norm of what was added up to give these, when they may have cancelled.
    """
    tolerance = 5e-2 if low_precision or _is_low_precision(expected) else 1e-3
    found, expected = wide(found), wide(expected)
    difference, size = (found - expected).norm().item(), expected.norm().item()
    if not (math.isfinite(difference) and math.isfinite(size)):
        finite = found.isfinite() & expected.isfinite()
        found, expected = found.double().where(finite, 0), expected.double().where(finite, 0)
        difference, size = (found - expected).norm().item(), expected.norm().item()
    return difference <= tolerance * max(size, scale) + 1e-12


def _difference(first: _Records, second: _Records, count: int, factor: float = 1.0) -> str | None:
    """Where the first ``count`` examples differ between two passes; ``first``'s gradients are multiplied by ``factor``.

    Names the first layer whose input differs, else the layer nearest to the loss whose upstream gradient does, else a
    buffer. Records of another shape (padded to another length) are compared by the norm of the gradient.
    """
    low = any(_is_low_precision(c.grad_output) for made in first.calls.values() for c in made)

    rows = count * first.copies

    def same(one: Tensor | None, other: Tensor | None, factor: float, scale: float = 0.0, count: int = rows) -> bool:
        if one is None or other is None or one.shape[1:] != other.shape[1:]:
            return True
        return _close(other[:count], one[:count] * factor if factor != 1 else one[:count], scale, low_precision=low)

    def pairs(name: str) -> list[tuple[Call, Call]]:
        return list(zip(first.calls[name], second.calls[name], strict=True))

    for name in first.calls:
        if len(first.calls[name]) != len(second.calls.get(name, [])):
            return f"Layer '{name}'"
    for name in first.calls:
        if not all(same(a.input, b.input, 1.0) for a, b in pairs(name)):
            return f"Layer '{name}'"
    for name in reversed(first.calls):
        if not all(same(a.grad_output, b.grad_output, factor) for a, b in pairs(name)):
            return f"Layer '{name}'"
    # Next to the largest, a gradient that should be zero (of a bias before a normalisation) is rounding.
    scale = 1e-3 * factor * max((norms[:count].norm().item() for norms in first.norms.values()), default=0.0)
    for name, norms in first.norms.items():
        if not same(norms, second.norms.get(name), factor, scale, count):
            return f"Parameter '{name}'"
    if factor == 1:
        for name, buffer in first.buffers.items():
            if not _close(second.buffers[name], buffer):
                return f"Buffer '{name}', which collects statistics of the batch without noise"
    return None


def loss_of(output: Any) -> Tensor:
    """The loss in what ``training_step`` returned."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise PrivacyConfigurationError(
            "training_step returned no loss. Whether a step happens must not depend on the data: return a loss for "
            "every batch."
        )
    return loss


def shadow_of(module: pl.LightningModule) -> pl.LightningModule:
    """A copy that shares the parameters and logs nothing."""
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    shadow = copy.deepcopy(module, memo)
    shadow.trainer = module.trainer
    for method in ("log", "log_dict"):
        object.__setattr__(shadow, method, lambda *args, **kwargs: None)
    return shadow


def _random_state() -> tuple[Any, ...]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return (
        torch.get_rng_state(),
        [torch.cuda.get_rng_state(d) for d in devices],
        np.random.get_state(),
        random.getstate(),
    )


def _same_random_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    same_torch = all(torch.equal(a, b) for a, b in zip([one[0], *one[1]], [other[0], *other[1]], strict=True))
    same_numpy = all(np.array_equal(a, b) for a, b in zip(one[2], other[2], strict=True))
    return same_torch and same_numpy and one[3] == other[3]


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    for device, cuda_state in enumerate(state[1]):
        torch.cuda.set_rng_state(cuda_state, device)
    np.random.set_state(state[2])
    random.setstate(state[3])


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state = _random_state()
    try:
        yield
    finally:
        _set_random_state(state)
