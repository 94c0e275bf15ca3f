"""The shipped decoder-only architectures, shrunk, against a decoder in NumPy that goes token by token in float64."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_family import random_params
from tiny_t5 import quick_jit

from t5x_like import gin_config
from t5x_like.architectures.variables import named_leaves
from t5x_like.models.decoder_only import DecoderOnlyModel
from t5x_like.typing import Params

VOCAB, RADIUS, LENGTH, PREFIX = 19, 3, 28, 5
SIZES = ("EMBED_DIM=12", "NUM_HEADS=3", "HEAD_DIM=4", "MLP_DIM=14", "NUM_LAYERS=2", f"VOCAB_SIZE={VOCAB}")
MORE_SIZES = {"gpt2": [f"MAX_LENGTH={LENGTH}"], "gpt3": [f"MAX_LENGTH={LENGTH}", "NUM_PAIRS=1", f"RADIUS={RADIUS}"]}


@dataclasses.dataclass(frozen=True)
class Naive:
    """A decoder as its paper has it.

    `radius` is how far each layer sees; `bidirectional` is of T5's buckets, None where positions are learned.
    """

    radius: tuple[float, float] = (math.inf, math.inf)
    bidirectional: bool | None = None
    prefix_lm: bool = False

    @property
    def t5(self) -> bool:
        return self.bidirectional is not None

    def logits(self, weights: dict[str, np.ndarray], tokens: np.ndarray, prefix: int) -> np.ndarray:
        """`[length, vocab]` of one example, of which the first `prefix` tokens may see each other."""
        x = weights["token_embedder/embedding" if self.t5 else "token_embedder/tokens/embedding"][tokens]
        if not self.t5:
            x = x + weights["token_embedder/positions/embedding"][: len(tokens)]
        for i, radius in enumerate(self.radius):
            layer = {n.split(f"layers_{i}/")[1]: w for n, w in weights.items() if f"/layers_{i}/" in n}
            normal = self._norm(x, layer, "pre_self_attention_layer_norm")
            x = x + self._attention(normal, layer, radius, prefix, weights.get("decoder/relpos_bias/rel_embedding"))
            x = x + self._mlp(self._norm(x, layer, "pre_mlp_layer_norm"), layer)
        x = self._norm(x, weights, "decoder/decoder_norm")
        if self.t5:
            return x @ weights["decoder/logits_dense/kernel"]
        return x @ weights["token_embedder/tokens/embedding"].T

    def _norm(self, x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
        rows = []
        for row in x:
            if self.t5:
                normal = row / math.sqrt((row**2).mean() + 1e-6)
            else:
                normal = (row - row.mean()) / math.sqrt(row.var() + 1e-5)
            rows.append(normal * weights[f"{name}/scale"] + weights.get(f"{name}/bias", 0.0))
        return np.stack(rows)

    def _attention(
        self, x: np.ndarray, weights: dict[str, np.ndarray], radius: float, prefix: int, table: np.ndarray | None
    ) -> np.ndarray:
        def project(name: str, h: int) -> np.ndarray:
            bias = weights.get(f"self_attention/{name}/bias")
            return x @ weights[f"self_attention/{name}/kernel"][:, h] + (0.0 if bias is None else bias[h])

        out = np.zeros_like(x) + weights.get("self_attention/out/bias", 0.0)
        for h in range(3):
            query, key, value = (project(name, h) for name in ("query", "key", "value"))
            if not self.t5:
                query = query / math.sqrt(4)
            for q in range(len(x)):
                seen = [k for k in range(len(x)) if self._sees(q, k, radius, prefix)]
                logits = np.array([query[q] @ key[k] for k in seen])
                if table is not None:
                    logits += [table[h, bucket(k - q, self.bidirectional)] for k in seen]
                shares = np.exp(logits - logits.max())
                out[q] += (shares / shares.sum()) @ value[seen] @ weights["self_attention/out/kernel"][h]
        return out

    def _sees(self, q: int, k: int, radius: float, prefix: int) -> bool:
        if self.prefix_lm and k < prefix:
            return True
        return k <= q and q - k <= radius

    def _mlp(self, x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
        if self.t5:
            return (gelu(x @ weights["mlp/wi_0/kernel"]) * (x @ weights["mlp/wi_1/kernel"])) @ weights["mlp/wo/kernel"]
        hidden = gelu(x @ weights["mlp/wi/kernel"] + weights["mlp/wi/bias"])
        return hidden @ weights["mlp/wo/kernel"] + weights["mlp/wo/bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bucket(distance: int, bidirectional: bool) -> int:
    """Raffel et al. 2020, section 2.1: of 32 buckets, 128 being the farthest distance told apart."""
    count, offset, far = 32, 0, max(-distance, 0)
    if bidirectional:
        count, offset, far = 16, 16 if distance > 0 else 0, abs(distance)
    if far < count // 2:
        return offset + far
    logarithm = math.log(far / (count / 2)) / math.log(128 / (count / 2))
    return offset + min(count // 2 + int(logarithm * (count - count // 2) + 1e-9), count - 1)


NAIVE = {
    "gpt2": Naive(),
    "gpt3": Naive(radius=(math.inf, RADIUS)),
    "lamda": Naive(bidirectional=False),
    "prefix_lm": Naive(bidirectional=True, prefix_lm=True),
}
SIMILAR = {
    "gpt2": Naive(radius=(math.inf, RADIUS)),
    "gpt3": Naive(radius=(RADIUS, math.inf)),
    "lamda": Naive(bidirectional=True),
    "prefix_lm": Naive(bidirectional=False, prefix_lm=True),
}


@functools.cache
def model_and_params(name: str) -> tuple[DecoderOnlyModel, Params]:
    sizes = [*SIZES, *MORE_SIZES.get(name, []), "DTYPE=float32", "DROPOUT_RATE=0.0"]
    model = gin_config.run(gin_config.load(DecoderOnlyModel, [f"models/{name}_tiny.gin"], sizes))
    return model, random_params(model, {"decoder_input_tokens": jnp.zeros((1, LENGTH), jnp.int32)})


def naive_logits(name: str, tokens: np.ndarray, prefix: int = PREFIX, naive: Naive | None = None) -> np.ndarray:
    weights = {path: np.asarray(leaf, np.float64) for path, leaf in named_leaves(model_and_params(name)[1])}
    return (naive or NAIVE[name]).logits(weights, tokens, prefix)


def examples(seed: int, lengths: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, length).astype(np.int32) for length in lengths]


def fill(parts: list[np.ndarray]) -> np.ndarray:
    row = np.concatenate(parts).astype(np.int32)
    return np.pad(row, (0, LENGTH - len(row)))


@pytest.mark.parametrize("name", NAIVE)
def test_logits_are_those_of_the_naive_decoder(name: str) -> None:
    model, params = model_and_params(name)
    rows = examples(0, (LENGTH, 9))
    batch = {
        "decoder_input_tokens": np.stack([fill([row]) for row in rows]),
        "decoder_causal_attention": np.stack([fill([np.ones(PREFIX)]) for _ in rows]),
    }
    found = quick_jit(model.logits)(params, batch)
    for row, tokens in enumerate(rows):
        np.testing.assert_allclose(found[row, : len(tokens)], naive_logits(name, tokens), rtol=0, atol=1e-4)
    similar = naive_logits(name, rows[0], naive=SIMILAR[name])
    assert np.abs(found[0] - similar).max() > 1e-2


@pytest.mark.parametrize("name", NAIVE)
def test_packed_examples_have_the_logits_of_each_by_itself(name: str) -> None:
    model, params = model_and_params(name)
    packed = [examples(1, (12, 7, 6)), examples(2, (20, 8))]
    sizes = [[len(tokens) for tokens in row] for row in packed]
    batch = {
        "decoder_input_tokens": np.stack([fill(row) for row in packed]),
        "decoder_segment_ids": np.stack([fill([np.full(n, i + 1) for i, n in enumerate(row)]) for row in sizes]),
        "decoder_positions": np.stack([fill([np.arange(n) for n in row]) for row in sizes]),
        "decoder_causal_attention": np.stack([fill([np.arange(n) < PREFIX for n in row]) for row in sizes]),
    }
    found = quick_jit(model.logits)(params, batch)
    for row, parts in enumerate(packed):
        start = 0
        for tokens in parts:
            here = found[row, start : start + len(tokens)]
            np.testing.assert_allclose(here, naive_logits(name, tokens), rtol=0, atol=1e-4)
            start += len(tokens)


@pytest.mark.parametrize("name", NAIVE)
def test_cached_steps_after_prompts_of_unequal_length_have_the_same_logits(name: str) -> None:
    """Prompts end at one column, and are read at once; then come one token at a time."""
    model, params = model_and_params(name)
    longest, steps, prompts = 9, (1, 1, 1, 1), (9, 4, 1)
    length = longest + sum(steps)
    texts = examples(3, tuple(prompt + sum(steps) for prompt in prompts))
    tokens = np.stack([np.pad(text, (length - len(text), 0)) for text in texts])
    real = np.stack([np.arange(length) >= longest - prompt for prompt in prompts])
    prefix = real & (np.arange(length) < longest)
    make_cache = quick_jit(functools.partial(model.network.apply, method="make_cache", mutable=["cache"]))
    decode_step = quick_jit(functools.partial(model.network.apply, method="decode_step", mutable=["cache"]))

    expected = [naive_logits(name, text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
    _, state = make_cache({"params": params}, jnp.zeros((3, length), jnp.int32))
    column = 0
    for step in (longest, *steps):
        now = slice(column, column + step)
        found, state = decode_step({"params": params} | state, tokens[:, now], jnp.asarray(column), real, prefix)
        for row, text in enumerate(texts):
            first = max(0, length - len(text) - column)  # columns before it are padding
            place = column + first - (length - len(text))
            wanted = expected[row][place : place + step - first]
            np.testing.assert_allclose(found[row, first:], wanted, rtol=0, atol=1e-4)
        column += step
    assert column == length
