"""What the optimizers of a manual training step are stepped with: gradients of records, or of nothing in the batch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Asked:
    """A backward pass that a training step asked for.

    Attributes:
        reached: The parameters that get a gradient: numbers of the optimizer, and of the parameter within it.
        is_public: Whether the loss depends on no record of the batch.
        times: How many steps of private optimizers its gradient is part of.
    """

    reached: list[tuple[int, int]]
    is_public: bool
    times: int = 0


@dataclass
class ManualPlan:
    """What examinations have found out about a training step that steps its optimizers itself.

    Attributes:
        private: Numbers of the optimizers whose gradients depend on records: every step of theirs is a release.
        public: Numbers of those whose gradients depend on no record of the batch (a generator's).
        releases: The most releases that the step makes from one batch.
        asked: The backward passes of the run that was examined last, in order.
    """

    private: set[int] = field(default_factory=set)
    public: set[int] = field(default_factory=set)
    releases: int = 0
    asked: list[Asked] = field(default_factory=list)

    @property
    def is_known(self) -> bool:
        """Whether a training step was examined."""
        return bool(self.private)

    def learn(self, private: set[int], stepped: set[int], asked: list[Asked]) -> None:
        """Adds what one examined step did: an optimizer is private as soon as one step of its own is."""
        self.private |= private
        self.public = (self.public | stepped) - self.private
        self.asked = asked
