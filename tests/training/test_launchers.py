"""Every way to start several processes, and every way in which one of them can fail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_dp.journal.contents import JOURNAL_NAME, JournalContents
from tests.training import ddp_script

SCRIPT = str(Path(ddp_script.__file__))
#: What a process needs to end after another one has failed: the timeout of the script's process group, and some.
PATIENCE = 60.0


def started(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None, torchrun: int = 0
) -> subprocess.Popen[str]:
    group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)] if torchrun else []
    command = [sys.executable, *group, SCRIPT, arguments[0], str(folder), *arguments[1:]]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"} | (environment or {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def processes_of(folder: Path) -> list[str]:
    """Processes that were started with this folder among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(folder) in arguments:
            found.append(" ".join(arguments))
    return found


def steps_in_journal(folder: Path) -> int:
    return len(JournalContents(folder / "private_runs" / "version_0" / JOURNAL_NAME).ledger())


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("private_ddp", marks=pytest.mark.slow),
        "ddp",
        pytest.param("private_ddp_spawn", marks=pytest.mark.slow),
        pytest.param("private_ddp_notebook", marks=pytest.mark.slow),
        pytest.param("ddp_spawn", marks=pytest.mark.slow),
    ],
)
def test_strategies_by_name_start_their_processes(strategy: str, tmp_path: Path) -> None:
    output, _ = started(tmp_path, strategy).communicate(timeout=200)
    assert "result: epsilon 2.9985" in output
    assert steps_in_journal(tmp_path) == 10
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    output, _ = started(tmp_path, "private_ddp", torchrun=2).communicate(timeout=200)
    assert output.count("result: epsilon 2.9985") == 1
    assert steps_in_journal(tmp_path) == 10


@pytest.mark.slow
def test_two_nodes_of_one_device(tmp_path: Path) -> None:
    """Each is launched by itself, as on two machines."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = ("private_ddp", "--nodes", "2", "--devices", "1")
    nodes = [started(tmp_path, *arguments, environment={**shared, "NODE_RANK": str(rank)}) for rank in range(2)]
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [output.count("result: epsilon 2.9985") for output in outputs] == [1, 0], outputs
    assert steps_in_journal(tmp_path) == 10


@pytest.mark.slow
def test_slurm(tmp_path: Path) -> None:
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NAME": "training",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
    }
    ranks = [{**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    tasks = [started(tmp_path, "private_ddp", environment=own) for own in ranks]
    outputs = [task.communicate(timeout=200)[0] for task in tasks]
    assert [output.count("result: epsilon 2.9985") for output in outputs] == [1, 0], outputs
    assert steps_in_journal(tmp_path) == 10


@pytest.mark.parametrize(
    ("fault", "strategy", "rank"),
    [
        ("raise", "private_ddp", 1),
        pytest.param("hang", "private_ddp", 1, marks=pytest.mark.slow),
        pytest.param("die", "private_ddp", 1, marks=pytest.mark.slow),
        pytest.param("die", "private_ddp", 0, marks=pytest.mark.slow),
        pytest.param("raise", "private_ddp_spawn", 1, marks=pytest.mark.slow),
        pytest.param("hang", "private_ddp_notebook", 1, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_ends_the_job(fault: str, strategy: str, rank: int, tmp_path: Path) -> None:
    """Within the timeout, with every step in the journal that was taken, and nothing left running."""
    job = started(tmp_path, strategy, "--fault", fault, "--rank", str(rank))
    output, _ = job.communicate(timeout=200)
    assert job.returncode != 0
    end = time.monotonic() + PATIENCE
    while (left := processes_of(tmp_path)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left
    if fault == "raise":
        assert f"this happened in process {rank} of 2" in output and "user code failed" in output
    elif rank:
        assert "this happened in process 0 of 2" in output and "could not reach another one" in output
    # The first process may have charged the step in which the other one failed; nothing of it was released.
    assert steps_in_journal(tmp_path) in (3, 4)


@pytest.mark.slow
def test_a_job_that_failed_goes_on_where_it_was(tmp_path: Path) -> None:
    """Its steps are charged to the training that follows in the same directory."""
    started(tmp_path, "private_ddp", "--fault", "die").communicate(timeout=200)
    before = steps_in_journal(tmp_path)
    output, _ = started(tmp_path, "private_ddp").communicate(timeout=200)
    assert "result: epsilon 2.9" in output and 3 <= before < steps_in_journal(tmp_path)
