"""What private training of a module would be like: every layer's way, what is proven, and what it costs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from lightning_dp.gradients.covered import is_covered
from lightning_dp.gradients.model import getattr_path, trainable, trained_layers
from lightning_dp.gradients.rules.composite import calls_linear
from lightning_dp.gradients.rules.registry import refusal_for, rule_for

#: How the gradients of a layer's parameters are found.
BY_RULE, AS_LINEAR_MAPS, RUN_AGAIN = "by rule", "as the linear maps it is made of", "run once more for every example"
FOLLOWED, REFUSED = "parameters followed to where they meet records", "refused"

#: The most names, and the most lines of a section, that the text shows.
_NAMES, _LINES = 3, 12


@dataclass
class LayerGroup:
    """Layers of one type that are dealt with in one way.

    Attributes:
        kind: Their type.
        way: How the gradients of their parameters are found, or that they are refused.
        names: Their names; those of parameters, where the LightningModule itself holds them.
        parameters: Trainable numbers in them.
        remedy: What to do, where they are refused.
    """

    kind: str
    way: str
    names: list[str]
    parameters: int
    remedy: str | None = None


@dataclass
class Plan:
    """A training as it is planned: public numbers.

    Attributes:
        epsilon, delta: What it will cost.
        steps, sampling_rate, expected_batch_size, num_records: Steps that are planned, q, q·N, N.
        noise_multiplier: Noise over sensitivity.
        noise_to_clip: Expected norm of the noise in the mean gradient, over the norm that a record is clipped to. Where
            it is far above 1, little is learned: see `halved_by`.
        halved_by: What would halve it at the same ε, and how far it gets: by change.
    """

    epsilon: float
    delta: float
    steps: int
    sampling_rate: float
    expected_batch_size: float
    num_records: int
    noise_multiplier: float
    noise_to_clip: float
    halved_by: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """What `lightning_dp.check` found. ``str(report)`` is its text, `to_dict` plain data for JSON.

    Attributes:
        layers: The trained layers, by type and way.
        problems: Why private training would refuse, with what to do; empty: it would train.
        verdict: ``"proven"``, ``"checked"`` or ``"partly checked"``: how far records are known not to influence one
            another's gradients; ``None``: nobody looked, or it was refused.
        notes: How losses were understood, where something is decided by records, and what was not looked at.
        plan: Noise and ε; ``None`` where it was refused before they were known.
        step_seconds, plain_step_seconds: Medians over a few steps, with and without privacy; of this machine, and of
            batches of the data, so not private.
        step_bytes, plain_step_bytes: The most bytes that tensors which a step makes had at once, with and without
            privacy: beside weights, optimizer and batch. With privacy, samples differ in size, and from run to run.
    """

    layers: list[LayerGroup]
    problems: list[str] = field(default_factory=list)
    verdict: str | None = None
    notes: list[str] = field(default_factory=list)
    plan: Plan | None = None
    step_seconds: float | None = None
    plain_step_seconds: float | None = None
    step_bytes: int | None = None
    plain_step_bytes: int | None = None

    @property
    def ok(self) -> bool:
        """Whether private training would begin."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dictionaries, lists, strings and numbers; infinite numbers are ``None``."""
        return {"ok": self.ok, **_finite(asdict(self))}

    def __str__(self) -> str:
        parts = [layers_text(self.layers), *self._independence(), *self._planned(), *self._costs()]
        if self.problems:
            parts.append("\n".join(["Refused:", *(f"  {problem}" for problem in self.problems)]))
        else:
            parts.append("Private training would begin. Nothing was trained, and nothing was charged.")
        return "\n".join(parts)

    def _independence(self) -> list[str]:
        if self.verdict is None:
            return []
        shown = [f"  {note}" for note in self.notes[:_LINES]]
        more = [f"  and {len(self.notes) - _LINES} more"] if len(self.notes) > _LINES else []
        return ["\n".join([f"Independence of records: {self.verdict}.", *shown, *more])]

    def _planned(self) -> list[str]:
        plan = self.plan
        if plan is None:
            return []
        lines = [
            f"Plan: ε = {plan.epsilon:.4g} at δ = {plan.delta:g} after {plan.steps} steps; {plan.num_records} records, "
            f"sampling rate {plan.sampling_rate:.4g}, expected batch {plan.expected_batch_size:g}; noise multiplier "
            f"{plan.noise_multiplier:.4g}.",
            f"  The noise in the mean gradient has {plan.noise_to_clip:.3g} times the norm a record is clipped to.",
        ]
        lines += [f"  {change}: {ratio:.3g} times." for change, ratio in plan.halved_by.items()]
        return ["\n".join(lines)]

    def _costs(self) -> list[str]:
        if self.step_seconds is None or not self.plain_step_seconds:
            return []
        ratio = self.step_seconds / self.plain_step_seconds
        lines = [f"A step takes {1e3 * self.step_seconds:.3g} ms here, {ratio:.2g} times one without privacy."]
        if self.step_bytes and self.plain_step_bytes:
            ratio = self.step_bytes / self.plain_step_bytes
            lines.append(f"The tensors that it makes take {_size(self.step_bytes)} at most, {ratio:.2g} times as much.")
        return ["\n  ".join(lines)]


def layer_groups(module: nn.Module, engine: str = "bookkeeping") -> list[LayerGroup]:
    """The trained layers of a module, by type and by the way in which their gradients are found.

    Args:
        module: The module.
        engine: ``"bookkeeping"``, or ``"per_example"``, which runs all layers one example at a time.
    """
    groups: dict[tuple[str, str, str | None], LayerGroup] = {}
    trained = trained_layers(module)
    refused = {name: m for name, m in module.named_modules() if refusal_for(m) is not None}
    for name, layer in {**trained, **refused}.items():
        remedy = refusal_for(layer)
        way = REFUSED if remedy else _way(layer, engine)
        own = [getattr_path(layer, own) for own in trainable(layer)] if name in trained else []
        names = [name] if name else trainable(layer)
        key = type(layer).__name__, way, remedy
        group = groups.setdefault(key, LayerGroup(*key[:2], [], 0, remedy))
        group.names += names
        group.parameters += sum(p.numel() for p in own if not isinstance(p, nn.UninitializedParameter))
    return sorted(groups.values(), key=lambda group: (group.way != REFUSED, -group.parameters))


def layers_text(groups: list[LayerGroup]) -> str:
    """The trained layers as text: a line for each type and way."""
    lines = ["Trained layers:" if groups else "No layer is trained."]
    for group in groups[:_LINES]:
        names = ", ".join(group.names[:_NAMES]) + (", …" if len(group.names) > _NAMES else "")
        count = f"{len(group.names)} x {group.kind}" if len(group.names) > 1 else group.kind
        lines.append(f"  {count} ({names}), {group.parameters} parameters: {group.way}")
        if group.remedy:
            lines.append(f"    {group.remedy}")
    if len(groups) > _LINES:
        lines.append(f"  and {len(groups) - _LINES} more types")
    return "\n".join(lines)


def _way(layer: nn.Module, engine: str) -> str:
    if engine == "per_example":
        return RUN_AGAIN
    if not is_covered(layer):
        return FOLLOWED
    if calls_linear(layer):
        return AS_LINEAR_MAPS
    return BY_RULE if rule_for(layer) is not None else RUN_AGAIN


def _size(count: int) -> str:
    """Bytes, to be read."""
    unit, name = next((u, n) for u, n in [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")] if count >= u)
    return f"{count / unit:.3g} {name}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
