"""SST-2: texts are hashed one by one, padding counts for nothing, and the text models have the loop's gradients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_dp import DifferentialPrivacy
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.training.checks.model import check_model
from lightning_dp.zoo import BagOfWords, Classifier, SST2DataModule, TextTransformer
from lightning_dp.zoo.text import PADDING, tokenize
from tests.conftest import assert_close, fit, oracle_gradients, trainer

TEXTS = ["a gripping film", "", "Dull", "no wit , only labored gags", "gripping , gripping", "a b c d e f g h i"]
BUCKETS, LENGTH = 50, 8

MODELS: dict[str, Callable[[], nn.Module]] = {
    "BagOfWords": lambda: BagOfWords(BUCKETS),
    "TextTransformer": lambda: TextTransformer(BUCKETS, length=20, dim=8, heads=2, hidden=12, layers=2),
}


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.tensor([tokenize(text, BUCKETS, length) for text in TEXTS])


def make(name: str) -> nn.Module:
    """A model in double precision whose parameters are all random: some are made zero."""
    model = MODELS[name]().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for layer in model.modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.padding_idx is not None:
            layer.weight.data[layer.padding_idx] = 0
    return model


def write(folder: Path, name: str = "sentence") -> None:
    from datasets import Dataset

    (folder / "sst2").mkdir()
    for split, texts in (("train", TEXTS * 5), ("validation", TEXTS[:4])):
        rows = {"idx": list(range(len(texts))), name: texts, "label": [i % 2 for i in range(len(texts))]}
        Dataset.from_dict(rows).to_parquet(str(folder / "sst2" / f"{split}-00000-of-00001.parquet"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_a_text_is_hashed_alike_in_every_process() -> None:
    code = f"from lightning_dp.zoo.text import tokenize; print(tokenize({TEXTS[3]!r}, 8192, 8, ['words', 'bigrams']))"
    printed = subprocess.run([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, check=True).stdout
    assert printed.strip() == str(tokenize(TEXTS[3], 8192, 8, ["words", "bigrams"]))


def test_tokens_are_truncated_padded_and_never_collide_with_padding() -> None:
    assert tokens().shape == (len(TEXTS), LENGTH)
    for text, row in zip(TEXTS, tokens().tolist(), strict=True):
        words = len(text.split()[:LENGTH])
        assert all(0 < token < BUCKETS for token in row[:words])
        assert row[words:] == [PADDING] * (LENGTH - words)
    assert tokenize("one two three", 3, 3) == [
        token for word in ("one", "two", "three") for token in tokenize(word, 3, 1)
    ]


def test_case_is_ignored_and_features_say_what_they_say() -> None:
    def kinds(text: str, *features: str) -> list[int]:
        return tokenize(text, 1 << 20, 4, features)  # type: ignore[arg-type]

    assert kinds("A Gripping FILM", "words") == kinds("a gripping film", "words")
    assert kinds("grippingly", "prefixes") == kinds("gripping", "prefixes") != kinds("great", "prefixes")
    assert kinds("film", "prefixes") != kinds("film", "words")  # a prefix is no word
    assert kinds("not good", "bigrams") != kinds("good not", "bigrams")
    assert [t for t in kinds("not very good", "bigrams") if t] == [
        kinds("not very", "bigrams")[0],
        kinds("very good", "bigrams")[0],
    ]
    assert [t for t in kinds("a b", "words", "prefixes") if t] == kinds("a b", "words")[:2] + kinds("a b", "prefixes")[
        :2
    ]
    assert len(kinds("a b c d e f", "words", "prefixes", "bigrams")) == 12


def test_a_text_is_encoded_alone_as_it_is_in_a_table(folder: Path) -> None:
    write(folder)
    data = SST2DataModule(val_size=7, buckets=BUCKETS, length=4, features=["words", "prefixes"])
    data.setup("fit")
    assert data.train is not None
    assert data.val is not None
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (23, 7, 4)
    rows = torch.cat([data.train.columns[0], data.val.columns[0]])
    assert rows.tolist() == [tokenize(text, BUCKETS, 4, ["words", "prefixes"]) for text in TEXTS * 5]
    assert torch.cat([data.train.columns[1], data.val.columns[1]]).tolist() == [0, 1] * 15


def test_files_with_other_columns_are_refused(folder: Path) -> None:
    write(folder, name="text")
    with pytest.raises(ValueError, match="no column sentence"):
        SST2DataModule().setup("fit")


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_change_a_prediction(name: str) -> None:
    model = make(name)
    short, long = model(tokens(10)), model(tokens(20))
    assert torch.isfinite(short).all()
    assert_close(long, short, 1e-10)
    assert len(short.unique(dim=0)) == len(TEXTS)  # and the texts do


@pytest.mark.parametrize("name", MODELS)
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    model, inputs = make(name), tokens()
    alone = torch.cat([model(inputs[i : i + 1]) for i in range(len(inputs))])
    assert_close(model(inputs), alone, 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_per_example_gradients_equal_the_loop(name: str) -> None:
    model, inputs, labels = make(name), tokens(), torch.tensor([0, 1, 1, 0, 1, 0])
    check_model(Classifier(model, classes=2), "bookkeeping")

    def loss(rows: slice) -> torch.Tensor:
        return F.cross_entropy(model(inputs[rows]), labels[rows], reduction="sum")

    expected = oracle_gradients(model, lambda i: loss(slice(i, i + 1)), len(inputs))
    engine = BookKeeping(model)
    with engine.forward(len(inputs)):
        total = loss(slice(None))
    with engine.backward():
        total.backward()
    gradients = engine.gradients()
    weights = torch.rand(len(inputs), dtype=torch.float64)
    assert set(gradients) == set(expected)
    for key, rows in expected.items():
        assert_close(gradients[key].squared_norms(), rows.flatten(1).pow(2).sum(1), 1e-10)
        found = torch.zeros_like(rows[0])
        gradients[key].add_weighted_sum_(found, weights)
        assert_close(found, torch.einsum("b,b...->...", weights, rows), 1e-10)


def test_a_bag_of_n_words_has_features_of_norm_at_most_one_unless_words_repeat() -> None:
    """The gradient of logit c at the table is the features, one column of them."""
    model = BagOfWords(1 << 12).double()
    for text in ("a", "a gripping film", "no wit , only labored gags"):
        model.zero_grad()
        model(torch.tensor([tokenize(text, 1 << 12, 12)]))[0, 1].backward()
        gradient = model.logits.weight.grad
        assert gradient is not None
        assert_close(gradient.norm(), torch.ones((), dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_private_training_runs(name: str, folder: Path) -> None:
    write(folder)
    module = Classifier(MODELS[name](), classes=2)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    private = trainer(callbacks=[DifferentialPrivacy(epsilon=3.0, delta=1e-3)], max_steps=2, max_epochs=-1)
    fit(private, module, SST2DataModule(batch_size=15, buckets=BUCKETS, length=10))
    assert private.global_step == 2
    assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
