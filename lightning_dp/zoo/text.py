"""SST-2, sentences about films, and two small networks that read them.

Words are hashed, so no vocabulary is learnt: a vocabulary is computed from private records, and a word in it tells that
somebody wrote it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_dp.zoo.data import TensorTable, _TableDataModule, load_hub_dataset

#: What a text is turned into: its words, their first letters (which inflected forms share), pairs of neighbours.
Features = Literal["words", "prefixes", "bigrams"]

PREFIX = 5
PADDING = 0


def tokenize(text: str, buckets: int, length: int, features: Sequence[Features] = ("words",)) -> list[int]:
    """Hashes a text to ``length · len(features)`` numbers below ``buckets``, with `PADDING` at the end.

    It looks at this text alone: nothing is learnt from others. The hash is CRC-32, which is the same in every process
    (Python's own ``hash`` is not). Words are what white space separates, in lower case.

    Args:
        text: Any string.
        buckets: Number of rows of the table that the numbers index; row 0 is padding.
        length: How many words are kept.
        features: Which features, one kind after the other: ``"words"``, ``"prefixes"`` (of `PREFIX` letters),
            ``"bigrams"``.
    """
    words = text.lower().split()[:length]
    kinds = {
        "words": words,
        "prefixes": [f"{word[:PREFIX]}*" for word in words],
        "bigrams": [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)],
    }
    numbers = [1 + zlib.crc32(item.encode()) % (buckets - 1) for kind in features for item in kinds[kind]]
    return numbers + [PADDING] * (length * len(features) - len(numbers))


class SST2DataModule(_TableDataModule):
    """SST-2 (Socher et al. 2013, in GLUE): is a phrase about a film positive?

    The hub's ``stanfordnlp/sst2``, or ``$LIGHTNING_DP_DATA/sst2`` when that is set. The ``validation`` split is for
    testing, for the labels of ``test`` are hidden. Batches are ``(B, length · len(features))`` and ``(B,)``.

    The train set has the phrases of its sentences as records of their own. The unit of privacy is one phrase, not one
    sentence with all of its phrases.

    Args:
        batch_size: Expected number of records per private step.
        val_size: How many records at the end of the train set are held out for validation.
        buckets, length, features: As for `tokenize`; public numbers, which must not depend on the records.
    """

    def __init__(
        self,
        batch_size: int = 4096,
        val_size: int = 0,
        buckets: int = 8192,
        length: int = 48,
        features: Sequence[Features] = ("words",),
    ) -> None:
        super().__init__(batch_size)
        self.val_size, self.buckets, self.length, self.features = val_size, buckets, length, features

    def setup(self, stage: str) -> None:
        if self.train is not None:
            return
        parts = load_hub_dataset("stanfordnlp/sst2", "sst2")
        missing = {"sentence", "label"}.difference(parts["train"].column_names)
        if missing:
            raise ValueError(
                f"SST2DataModule: the files have no column {', '.join(sorted(missing))}; use those of the hub's "
                "stanfordnlp/sst2."
            )
        tokens, labels = self._table(parts["train"])
        kept = len(labels) - self.val_size
        self.train = TensorTable(tokens[:kept], labels[:kept])
        self.val = TensorTable(tokens[kept:], labels[kept:])
        self.test = TensorTable(*self._table(parts["validation"]))

    def _table(self, split: Any) -> tuple[Tensor, Tensor]:
        rows = [tokenize(text, self.buckets, self.length, self.features) for text in split["sentence"]]
        return torch.tensor(rows).reshape(len(rows), -1), torch.tensor(list(split["label"]))


class BagOfWords(nn.Module):
    """A linear classifier of the hashed words of a text, in whatever order: ``(B, T) -> (B, classes)``.

    Every bucket has a vector of logits, at first zero; a text's are the sum over its n tokens divided by ``√n``. A text
    of n different words has features of norm 1, be it long or short, and one clipping norm suits all.

    Args:
        buckets: Number of rows of the table; row 0 is padding and stays zero.
        classes: Number of classes.
    """

    def __init__(self, buckets: int = 8192, classes: int = 2) -> None:
        super().__init__()
        self.logits = nn.EmbeddingBag(buckets, classes, mode="sum", padding_idx=PADDING)
        nn.init.zeros_(self.logits.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        summed = self.logits(tokens)
        count = (tokens != PADDING).sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = summed / count.to(summed.dtype).sqrt()
        return logits


class TextTransformer(nn.Module):
    """A small transformer encoder: ``(B, T) -> (B, classes)``.

    Its head reads the sum of the n tokens that are not padding, divided by ``√n``: a mean would be smaller, and learn
    more slowly.
    Normalisation comes first and nothing is dropped out.

    Args:
        buckets: Number of rows of the table of tokens; row 0 is padding.
        length: The largest T.
        dim: Width of the tokens.
        heads: Number of attention heads.
        hidden: Width inside the feed-forward part.
        layers: Number of layers.
        classes: Number of classes.
    """

    def __init__(
        self,
        buckets: int = 8192,
        length: int = 48,
        dim: int = 32,
        heads: int = 2,
        hidden: int = 64,
        layers: int = 1,
        classes: int = 2,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(buckets, dim, padding_idx=PADDING)
        self.position = nn.Embedding(length, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, hidden, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(dim, classes)
        for table in (self.token, self.position):  # small enough that what is learnt soon outweighs it
            nn.init.normal_(table.weight, std=0.1)
        nn.init.zeros_(self.token.weight[PADDING])

    def forward(self, tokens: Tensor) -> Tensor:
        ignored = tokens == PADDING
        ignored[:, 0] = False  # a text without words attends to its first padding: no row of attention may be empty
        states = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device)[None])
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=ignored)
        kept = (~ignored)[..., None].to(states.dtype)
        logits: Tensor = self.head((states * kept).sum(1) / kept.sum(1).sqrt())
        return logits
