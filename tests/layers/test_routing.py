"""Routers, choices and slots; what layers do with them is in `test_moe`."""

import functools
import math

import jax
import jax.numpy as jnp
import naive_moe
import numpy as np
import pytest
from naive_moe import Naive

from t5x_like.errors import UserError
from t5x_like.layers.routing import (
    CapacityFactor,
    Choose,
    ExpertChoice,
    FixedCapacity,
    HashRouter,
    Routed,
    Router,
    TokenChoices,
    Tokens,
    TopK,
    take_rows,
    top_k,
)
from t5x_like.typing import Array, PRNGKey

GROUPS, SIZE, EXPERTS, CAPACITY = 64, 9, 4, 2
KEY = jax.random.key(2)


# ---- Capacity


@pytest.mark.parametrize(
    ("group", "experts", "choices", "training", "slots"),
    [
        (512, 64, 1, True, 10),  # 1.25 * 512 / 64
        (512, 64, 1, False, 16),
        (512, 64, 2, True, 20),
        (100, 8, 1, True, 16),  # 15.6
        (512, 256, 1, True, 4),  # 2.5, but at least 4
        (3, 256, 1, True, 3),  # at least 4, but there are only 3 tokens
        (8, 2, 3, False, 8),  # 24 choices, but no more than one per token and expert
    ],
)
def test_capacity_factor(group: int, experts: int, choices: int, training: bool, slots: int) -> None:
    assert CapacityFactor()(group, experts, choices, training) == slots


def test_capacity_factor_without_a_minimum_and_fixed_capacity() -> None:
    assert CapacityFactor(train=1.0, minimum=1)(512, 256, 1, True) == 2
    assert CapacityFactor(train=1.0, minimum=1)(513, 256, 1, True) == 3
    assert [FixedCapacity(5)(group, 8, 2, True) for group in (100, 3)] == [5, 3]
    assert FixedCapacity(5)(100, 8, 2, False) == 5


# ---- Choices and slots, from probabilities that tests make up


def probabilities(seed: int, experts: int = EXPERTS) -> np.ndarray:
    """Of many random groups."""
    logits = np.random.default_rng(seed).normal(0, 1.5, (GROUPS, SIZE, experts))
    return np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))


def real_tokens(seed: int) -> np.ndarray:
    """From none to all of a group's, anywhere in it."""
    rng = np.random.default_rng(seed)
    return rng.random((GROUPS, SIZE)) < np.linspace(0, 1, GROUPS)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def fill(choose: Choose, p: Array, real: Array) -> tuple[Array, Array, Array, Array]:
    """What slots do, by their public face alone.

    Returns:
      The token [G, E * C] that every slot holds, counted from 1, 0 for none; the weight [G, S, E * C] of every slot's
      answer in every token's output; tokens in experts; dropped tokens.
    """
    choices = choose(p, real, CAPACITY, KEY)
    slots = choices.slots(EXPERTS, CAPACITY) if isinstance(choices, TokenChoices) else choices
    sent = slots.dispatch(jnp.broadcast_to(jnp.arange(1.0, SIZE + 1)[None, :, None], (GROUPS, SIZE, 1)))
    answers = jnp.eye(EXPERTS * CAPACITY).reshape(1, EXPERTS, CAPACITY, -1)  # every slot has a vector of its own
    weights = slots.combine(jnp.broadcast_to(answers, (GROUPS, *answers.shape[1:])))
    return sent.reshape(GROUPS, -1), weights, slots.kept, slots.dropped


def assert_filled_as(expected: list[list[naive_moe.Place]], choose: Choose, p: np.ndarray, real: np.ndarray) -> None:
    sent, weights, kept, dropped = map(np.asarray, fill(choose, p, real))
    for g, wanted in enumerate(expected):
        holds = [(int(token) - 1, slot // CAPACITY) for slot, token in enumerate(sent[g]) if token]
        assert sorted(holds) == sorted(place[:2] for place in wanted)
        gates = np.zeros_like(weights[g])
        for token, expert, gate in wanted:
            slots = range(expert * CAPACITY, expert * CAPACITY + CAPACITY)
            gates[token, next(slot for slot in slots if sent[g, slot] == token + 1)] = gate
        np.testing.assert_allclose(weights[g], gates, rtol=1e-6)
        np.testing.assert_array_equal(kept[g], np.bincount([e for _, e, _ in wanted], minlength=EXPERTS))
        assert dropped[g] == real[g].sum() - len({token for token, *_ in wanted})


OPTIONS: dict[str, dict] = {
    "top 1": {},
    "top 2": {"choices": 2},
    "top 3": {"choices": 3},
    "top 4 normalized": {"choices": 4, "normalize": True},
    "top 2 policy": {"choices": 2, "normalize": True, "second_threshold": 0.5},
    "top 3 policy": {"choices": 3, "second_threshold": 0.8},
    "top 1 priority": {"prioritize": True},
    "top 2 priority": {"choices": 2, "prioritize": True},
    "top 1 priority normalized": {"prioritize": True, "normalize": True},
    "top 2 priority normalized": {"choices": 2, "prioritize": True, "normalize": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_top_k_fills_slots_as_the_oracle_does(options: dict) -> None:
    p, real = probabilities(0), real_tokens(0)
    naive = Naive(EXPERTS, **options, capacity=CAPACITY)
    draws = np.asarray(jax.random.uniform(KEY, (GROUPS, naive.choices, SIZE)))
    expected = [
        naive_moe.top_k_places(naive, p[g].tolist(), list(real[g]), draws[g] if naive.second_threshold else None)
        for g in range(GROUPS)
    ]
    assert_filled_as(expected, TopK(**options), p, real)


def test_expert_choice_fills_slots_as_the_oracle_does() -> None:
    p, real = probabilities(0), real_tokens(0)
    naive = Naive(EXPERTS, capacity=CAPACITY)
    expected = [naive_moe.expert_choice_places(naive, p[g].tolist(), list(real[g])) for g in range(GROUPS)]
    assert_filled_as(expected, ExpertChoice(), p, real)


def test_slots_by_hand() -> None:
    """Two experts with one slot, two choices: both first choices go before any second one."""
    p, real = jnp.asarray([[[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]]), jnp.ones((1, 3), bool)
    y = jnp.asarray([[[[10.0]], [[100.0]]]])

    def serve(choose: TopK) -> tuple[Array, Array, Array]:
        slots = choose(p, real, 1, None).slots(2, 1)
        return slots.combine(y)[0, :, 0], slots.kept, slots.dropped

    out, kept, dropped = jax.jit(lambda: serve(TopK(choices=2)))()
    np.testing.assert_allclose(out, [6.0, 0.0, 80.0])
    np.testing.assert_array_equal(kept, [[1, 1]])
    np.testing.assert_array_equal(dropped, [1])
    out, *_ = jax.jit(lambda: serve(TopK(choices=2, prioritize=True)))()
    np.testing.assert_allclose(out, [0.0, 9.0, 80.0])


def test_the_second_expert_policy_is_for_training_alone() -> None:
    """Half a threshold of 1 is a chance of a half; the first choice always goes."""
    p, real = jnp.full((1, 10_000, 2), 0.5), jnp.ones((1, 10_000), bool)
    choose = TopK(choices=2, second_threshold=1.0)
    apply = jax.jit(choose, static_argnums=2)
    kept = (np.asarray(apply(p, real, 1, KEY).experts) < 2)[0].mean(axis=1)
    assert kept[0] == 1.0
    assert abs(kept[1] - 0.5) < 0.02
    assert (np.asarray(apply(p, real, 1, None).experts) < 2).all()


def test_equal_probabilities_go_to_the_lower_number_as_in_lax_top_k() -> None:
    p = jnp.asarray([[[0.2, 0.3, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]])
    gates, experts = jax.jit(top_k, static_argnums=1)(p, 3)
    wanted_gates, wanted = jax.lax.top_k(p, 3)
    np.testing.assert_array_equal(experts.swapaxes(1, 2), wanted)
    np.testing.assert_array_equal(gates.swapaxes(1, 2), wanted_gates)
    np.testing.assert_array_equal(wanted, [[[1, 2, 0], [0, 1, 2]]])


@pytest.mark.parametrize("choices", [0, 3])
def test_a_wrong_number_of_choices_is_explained(choices: int) -> None:
    with pytest.raises(UserError, match=rf"TopK\.choices is {choices}; with 2 experts it must be 1 to 2"):
        TopK(choices=choices)(jnp.full((1, 3, 2), 0.5), jnp.ones((1, 3), bool), 1, None)


def test_which_choices_are_causal() -> None:
    causal = [TopK().causal, TopK(2).causal, HashRouter().choose.causal, Router().choose.causal]
    assert all(causal)
    assert not any([TopK(prioritize=True).causal, ExpertChoice().causal])


def test_rows_out_of_range_are_zero_and_the_gradient_is_a_scatters() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    index = jnp.asarray([[2, 3, 0, 2], [1, 0, 3, 3]])  # 3 is out of range, row 2 is taken twice, and row 2 never
    inverse = jnp.asarray([[[2, 4, 0], [4, 4, 3]], [[1, 0, 4], [4, 4, 4]]])
    none = np.zeros(4, np.float32)
    weights = np.random.default_rng(1).normal(size=(2, 4, 4)).astype(np.float32)
    taken, pull = jax.jit(lambda x: jax.vjp(lambda x: take_rows(x, index, inverse), x))(x)
    np.testing.assert_array_equal(taken, [[x[0, 2], none, x[0, 0], x[0, 2]], [x[1, 1], x[1, 0], none, none]])
    (gradient,) = jax.jit(pull)(weights)
    wanted = [[weights[0, 2], none, weights[0, 0] + weights[0, 3]], [weights[1, 1], weights[1, 0], none]]
    np.testing.assert_allclose(gradient, wanted)


# ---- Routers


def route(
    router: Router | HashRouter,
    x: np.ndarray,
    tokens: Tokens,
    kernel: np.ndarray | None = None,
    key: PRNGKey | None = None,
) -> Routed:
    """With one expert per column of the kernel, or 8 without."""
    variables = {} if kernel is None else {"params": {"router_weights": {"kernel": jnp.asarray(kernel, jnp.float32)}}}
    experts = 8 if kernel is None else kernel.shape[1]
    rngs = None if key is None else {"dropout": key}
    apply = jax.jit(lambda x, tokens: router.apply(variables, x, tokens, experts, x.shape[1], rngs=rngs))
    return apply(jnp.asarray(x, jnp.float32), tokens)


def all_real(groups: int, size: int) -> Tokens:
    return Tokens(jnp.ones((groups, size), jnp.int32), jnp.ones((groups, size), bool))


def test_statistics_of_perfect_balance_indecision_and_collapse() -> None:
    balanced = np.eye(4)[None]  # every token has a favourite of its own
    undecided = np.zeros((1, 4, 4))
    collapsed = np.eye(4)[None, [0, 0, 0, 0]]
    x = np.concatenate([balanced, undecided, collapsed])
    routed = route(Router(balance_loss=0.5, z_loss=0.25), x, all_real(3, 4), kernel=20 * np.eye(4))
    log_4, z = math.log(4), 20.0 + math.log1p(3 * math.exp(-20))
    np.testing.assert_allclose(routed.balance_loss, [1.0, 1.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(routed.z_loss, [z**2, log_4**2, z**2], rtol=1e-6)
    np.testing.assert_allclose(routed.entropy, [0.0, log_4, 0.0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(routed.confidence, [1.0, 0.25, 1.0], rtol=1e-6)
    np.testing.assert_allclose(routed.loss, 0.5 * routed.balance_loss + 0.25 * routed.z_loss, rtol=1e-6)


def test_jitter_is_within_its_bounds_and_needs_a_key() -> None:
    """Against a logit of 0, a token of 1 shows its noise as its gate's log-odds."""
    x, kernel = np.ones((1, 2000, 1)), np.asarray([[1.0, 0.0]])

    def noise(key: PRNGKey | None) -> np.ndarray:
        routed = route(Router(TopK(), jitter_noise=0.1), x, all_real(1, 2000), kernel, key)
        gates = np.asarray(routed.choices.gates[0, 0], np.float64)
        return np.log(gates / (1 - gates))

    drawn = noise(KEY)
    assert 0.9 - 1e-6 < drawn.min() < 0.901
    assert 1.099 < drawn.max() < 1.1 + 1e-6
    assert abs(drawn.std() - 0.2 / math.sqrt(12)) < 0.002
    np.testing.assert_array_equal(noise(KEY), drawn)
    assert (noise(jax.random.key(3)) != drawn).any()
    np.testing.assert_allclose(noise(None), 1.0, rtol=1e-6)


def test_hashing_sends_a_token_to_one_expert_wherever_it_stands() -> None:
    ids = jnp.asarray([[5, 6, 5, 0], [7, 5, 123_456, 2_000_000_000]])
    tokens = Tokens(ids, ids > 0)
    experts = np.asarray(route(HashRouter(), np.zeros((2, 4, 3)), tokens).choices.experts[:, 0])
    wanted = [[naive_moe.hashed(int(i), 8) if i else 8 for i in row] for row in np.asarray(ids)]
    np.testing.assert_array_equal(experts, wanted)
    assert experts[0, 0] == experts[0, 2] == experts[1, 1]


def test_hashing_spreads_a_vocabulary_evenly_and_seeds_differ() -> None:
    ids = jnp.arange(1, 32_001)[None]
    tokens, x = Tokens(ids, ids > 0), np.zeros((1, 32_000, 1))
    drawn = [np.asarray(route(HashRouter(seed), x, tokens).choices.experts[0, 0]) for seed in (0, 1)]
    for experts in drawn:
        counts = np.bincount(experts, minlength=8)
        assert ((counts - 4000) ** 2 / 4000).sum() < 24.3  # chi-squared, 7 degrees of freedom, p = 0.001
    assert abs((drawn[0] == drawn[1]).mean() - 1 / 8) < 0.01
