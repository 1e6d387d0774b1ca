"""The description of a training's mechanism that journal and privacy card state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dp_accounting import NeighboringRelation

from lightning_dp.mechanism.mechanism import describe
from lightning_dp.statistics.base import PrivateStatistic
from lightning_dp.training.repair import repaired
from lightning_dp.training.run_directory import software_versions

if TYPE_CHECKING:
    from lightning_dp.training.strategy import PrivateMixin


def public_configuration(strategy: PrivateMixin) -> dict[str, Any]:
    """The mechanism and its surroundings as plain data: strings, numbers, lists and dictionaries.

    All of it is public (N by assumption), but for ``"independence"``: the self-check names the lines of code that read
    values of the records it examined.
    """
    step = strategy.private_step
    groups = step.groups if step is not None else [()]
    state = step.clipping_state if step is not None else None
    bound = step.clipping if step is not None else strategy.mechanism.clipping
    return {
        "clipping": describe(strategy.mechanism.clipping),
        "sensitivity": bound.sensitivity(NeighboringRelation.ADD_OR_REMOVE_ONE, groups, state),
        "groups": len(groups),
        "noise": {**describe(strategy.mechanism.noise), "multiplier": strategy.noise_multiplier},
        "denoiser": None if strategy.mechanism.denoiser is None else describe(strategy.mechanism.denoiser),
        "manual_optimization": _manual(strategy),
        "num_records": strategy.num_records,
        "sampling_rate": strategy.sampling_rate,
        "expected_batch_size": strategy.expected_batch_size,
        "weighted_sampling": strategy.train_loader is not None and strategy.train_loader.poisson.keeps is not None,
        "engine": strategy.options.engine,
        "loss_reduction": strategy.options.loss_reduction,
        "max_physical_batch_size": strategy.options.max_physical_batch_size,
        "augmentation_multiplicity": strategy.mechanism.augmentation_multiplicity,
        "self_check": strategy.options.self_check,
        "independence": strategy.examiner.statement(),
        "statistics": [
            f"{type(layer).__name__} ({layer.label})"
            for layer in strategy.module_in_fit().modules()
            if isinstance(layer, PrivateStatistic)
        ],
        "repaired": sorted(f"{name} ({kind})" for name, kind in repaired(strategy.module_in_fit()).items()),
        "seed_given": strategy.seed is not None,
        "secure_rng": strategy.randomness.secure,
        "journal": strategy.options.journal,
        "precision": str(strategy.trainer_in_fit().precision),
        "model": type(strategy.module_in_fit()).__name__,
        "trainable_parameters": sum(p.numel() for p in step.engine.parameters.values()) if step else None,
        "software": software_versions(),
    }


def _manual(strategy: PrivateMixin) -> dict[str, Any] | None:
    """Of a module that steps its optimizers itself: which of them meet records, and how often; else ``None``."""
    plan = strategy.examiner.understanding.manual
    if not plan.is_known or strategy.train_loader is None:
        return None
    return {
        "private_optimizers": sorted(plan.private),
        "optimizers_without_records": sorted(plan.public),
        "releases_per_step": plan.releases,
        "rows_of_a_batch": strategy.train_loader.poisson.filled_to,
    }
