"""The self-check: examines the training step before the first private step, and whenever it runs other code."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.checkpoint import CheckpointError

from lightning_dp.errors import (
    ACTIVATION_CHECKPOINTING,
    FormChanged,
    PrivacyConfigurationError,
    SharedOutputShaped,
    UnsupportedModelError,
)
from lightning_dp.gradients.engine import SummingEngine
from lightning_dp.gradients.forms import CallForms
from lightning_dp.mechanism.sampling import Draw
from lightning_dp.training import lightning_api, steering
from lightning_dp.training.batches import Layout, Shapes, find_layout, shapes_of_one
from lightning_dp.training.checks.contributions import check_contributions
from lightning_dp.training.independence.collation import check_collation, check_copies_stay_together
from lightning_dp.training.independence.examination import examine
from lightning_dp.training.independence.exchange import check_exchange
from lightning_dp.training.independence.findings import Findings
from lightning_dp.training.independence.shadow import random_state_kept
from lightning_dp.training.independence.shadow import seed_everything as seed_records
from lightning_dp.training.independence.subject import Subject, Understanding, choose_records, fresh
from lightning_dp.training.manual.rehearsal import NothingPrivate

if TYPE_CHECKING:
    from lightning_dp.training.strategy import PrivateMixin

#: The most records for the row tracer (a number that is hardly a size of a model), the most for the exchange tests, and
#: the most rows of the latter, where each record has several (``augmentation_multiplicity``).
_TRACED, _EXCHANGED, _EXAMINED_ROWS = 11, 18, 36

#: Batches that are looked at for a step with gradients of records, where ``training_step`` takes its steps itself.
_LOOKED_AHEAD = 8


class Examiner:
    """Examines a strategy's training step, and keeps the findings.

    Args:
        strategy: The strategy whose ``training_step`` is examined.
    """

    def __init__(self, strategy: PrivateMixin) -> None:
        self._strategy = strategy
        self.reset(pending=False)

    def reset(self, pending: bool) -> None:
        """Forgets all findings, at the start of a fit.

        Args:
            pending: Whether the step is to be examined before it is taken.
        """
        self.is_pending = pending
        #: The findings of all examinations, merged; ``None`` before the first.
        self.findings: Findings | None = None
        #: Losses and code that were examined: a step that runs other code raises `FormChanged`.
        self.understanding = Understanding()
        self._subject: Subject | None = None
        self._layout: Layout | None = None

    @property
    def logged_names(self) -> set[str]:
        """Names of the metrics that the step logged when it was examined."""
        return set() if self.findings is None else self.findings.names

    def run_once(self, args: tuple[Any, ...]) -> None:
        """Examines the training step, on records spread over the data set rather than on those that were drawn."""
        if not self.is_pending:
            return
        self.is_pending = False
        if self._strategy.num_records < 2:
            rank_zero_warn(
                "lightning_dp: the train set has one record: whether records are independent is not checked."
            )
            return
        subject = self._subject = self._make_subject(args)
        findings = _of_first_private(self._examine, subject, args)
        steering.check_monitors(self._strategy.trainer_in_fit(), findings.logged)
        _announce(findings)

    def _make_subject(self, args: tuple[Any, ...]) -> Subject:
        copies, loader = self._strategy.mechanism.augmentation_multiplicity, self._strategy.train_loader
        assert loader is not None
        most = min(_EXCHANGED, _EXAMINED_ROWS // copies)
        most = min(most, self._strategy.micro_batches.records_at_once or most)
        with random_state_kept():
            seed_records(0)
            records = choose_records(
                lambda index: loader.load_record(index, copies),
                self._strategy.num_records,
                max(2, min(most, self._strategy.num_records)),
            )
        # Whether records are independent does not depend on precision, but autocast's rounding blurs the comparison.
        mixed = isinstance(self._strategy.precision_plugin, MixedPrecision)
        return Subject(
            module=self._strategy.module_in_fit(),
            records=records,
            collate=lambda items: self._strategy.precision_plugin.convert_input(loader.collate_items(items)),
            transfer=self._strategy.micro_batches.transfer,
            arguments=args,
            context=nullcontext if mixed else self._strategy.precision_plugin.train_step_context,
            stand_in=self._standing_in,
            loss_reduction=self._strategy.options.loss_reduction,
            copies=copies,
            largest_batch=self._largest_batch(),
            needs_layers=self._strategy.options.engine == "bookkeeping",
            per_record_means=self._strategy.options.per_record_means,
            understanding=self.understanding,
        )

    def _largest_batch(self) -> int:
        """The most records that one forward pass is likely to have: four standard deviations above the mean."""
        expected = self._strategy.expected_batch_size
        drawn = expected + 4 * math.sqrt(expected * (1 - self._strategy.sampling_rate))
        share = math.ceil(min(drawn, self._strategy.num_records) / self._strategy.trainer_in_fit().world_size)
        share = min(share, self._strategy.micro_batches.records_at_once or share)
        return min(share, (self._strategy.private_step and self._strategy.private_step.engine.max_examples) or share)

    def _examine(self, subject: Subject) -> Findings:
        """Runs all examinations; again, with layers followed by other means, where copies of outputs do not do."""
        while True:
            try:
                return self._examine_once(subject)
            except SharedOutputShaped as error:
                new = set(error.layers) - self.understanding.followed
                if not new:
                    raise UnsupportedModelError(str(error)) from None
                self.understanding.followed |= new

    def _examine_once(self, subject: Subject) -> Findings:
        """Runs all examinations on the subject's records, and merges what they find into `findings`.

        Raises:
            UnsupportedModelError, PrivacyConfigurationError: Records are not independent, or a gradient is missed.
        """
        try:
            unseen = check_collation(subject)
            if subject.copies > 1:
                check_copies_stay_together(subject)
            sorts = any("order of its own" in sentence for sentence in unseen)
            few = replace(subject, records=subject.records[: max(2, min(_TRACED, len(subject.records)))])
            findings = examine(few)
            in_parts = self._strategy.micro_batches.records_at_once is not None
            if findings.counts and (self._strategy.options.engine == "per_example" or in_parts):
                self._refuse_counters(findings.counts)
            try:
                unseen += check_exchange(subject, findings, compare_places=not sorts)
            except SharedOutputShaped:
                raise
            except UnsupportedModelError as error:
                raise UnsupportedModelError(" ".join([*findings.doubts, str(error)])[:2000]) from None
            self._refuse_beyond_rules(findings.forms)
            if subject.needs_layers:
                state = self._strategy.private_step.clipping_state if self._strategy.private_step else {}
                unseen += check_contributions(subject, self._strategy.mechanism.clipping, state, findings.forms)
        except (SharedOutputShaped, NothingPrivate):
            raise
        except (UnsupportedModelError, PrivacyConfigurationError) as error:
            raise type(error)(str(error)) from None
        except CheckpointError as error:
            raise UnsupportedModelError(ACTIVATION_CHECKPOINTING) from error
        findings.unseen += [sentence for sentence in unseen if sentence not in findings.unseen]
        if self.findings is None:
            self.findings = findings
        else:
            self.findings.merge(findings)
        if self._strategy.private_step is not None:
            self._strategy.private_step.engine.forms = self.findings.forms
        return findings

    def _refuse_beyond_rules(self, forms: CallForms) -> None:
        """Raises: a rule that bounds within the backward pass knows layers that are called with one entry per
        example, and nothing else."""
        step, found = self._strategy.private_step, forms.beyond_rules()
        if step is None or not isinstance(step.engine, SummingEngine) or not found:
            return
        raise UnsupportedModelError(
            f"{', '.join(map(repr, found[:4]))}: {type(self._strategy.mechanism.clipping).__name__} bounds what layers "
            "give that are called with one entry per example in their leading dimension, and these are used in another "
            "way (a parameter outside its layer's forward, the batch in another dimension). Use FlatClipping or "
            "PerLayerClipping, which bound any."
        )

    def _refuse_counters(self, counts: list[str]) -> None:
        """Raises: state that every call of training_step changes counts micro-batches, and so the records drawn."""
        names = ", ".join(map(repr, counts[:4]))
        if self._strategy.options.engine == "per_example":
            raise UnsupportedModelError(
                f"training_step changes {names} whenever it is called, and engine='per_example' calls it once for "
                "every record: after a few steps it would tell exactly how many were drawn. Count steps by "
                "self.global_step instead."
            )
        raise UnsupportedModelError(
            f"training_step changes {names} whenever it is called, and max_physical_batch_size (or "
            "accumulate_grad_batches) calls it once per micro-batch: how often depends on the size of the sample. "
            "Count steps by self.global_step instead."
        )

    def examine_drawn(self, batch: Any, draw: Draw, args: tuple[Any, ...], reason: FormChanged, seed: int) -> None:
        """Examines a step that ran code that was not examined before, on its drawn batch; nothing is charged yet.

        Args:
            batch: The drawn batch, on the device.
            draw: Its records.
            args: What ``training_step`` takes after the batch.
            reason: What stopped the step.
            seed: Of the random numbers that the examined step draws.

        Raises:
            UnsupportedModelError: Records are not independent in the step.
            FormChanged: ``reason``, if there was no examination before the first step.
        """
        subject = self._subject
        if subject is None or self.findings is None:
            raise reason
        subject.arguments = args
        copies = self._strategy.mechanism.augmentation_multiplicity
        try:
            found = self.findings
            if draw.size:
                found = examine(subject, batch, draw.size * copies, self.batch_layout(), seed)
            self.findings.merge(found)
            # The record that made the step run other code is among those that were drawn.
            drawn = draw.records
            if len(drawn) > 1 and self._strategy.train_loader is not None:
                loader = self._strategy.train_loader
                with random_state_kept():
                    chosen = choose_records(
                        lambda index: loader.load_record(drawn[index], copies), len(drawn), len(subject.records)
                    )
                self._examine(replace(subject, records=chosen))
            self._examine(subject)
            self.findings.merge(found)
            steering.check_monitors(self._strategy.trainer_in_fit(), found.logged)
        except NothingPrivate as error:  # of the other steps, what runs proves that no record reaches them
            if not self.understanding.manual.is_known:
                raise UnsupportedModelError(f"{reason} {error}"[:2000]) from None
            self.findings.names |= error.names
            self.findings.logged |= error.logged
            steering.check_monitors(self._strategy.trainer_in_fit(), error.logged)
        except (UnsupportedModelError, PrivacyConfigurationError) as error:
            raise UnsupportedModelError(f"{reason} {error}"[:2000]) from None

    def _standing_in(self, shadow: Any) -> AbstractContextManager[None]:
        """Within, hooks that the Trainer calls reach a copy of the module (``shadow``), not the module."""
        return lightning_api.standing_in(self._strategy, shadow)

    def shapes_of_records(self) -> list[Shapes]:
        """Shapes of a batch of one, for each of the records that were examined."""
        if (subject := self._subject) is None:
            return []
        layout = self.batch_layout()
        with random_state_kept():
            return [shapes_of_one(subject.transfer(subject.collated([r])), layout) for r in subject.records]

    def batch_layout(self) -> Layout:
        """Where the examples are in a transferred batch, found from two sizes."""
        if self._layout is None:
            loader = self._strategy.train_loader
            assert loader is not None
            copies = self._strategy.mechanism.augmentation_multiplicity
            with random_state_kept():
                some = [loader.load_record(i % self._strategy.num_records, copies) for i in range(5)]
                batches = []
                for records in (some, [*some, *some[:2]]):
                    items = [fresh(item) for record in records for item in record]
                    seed_records(0)
                    batches.append(
                        self._strategy.micro_batches.transfer(
                            self._strategy.precision_plugin.convert_input(loader.collate_items(items))
                        )
                    )
            self._layout = find_layout(batches[0], 5 * copies, batches[1], 7 * copies)
        return self._layout

    def statement(self) -> dict[str, Any] | None:
        """The findings about the independence of records, for the privacy card; ``None`` without a self-check."""
        if self.findings is None:
            return None
        return {
            "verdict": self.findings.verdict,
            "decisions": dict(self.findings.decisions),
            "losses": dict(self.findings.understood),
            "not_checked": list(self.findings.unseen),
        }


def _of_first_private(examine: Callable[[Subject], Findings], subject: Subject, args: tuple[Any, ...]) -> Findings:
    """What is found on the first batch, or, where no step with gradients of records is taken, on one of the next.

    Args:
        examine: Examines a subject.
        subject: The subject; its arguments are set.
        args: What ``training_step`` takes after the batch: the batch's number, perhaps.
    """
    numbered = bool(args) and isinstance(args[0], int)
    for ahead in range(_LOOKED_AHEAD if numbered else 1):
        subject.arguments = (args[0] + ahead, *args[1:]) if ahead else args
        try:
            return examine(subject)
        except NothingPrivate as error:
            last = error
    raise last


def _announce(findings: Findings) -> None:
    for line, what in findings.understood.items():
        rank_zero_info(f"lightning_dp: {line}: {what} (per_record_means=False leaves losses as they are).")
    if findings.unseen:
        rank_zero_warn(f"lightning_dp: not checked: {'; '.join(findings.unseen)}. The privacy card says so.")
