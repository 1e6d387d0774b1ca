"""Adult, a table of people: a record's features depend on that record and on constants written here, on nothing else.

A mean, a standard deviation or a list of the categories that occur would be computed from the private records and
cost privacy that no accountant sees. So the categories are those of the data set's documentation and the edges of the
buckets are round numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dp.zoo.data import TensorTable, _TableDataModule, load_hub_dataset

#: The documented values of every categorical column; '?', which marks a missing value, and all others share one more.
#: Source: ``adult.names`` of the UCI repository (Becker & Kohavi 1996, doi:10.24432/C5XW20).
CATEGORIES: dict[str, tuple[str, ...]] = {
    "workclass": (
        "Private", "Self-emp-not-inc", "Self-emp-inc", "Federal-gov", "Local-gov", "State-gov", "Without-pay",
        "Never-worked",
    ),
    "marital.status": (
        "Married-civ-spouse", "Divorced", "Never-married", "Separated", "Widowed", "Married-spouse-absent",
        "Married-AF-spouse",
    ),
    "occupation": (
        "Tech-support", "Craft-repair", "Other-service", "Sales", "Exec-managerial", "Prof-specialty",
        "Handlers-cleaners", "Machine-op-inspct", "Adm-clerical", "Farming-fishing", "Transport-moving",
        "Priv-house-serv", "Protective-serv", "Armed-Forces",
    ),
    "relationship": ("Wife", "Own-child", "Husband", "Not-in-family", "Other-relative", "Unmarried"),
    "race": ("White", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other", "Black"),
    "sex": ("Female", "Male"),
    "native.country": (
        "United-States", "Cambodia", "England", "Puerto-Rico", "Canada", "Germany", "Outlying-US(Guam-USVI-etc)",
        "India", "Japan", "Greece", "South", "China", "Cuba", "Iran", "Honduras", "Philippines", "Italy", "Poland",
        "Jamaica", "Vietnam", "Mexico", "Portugal", "Ireland", "France", "Dominican-Republic", "Laos", "Ecuador",
        "Taiwan", "Haiti", "Columbia", "Hungary", "Guatemala", "Nicaragua", "Scotland", "Thailand", "Yugoslavia",
        "El-Salvador", "Trinadad&Tobago", "Peru", "Hong", "Holand-Netherlands",
    ),
}  # fmt: skip

#: Lower edges of the buckets of every numeric column, all but the first bucket's. Years, hours and dollars.
EDGES: dict[str, tuple[float, ...]] = {
    "age": (20, 22, 24, 26, 28, 30, 35, 40, 45, 50, 55, 60, 65),
    "education.num": tuple(range(2, 17)),  # one bucket a grade: the same as the column "education"
    "capital.gain": (1, *range(1000, 11000, 1000), 20000),
    "capital.loss": (1, 1400, 1600, 1800, 2000, 2200, 2400),
    "hours.per.week": (10, 20, 30, 35, 40, 41, 45, 50, 55, 60),
}

#: Number of features of a record.
FEATURES = sum(len(values) + 1 for values in (*CATEGORIES.values(), *EDGES.values()))

LABEL = "income"
LABELS = ("<=50K", ">50K")


class AdultDataModule(_TableDataModule):
    """UCI Adult (1994 census): does a person earn more than 50 000 dollars a year?

    The hub's ``scikit-learn/adult-census-income``, or ``$LIGHTNING_DP_DATA/adult`` when that is set. The last fifth of
    the file's rows is for testing. `encode_adult` makes the features: ``(B, FEATURES)``, and labels ``(B,)``.

    Args:
        batch_size: Expected number of records per private step.
        val_size: How many records at the end of the train part are held out for validation.
    """

    def __init__(self, batch_size: int = 2048, val_size: int = 0) -> None:
        super().__init__(batch_size)
        self.val_size = val_size

    def setup(self, stage: str) -> None:
        if self.train is not None:
            return
        rows = load_hub_dataset("scikit-learn/adult-census-income", "adult")["train"]
        missing = sorted({*CATEGORIES, *EDGES, LABEL}.difference(rows.column_names))
        if missing:
            raise ValueError(
                f"AdultDataModule: the file has no column {', '.join(missing)}; its columns are "
                f"{', '.join(rows.column_names)}. Use the file adult.csv of the hub's scikit-learn/adult-census-income."
            )
        features = encode_adult({name: rows[name] for name in (*CATEGORIES, *EDGES)})
        labels = _labels(rows[LABEL])
        train = len(labels) - len(labels) // 5
        kept = train - self.val_size
        self.train = TensorTable(features[:kept], labels[:kept])
        self.val = TensorTable(features[kept:train], labels[kept:train])
        self.test = TensorTable(features[train:], labels[train:])


def encode_adult(columns: Mapping[str, Sequence[Any]]) -> Tensor:
    """One-hot categories and buckets, ``(N, FEATURES)``: row i is a function of record i alone.

    Formal guarantee: every row has as many ones as there are columns, 12, and so the norm √12, whatever the record.

    Args:
        columns: The columns named in `CATEGORIES` and `EDGES`, ``N`` values each.
    """
    positions = [_category(columns[name], known) for name, known in CATEGORIES.items()]
    positions += [np.digitize(np.asarray(columns[name], dtype=float), edges) for name, edges in EDGES.items()]
    sizes = [len(values) + 1 for values in (*CATEGORIES.values(), *EDGES.values())]
    return torch.cat(
        [
            torch.nn.functional.one_hot(torch.from_numpy(position).long(), size)
            for position, size in zip(positions, sizes, strict=True)
        ],
        dim=1,
    ).float()


def _category(values: Sequence[Any], known: Sequence[str]) -> Any:
    """Places in ``known``; what is not there comes after the last."""
    places = {value: place for place, value in enumerate(known)}
    return np.array([places.get(str(value).strip(), len(known)) for value in values], dtype=np.int64)


def _labels(values: Sequence[str]) -> Tensor:
    """0 or 1, ``(N,)``."""
    stripped = [str(value).strip().rstrip(".") for value in values]  # one of UCI's two files ends them with a point
    strange = sorted(set(stripped).difference(LABELS))
    if strange:
        raise ValueError(f"AdultDataModule: column {LABEL} has the value '{strange[0]}'; it may have {LABELS}.")
    return torch.tensor([LABELS.index(value) for value in stripped])
