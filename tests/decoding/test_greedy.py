import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_network import EOS, ToyNetwork, naive_greedy

from t5x_like.decoding.contract import DecodeFn
from t5x_like.decoding.greedy import Greedy
from t5x_like.errors import UserError

PROMPTS = [[0, 0, 0, 0], [0, 4, 0, 0], [0, 3, 2, 4]]  # nothing forced, one token, three tokens


def test_equals_a_loop() -> None:
    network, prompts = ToyNetwork.random(0, examples=24), PROMPTS * 8
    tokens, scores = network.decode(Greedy(), prompts)
    expected = [naive_greedy(network, example, prompt) for example, prompt in enumerate(prompts)]
    np.testing.assert_array_equal(tokens[:, 0], expected)
    expected_scores = [network.score(e, p, t) for e, (p, t) in enumerate(zip(prompts, expected, strict=True))]
    np.testing.assert_allclose(scores[:, 0], expected_scores, rtol=1e-6, atol=1e-6)
    assert scores.dtype == jnp.float32


def test_written_out_by_hand() -> None:
    """Two contexts that matter: even sums of what was fed go on, odd ones end."""
    table = np.log(np.array([[[0.1, 0.2, 0.6, 0.1], [0.1, 0.7, 0.1, 0.1]]], np.float32))
    network = ToyNetwork(table, max_length=4)
    # Weights 8, 29, 64, 113, tokens fed plus 1: [0] sums to 8 (even): 2; [0, 2] to 8 + 87 (odd): 1 ends it.
    tokens, scores = network.decode(Greedy(), [[0]])
    np.testing.assert_array_equal(tokens, [[[2, EOS, 0, 0]]])
    np.testing.assert_allclose(scores, [[np.log(0.6) + np.log(0.7)]], rtol=1e-6)


def test_lowest_id_among_equals() -> None:
    network = ToyNetwork(np.zeros((1, 1, 4), np.float32), max_length=2)
    np.testing.assert_array_equal(network.decode(Greedy(), [[0]]).tokens, [[[0, 0]]])


def test_forced_end_token_does_not_end_but_a_chosen_one_does() -> None:
    likely_end = np.log(np.array([[[0.1, 0.6, 0.1, 0.1, 0.1]]], np.float32))
    network = ToyNetwork(likely_end, max_length=6)
    tokens, scores = network.decode(Greedy(), [[0, 3, EOS, 4, 2]])
    np.testing.assert_array_equal(tokens, [[[3, EOS, 4, 2, EOS, 0]]])
    np.testing.assert_allclose(scores, [[np.log(0.6)]], rtol=1e-6)


def test_free_position_between_forced_ones() -> None:
    network = ToyNetwork(np.array([[[0, 0, 0, 9, 0]]], np.float32), max_length=4)
    np.testing.assert_array_equal(network.decode(Greedy(), [[0, 2, 0, 4]]).tokens, [[[2, 3, 4, 3]]])


def test_prompt_as_long_as_the_output_costs_nothing() -> None:
    tokens, scores = ToyNetwork.random(0, examples=1, max_length=3).decode(Greedy(), [[0, 4, 3, 2]])
    np.testing.assert_array_equal(tokens, [[[4, 3, 2]]])
    np.testing.assert_array_equal(scores, [[0.0]])


def test_a_row_that_ended_does_not_change_while_others_go_on() -> None:
    table = np.zeros((2, 1, 4), np.float32)
    table[0, :, EOS], table[1, :, 2] = 5, 5
    network = ToyNetwork(table, max_length=7)
    together = network.decode(Greedy(), [[0], [0]])
    alone = network.decode(Greedy(), [[0]], examples=[0])
    np.testing.assert_array_equal(together.tokens[:, 0], [[EOS, 0, 0, 0, 0, 0, 0], [2] * 7])
    np.testing.assert_array_equal(together.scores[0], alone.scores[0])


def test_stops_when_all_rows_ended() -> None:
    table = np.zeros((2, 1, 4), np.float32)
    table[:, :, EOS] = 5
    network = ToyNetwork(table)
    stepper, positions = network.counted_stepper()
    prompt = jnp.array([[0, 0, 0], [0, 3, 2]])  # the second row may end at its third token only
    jax.block_until_ready(Greedy()(stepper, network.cache(), prompt, 8, EOS))
    jax.effects_barrier()
    assert positions == [0, 1, 2]


def test_jit_equals_eager() -> None:
    network = ToyNetwork.random(1)
    eager = network.decode(Greedy(), PROMPTS)
    jitted = jax.jit(lambda: network.decode(Greedy(), PROMPTS))()
    jax.tree.map(np.testing.assert_array_equal, jitted, eager)


def test_is_a_decode_fn_and_a_value() -> None:
    search: DecodeFn = Greedy()
    assert search == Greedy() and hash(search) == hash(Greedy())


@pytest.mark.parametrize("prompt", [[[0, 4, 3, 2, 2]], [[0, 4, 3, 2, 0]]])
def test_prompt_that_does_not_fit_is_an_error(prompt: list[list[int]]) -> None:
    network = ToyNetwork.random(0, examples=1, max_length=3)
    with pytest.raises(UserError, match=r"max_length is 3.*up to 4 tokens.*set max_length to 4 or more"):
        network.decode(Greedy(), prompt)


def test_no_room_for_a_token_is_an_error() -> None:
    with pytest.raises(UserError, match=r"max_length is 0.*set max_length to 1 or more"):
        ToyNetwork.random(0, examples=1, max_length=0).decode(Greedy(), [[0]])
