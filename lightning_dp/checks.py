"""What cannot be trained privately, and why: checks before the first step, each with the way out.

`check_trainer`, `check_model` and `check_optimizers` look at the configuration; `check_contributions` runs a few
examples through the bounding. Whether records are independent is examined in `lightning_dp.independence`.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.clipping import Bounding, Group, State
from lightning_dp.denoising import Denoiser
from lightning_dp.engines import Engine, SummingEngine, set_aside
from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.forms import CallForms
from lightning_dp.independence.shadow import AlignedRandomness, Shadow, random_state_kept, seed_everything
from lightning_dp.independence.subject import Subject, loss_of, reduced
from lightning_dp.layers import refusal_for, rule_for, trainable, trained_layers
from lightning_dp.noise import NOISES, GaussianNoise, Noise
from lightning_dp.pipeline import PrivateStep
from lightning_dp.randomness import Randomness
from lightning_dp.records import getattr_path

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
    if not np.isfinite(noise.density().log_moments(1.0, 2)).all():
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
    refused: dict[tuple[str, str], list[str]] = {}
    for name, child in module.named_modules():
        reason = refusal_for(child)
        if reason:
            refused.setdefault((type(child).__name__, reason), []).append(name)
    problems = [_of_layers(names, kind, reason) for (kind, reason), names in refused.items()]
    if engine == "bookkeeping":
        without: dict[tuple[str, str], list[str]] = {}
        for name, child in trained_layers(module).items():
            for reason in [] if refusal_for(child) else _without_rule(name, child):
                without.setdefault((type(child).__name__, reason), []).append(name)
        problems += [
            reason if names == [""] else _of_layers(names, kind, reason) for (kind, reason), names in without.items()
        ]
        problems += _compiled(module) + _tied(module)
    problems += _odd_parameters(module)
    hooked = [name for name, p in module.named_parameters() if p.requires_grad and has_hooks(p)]
    if hooked:
        problems.append(
            f"parameters {hooked} have gradient hooks (register_hook, register_post_accumulate_grad_hook, "
            "wandb.watch), which would see gradients without noise; remove them, and look at p.grad in "
            "on_after_backward, where the noise is in"
        )
    if problems:
        listed = "\n  - ".join(["This model cannot be trained privately as it is:", *problems])
        raise UnsupportedModelError(listed if len(listed) <= 2000 else f"{listed[:1990]} …")
    if not any(p.requires_grad for p in module.parameters()):
        raise UnsupportedModelError("The model has no parameter that requires a gradient: there is nothing to train.")


def _odd_parameters(module: nn.Module) -> list[str]:
    """Parameters that have no numbers yet, or complex ones."""
    problems = []
    lazy = [name for name, p in module.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        problems.append(
            f"parameters {lazy[:4]} of lazy layers have no shape yet: pass a batch (of zeros) through the module "
            "once in "
            "configure_model or before the fit"
        )
    named = {name: p for name, p in module.named_parameters() if name not in lazy}
    complex_ones = [name for name, p in named.items() if p.requires_grad and p.is_complex()]
    if complex_ones:
        problems.append(
            f"parameters {complex_ones[:4]} are complex, for which no bound is proven: hold the two parts as one real "
            "parameter, and use torch.view_as_complex(parameter)"
        )
    return problems


def _of_layers(names: list[str], kind: str, reason: str) -> str:
    """One line for all layers of a type with the same problem."""
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"layer{'s' if len(names) > 1 else ''} {shown}{more} ({kind}): {reason}"


def _few(names: list[str]) -> list[str]:
    return names if len(names) <= _NAMED else [*names[:_NAMED], "…"]


#: Layers that a line names.
_NAMED = 4


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
            f"its fused kernel hides the gradients of the single steps; use "
            f"opacus.layers.DP{type(module).__name__}, which takes the same arguments and weights (or let "
            f"`opacus.validators.ModuleValidator.fix` exchange it), {_WAY_OUT}"
        ]
    if type(module).forward is nn.Module.forward:
        return [
            f"it holds the parameters {_few(own)} and has no forward of its own (a ParameterList, a parametrization): "
            "what uses them cannot be seen; hold them in the module that uses them, "
            f"freeze them (requires_grad_(False)), {_WAY_OUT}"
        ]
    unknown = [p for p in own if p not in ("weight", "bias")] if rule_for(module) else []
    if unknown:
        return [f"its rule does not know the parameters {unknown} (weight_norm, pruning?); remove them, {_WAY_OUT}"]
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


#: Examples that pass through the bounding one by one.
_BOUNDED_EXAMPLES = 2

#: Pairs that are looked at; and the relative error that no rounding explains.
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
    """Runs a few examples through the bounding itself, in a shadow of the model, one by one and together.

    Every example's contribution must stay within the sensitivity of every group, and those of all must add up to what
    the batch gives.

    Args:
        subject: The step and the records.
        clipping, state: The rule, and what it has chosen so far.
        forms: How layers are called.

    Returns:
        What could not be looked at, in sentences.

    Raises:
        UnsupportedModelError: With the parameter's name.
    """
    bounds: dict[Group, float] = {}
    copies, mean = subject.copies, subject.loss_reduction == "mean"
    unaligned = False

    def contribution(examples: list[int]) -> tuple[PrivateStep, dict[str, Tensor]]:
        nonlocal unaligned
        shadow = Shadow(subject.module).module.eval()
        rule = clipping.bind(shadow)
        engine = rule.make_engine("bookkeeping", shadow)
        engine.copies, engine.forms = copies, forms
        step = PrivateStep(engine, rule, GaussianNoise(), PrivacyLedger(), Randomness())
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
        """The parameter for which contributions add up worst, and by how much of their size they do not."""
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
            # An activation that is zero but for rounding may count in a batch of two and not in one of one: another
            # pair is looked at then. What is wrong with a rule is wrong for all of them.
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
