from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from dp_accounting import GaussianDpEvent, NeighboringRelation, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_dp import (
    AdaptiveClipping,
    DifferentialPrivacy,
    FlatClipping,
    GaussianNoise,
    GradientEncoding,
    LowPassDenoiser,
    PowerLawCodebook,
    PrivacyBudget,
    PrivacyCard,
    PrivacyConfigurationError,
    PrivacyLedger,
    PrivateStrategy,
    StudentTNoise,
    card_of_run,
    epsilon,
    privacy_card,
    render_card,
)
from lightning_dp.accounting.events import subsampled_gaussian
from lightning_dp.cli.command import main
from lightning_dp.errors import JournalError
from lightning_dp.journal.contents import JOURNAL_NAME
from lightning_dp.reporting.card import rounded_up
from tests.conftest import Net, fit, loader, trainer

DELTA = 1e-3


class Logging(Net):
    """Logs from training and from validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_epoch_only", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_loss", F.cross_entropy(self.net(inputs), labels))


def one_callback(**kwargs: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(None, DELTA, FlatClipping(0.5), GaussianNoise(2.0), **kwargs)


def trained(path: Path, module: Net | None = None, **kwargs: Any) -> dict[str, Any]:
    fit(trainer(default_root_dir=path, **{"callbacks": [one_callback()], **kwargs}), module or Logging(), loader(),
        loader())  # fmt: skip
    found: dict[str, Any] = json.loads((path / "privacy_card.json").read_text())
    return found


def test_epsilon_is_stated_by_both_accountants_and_under_both_assumptions(tmp_path: Path) -> None:
    card = trained(tmp_path, max_epochs=2)
    for accountant in ("pld", "rdp"):
        poisson = epsilon(noise_multiplier=2.0, sampling_rate=0.2, steps=10, delta=DELTA, accountant=accountant)
        assert card["epsilon"]["poisson_sampling"][accountant] == pytest.approx(poisson, rel=1e-9)
    plain = SelfComposedDpEvent(GaussianDpEvent(2.0), 10)
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    rdp = RdpAccountant(neighboring_relation=relation).compose(plain).get_epsilon(DELTA)
    pld = PLDAccountant(neighboring_relation=relation).compose(plain).get_epsilon(DELTA)
    assert card["epsilon"]["sampling_not_trusted"]["rdp"] == pytest.approx(rdp, rel=1e-6)
    assert card["epsilon"]["sampling_not_trusted"]["pld"] == pytest.approx(pld, rel=1e-3)


def test_the_card_names_what_the_guarantee_is_about(tmp_path: Path) -> None:
    card = trained(tmp_path)
    assert card["delta"] == DELTA and card["status"] == "finished" and card["target_epsilon"] is None
    assert card["definition"]["adjacency"] == "add or remove one record"
    assert "one record of the train set" in card["definition"]["unit_of_privacy"]
    assert card["mechanism"]["clipping"] == {"class": "FlatClipping", "max_norm": 0.5}
    assert card["mechanism"]["sensitivity"] == 0.5
    assert card["mechanism"]["noise"] == {"class": "GaussianNoise", "multiplier": 2.0}
    assert card["sampling"]["num_records"] == 40 and card["sampling"]["sampling_rate"] == 0.2
    assert card["steps"]["total"] == card["steps"]["in_model"] == 5 and card["steps"]["lost_or_elsewhere"] == 0
    assert {"python", "torch", "lightning", "dp-accounting"} <= set(card["software"])
    text = (tmp_path / "privacy_card.md").read_text()
    for part in (card["statement"], "add or remove one record", "| q | 0.2 |", "| N | 40 |", "max_norm=0.5", "q = 1",
                 "N is treated as public", "multiplier 2, Poisson-sampled with q = 0.2 | 5 |"):  # fmt: skip
        assert part in text, part


def test_the_card_says_what_is_not_covered_and_names_the_metrics(tmp_path: Path) -> None:
    card = trained(tmp_path, max_epochs=2)
    parts = {part["what"]: part for part in card["not_covered"]}
    expected = {"hyper-parameter search", "validation and test data", "training metrics", "seed", "preprocessing",
                "the number of records"}  # fmt: skip
    assert expected <= set(parts)
    logged = {"train_loss", "train_loss_step", "train_loss_epoch", "train_epoch_only"}
    assert set(parts["training metrics"]["metrics"]) == logged
    assert parts["validation and test data"]["metrics"] == ["val_loss"]
    assert "was given" not in parts["seed"]["why"] and "steps lost in crashes" not in parts
    assert "`train_epoch_only`" in (tmp_path / "privacy_card.md").read_text()


def test_a_seed_and_a_missing_journal_are_confessed(tmp_path: Path) -> None:
    parts = {
        p["what"]: p["why"] for p in trained(tmp_path, callbacks=[one_callback(seed=1, journal=False)])["not_covered"]
    }
    assert "seed= was given" in parts["seed"]
    assert "journal=False" in parts["steps lost in crashes"]


def test_the_card_says_what_is_known_of_independence(tmp_path: Path) -> None:
    card = trained(tmp_path / "a")
    assert card["independence"] == {"verdict": "proven", "decisions": {}, "losses": {}, "not_checked": []}
    page = (tmp_path / "a" / "privacy_card.md").read_text()
    assert "## Independence of records\n\nProven: every operation" in page and "It is not known whether" not in page

    class Reading(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("shown", loss.item())
            return loss

    found = trained(tmp_path / "b", Reading())["independence"]
    assert found["verdict"] == "checked"
    [line] = found["decisions"]
    assert "test_card.py:" in line and line in (tmp_path / "b" / "privacy_card.md").read_text()


def test_a_card_of_what_nobody_checked_says_so_beside_its_headline(tmp_path: Path) -> None:
    card = trained(tmp_path, callbacks=[one_callback(self_check=False)])
    assert card["independence"]["verdict"] == "not checked"
    page = (tmp_path / "privacy_card.md").read_text().splitlines()
    headline = next(number for number, line in enumerate(page) if card["statement"] in line)
    assert "if they do, ε is false" in page[headline + 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_fit_has_a_card_too(tmp_path: Path, error: type[BaseException]) -> None:
    class Crash(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                raise error

    with pytest.raises((RuntimeError, SystemExit)):
        trained(tmp_path, callbacks=[one_callback(), Crash()])
    card = json.loads((tmp_path / "privacy_card.json").read_text())
    assert card["status"] == f"interrupted by {error.__name__}"
    assert card["steps"]["total"] == 3


def test_a_card_that_fails_hides_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            monkeypatch.setattr("lightning_dp.training.callbacks.card.write_card", None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, callbacks=[one_callback(), Crash()])


def test_an_error_before_training_leaves_no_card(tmp_path: Path) -> None:
    run = trainer(default_root_dir=tmp_path, callbacks=[one_callback()], overfit_batches=2)
    with pytest.raises(PrivacyConfigurationError):
        fit(run, Net(), loader())
    assert not list(tmp_path.iterdir())


def test_the_card_lies_beside_the_checkpoints(tmp_path: Path) -> None:
    run = trainer(
        logger=CSVLogger(tmp_path), enable_checkpointing=True, callbacks=[one_callback()], log_every_n_steps=1
    )
    fit(run, Net(), loader())
    [card] = tmp_path.rglob("privacy_card.md")
    assert (card.parent / "checkpoints").is_dir() and (card.parent / "metrics.csv").is_file()


@pytest.mark.parametrize("option", [{"callbacks": [one_callback(card=False)]}, {"fast_dev_run": True}])
def test_no_card_is_written_when_none_is_wanted(tmp_path: Path, option: dict[str, Any]) -> None:
    fit(trainer(default_root_dir=tmp_path, **{"callbacks": [one_callback()], **option}), Net(), loader())
    assert not list(tmp_path.rglob("privacy_card*"))


def test_every_stage_in_view(tmp_path: Path) -> None:
    callback = PrivacyCard(str(tmp_path / "cards"))
    strategy = PrivateStrategy(AdaptiveClipping(5.0), GaussianNoise())
    fit(trainer(strategy=strategy, callbacks=[callback, PrivacyBudget(2.0, DELTA)]), Net(), loader())
    card = json.loads(Path(callback.json_path).read_text())
    assert callback.json_path == str(tmp_path / "cards" / "privacy_card.json")
    assert card["delta"] == DELTA and card["target_epsilon"] == 2.0
    assert card["mechanism"]["sensitivity"] == strategy.private_step.clipping_state["max_norm"] != 5.0  # type: ignore
    assert card["mechanism"]["noise"]["multiplier"] == strategy.noise_multiplier
    assert 0.97 * 2.0 < card["epsilon"]["poisson_sampling"]["pld"] <= 2.0


def test_what_a_card_needs_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(PrivacyConfigurationError, match="needs a δ"):
        fit(trainer(strategy=PrivateStrategy(noise=GaussianNoise(1.0)), callbacks=[PrivacyCard()]), Net(), loader())
    with pytest.raises(PrivacyConfigurationError, match="without privacy.*DifferentialPrivacy"):
        fit(trainer(callbacks=[PrivacyCard(delta=DELTA)]), Net(), loader())
    with pytest.raises(ValueError, match="strictly between"):
        PrivacyCard(delta=1.0)
    (tmp_path / "file").touch()
    private = PrivateStrategy(noise=GaussianNoise(1.0))
    run = trainer(strategy=private, callbacks=[PrivacyCard(str(tmp_path / "file"), DELTA)])
    with pytest.raises(PrivacyConfigurationError, match="cannot write to .*file"):
        fit(run, Net(), loader())
    assert len(private.ledger) == 0


def configuration() -> dict[str, Any]:
    private = PrivateStrategy(noise=GaussianNoise(0.0))
    fit(trainer(strategy=private), Net(), loader())
    return private.public_configuration()


def test_training_without_noise_is_called_that() -> None:
    ledger = PrivacyLedger()
    ledger.record(subsampled_gaussian(0.0, 0.1), 3)
    card = privacy_card(ledger, delta=DELTA, configuration=configuration())
    assert card["epsilon"]["poisson_sampling"] == {"pld": "inf", "rdp": "inf"}
    json.dumps(card, allow_nan=False)
    assert "no privacy guarantee" in render_card(card) and "∞" in render_card(card)
    with pytest.raises(ValueError, match="strictly between"):
        privacy_card(ledger, delta=0.0, configuration=configuration())


@given(st.floats(1e-6, 1e6))
def test_what_is_shown_is_never_below_the_truth_and_close_to_it(exact: float) -> None:
    assert exact <= float(rounded_up(exact)) <= exact * (1 + 1.001e-3)


# -- from the journal --------------------------------------------------------------------------------------------------


def test_the_card_of_the_journal_says_what_the_card_of_the_fit_said(tmp_path: Path) -> None:
    card = trained(tmp_path, max_epochs=2)
    again = card_of_run(tmp_path)
    assert again.pop("status").startswith("finished") and card.pop("status") == "finished"
    assert json.loads(json.dumps(again)) == card
    stricter = card_of_run(tmp_path, delta=1e-6)
    assert stricter["epsilon"]["poisson_sampling"]["pld"] > card["epsilon"]["poisson_sampling"]["pld"]


def test_the_card_of_noise_on_coordinates_says_what_bounds_a_record_and_which_accountant_it_was(tmp_path: Path) -> None:
    callback = DifferentialPrivacy(
        2.0, DELTA, GradientEncoding(PowerLawCodebook()), StudentTNoise(9), LowPassDenoiser(), max_physical_batch_size=3
    )
    fit(trainer(default_root_dir=tmp_path, callbacks=[callback], max_steps=3), Net(), loader())
    text = (tmp_path / "privacy_card.md").read_text()
    for part in (
        "GradientEncoding(codebook={'class': 'PowerLawCodebook'",
        "StudentTNoise(df=9",
        "LowPassDenoiser(a=(-0.9,)",
        "what one record adds is bounded by one of 4 public vectors",
        "The noise is not Gaussian",
    ):
        assert part in text
    card = json.loads((tmp_path / "privacy_card.json").read_text())
    assert 1.99 < card["epsilon"]["poisson_sampling"]["pld"] == card["epsilon"]["poisson_sampling"]["rdp"] <= 2.0
    again = card_of_run(tmp_path)
    again.pop("status"), card.pop("status")
    assert json.loads(json.dumps(again)) == card


def test_a_killed_run_has_a_card_from_its_journal(tmp_path: Path) -> None:
    class Copy(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 7:
                shutil.copytree(tmp_path / "run", tmp_path / "dead")

    trained(tmp_path / "run", callbacks=[one_callback(), Copy()], max_epochs=2)
    card = card_of_run(tmp_path / "dead")
    assert card["status"].startswith("killed") and card["steps"]["total"] == 7
    assert "train_epoch_only" in [n for p in card["not_covered"] for n in p.get("metrics", ())]
    lost = trained(tmp_path / "dead", max_steps=2)
    assert lost["steps"] == {**lost["steps"], "total": 9, "in_model": 2, "lost_or_elsewhere": 7}
    assert "7 lost in crashes or taken by other" in (tmp_path / "dead" / "privacy_card.md").read_text()


def test_the_command_writes_and_prints_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(trainer(default_root_dir=tmp_path / "run", callbacks=[one_callback()]), Net(), loader())
    (tmp_path / "run" / "privacy_card.md").unlink()
    main(["card", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert (tmp_path / "run" / "privacy_card.md").read_text() in out
    main(["card", str(tmp_path / "run" / JOURNAL_NAME), "--delta", "1e-6", "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "privacy_card.json").read_text())["delta"] == 1e-6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent"], "No privacy journal absent"),
        (["."], "There is one in: .*run"),
        (["run", "--delta", "2"], "strictly between"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(trainer(default_root_dir="run", callbacks=[one_callback()], max_steps=1), Net(), loader())
    with pytest.raises(SystemExit) as caught:
        main(["card", *arguments])
    assert caught.value.code == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_run_without_a_delta_asks_for_one(tmp_path: Path) -> None:
    fit(trainer(strategy=PrivateStrategy(noise=GaussianNoise(1.0)), default_root_dir=tmp_path), Net(), loader())
    with pytest.raises(ValueError, match="--delta"):
        card_of_run(tmp_path)
    assert card_of_run(tmp_path, 1e-5)["delta"] == 1e-5
    with pytest.raises(JournalError, match="No privacy journal"):
        card_of_run(tmp_path / "elsewhere")


def test_a_budget_without_end_is_stated(tmp_path: Path) -> None:
    run = trainer(default_root_dir=tmp_path, callbacks=[DifferentialPrivacy(epsilon=math.inf, delta=1e-5)])
    fit(run, Net(), loader())
    card = json.loads((tmp_path / "privacy_card.json").read_text())
    assert card["target_epsilon"] == card["epsilon"]["poisson_sampling"]["pld"] == "inf"
    assert "ε = inf" in (tmp_path / "privacy_card.md").read_text()
