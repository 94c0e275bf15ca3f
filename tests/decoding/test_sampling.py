import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from toy_network import EOS, ToyNetwork, forced_at
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from t5x_like.decoding.contract import DecodeFn
from t5x_like.decoding.greedy import Greedy
from t5x_like.decoding.sampling import Sampling
from t5x_like.errors import UserError

KEY = jax.random.key(7)
PROMPTS = [[0, 0, 0, 0], [0, 4, 0, 0], [0, 3, 2, 4]]
SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.8},
    {"temperature": 1.6, "top_k": 4, "top_p": 0.75},
]


def naive_warp(log_probs: np.ndarray, temperature: float = 1, top_k: int = 0, top_p: float = 1) -> np.ndarray:
    """Probabilities, token by token; no ties."""
    scaled = log_probs / temperature
    probs = np.exp(scaled - np.max(scaled))
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept = order[: top_k or None]
    probs /= sum(probs[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += probs[token]
    return np.array([probs[token] / mass if token in nucleus else 0.0 for token in range(len(probs))])


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [0.01, 0.6, 0.95, 1.0])
def test_warp_equals_hugging_face(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((32, 50)).astype(np.float32)
    expected = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = Sampling(temperature, top_k, top_p).warp(jnp.asarray(logits))
    np.testing.assert_array_equal(np.isfinite(ours), torch.isfinite(expected).numpy())
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)


def support(probs: list[float], **settings: float) -> list[int]:
    """Tokens that `warp` keeps."""
    warped = Sampling(**settings).warp(jnp.log(jnp.array([probs], jnp.float32)))
    return np.flatnonzero(np.isfinite(warped[0])).tolist()


def test_top_k_support() -> None:
    assert support([0.1, 0.4, 0.2, 0.3], top_k=1) == [1]
    assert support([0.1, 0.4, 0.2, 0.3], top_k=2) == [1, 3]
    assert support([0.1, 0.4, 0.2, 0.3], top_k=4) == [0, 1, 2, 3]
    assert support([0.1, 0.4, 0.2, 0.3], top_k=9) == [0, 1, 2, 3]
    assert support([0.4, 0.2, 0.2, 0.2], top_k=2) == [0, 1, 2, 3]  # tied with the second
    assert support([0.3, 0.3, 0.3, 0.1], top_k=1) == [0, 1, 2]


def test_top_p_support() -> None:
    assert support([0.125, 0.5, 0.125, 0.25], top_p=0.49) == [1]
    assert support([0.125, 0.5, 0.125, 0.25], top_p=0.5) == [1]  # reached exactly
    assert support([0.125, 0.5, 0.125, 0.25], top_p=0.51) == [1, 3]
    assert support([0.125, 0.5, 0.125, 0.25], top_p=0.75) == [1, 3]
    assert support([0.125, 0.5, 0.125, 0.25], top_p=0.76) == [0, 1, 2, 3]  # tied with the third
    assert support([0.125, 0.5, 0.125, 0.25], top_p=1e-9) == [1]  # at least one
    assert support([0.25, 0.25, 0.25, 0.25], top_p=1e-9) == [0, 1, 2, 3]


def test_top_p_counts_what_top_k_left() -> None:
    """Of 0.4 and 0.3 the first is 4/7: enough for 0.57, though not by 0.4 alone."""
    probs = [0.1, 0.4, 0.2, 0.3]
    assert support(probs, top_p=0.57) == [1, 3]
    assert support(probs, top_k=2, top_p=0.57) == [1]
    assert support(probs, top_k=2, top_p=0.58) == [1, 3]


def test_top_p_counts_after_temperature() -> None:
    """At temperature 0.5 odds square: 16 : 9 : 4 : 1, the first alone is 16/30."""
    assert support([0.1, 0.4, 0.2, 0.3], temperature=0.5, top_p=0.53) == [1]
    assert support([0.1, 0.4, 0.2, 0.3], temperature=0.5, top_p=0.54) == [1, 3]


@pytest.mark.parametrize("settings", [{}, *SETTINGS])
def test_frequencies_are_those_of_the_warped_distribution(settings: dict[str, float]) -> None:
    """Pearson's chi-square over all sequences of two tokens, a prompt token before them."""
    network, prompt, samples = ToyNetwork.random(3, examples=1, vocab=5, max_length=3), [0, 3], 4000
    tokens = network.decode(Sampling(**settings, num_samples=samples), [prompt], KEY).tokens[0].tolist()
    counts = Counter(map(tuple, tokens))
    chi_square, cells = 0.0, 0
    for first, second in itertools.product(range(5), range(5)):
        prob = naive_warp(network.log_probs(0, prompt), **settings)[first]
        if first != EOS:
            prob *= naive_warp(network.log_probs(0, [*prompt, first]), **settings)[second]
        elif second:
            prob = 0.0  # only padding follows the end
        count = counts.pop((3, first, second), 0)
        if prob:
            chi_square += (count - samples * prob) ** 2 / (samples * prob)
            cells += 1
        else:
            assert count == 0
    assert not counts
    freedom = cells - 1
    assert chi_square < freedom + 3.3 * np.sqrt(2 * freedom)  # about the 99.9th percentile


@pytest.mark.parametrize("settings", SETTINGS)
def test_scores_are_the_networks_own(settings: dict[str, float]) -> None:
    """Also checks forced prompts, zeros after the end and best first."""
    network = ToyNetwork.random(5)
    tokens, scores = network.decode(Sampling(**settings, num_samples=6), PROMPTS, KEY)
    assert tokens.shape == (3, 6, 8)
    expected = [
        [network.score(example, PROMPTS[example], sample) for sample in samples]
        for example, samples in enumerate(tokens.tolist())
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)
    assert np.all(np.diff(scores, axis=1) <= 0)
    assert len({tuple(sample) for sample in tokens[0].tolist()}) > 1


def test_any_step_can_be_replayed_alone() -> None:
    network, search = ToyNetwork.random(2), Sampling(temperature=1.5)
    rows = network.decode(search, PROMPTS, KEY).tokens[:, 0].tolist()
    for position in range(network.max_length):
        logits = np.stack([network.logits(e, [0, *row[:position]]) for e, row in enumerate(rows)])
        drawn = jax.random.categorical(jax.random.fold_in(KEY, position), search.warp(jnp.asarray(logits)))
        for prompt, row, token in zip(PROMPTS, rows, drawn.tolist(), strict=True):
            start = len([t for t in prompt if t])
            if not forced_at(prompt, position) and EOS not in row[start:position]:
                assert row[position] == token


def test_a_row_does_not_depend_on_the_others() -> None:
    network, search = ToyNetwork.random(4), Sampling(num_samples=3)
    together = network.decode(search, PROMPTS, KEY)
    others = network.decode(search, [PROMPTS[0], [0, 2, 2, 2], [0] + [0] * 3], KEY, examples=[0, 0, 1])
    alone = network.decode(search, PROMPTS[:1], KEY, examples=[0])
    for result in (others, alone):
        np.testing.assert_array_equal(result.tokens[0], together.tokens[0])
        np.testing.assert_array_equal(result.scores[0], together.scores[0])


def test_rows_and_keys_draw_differently() -> None:
    """Sixteen equal rows of a network that never ends, and the same under another key."""
    logits = np.zeros((1, 1, 50), np.float32)
    logits[..., EOS] = -np.inf
    network, rows = ToyNetwork(logits), []
    for key in jax.random.split(KEY):
        rows += network.decode(Sampling(), [[0]] * 16, key, examples=[0] * 16).tokens[:, 0].tolist()
    assert len({tuple(row) for row in rows}) == 32


def test_one_token_kept_is_greedy() -> None:
    network = ToyNetwork.random(6)
    greedy = network.decode(Greedy(), PROMPTS)
    for search in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-3)):
        jax.tree.map(np.testing.assert_array_equal, network.decode(search, PROMPTS, KEY), greedy)


def test_stops_when_all_samples_ended() -> None:
    network = ToyNetwork(np.array([[[0, 50, 0, 0]]], np.float32))
    stepper, positions = network.counted_stepper()
    found = Sampling(num_samples=3)(stepper, network.cache(), jnp.array([[0, 2]]), 8, EOS, KEY)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert positions == [0, 1]
    np.testing.assert_array_equal(found.tokens, [[[2, EOS, 0, 0, 0, 0, 0, 0]] * 3])


def test_jit_equals_eager_with_either_kind_of_key() -> None:
    network = ToyNetwork.random(1)
    search: DecodeFn = Sampling(temperature=0.9, top_k=4, top_p=0.9, num_samples=3)
    eager = network.decode(search, PROMPTS, KEY)
    for key in (KEY, jax.random.key_data(KEY)):
        jitted = jax.jit(lambda key: network.decode(search, PROMPTS, key))(key)
        jax.tree.map(np.testing.assert_array_equal, jitted, eager)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature is 0.0: .*use Greedy\(\)"),
        ({"temperature": -1.0}, "temperature is -1.0: set it above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1: set it to 1 or more"),
        ({"top_p": 0.0}, "top_p is 0.0: set it above 0"),
        ({"top_p": 1.5}, "top_p is 1.5: .*to 1 to keep all"),
        ({"num_samples": 0}, "num_samples is 0: set it to 1 or more"),
    ],
)
def test_wrong_fields_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"Sampling.{message}"):
        Sampling(**settings)


def test_a_missing_key_is_an_error() -> None:
    with pytest.raises(UserError, match=r"pass key=jax.random.key\(seed\)"):
        ToyNetwork.random(0).decode(Sampling(), PROMPTS)
