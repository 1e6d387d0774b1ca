"""The books of one fit: its ledger and journal, with the charges of earlier fits that are carried over."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_accounting import DpEvent
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.journal.files import relative_path
from lightning_dp.journal.writer import PrivacyJournal
from lightning_dp.mechanism.mechanism import describe
from lightning_dp.training.spent import DataMark, Spending, note_spending, spent_by, statistics_of

if TYPE_CHECKING:
    from lightning_dp.training.strategy import PrivateMixin


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a fit resumes from: its path, its number of releases (steps and statistics), its journal."""

    checkpoint: str
    steps: int
    journal: dict[str, str] | None


class Books:
    """Keeps the ledger and the journal of a fit.

    Args:
        strategy: The strategy of the fit.
    """

    def __init__(self, strategy: PrivateMixin) -> None:
        self._strategy = strategy
        #: The journal of the current fit; ``None`` without one, and between fits.
        self.journal: PrivacyJournal | None = None
        #: The journal's name and path, for checkpoints; ``None`` without a journal.
        self.reference: dict[str, str] | None = None
        self.resumed: Resumed | None = None
        self.spending: Spending | None = None
        self.run_directory = ""
        #: `is_due`: the train loader was set up before the checkpoint was loaded, so that `open` is yet to be called.
        #: `is_open`: this fit's journal has been opened; True in every process, though only the first holds it.
        self.is_due = self.is_open = False

    def open(self, trainer: Trainer) -> None:
        """Charges what the module's weights have cost before; opens the journal, if one is kept, and charges what it
        holds beyond the ledger."""
        self.is_due = False
        if self.spending is None and not getattr(trainer, "fast_dev_run", False):
            self._include_spent()
        if not self._strategy.options.journal or getattr(trainer, "fast_dev_run", False):
            self._share_ledger()
            return
        if self.is_open:  # the train loader has been loaded again
            if self.journal is not None:
                self.journal.set_num_records(self._strategy.num_records)
            return
        self._strategy.on_first_process(lambda: self._start_journal(trainer))
        self.is_open = True
        self._share_ledger()

    def _include_spent(self) -> None:
        """Charges what the module's weights, and the statistics that came with it, have cost before."""
        assert self._strategy.train_loader is not None
        module = self._strategy.module_in_fit()
        data = DataMark.of(self._strategy.train_loader.dataset, self._strategy.num_records)
        before, others = spent_by(module, data)
        new = before.copy()
        if self.resumed is not None:  # the checkpoint's ledger is in this one, and its weights replace the module's
            new = PrivacyLedger()
        new.include(statistics_of(module, self._strategy.ledger))
        known = len(self._strategy.ledger)
        self._strategy.ledger.include(new)
        if more := len(self._strategy.ledger) - known:
            rank_zero_warn(
                f"lightning_dp: this module's weights have cost privacy on these records before: {more} private "
                "steps or "
                "statistics that another training took. They are charged to this training too, and its noise is chosen "
                "for what is left. To begin anew, make a new module; to go on, give the budget a larger ε."
            )
        if others:
            rank_zero_warn(
                "lightning_dp: this module was trained privately on other records before, which are not charged here: "
                "what is stated holds for the records of this train set."
            )
        self.spending = note_spending(module, self._strategy.ledger, data)

    def _share_ledger(self) -> None:
        """Copies the first process's ledger to all processes: its length selects the next step's random streams."""
        state, run, reference = self._strategy.share(
            (self._strategy.ledger.state_dict(), self._strategy.ledger.run, self.reference)
        )
        if not self._strategy.trainer_in_fit().is_global_zero:
            self._strategy.ledger.become(PrivacyLedger.from_state_dict(state))
            self._strategy.ledger.start_run(run)
            self.reference = reference

    def _start_journal(self, trainer: Trainer) -> None:
        noise = {
            name: value
            for name, value in describe(self._strategy.mechanism.noise).items()
            if name not in ("multiplier", "scale")
        }
        mechanism = {
            "clipping": describe(self._strategy.mechanism.clipping),
            "noise": " ".join(map(str, noise.values())),
        }
        journal = PrivacyJournal(self.run_directory, num_records=self._strategy.num_records, configuration=mechanism)
        try:
            self._charge_lost_steps(journal)
            journal.include(self._strategy.ledger)
        except BaseException:
            journal.close()
            raise
        journal.start_run(
            self._strategy.ledger.run,
            lambda: {"model_steps": trainer.global_step, "configuration": self._strategy.public_configuration()},
        )
        self.journal, self.reference = journal, journal.reference()

    def _charge_lost_steps(self, journal: PrivacyJournal) -> None:
        resumed, before = self.resumed, len(self._strategy.ledger)
        if resumed is not None and resumed.journal is not None:
            known = journal.continue_from(resumed.journal, Path(resumed.checkpoint).absolute().parent)
            if known is not None:
                self._strategy.ledger.include(known)
            else:
                rank_zero_warn(
                    f"lightning_dp: the privacy journal of the checkpoint ({resumed.journal['path']}) is gone: steps "
                    "that were taken after the checkpoint was saved, if any, are unknown and not charged."
                )
        elif resumed is not None:
            rank_zero_warn(
                "lightning_dp: the checkpoint was saved without a privacy journal: steps that were taken after it was "
                "saved, if any, are unknown and not charged."
            )
        self._strategy.ledger.include(journal.known())
        lost = len(self._strategy.ledger) - (before if resumed is None else resumed.steps)
        uncertain = f" (of these, {journal.uncertain_steps} were reserved and perhaps never taken)"
        note = uncertain if lost and journal.uncertain_steps else ""
        note += " (a statistic counts as a step)" if self._strategy.ledger.statistics() else ""
        if resumed is not None:
            rank_zero_info(
                f"lightning_dp: the checkpoint contains {resumed.steps} private steps; {lost} more were taken and are "
                f"lost{note}; they are charged, {len(self._strategy.ledger)} in all. Journal: {journal.path}"
            )
        elif lost:
            rank_zero_warn(
                f"lightning_dp: {lost} private steps were taken in this directory before{note}, and are charged to "
                "this training too. To account for it alone, give it a directory of its own (a logger, or "
                f"Trainer(default_root_dir=…)). Journal: {journal.path}"
            )

    def charge(self, event: DpEvent, at_most: int | None) -> None:
        if self.journal is not None:
            self.journal.charge(event, at_most)

    def close(self) -> None:
        """Ends a fit: closes its journal, and keeps a copy of the ledger as the module's spending."""
        if self.journal is not None:
            self.journal.close()
        self.journal, self.resumed = None, None
        if self.spending is not None:  # this strategy's ledger may go on with another module
            self.spending.ledger = self._strategy.ledger.copy()
        self.spending = None
        self.is_due = self.is_open = False

    def checkpoint_entry(self, filepath: Any) -> dict[str, Any]:
        """The ledger and the journal's path, absolute and relative to the checkpoint's folder, for a checkpoint."""
        entry: dict[str, Any] = {"ledger": self._strategy.ledger.state_dict()}
        if self.reference is not None:
            path, folder = self.reference["path"], os.path.dirname(os.path.abspath(filepath))
            entry["journal"] = {**self.reference, "relative": relative_path(path, folder)}
        return entry

    def take_over(self, entry: dict[str, Any], checkpoint_path: Any, fitting: bool) -> None:
        """Charges the ledger of a checkpoint's entry; a fit also remembers the checkpoint that it resumes from.

        Args:
            entry: As `checkpoint_entry` made it.
            checkpoint_path: Where the checkpoint was loaded from.
            fitting: Whether a fit resumes from it, rather than a validation or test that loads it.

        Raises:
            PrivacyConfigurationError: The entry's ledger cannot be read.
        """
        # `include`, not `become`: steps that this process took after the checkpoint was saved stay charged.
        try:
            ledger = PrivacyLedger.from_state_dict(entry["ledger"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PrivacyConfigurationError(
                f"The ledger in the checkpoint {checkpoint_path} makes no sense ({error}): the file is damaged, or "
                "was changed. Resume from another checkpoint; the journal beside it knows what was taken."
            ) from error
        self._strategy.ledger.include(ledger)
        reference = entry.get("journal")
        if fitting:
            self.resumed = Resumed(os.fspath(checkpoint_path), len(ledger), reference)
        elif self.reference is None and reference is not None:
            self.reference = {key: reference[key] for key in ("name", "path")}
