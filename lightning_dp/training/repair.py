"""Exchanging what cannot be trained privately for what can: GroupNorm for BatchNorm."""

from __future__ import annotations

import weakref
from typing import Any, Self

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_dp.torch_api import own_modules

#: Types that are exchanged (exactly these: a subclass may compute something else).
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

#: Channels that a group has at least; of vectors, which have no other dimension to normalise over, more.
_CHANNELS, _CHANNELS_OF_VECTORS = 4, 16

#: The most groups. Source: Wu & He 2018, "Group Normalization", section 3.1.
_GROUPS = 32

#: What was exchanged in a module, by module.
_REPAIRED: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


class _Frozen(nn.Module):
    """A BatchNorm that stays in eval mode: it applies the statistics that it came with, a public affine map."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` that stays in eval mode."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that stays in eval mode."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` that stays in eval mode."""


class FrozenSyncBatchNorm(_Frozen, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that stays in eval mode."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}


def repair(module: nn.Module) -> nn.Module:
    """Exchanges every BatchNorm of a module, in place, for what can be trained privately.

    - One that is trained becomes a GroupNorm with the same weights, of at least 4 channels a group (16, for vectors)
      and at most 32 groups. Statistics that it came with are lost.
    - One that is frozen, and came with statistics, keeps them and stays in eval mode: a fixed affine map. Its
      parameters keep their names.

    Call it in ``__init__``, or give ``repair=True`` to `DifferentialPrivacy` or `PrivateStrategy`.

    Args:
        module: The module. Layers of subclasses of BatchNorm are left alone, and refused in a fit as they are.

    Returns:
        The module itself; or what has taken its place, if it is a BatchNorm.

    Example::

        >>> import torch, lightning_dp
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU())
        >>> lightning_dp.repair(net)[1].num_groups
        16
    """
    if type(module) in _BATCH_NORMS:
        return _exchanged(module)
    made: dict[nn.Module, nn.Module] = {}  # a layer that is used in two places stays one
    found = _REPAIRED.setdefault(module, {})
    for path, parent in list(module.named_modules()):
        for name, child in own_modules(parent):
            if type(child) in _BATCH_NORMS:
                made.setdefault(child, _exchanged(child))
                setattr(parent, name, made[child])
                found[f"{path}.{name}".lstrip(".")] = type(made[child]).__name__
    return module


def repaired(module: nn.Module) -> dict[str, str]:
    """What was exchanged in a module: types of layers, by name."""
    return dict(_REPAIRED.get(module, {}))


def repair_and_say(module: nn.Module) -> None:
    """`repair`, with a line about what was exchanged."""
    before = repaired(module)
    repair(module)
    new = {name: kind for name, kind in repaired(module).items() if name not in before}
    groups = [name for name, kind in new.items() if kind == "GroupNorm"]
    frozen = [name for name in new if name not in groups]
    if groups:
        rank_zero_info(
            f"lightning_dp: repair=True: GroupNorm in the place of {len(groups)} BatchNorm layers "
            f"({_few(groups)}), with their weights and without their statistics."
        )
    if frozen:
        rank_zero_info(
            f"lightning_dp: repair=True: {len(frozen)} frozen BatchNorm layers ({_few(frozen)}) stay in eval mode, "
            "with the statistics that they came with."
        )


def loading_repaired(cls: Any, layers: dict[str, str]) -> Any:
    """The class, with modules that are repaired before a checkpoint's weights are loaded into them."""
    if not layers:
        return cls

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        repair(self)
        cls.on_load_checkpoint(self, checkpoint)

    return type(cls.__name__, (cls,), {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__})


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _exchanged(layer: nn.Module) -> nn.Module:
    frozen = not any(p.requires_grad for p in layer.parameters())
    batches: Any = getattr(layer, "num_batches_tracked", None)
    if frozen and layer.running_mean is not None and (batches is None or int(batches) > 0):
        layer.__class__ = _FROZEN[type(layer)]
        return layer.train()
    return _group_norm(layer)


def _group_norm(layer: Any) -> nn.GroupNorm:
    channels = layer.num_features
    least = _CHANNELS_OF_VECTORS if isinstance(layer, nn.BatchNorm1d) else _CHANNELS
    groups = max(n for n in range(1, _GROUPS + 1) if channels % n == 0 and (n == 1 or channels // n >= least))
    made = nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)
    if layer.affine:
        # The same parameters: whoever holds them (an optimizer, a list of names) still does.
        made.weight, made.bias = layer.weight, layer.bias
    elif layer.running_mean is not None:
        made.to(layer.running_mean.device)
    return made.train(layer.training)
