import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_network import EOS, Hypothesis, ToyNetwork, every_hypothesis, naive_beam

from t5x_like.decoding.beam import BeamSearch
from t5x_like.decoding.contract import Decoded, DecodeFn
from t5x_like.errors import UserError

PROMPTS = [[0, 0, 0, 0], [0, 4, 0, 0], [0, 3, 2, 4]]


def assert_found(found: Decoded, example: int, expected: list[Hypothesis]) -> None:
    length = found.tokens.shape[2]
    padded = [tokens + [0] * (length - len(tokens)) for _, tokens in expected]
    np.testing.assert_array_equal(found.tokens[example, : len(expected)], padded)
    scores = [score for score, _ in expected]
    np.testing.assert_allclose(found.scores[example, : len(expected)], scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("num_beams", "alpha"), [(1, 0.6), (2, 0.0), (4, 0.6), (5, 2.0)])
def test_equals_a_naive_beam_search_that_never_stops_early(num_beams: int, alpha: float) -> None:
    network, prompts = ToyNetwork.random(0, examples=24), PROMPTS * 8
    found = network.decode(BeamSearch(num_beams, alpha), prompts)
    for example, prompt in enumerate(prompts):
        assert_found(found, example, naive_beam(network, example, prompt, num_beams, alpha))
    assert found.scores.dtype == jnp.float32


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
def test_enough_beams_find_the_best_of_all(alpha: float) -> None:
    """With 3 tokens, one of them the end, 2 * 2 * 2 beginnings can be live before the fourth and last one."""
    network = ToyNetwork.random(0, examples=9, vocab=3, max_length=4)
    found = network.decode(BeamSearch(8, alpha), [[0]] * 9)
    for example in range(9):
        assert_found(found, example, every_hypothesis(network, example, alpha)[:8])


def test_the_penalty_written_out_by_hand() -> None:
    """After [0] (8, even) the end is as likely as going on, and after [0, 2] (8 + 87, odd) it is certain."""
    table = np.log(np.array([[[0.01, 0.5, 0.48, 0.01], [0.01, 0.97, 0.01, 0.01]]], np.float32))
    network = ToyNetwork(table, max_length=3)
    short, long = np.log(0.5), np.log(0.48 * 0.97)
    found = network.decode(BeamSearch(2, 0.0), [[0]])
    np.testing.assert_array_equal(found.tokens, [[[EOS, 0, 0], [2, EOS, 0]]])
    np.testing.assert_allclose(found.scores, [[short, long]], rtol=1e-6)
    found = network.decode(BeamSearch(2, 1.0), [[0]])
    np.testing.assert_array_equal(found.tokens, [[[2, EOS, 0], [EOS, 0, 0]]])
    np.testing.assert_allclose(found.scores, [[long / (7 / 6), short]], rtol=1e-6)


def test_forced_end_token_does_not_end() -> None:
    network = ToyNetwork(np.array([[[0, 9, 0, 0, 0]]], np.float32), max_length=5)
    prompt = [0, 3, EOS, 4]
    found = network.decode(BeamSearch(3), [prompt])
    np.testing.assert_array_equal(found.tokens[0, 0], [3, EOS, 4, EOS, 0])
    assert_found(found, 0, naive_beam(network, 0, prompt, 3, 0.6))


def test_free_position_between_forced_ones() -> None:
    network = ToyNetwork.random(3, examples=1, max_length=6)
    prompt = [0, 4, 0, 3, 2]
    assert_found(network.decode(BeamSearch(3), [prompt]), 0, naive_beam(network, 0, prompt, 3, 0.6))


def test_places_without_a_hypothesis_are_empty() -> None:
    """All three tokens forced: one hypothesis, which costs nothing."""
    tokens, scores = ToyNetwork.random(0, examples=1, max_length=3).decode(BeamSearch(3), [[0, 4, 3, 2]])
    np.testing.assert_array_equal(tokens, [[[4, 3, 2], [0, 0, 0], [0, 0, 0]]])
    np.testing.assert_array_equal(scores, [[0.0, -np.inf, -np.inf]])


def steps_taken(network: ToyNetwork, search: BeamSearch) -> int:
    stepper, positions = network.counted_stepper()
    prompt = jnp.zeros((len(network.table), 1), jnp.int32)
    jax.block_until_ready(search(stepper, network.cache(), prompt, network.max_length, EOS))
    jax.effects_barrier()
    assert positions == list(range(len(positions)))
    return len(positions)


@pytest.mark.parametrize(("alpha", "steps"), [(0.0, 2), (1.0, 3), (2.0, 4)])
def test_stops_as_soon_as_nothing_better_can_come(alpha: float, steps: int) -> None:
    """Each token ends with probability 0.6, else one of two others follows, 0.2 each; two beams of 7 tokens.

    What ended with n tokens has `log(0.6) + (n - 1) log(0.2)` over `((5 + n) / 6) ** alpha`; best are n = 1,
    -0.51, and n = 2, -2.12 (alpha 0), -1.82 (alpha 1), -1.56 (alpha 2). What is live with n tokens cannot end
    above `n log(0.2)` over `2 ** alpha`. That is less than the second best first at n = 2, -3.22 (alpha 0);
    n = 3, -2.41 (alpha 1); n = 4, -1.61 (alpha 2).
    """
    table = np.log(np.array([[[0.2, 0.6, 0.2]]], np.float32))
    assert steps_taken(ToyNetwork(table, max_length=7), BeamSearch(2, alpha)) == steps


def test_an_example_that_is_over_does_not_change_while_others_go_on() -> None:
    table = np.zeros((2, 1, 4), np.float32)
    table[0, :, EOS], table[1, :, 2] = 4, 4
    network, search = ToyNetwork(table), BeamSearch(3)
    together = network.decode(search, [[0], [0]])
    for example in (0, 1):
        alone = network.decode(search, [[0]], examples=[example])
        np.testing.assert_array_equal(together.tokens[example], alone.tokens[0])
        np.testing.assert_array_equal(together.scores[example], alone.scores[0])
    assert steps_taken(ToyNetwork(table[:1]), search) < steps_taken(network, search) == 8


def test_jit_equals_eager() -> None:
    network = ToyNetwork.random(1)
    search: DecodeFn = BeamSearch(3)
    eager = network.decode(search, PROMPTS)
    jitted = jax.jit(lambda: network.decode(search, PROMPTS))()
    jax.tree.map(np.testing.assert_array_equal, jitted, eager)


@pytest.mark.parametrize(
    ("num_beams", "alpha", "message"),
    [
        (0, 0.6, "num_beams is 0: set it to 1 or more"),
        (4, -0.5, "length_penalty is -0.5: set it to 0 or more"),
        (4, float("nan"), "length_penalty is nan"),
    ],
)
def test_wrong_fields_are_named(num_beams: int, alpha: float, message: str) -> None:
    with pytest.raises(UserError, match=f"BeamSearch.{message}"):
        BeamSearch(num_beams, alpha)
