"""`lightning_dp.check`: what a fit would do, said before it begins."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_dp
from lightning_dp import BackpropClipping, DifferentialPrivacy, PrivateStrategy, UnsupportedModelError
from lightning_dp.training.report import FOLLOWED, REFUSED, layer_groups
from tests.conftest import Net, fit, loader, trainer


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0] * self.scale, batch[1]), batch_idx)


def test_what_is_planned_is_what_a_fit_does() -> None:
    report = lightning_dp.check(Net(), loader(), epsilon=3.0, delta=1e-4, trainer=trainer(max_epochs=2))
    callback = DifferentialPrivacy(epsilon=3.0, delta=1e-4)
    run = trainer(max_epochs=2, callbacks=[callback])
    fit(run, Net(), loader())
    strategy: Any = run.strategy
    assert report.ok
    assert report.verdict == "proven"
    assert report.plan is not None
    assert report.plan.noise_multiplier == pytest.approx(strategy.noise_multiplier)
    assert report.plan.steps == strategy.ledger.steps
    assert report.plan.epsilon == pytest.approx(strategy.ledger.epsilon(1e-4))
    assert report.step_seconds
    assert report.plain_step_seconds


def test_what_a_step_makes_is_counted_beside_a_plain_one() -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, 3)))

    options: dict[str, Any] = {"epsilon": None, "delta": 1e-4, "noise": 1.0, "trainer": trainer(max_epochs=4)}

    def found(engine: str) -> Any:
        return lightning_dp.check(Wide(), loader(200, 100), engine=engine, **options)

    by_rule, looped = found("bookkeeping"), found("per_example")
    assert by_rule.plain_step_bytes == looped.plain_step_bytes
    weights = 4 * sum(p.numel() for p in Wide().parameters())
    assert weights < by_rule.plain_step_bytes < 1.3 * by_rule.step_bytes
    # By rule, no example's gradient is made; by a loop, nothing is made but one example's.
    assert by_rule.step_bytes < 50 * weights
    assert looped.step_bytes < 4 * weights
    assert "The tensors that it makes take" in str(looped)


def test_noise_beside_the_clip_is_that_of_the_mean_gradient() -> None:
    report = lightning_dp.check(Net(), loader(), epsilon=None, noise=2.0, clipping=0.5)
    plan, numbers = report.plan, sum(p.numel() for p in Net().parameters())
    assert plan is not None
    assert plan.noise_to_clip == pytest.approx(2.0 * numbers**0.5 / plan.expected_batch_size)


def test_the_changes_that_are_named_do_what_is_said() -> None:
    plan = lightning_dp.check(Net(), loader(400, 8), epsilon=2.0, delta=1e-4).plan
    assert plan is not None
    [change, *_] = plan.halved_by
    factor = int(change.split()[1])
    larger = lightning_dp.check(Net(), loader(400, 8 * factor), epsilon=2.0, delta=1e-4).plan
    assert larger is not None
    assert larger.noise_to_clip == pytest.approx(plan.halved_by[change], rel=0.1)  # by few orders there


def test_nothing_is_trained_charged_or_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module, data = Net(), loader()
    before = copy.deepcopy(module.state_dict())
    lightning_dp.check(module, data)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not list(tmp_path.iterdir())
    run = trainer(max_steps=2, strategy=PrivateStrategy(1.0, 1.0))
    fit(run, module, data)
    assert run.strategy.ledger.steps == 2  # type: ignore[attr-defined]


def test_callbacks_of_the_module_write_nothing(tmp_path: Path) -> None:
    class Keeps(Net):
        def configure_callbacks(self) -> Any:
            return [ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1)]

    module = Keeps()
    assert lightning_dp.check(module, loader(), epsilon=None, noise=1.0).ok
    assert not list(tmp_path.iterdir()) and len(module.configure_callbacks()) == 1


def test_what_a_module_has_spent_is_counted() -> None:
    module, data = Net(), loader()
    options: dict[str, Any] = {"epsilon": 3.0, "delta": 1e-4}
    fresh = lightning_dp.check(module, data, **options).plan
    fit(trainer(max_epochs=1, callbacks=[DifferentialPrivacy(**options, noise=1.0)]), module, data)
    spent = lightning_dp.check(module, data, **{**options, "epsilon": 20.0}).plan
    alone = lightning_dp.check(Net(), data, **{**options, "epsilon": 20.0}).plan
    assert fresh is not None
    assert spent is not None
    assert alone is not None
    assert spent.noise_multiplier > alone.noise_multiplier


def test_a_refusal_is_reported_with_the_way_out_and_that_way_works() -> None:
    report = lightning_dp.check(Normalised(), loader())
    assert not report.ok
    assert [group.way for group in report.layers if group.kind == "BatchNorm1d"] == [REFUSED]
    assert "repair=True" in str(report)
    mended = lightning_dp.check(Normalised(), loader(), repair=True)
    assert mended.ok
    assert {group.kind for group in mended.layers} == {"Linear", "_GroupNorm1d"} or all(
        group.way != REFUSED for group in mended.layers
    )
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["ok"] is False


def test_a_refused_fit_says_how_every_layer_is_dealt_with(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnsupportedModelError), caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(trainer(max_steps=1, callbacks=[DifferentialPrivacy(epsilon=3.0)]), Normalised(), loader())
    assert "2 x Linear (net.0, net.2)" in caplog.text
    assert "BatchNorm1d (net.1)" in caplog.text


def test_every_way_is_named() -> None:
    found = {name: group.way for group in layer_groups(Scaled()) for name in group.names}
    assert found["scale"] == FOLLOWED
    assert "rule" in found["net.0"]
    assert "linear maps" in layer_groups(nn.LSTM(2, 3))[0].way
    assert "once more" in layer_groups(nn.Linear(2, 3), "per_example")[0].way


def test_what_depends_on_records_is_refused_with_the_line() -> None:
    class Mixing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch[0] - batch[0].mean(0), batch[1]), batch_idx)

    report = lightning_dp.check(Mixing(), loader())
    assert not report.ok
    assert "test_check.py" in report.problems[0]


def test_arguments_are_those_of_the_callback() -> None:
    with pytest.raises(TypeError, match="did you mean clipping"):
        lightning_dp.check(Net(), loader(), cliping=1.0)
    report = lightning_dp.check(Scaled(), loader(), clipping=BackpropClipping(1.0, 0.1))
    assert not report.ok
    assert "FlatClipping" in report.problems[0]
