"""Micro-batches: the user's ``training_step`` on the parts of a logical batch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.errors import FormChanged, PrivacyConfigurationError
from lightning_dp.gradients.forms import form_changed_in
from lightning_dp.mechanism.sampling import Draw
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.training import lightning_api
from lightning_dp.training.independence.joined import check_joined
from lightning_dp.training.independence.losses import PerRecordMeans
from lightning_dp.training.independence.subject import loss_of, reduced
from lightning_dp.training.independence.watch import Watch
from lightning_dp.training.loader import PoissonIterator

if TYPE_CHECKING:
    from lightning_dp.training.strategy import PrivateMixin

#: How often a step may turn out to run code that was not examined (LayerDrop skips other layers each time).
_ATTEMPTS = 8


class MicroBatches:
    """Runs logical batches, in parts that fit into memory.

    Args:
        strategy: The strategy whose logical batches are run.
    """

    def __init__(self, strategy: PrivateMixin) -> None:
        self._strategy = strategy
        #: The draw of the current batch; ``None`` once its step has begun.
        self.drawn: Draw | None = None
        #: The most records at once where ``max_physical_batch_size`` says nothing; ``None``: all.
        self.most_at_once: int | None = None
        #: Examples of the last micro-batch, whose backward pass Lightning runs; 0 if there is none.
        self.left_to_backward = 0
        #: Records of the current sample whose parts the loader has given.
        self._loaded = 0
        #: What ``training_step`` runs on: a batch, and the draw of its records.
        self._running: tuple[Any, Draw] = (None, Draw([], 0))

    @property
    def records_at_once(self) -> int | None:
        """The most records that pass through the model at once; ``None``: a whole logical batch."""
        rows, copies = (
            self._strategy.options.max_physical_batch_size,
            self._strategy.mechanism.augmentation_multiplicity,
        )
        return max(1, rows // copies) if rows else self.most_at_once

    def loaded_at_once(self) -> int | None:
        """The most records that are loaded at once: those of a micro-batch; ``None``: a whole logical batch, which is
        taken apart where only the engine needs that."""
        step, most = self._strategy.private_step, self.records_at_once
        if most is None or not self._strategy.module_in_fit().automatic_optimization:
            return None
        return min(most, (step and step.engine.max_examples) or most)

    def run(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's ``training_step`` on every micro-batch of the logical batch, and all backward passes but the
        last, which Lightning asks for through `backward`."""
        step, draw = self._strategy.private_step, self.drawn
        assert step is not None
        if draw is None:
            raise PrivacyConfigurationError(
                "The optimizer evaluated the loss more than once on one batch; each evaluation would be a further "
                "release. Use an optimizer that takes one gradient per step."
            )
        self.drawn, self._loaded = None, 0
        assert self._strategy.logs is not None
        self._strategy.logs.begin()
        for seed in range(_ATTEMPTS):
            try:
                return self._logical_batch(step, batch, draw, args, kwargs)
            except (FormChanged, SystemError) as error:
                reason = form_changed_in(error)
                if reason is None:
                    raise
                # Nothing was charged, and nothing of this batch was released.
                self._strategy.examiner.examine_drawn(*self._running, args, reason, seed)
                self._strategy.logs.again()
        return self._logical_batch(step, batch, draw, args, kwargs)

    def _logical_batch(
        self, step: PrivateStep, batch: Any, draw: Draw, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """All micro-batches of a logical batch."""
        assert self._strategy.noise_multiplier is not None
        step.begin(
            self._strategy.noise_multiplier,
            self._strategy.sampling_rate,
            self._strategy.expected_batch_size,
            limit=None if self._strategy.budget is None else self._strategy.step_limit,
        )
        self.left_to_backward = 0
        self._strategy.examiner.run_once(args)
        trainer = self._strategy.trainer_in_fit()
        # The same number of micro-batches in every process, so that collectives in training_step match.
        count, copies = draw.size, step.engine.copies
        assert self._strategy.train_loader is not None
        loaded = self._strategy.train_loader.poisson.most
        parts = draw.parts(loaded or step.engine.max_examples, trainer.world_size)
        weighted_loss: Any = 0.0
        for part in parts:
            start, stop = part.start, part.stop
            if start == stop:
                self._join_collectives(args, kwargs)
                continue
            self._running = batch, draw
            rows = slice(start * copies, stop * copies)
            if stop - start == count or (loaded is not None and start == 0):
                micro_batch = batch
            elif loaded is None:
                micro_batch = self._strategy.take_examples(batch, count * copies, rows)
            else:
                micro_batch = self._load_part(draw, part)
            if loaded is not None:
                self._running = micro_batch, Draw(draw.records[part], stop - start)
            lightning_api.weigh_logs_by(trainer, micro_batch)
            size = (stop - start) * copies
            if joined := self._strategy.examiner.understanding.joined:
                check_joined(joined, micro_batch, self._strategy.examiner.batch_layout(), size)
            with step.engine.forward(size), self.watch(size):
                output = self._strategy.user_training_step(micro_batch, *args, **kwargs)
            loss = reduced(loss_of(output), self._strategy.options.loss_reduction)
            weighted_loss += loss.detach() * (
                (stop - start) / count if self._strategy.options.loss_reduction == "mean" else 1
            )
            self.left_to_backward = stop - start
            if stop < count:
                self.backward(loss, None)
        if count == 0:  # this process adds nothing to the sums: there is no loss, and no backward pass
            return torch.zeros((), device=self._strategy.root_device, requires_grad=True)
        lightning_api.weigh_logs_by(trainer, batch, count * copies if loaded is not None else None)
        shown = loss + (weighted_loss - loss.detach()) if len(parts) > 1 else loss
        return {**output, "loss": shown} if isinstance(output, dict) else shown

    def _load_part(self, draw: Draw, part: slice) -> Any:
        """A part of a sample that is loaded in parts: the loader's next, or, if it was had before, loaded again."""
        if part.start >= self._loaded:
            self._loaded = part.stop
            iterator: PoissonIterator = lightning_api.train_iterator(self._strategy.trainer_in_fit())
            collated = iterator.next_part()
            return self.transfer(self._strategy.precision_plugin.convert_input(collated))
        copies = self._strategy.mechanism.augmentation_multiplicity
        return self.load([record for record in draw.records[part] for _ in range(copies)])

    def watch(self, rows: int) -> AbstractContextManager[Any]:
        """The context of a ``training_step`` of so many rows: raises when it runs code that was not examined."""
        if self._strategy.examiner.findings is None:  # there was no self-check
            return PerRecordMeans(rows, None, enabled=self._strategy.options.per_record_means)
        known = self._strategy.examiner.understanding
        return Watch(rows, known.losses, known.places, enabled=self._strategy.options.per_record_means)

    def _join_collectives(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs ``training_step`` on record 0 and discards the loss: this process has no example where others have.

        Otherwise, collectives in their step (a log with ``sync_dist=True``, say) would deadlock. What this call logs
        is weighted like a batch of one record.
        """
        step, trainer = self._strategy.private_step, self._strategy.trainer_in_fit()
        assert step is not None
        copies = step.engine.copies
        batch = self.load([0] * copies)
        lightning_api.weigh_logs_by(trainer, batch)
        with step.engine.forward(copies), self.watch(copies):
            self._strategy.user_training_step(batch, *args, **kwargs)

    def load(self, records: list[int]) -> Any:
        """The batch that consists of these records of the train set, as Lightning would bring it to the device."""
        assert self._strategy.train_loader is not None
        return self.transfer(
            self._strategy.precision_plugin.convert_input(self._strategy.train_loader.collate_records(records))
        )

    def transfer(self, batch: Any) -> Any:
        """Brings a collated batch to the device, through the transfer hooks."""
        batch = lightning_api.before_transfer(self._strategy.module_in_fit(), batch)
        return self._strategy.batch_to_device(batch, dataloader_idx=0)

    def backward(self, loss: Tensor, optimizer: Any, *args: Any, last: bool = False, **kwargs: Any) -> None:
        """The backward pass of a micro-batch, whose contributions are bounded.

        Args:
            loss: Of the micro-batch that ran last.
            optimizer: As `Precision.backward` takes it, and what it takes beyond.
            last: Whether it is the last one of the logical batch.
        """
        strategy, examples = self._strategy, self.left_to_backward
        assert strategy.private_step is not None
        factor = strategy.half_precision.factor(examples if strategy.options.loss_reduction == "mean" else 1)
        scaled = loss if factor == 1 else loss * factor
        with strategy.private_step.backward(self.loss_scale(examples) / factor, last=last):
            strategy.precision_plugin.backward(scaled, strategy.module_in_fit(), optimizer, *args, **kwargs)

    def loss_scale(self, examples: int) -> float:
        """The factor that makes an example's gradient, summed over its copies, that of the mean loss over the copies.

        Args:
            examples: Number of examples in the micro-batch, copies not counted.
        """
        return (
            float(examples)
            if self._strategy.options.loss_reduction == "mean"
            else 1.0 / self._strategy.mechanism.augmentation_multiplicity
        )

    def refuse_skipped(self) -> None:
        if self.drawn is not None:
            raise PrivacyConfigurationError(
                "A batch was drawn that no training step was taken on: on_train_batch_start returned -1, which skips "
                "the rest of the epoch. Whether a step happens must not depend on the data. Use limit_train_batches, "
                "or trainer.should_stop on what has noise."
            )
