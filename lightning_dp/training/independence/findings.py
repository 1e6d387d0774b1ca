"""What an examination found."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_dp.gradients.forms import CallForms
from lightning_dp.training.batches import Layout
from lightning_dp.training.independence.tracer import Read


@dataclass
class Findings:
    """What an examination found.

    Attributes:
        decisions: Lines where something may be decided by what records hold, and how.
        understood: Lines where a batch mean was understood as a mean over records.
        unseen: What could not be examined, in sentences.
        doubts: Why, for an engine that sees one record at a time, the loss may be another than that of a batch.
        logged: Names of metrics that the step logs and that depend on records.
        counts: State that a step changes, whatever the records: counters.
        forms: How layers are called.
        operations: How many operations PyTorch ran.
        records: How many records were looked at.
        reads: Values that became Python's within ``training_step``, in order.
        constants: Numbers that the batch's are compared with, each with its leaf's place in the batch.
        names: Names of all metrics that the step logs.
        layout: Where the examples are in the batch that was looked at.
    """

    decisions: dict[str, str] = field(default_factory=dict)
    understood: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    logged: set[str] = field(default_factory=set)
    counts: list[str] = field(default_factory=list)
    forms: CallForms = field(default_factory=CallForms)
    operations: int = 0
    records: int = 0
    reads: list[Read] = field(default_factory=list)
    constants: set[tuple[int, float]] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    layout: Layout | None = None

    @property
    def verdict(self) -> str:
        """``"proven"``, ``"checked"`` or, where something could not be looked at, ``"partly checked"``."""
        if self.unseen:
            return "partly checked"
        return "checked" if self.decisions else "proven"

    def merge(self, other: Findings) -> None:
        """Adds a later examination's decisions, losses, unseen, metrics, constants and forms; nothing else of it."""
        self.decisions |= other.decisions
        self.understood |= other.understood
        self.unseen += [sentence for sentence in other.unseen if sentence not in self.unseen]
        self.logged |= other.logged
        self.constants |= other.constants
        self.names |= other.names
        # In a batch of one, nobody can tell an input that all examples share from that of the one.
        self.forms.merge(other.forms, only_new=other.records < 2)
