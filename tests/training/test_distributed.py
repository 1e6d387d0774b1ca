"""Several processes compute what one does: the same samples, sums and ε, and noise that is added once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp.training.distributed import parameter_hash
from tests.conftest import Net, assert_close
from tests.mechanism.test_noise import is_gaussian_of_std
from tests.training import ddp_worker

#: What is trained with every number of processes; the rest with two.
EVERYWHERE = [
    *ddp_worker.RULES,
    "feedback",
    "per_example",
    "micro_batches",
    "low_pass",
    "ks",
    "student",
    "noisy_backprop",
    "noisy_adaptive",
    "projected",
    "surprised",
    "noise_alone",
]
TWO = [
    *EVERYWHERE,
    "first_half",
    "few_records",
    "hundred_steps",
    "budget",
    "stopped",
    "one_callback",
    "own_split",
    "diverging",
]


def launch(world_size: int, folder: Path, cases: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What every process of a group reports about every case."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    worker = [str(Path(ddp_worker.__file__)), str(folder), *cases]
    done = subprocess.run([*command, *worker], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: [torch.load(folder / f"{case}.{rank}") for rank in range(world_size)] for case in cases}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    cases = ["whole", *(case for case in TWO if case not in ("diverging", "own_split"))]
    return {case: ddp_worker.run(case, 1, folder / "alone") for case in cases}


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return launch(2, folder / "two", TWO)


def check_equal(alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    for own in together:
        assert torch.equal(own["parameters"], together[0]["parameters"])
        assert own["epsilon"] == alone["epsilon"] and own["steps"] == alone["steps"]
    assert_close(together[0]["parameters"], alone["parameters"], 1e-6)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_two_processes_give_what_one_gives(case: str, alone: Any, two: Any) -> None:
    """Without noise, and with it: it is drawn from the same streams, once."""
    check_equal(alone[case], two[case])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 4])
def test_more_processes_give_what_one_gives(world_size: int, alone: Any, tmp_path: Path) -> None:
    together = launch(world_size, tmp_path, EVERYWHERE)
    for case in EVERYWHERE:
        check_equal(alone[case], together[case])


def test_each_record_is_in_one_share_and_all_draw_the_same_sample(alone: Any, two: Any) -> None:
    drawn, (first, second) = alone["hundred_steps"], two["hundred_steps"]
    assert len(first["records"]) == len(drawn["records"]) == 100
    for whole, one, other in zip(drawn["records"], first["records"], second["records"], strict=True):
        assert sorted(one + other) == sorted(whole)
        assert 0 <= len(one) - len(other) <= 1


def test_replicas_are_equal_to_the_bit_after_every_step(two: Any) -> None:
    first, second = two["hundred_steps"]
    assert len(first["hashes"]) == 100 and len(set(map(tuple, first["hashes"]))) == 100
    assert first["hashes"] == second["hashes"]
    assert first["epsilon"] == second["epsilon"]


def test_noise_is_added_once(alone: Any, two: Any) -> None:
    """Of std z·C/qN: neither √2 times as much, nor as little."""
    torch.manual_seed(0)
    before = torch.cat([p.detach().flatten() for p in ddp_worker.Still().parameters()])
    std = 2.0 * 0.5 / ddp_worker.EXPECTED
    for own in two["noise_alone"]:
        sample = (before - own["parameters"]).double()
        assert is_gaussian_of_std(sample, std)
        assert not is_gaussian_of_std(sample, std * 2**0.5)
        assert not is_gaussian_of_std(sample, std / 2**0.5)


def test_processes_without_records_take_part(alone: Any, two: Any) -> None:
    """Also in what the module itself exchanges; and they add nothing."""
    check_equal(alone["few_records"], two["few_records"])
    first, second = two["few_records"]
    shares = [(len(one), len(other)) for one, other in zip(first["records"], second["records"], strict=True)]
    assert any(0 in share for share in shares) and len(shares) == 12
    assert first["hashes"] == second["hashes"]


def test_budget_and_noise_are_decided_once(alone: Any, two: Any) -> None:
    for case in ("budget", "stopped", "one_callback"):
        for own in two[case]:
            assert (own["steps"], own["multiplier"]) == (alone[case]["steps"], alone[case]["multiplier"])
            assert own["epsilon"] == alone[case]["epsilon"] <= 4.0
    assert two["stopped"][0]["steps"] < 400


def test_a_run_resumes_with_another_number_of_processes(alone: Any, two: Any, folder: Path) -> None:
    """With the explicit seed, to what the uninterrupted run would have given."""
    check_equal(alone["whole"], launch(2, folder / "alone", ["second_half"])["second_half"])
    check_equal(alone["whole"], [ddp_worker.run("second_half", 1, folder / "two")])


def test_train_sets_that_differ_are_refused(two: Any) -> None:
    for own in two["own_split"]:
        assert own["steps"] == 0 and "random_split a generator with a fixed seed" in own["error"]


def test_replicas_that_differ_stop_the_training(two: Any) -> None:
    for own in two["diverging"]:
        assert own["steps"] == 5
        assert "After 5 private steps the parameters of processes [1] differ from those of process 0" in own["error"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_hash_sees_every_bit_and_its_place(dtype: torch.dtype) -> None:
    module = Net().to(dtype)
    before = parameter_hash(module)
    assert torch.equal(parameter_hash(module), before)
    weight = next(module.parameters())
    with torch.no_grad():
        weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
    assert not torch.equal(parameter_hash(module), before)
    with torch.no_grad():
        weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
    for parameter in module.parameters():  # a sign
        with torch.no_grad():
            parameter.view(-1)[0].neg_()
            assert not torch.equal(parameter_hash(module), before)
            parameter.view(-1)[0].neg_()
    assert torch.equal(parameter_hash(module), before)
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0, dtype=dtype))
    assert not torch.equal(parameter_hash(module), before)
