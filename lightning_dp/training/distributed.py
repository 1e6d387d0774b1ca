"""Private training in several processes, on one node or many: the same mechanism as in one process.

All processes draw the same global Poisson sample and take their share of it; the bounded sums are added up, and the
noise is added once. There is no `DistributedDataParallel`, whose reducer would wait for gradients that never come.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import PrivacyConfigurationError, ReplicasDiverged
from lightning_dp.mechanism.clipping import Bounding, FlatClipping
from lightning_dp.mechanism.denoising import Denoiser
from lightning_dp.mechanism.noise import GaussianNoise, Noise
from lightning_dp.training.lightning_api import MultiProcessingLauncher, start_method_of, sync_module_states
from lightning_dp.training.made_private import MIXINS
from lightning_dp.training.strategy import PrivateMixin

#: Private steps between two comparisons of the replicas' parameters.
REPLICA_CHECK_EVERY = 100


class PrivateParallelMixin(PrivateMixin):
    """What makes a strategy of several processes private; combined with Lightning's `DDPStrategy`.

    Formal guarantee: with W processes, a step is the same mechanism as in one. Proof: each record of the global sample
    is in one process's share, so that the sum over all processes has one bounded term per record; of the noise's
    blocks each is drawn by one process, from the stream that a single process draws it from; the divisor is q·N of the
    global sample. The processes trust each other: sums travel between them before all of the noise is in.
    """

    supported: ClassVar[tuple[type[Strategy], ...]] = (DDPStrategy,)

    global_rank: int
    local_rank: int
    world_size: int
    cluster_environment: ClusterEnvironment | None

    def setup(self, trainer: Trainer) -> None:
        if self._was_launched():
            _die_with_parent()
        super().setup(trainer)

    def _was_launched(self) -> bool:
        """Whether a process of this training, rather than the user, has started this one."""
        if isinstance(self._launcher, MultiProcessingLauncher):
            return multiprocessing.parent_process() is not None
        # Lightning runs the same command again. Under torchrun or SLURM, the launcher ends its processes itself.
        return isinstance(self.cluster_environment, LightningEnvironment) and self.local_rank > 0 and _repeats_parent()

    def configure_ddp(self) -> None:
        """Every process starts from the first one's parameters and buffers; nothing is wrapped."""
        sync_module_states(self.module_in_fit())

    def share(self, value: Any) -> Any:
        return self.broadcast(value)

    def agree(self, value: Any, problem: str) -> None:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, value)
        if any(other != everyone[0] for other in everyone):
            raise PrivacyConfigurationError(problem)

    def on_first_process(self, action: Callable[[], None]) -> None:
        error: Exception | None = None
        if self.is_global_zero:
            try:
                action()
            except Exception as raised:
                error = raised
        message = self.share(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if message is not None:
            raise RuntimeError(f"The first process stopped the training: {message}")

    def add_up(self, tensor: Tensor) -> Callable[[], None]:
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None

        def wait() -> None:
            work.wait()

        return wait

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        if len(self.ledger) % REPLICA_CHECK_EVERY == 0:
            self._check_replicas()
        return output

    def on_train_end(self) -> None:
        super().on_train_end()
        self._check_replicas()

    def _check_replicas(self) -> None:
        """Compares a hash of the parameters over all processes."""
        own = parameter_hash(self.module_in_fit())
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        others = [rank for rank, other in enumerate(everyone) if not torch.equal(other, everyone[0])]
        if others:
            raise ReplicasDiverged(
                f"After {self.ledger.steps} private steps the parameters of processes {others} differ from those of "
                "process 0. Something changes parameters in one process only (a callback, a hook, a metric that "
                "decides), or the machines compute differently. What was released until now is charged."
            )

    def _let_others_speak(self) -> None:
        """Waits a little for processes that this one has started: the one that failed first is to print its error."""
        end = time.monotonic() + _LAST_WORDS
        for process in getattr(self._launcher, "procs", []):
            if isinstance(process, subprocess.Popen):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        # An exception of a process that this one has launched is raised here, with that process's `error_index`.
        rank = self.global_rank + getattr(exception, "error_index", 0)
        note = f"lightning_dp: this happened in process {rank} of {self.world_size}."
        if isinstance(exception, dist.DistError) or any(sign in str(exception) for sign in _SIGNS_OF_A_LOST_PROCESS):
            note += " It could not reach another one, which may have failed before: look for that one's error."
            self._let_others_speak()
        exception.add_note(note)

    def state_to_bring_back(self) -> dict[str, Any]:
        """The state that `bring_back` restores in the launching process."""
        return {
            "ledger": self.ledger.state_dict(),
            "run": self.ledger.run,
            "noise_multiplier": self.noise_multiplier,
            "journal_reference": self.books.reference,
            **self.public_state(),
        }

    def bring_back(self, state: dict[str, Any]) -> None:
        """Restores, in the launching process, the `state_to_bring_back` of a worker."""
        self.ledger.become(PrivacyLedger.from_state_dict(state.pop("ledger")))
        self.ledger.start_run(state.pop("run"))
        self.noise_multiplier = state["noise_multiplier"]
        self.books.reference = state["journal_reference"]
        self._clipping_state, self._denoiser_state = state["clipping"], state["denoiser"]

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, MultiProcessingLauncher):
            self._launcher = _Launcher(self, start_method=start_method_of(self._launcher))  # type: ignore[arg-type]


#: Seconds that processes have to end by themselves, when one of them is lost.
_LAST_WORDS = 10.0


#: Parts of the messages of errors that gloo and NCCL raise when another process is gone, or does not answer.
_SIGNS_OF_A_LOST_PROCESS = ("gloo", "NCCL", "Timed out waiting", "Connection closed by peer", "Connection reset")


def _repeats_parent() -> bool:
    """Whether this process has the command-line arguments of its parent, folders in paths aside."""
    try:
        own, parent = (
            [os.path.basename(part) for part in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[1:-1]]
            for process in (os.getpid(), os.getppid())
        )
    except OSError:
        return False
    return bool(own) and own == parent


def _die_with_parent() -> None:
    """Asks the kernel to end this process when the one that launched it ends, where that is possible (on Linux).

    A process that hangs in user code would otherwise outlive a job that failed: Lightning catches the gentler signals.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def parameter_hash(module: nn.Module) -> Tensor:
    """Two checksums ``(2,)`` of the bits of all parameters, int64: equal if these are, and seldom otherwise."""
    views = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
    device = next(module.parameters()).device
    total = torch.zeros(2, dtype=torch.int64, device=device)
    positions = torch.arange(1, 1 + _HASHED, device=device)
    number = -1
    for parameter in module.parameters():
        bits = parameter.detach().contiguous().view(-1).view(views[parameter.element_size()])
        for part in bits.split(_HASHED):
            number += 2  # odd: an even multiple of the highest bit is none
            part = part.long()
            total += number * torch.stack([part.sum(), (part * positions[: len(part)]).sum()])
    return total


#: Coordinates that are hashed at once: they are widened to eight bytes.
_HASHED = 2**20


class _Launcher(MultiProcessingLauncher):
    """Lightning's launcher, which also brings the ledger and `public_state` back to the launching process."""

    def get_extra_results(self, trainer: Trainer) -> dict[str, Any]:
        strategy: Any = trainer.strategy
        return {**super().get_extra_results(trainer), "privacy": strategy.state_to_bring_back()}

    def update_main_process_results(self, trainer: Trainer, extra: dict[str, Any]) -> None:
        strategy: Any = trainer.strategy
        strategy.bring_back(extra.pop("privacy"))
        super().update_main_process_results(trainer, extra)


class PrivateDDPStrategy(PrivateParallelMixin, DDPStrategy):
    """Differentially private training in several processes, one per device, on one node or many.

    Samples, noise and ledger are global: for a given expected batch size, ε does not depend on the number of devices.
    The train loader's batch size is per device, as always in Lightning: the expected batch is ``batch_size · devices ·
    num_nodes``. A process whose share of a sample is empty, while another one's is not, runs ``training_step`` on the
    first record of the train set and discards the result, so that no collective in it (``self.log(…,
    sync_dist=True)``) deadlocks.

    Args:
        clipping, noise, denoiser: As for `PrivateStrategy`.
        options: ``max_physical_batch_size`` (per device), ``engine``, ``loss_reduction``, ``self_check``, ``seed``,
            ``journal``, ``secure_rng``, ``augmentation_multiplicity``, ``per_record_means``, ``repair``: see
            `privacy_options`.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin, process_group_backend,
            timeout, start_method: As for Lightning's `DDPStrategy`; the Trainer fills most of them in.

    Raises:
        ReplicasDiverged: In a fit: the processes' parameters differ; compared every `REPLICA_CHECK_EVERY` steps, and
            at the end.
        PrivacyConfigurationError, UnsupportedModelError: As for `PrivateStrategy`.
    """

    strategy_name = "private_ddp"

    def __init__(
        self,
        clipping: Bounding | float = FlatClipping(1.0),
        noise: Noise | float = GaussianNoise(),
        denoiser: Denoiser | None = None,
        *,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **options: Any,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.configure_privacy(clipping, noise, denoiser, **options)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Under `strategy_name`, with the ways to start processes."""
        for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
            strategy_registry.register(
                f"{cls.strategy_name}{suffix}",
                cls,
                description=f"Differentially private training in several processes, started by {start_method}",
                override=True,
                start_method=start_method,
            )


def register_strategies() -> None:
    """Makes ``Trainer(strategy="private_ddp")`` work, and lets `make_private` take Lightning's `DDPStrategy`."""
    if PrivateParallelMixin not in MIXINS:
        MIXINS.append(PrivateParallelMixin)
    PrivateDDPStrategy.register_strategies(StrategyRegistry)
