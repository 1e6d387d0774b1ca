"""Adult: what a record is turned into depends on that record alone."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp import DifferentialPrivacy
from lightning_dp.recipes import read_recipe, shipped_recipes
from lightning_dp.zoo import MLP, AdultDataModule, Classifier
from lightning_dp.zoo.tables import CATEGORIES, EDGES, FEATURES, LABELS, encode_adult
from tests.conftest import fit, trainer


def records(count: int) -> list[dict[str, Any]]:
    """Records with every category in turn, missing values and unheard-of ones among them."""
    generator = torch.Generator().manual_seed(2)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        row: dict[str, Any] = {
            name: (*known, "?", "Unheard-of")[i % (len(known) + 2)] for name, known in CATEGORIES.items()
        }
        for name, edges in EDGES.items():
            row[name] = int(torch.randint(int(edges[-1]) + 10, (), generator=generator))
        rows.append({**row, "fnlwgt": 1000 + i, "education": "HS-grad", "income": LABELS[i % 3 == 0]})
    return rows


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "adult").mkdir()
    with (folder / "adult" / "adult.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_record_is_encoded_alone_as_it_is_in_a_table() -> None:
    rows = records(60)
    table = encode_adult(columns(rows))
    assert table.shape == (60, FEATURES)
    alone = torch.cat([encode_adult(columns([row])) for row in rows])
    assert torch.equal(alone, table)
    assert len(table.unique(dim=0)) > 50  # the encoding tells records apart


def test_every_record_has_the_same_norm() -> None:
    rows = encode_adult(columns(records(60)))
    assert torch.equal(rows.sum(1), torch.full((60,), float(len(CATEGORIES) + len(EDGES))))
    assert set(rows.unique().tolist()) == {0.0, 1.0}


def test_missing_and_unknown_categories_share_a_feature_of_their_own() -> None:
    row = records(1)[0]
    for name, known in CATEGORIES.items():
        encoded = {value: encode_adult(columns([{**row, name: value}])) for value in (*known, "?", "Unheard-of", None)}
        assert torch.equal(encoded["?"], encoded["Unheard-of"])
        assert torch.equal(encoded["?"], encoded[None])
        assert len(torch.cat(list(encoded.values())).unique(dim=0)) == len(known) + 1


@pytest.mark.parametrize("name", EDGES)
def test_buckets_begin_at_their_edges(name: str) -> None:
    row, edges = records(1)[0], EDGES[name]
    values = [edges[0] - 1, *edges]
    encoded = encode_adult(columns([{**row, name: value} for value in values]))
    assert len(encoded.unique(dim=0)) == len(edges) + 1
    below = encode_adult(columns([{**row, name: edge - 0.5} for edge in edges]))
    assert torch.equal(below, encoded[:-1])


def test_the_last_fifth_is_for_testing_and_the_part_before_it_for_validation(folder: Path) -> None:
    rows = records(53)
    write(folder, rows)
    data = AdultDataModule(val_size=8)
    data.setup("fit")
    assert data.train is not None
    assert data.val is not None
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (35, 8, 10)
    parts = [table.columns for table in (data.train, data.val, data.test)]
    assert torch.equal(torch.cat([features for features, _ in parts]), encode_adult(columns(rows)))
    assert torch.cat([labels for _, labels in parts]).tolist() == [int(row["income"] == ">50K") for row in rows]


def test_a_file_with_other_columns_is_refused(folder: Path) -> None:
    write(folder, [{"age": 30, "wage": 3}])
    with pytest.raises(ValueError, match=r"no column capital\.gain, .*its columns are age, wage"):
        AdultDataModule().setup("fit")


def test_another_label_is_refused(folder: Path) -> None:
    write(folder, [{**records(1)[0], "income": "much"}])
    with pytest.raises(ValueError, match="column income has the value 'much'"):
        AdultDataModule().setup("fit")


def test_a_private_training_runs(folder: Path) -> None:
    write(folder, records(50))
    module = Classifier(MLP([FEATURES, 4, 2]), classes=2)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    private = trainer(callbacks=[DifferentialPrivacy(epsilon=3.0, delta=1e-3)], max_steps=2, max_epochs=-1)
    fit(private, module, AdultDataModule(batch_size=20))
    assert private.global_step == 2
    assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("recipe", [name for name in shipped_recipes() if name.startswith("adult/")])
def test_networks_of_the_recipes_take_the_features(recipe: str) -> None:
    net = read_recipe(shipped_recipes()[recipe])["model"]["init_args"]["net"]
    assert net["init_args"]["sizes"][0] == FEATURES
