"""Batches of random tokens, laid out by a model's own converter, so that no data set is needed.

Rows differ in length, some hold several examples where rows are packed, and the last ones are all padding. Rows stand
in pairs of equal lengths, so that both halves of a batch in turns (two microbatches) have as many tokens of every kind.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np

from t5x_like.data.packing import Example, Row
from t5x_like.errors import UserError
from t5x_like.models.classification import ClassificationModel
from t5x_like.models.contract import Model
from t5x_like.typing import Batch
from t5x_like.verification.changes import fields_of
from t5x_like.verification.shrink import IDS, ROWS, VOCAB

Sizes: TypeAlias = Mapping[str, int]
"""Tokens of an example, by the feature that counts them: `inputs` and `targets`."""

MOST_EXAMPLES = 3
"""In a packed row."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Draws what a model reads.

    Attributes:
      model: small.
      lengths: of its features.
    """

    model: Model
    lengths: Mapping[str, int]

    @functools.cached_property
    def packs(self) -> bool:
        """Whether the model's rows may hold several examples."""
        half = self.example(np.random.default_rng(0), {name: size // 2 for name, size in self.lengths.items()})
        return len(self.model.converter.pack([half, half], self.lengths)) == 1

    def rows(self, packed: bool, seed: int = 0) -> list[Row]:
        """Rows of one example, or of up to three if `packed`; the first are full."""
        rng = np.random.default_rng(seed)
        rows: list[Row] = []
        for pair in range(ROWS // 2 - 1):
            count = 1 + pair % MOST_EXAMPLES if packed else 1
            room = {name: size // count for name, size in self.lengths.items()}
            sizes = [
                room if pair == 0 else {name: _size(rng, size) for name, size in room.items()} for _ in range(count)
            ]
            rows += [[self.example(rng, each) for each in sizes] for _ in range(2)]
        return [*rows, [], []]

    def batch(self, rows: Sequence[Row], packed: bool) -> Batch:
        """Rows as the model reads them; the first token of each example is global where a network has such."""
        batch: dict[str, np.ndarray] = self.model.converter.convert(rows, self.lengths, packed)
        if any(field.name == "max_global" and field.value for field in fields_of(self.model)):
            tokens = batch["encoder_input_tokens"]
            places = batch.get("encoder_positions", np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape))
            batch["global_attention_mask"] = ((places == 0) & (tokens != 0)).astype(np.int32)
        return batch

    def example(self, rng: np.random.Generator, sizes: Sizes) -> Example:
        """One example of so many tokens.

        Raises:
          UserError: the model's converter reads a feature that is not known here.
        """
        converter, inputs, targets = self.model.converter, sizes["inputs"], sizes["targets"]
        if isinstance(self.model, ClassificationModel):
            targets = inputs if "target_positions" in converter.task_features else self._classes[0]
            labels = rng.integers(0, min(self._classes[1], inputs) if targets == 2 else self._classes[1], targets)
        elif "target_positions" in converter.task_features:
            targets = min(inputs, targets)
            labels = self._tokens(rng, targets)
        else:
            labels = self._tokens(rng, targets)
        positions = np.sort(rng.permutation(inputs)[:targets]).astype(np.int32)
        order = np.zeros(inputs, np.int32)
        order[positions[: len(order)]] = 1 + rng.permutation(len(positions)).astype(np.int32)
        drawn = {
            "inputs": self._tokens(rng, inputs),
            "targets": labels.astype(np.int32),
            "target_positions": positions,
            "order": order,
            "segment_ids": (np.arange(inputs) >= inputs // 2).astype(np.int32),
            "next_sentence": rng.integers(0, 2, 1).astype(np.int32),
        }
        unknown = sorted({*converter.task_features} - {*drawn})
        if unknown:
            raise UserError(f"verify cannot draw {', '.join(unknown)}, which {type(converter).__name__} reads")
        return {name: drawn[name] for name in (*converter.task_features, *converter.optional_features) if name in drawn}

    def _tokens(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Any but those with a meaning."""
        return rng.choice(self._words, size).astype(np.int32)

    @functools.cached_property
    def _words(self) -> list[int]:
        special = {0, 1} | {field.value for field in fields_of(self.model) if field.name in IDS}
        sizes = [f.value for f in fields_of(self.model) if f.name == "vocab_size" and isinstance(f.value, int)]
        return [token for token in range(max(sizes, default=VOCAB)) if token not in special]

    @functools.cached_property
    def _classes(self) -> tuple[int, int]:
        """A classifier's targets in each example, and their classes."""
        batch = self.model.converter.convert([[]], self.lengths, packed=False)
        params = jax.eval_shape(lambda: self.model.init(jax.random.key(0), batch))
        shape = jax.eval_shape(lambda params: self.model.logits(params, batch), params).shape
        return shape[1], shape[2]


def _size(rng: np.random.Generator, most: int) -> int:
    return int(rng.integers(1, most + 1)) if most else 0
