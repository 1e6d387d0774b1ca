"""What makes a Lightning strategy private: Lightning's hooks, and nothing else.

One Lightning batch is one logical batch is one private step, so that `global_step`, schedulers, `max_steps`,
`log_every_n_steps` and the progress bar count private steps.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_dp.errors import PrivacyConfigurationError
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.mechanism.sums import Wire
from lightning_dp.torch_api import functions_unwatched
from lightning_dp.training import lightning_api, steering
from lightning_dp.training.batches import take_rows
from lightning_dp.training.checks import configuration
from lightning_dp.training.checks.fingerprint import fingerprint_of
from lightning_dp.training.checks.model import check_model
from lightning_dp.training.configured import ConfiguredStrategy
from lightning_dp.training.loader import PoissonIterator
from lightning_dp.training.manual import requirements
from lightning_dp.training.repair import repair_and_say, repaired
from lightning_dp.training.run_directory import run_directory
from lightning_dp.training.spent import CHECKPOINT_KEY
from lightning_dp.training.users_loader import poisson_loader


class PrivateMixin(ConfiguredStrategy):
    """What makes a Lightning strategy private; combined with one that knows devices and processes.

    It derives from `Strategy` so that the class of a strategy that already exists can be exchanged for one that
    includes it (see `make_private`).
    """

    #: Strategies that can be made private by `make_private`.
    supported: ClassVar[tuple[type[Strategy], ...]] = (SingleDeviceStrategy,)

    #: Whether a callback made this strategy private, rather than the user who built it.
    made_private = False

    # -- set-up ----------------------------------------------------------------------------------------------------

    def connect(self, model: pl.LightningModule) -> None:
        if self.options.repair:  # before a checkpoint is loaded
            repair_and_say(model)
        super().connect(model)

    def setup(self, trainer: Trainer) -> None:
        if self.options.repair and self.lightning_module is not None:  # layers that configure_model has made
            repair_and_say(self.lightning_module)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.accumulation.take_over(trainer)
            assert self.lightning_module is not None
            self.originals.use(self.lightning_module)
            self.half_precision.use(trainer.precision_plugin)
            configuration.check_trainer(trainer)
            configuration.check_precision(trainer, self.mechanism.clipping)
            self._check_model()
            self.randomness.renew()
            self.randomness.share(self.share)
            self.ledger.start_run(self.share(secrets.token_hex(8)))
            self.private_step = None
            if self.books.resumed is None:  # what a checkpoint brought into an earlier fit belongs to that one
                self._clipping_state, self._denoiser_state = {}, {}
            self.examiner.reset(pending=self.options.self_check)
            if not self.options.self_check:
                rank_zero_warn(
                    "lightning_dp: self_check=False: nobody looks whether records influence one another's gradients. "
                    "If they do, ε is false. The privacy card says so."
                )
            # Read here, before LearningRateFinder replaces the loggers.
            self.books.run_directory = self.share(run_directory(trainer))
        elif self.lightning_module is not None:
            self.mechanism.clipping.attach(self.lightning_module)
        super().setup(trainer)
        if fitting:
            self._make_step(trainer)
            self._is_set_up = True
            if self.books.is_due:  # a setup hook asked for the train loader: the checkpoint was not loaded then
                self.books.open(trainer)
            self.releases.fill(trainer)

    def _check_model(self) -> None:
        module = self.module_in_fit()
        if module.automatic_optimization:
            check_model(module, self.options.engine)
        else:  # which layers meet records is found before the first step
            requirements.check_configuration(self.mechanism, self.options, self.trainer_in_fit().world_size)

    def _make_step(self, trainer: Trainer) -> None:
        """Makes the private step for the parameters that are trainable now."""
        module = self.module_in_fit()
        mechanism = self.mechanism.for_module(module)
        mechanism.clipping.attach(module)
        engine = mechanism.make_engine(self.options.engine, module)
        engine.forms = None if self.examiner.findings is None else self.examiner.findings.forms
        if module.automatic_optimization:
            configuration.check_optimizers(trainer, engine)
        else:
            requirements.check_optimizers(module, self.optimizers, self.lr_scheduler_configs)
            self.manual.reset(self.optimizers)
        wire = Wire(trainer.global_rank, trainer.world_size, self.add_up if trainer.world_size > 1 else None)
        step = PrivateStep(mechanism, engine, self.ledger, self.randomness, wire, self.books.charge)
        step.denoiser_state = self._denoiser_state
        if self._clipping_state.keys() == step.clipping_state.keys():
            step.clipping_state = self._clipping_state
        if self.private_step is not None:  # layers were frozen or unfrozen
            step.follow(self.private_step)
        self.private_step = step
        self._checked_fingerprint = fingerprint_of(self.module_in_fit(), self._optimized_parameters())
        shapes = [(name, tuple(p.shape), p.dtype) for name, p in engine.parameters.items()]
        self.agree(shapes, "The processes train different parameters: the same layers must be frozen in all of them.")

    def _optimized_parameters(self) -> list[torch.nn.Parameter]:
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    def process_dataloader(self, dataloader: object) -> object:
        trainer = self.trainer_in_fit()
        if not (trainer.state.fn == TrainerFn.FITTING and trainer.training):
            return super().process_dataloader(dataloader)
        self.accumulation.take_over(trainer)  # also before a hook asks how many steps there are
        self.train_loader = poisson_loader(self, dataloader)
        self.books.is_due = not self._is_set_up
        if self._is_set_up:
            self.books.open(trainer)
        return self.train_loader

    def on_train_start(self) -> None:
        super().on_train_start()
        loaders = lightning_api.train_loaders(self.trainer_in_fit())
        others = [loader for loader in loaders if loader is not self.train_loader]
        if others and len(loaders) == 1:
            raise PrivacyConfigurationError(
                "The train dataloader was exchanged after it was set up (BatchSizeFinder and Tuner.scale_batch_size do "
                "that): the batch size decides the sampling rate, and so ε. Choose it beforehand; what fits into "
                "memory at once is max_physical_batch_size."
            )
        if others:
            raise PrivacyConfigurationError(
                "Private training draws one Poisson sample per step and needs exactly one train dataloader. Combine "
                "several data sets into one (torch.utils.data.ConcatDataset)."
            )
        steering.check_validation(self.trainer_in_fit(), self.train_loader)
        steering.warn(self.trainer_in_fit())
        self.logs = steering.Logs(self.trainer_in_fit(), lambda: self.examiner.logged_names)
        if self.budget is not None:
            self.budget.choose_noise(self.trainer_in_fit(), self)
        self.noise_multiplier = self.share(self.noise_multiplier)
        if self.noise_multiplier is None:
            raise PrivacyConfigurationError(
                "No noise multiplier: give GaussianNoise(multiplier=…), or add the callback PrivacyBudget(epsilon=…, "
                "delta=…), which chooses it. (multiplier=0.0 trains without noise: ε is infinite.)"
            )
        if self.books.journal is not None and self.ledger.statistics():
            # The journal described the run when it charged a statistic, before a budget chose the noise of the steps.
            self.books.journal.note(noise_multiplier=self.noise_multiplier)

    def teardown(self) -> None:
        self.books.close()
        self.releases.close()
        if self.logs is not None:
            self.logs.close()
        self.logs = None
        self._is_set_up = False
        self.accumulation.restore()
        self.half_precision.restore()
        self.manual.reset()
        self.originals.restore()
        super().teardown()

    # -- the training step -----------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        assert self.train_loader is not None and self.lightning_module is not None
        configuration.check_no_accumulation(self.trainer_in_fit())
        self.micro_batches.refuse_skipped()
        iterator: PoissonIterator = lightning_api.train_iterator(self.trainer_in_fit())
        self.micro_batches.drawn = iterator.draw
        if self._checked_fingerprint != fingerprint_of(self.module_in_fit(), self._optimized_parameters()):
            # A callback froze, unfroze or exchanged layers: make the step for what is trained from now on.
            self._check_model()
            self._make_step(self.trainer_in_fit())
            self.examiner.is_pending = self.options.self_check

    def on_train_end(self) -> None:
        super().on_train_end()
        self.micro_batches.refuse_skipped()

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's ``training_step`` on every micro-batch of the logical batch, and all backward passes but the
        last, which Lightning asks for through `backward`."""
        if not self.module_in_fit().automatic_optimization:
            return self.manual.run(batch, *args, **kwargs)
        return self.micro_batches.run(batch, *args, **kwargs)

    def user_training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's own ``training_step``, on one micro-batch."""
        return super().training_step(*args, **kwargs)

    def take_examples(self, batch: Any, size: int, examples: slice | list[int]) -> Any:
        """Some rows of a batch, as a batch of the same form. Override it for batches that are not trees of tensors.

        Args:
            batch: A collated batch, on the device.
            size: Its number of rows: examples, times ``augmentation_multiplicity``.
            examples: The rows to take, as a slice or a list of indices.

        Raises:
            TypeError, ValueError: The batch cannot be sliced by example.
        """
        return take_rows(batch, self.examiner.batch_layout(), size, examples)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Takes a step of the optimizer, without showing it the loss, which has no noise."""
        if not self.module_in_fit().automatic_optimization:
            result = closure()
            self.manual.before_step(optimizer)
            with functions_unwatched():
                super().optimizer_step(optimizer, lambda: None, *args, **kwargs)
            return result

        def private() -> Any:
            closure()
            return steering.HiddenLoss()

        return super().optimizer_step(optimizer, private, *args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """The last backward pass of a logical batch, and the release: no hook runs between the two."""
        if not self.module_in_fit().automatic_optimization:
            return self.manual.backward(closure_loss, *args, **kwargs)
        step, module = self.private_step, self.module_in_fit()
        assert step is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        if self.micro_batches.left_to_backward:
            self.micro_batches.backward(closure_loss, optimizer, *args, last=True, **kwargs)
        step.release(others=[*module.parameters(), *self._optimized_parameters()])
        self.warn_of_nonfinite(step)
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        checkpoint[CHECKPOINT_KEY] = {**self.books.checkpoint_entry(filepath), **self.public_state()}
        if layers := repaired(self.module_in_fit()):
            checkpoint[CHECKPOINT_KEY]["repaired"] = layers
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        fitting = self.trainer_in_fit().state.fn == TrainerFn.FITTING
        if CHECKPOINT_KEY in checkpoint:
            entry = checkpoint[CHECKPOINT_KEY]
            self.books.take_over(entry, checkpoint_path, fitting)
            self._clipping_state = dict(entry["clipping"])
            self._denoiser_state = dict(entry.get("denoiser", {}))
        elif fitting:
            raise PrivacyConfigurationError(
                f"The checkpoint {checkpoint_path} holds no privacy ledger: it comes from training without privacy, "
                "and what that training revealed is unknown. If it never saw the private data, load its weights with "
                "load_from_checkpoint instead of resuming from it."
            )
        return checkpoint
