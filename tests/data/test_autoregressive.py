from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_like.data.objectives import autoregressive
from t5x_like.data.vocabularies import sentencepiece_vocabulary
from t5x_like.errors import UserError

FEATURES = {"inputs": seqio.Feature(sentencepiece_vocabulary(), add_eos=False)}
CLS, SEP = 8098, 1
DOCUMENTS = [list(range(300, 309)), [], list(range(400, 405))]
Example = dict[str, np.ndarray]


def run(
    preprocessor: Callable[..., tf.data.Dataset], rows: list[list[int]], number: int = 0, **lengths: int
) -> list[Example]:
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"targets": row} for row in rows), output_signature={"targets": tf.TensorSpec([None], tf.int32)}
    )
    more = (FEATURES,) if preprocessor is autoregressive.permutation_lm else ()
    with seqio.utils.map_seed_manager(number):
        return list(preprocessor(dataset, lengths, *more).as_numpy_iterator())


def test_causal_targets_are_running_text_after_nothing() -> None:
    examples = run(autoregressive.causal_lm, DOCUMENTS, inputs=0, targets=6)
    assert [example["inputs"].tolist() for example in examples] == [[], [], []]
    assert [example["targets"].tolist() for example in examples] == [
        [300, 301, 302, 303, 304, 305],
        [306, 307, 308, 400, 401, 402],
        [403, 404],
    ]


def test_a_prefix_is_as_likely_to_end_anywhere() -> None:
    examples = run(autoregressive.prefix_lm, [list(range(10, 10 + 6 * 2000 + 1))], inputs=6, targets=9)
    assert len(examples) == 2001
    for number, example in enumerate(examples[:-1]):
        joined = [*example["inputs"].tolist(), *example["targets"].tolist()]
        assert joined == list(range(10 + 6 * number, 16 + 6 * number))
    assert (examples[-1]["inputs"].tolist(), examples[-1]["targets"].tolist()) == ([], [12010])
    places = Counter(len(example["inputs"]) for example in examples[:-1])
    assert places.keys() == {1, 2, 3, 4, 5}
    assert all(abs(count - 400) < 72 for count in places.values())  # four standard deviations


def test_the_end_of_a_random_order_is_predicted() -> None:
    text = list(range(300, 330))
    for example in run(autoregressive.permutation_lm, [text] * 3, inputs=32, targets=9):
        inputs, order, targets, positions = (
            example[name].tolist() for name in ("inputs", "order", "targets", "target_positions")
        )
        assert inputs == [*text, SEP, CLS]
        assert sorted(order) == [0] * 27 + [1, 2, 3, 4, 5]  # 30 / 6
        assert positions == sorted(positions) == np.flatnonzero(order).tolist()
        assert targets == [text[place] for place in positions]


def test_a_target_sees_what_the_authors_collator_lets_it_see() -> None:
    """Their rule, naively: i does not see j if j is predicted and comes no earlier in the order than i."""
    (example,) = run(autoregressive.permutation_lm, [list(range(300, 330))], inputs=32, targets=9)
    order, size = example["order"].tolist(), 32
    predicted = set(example["target_positions"].tolist())
    places = {place: order[place] if place in predicted else -1 for place in range(size)}
    for i in range(size):
        for j in range(size):
            hidden = j in predicted and places[i] <= places[j]
            assert (order[j] < order[i] or order[j] == 0) == (not hidden)


def test_every_position_is_as_likely_to_be_predicted_and_to_come_first() -> None:
    examples = run(autoregressive.permutation_lm, [list(range(300, 318))] * 1500, inputs=20, targets=9)
    chosen = Counter(place for example in examples for place in example["target_positions"].tolist())
    first = Counter(int(np.flatnonzero(example["order"] == 1)[0]) for example in examples)
    assert chosen.keys() == first.keys() == set(range(18))
    assert all(abs(count - 250) < 58 for count in chosen.values())  # 3 of 18: four standard deviations of 1500 draws
    assert all(abs(count - 83) < 36 for count in first.values())


def test_a_short_end_and_a_few_targets() -> None:
    long, short = run(autoregressive.permutation_lm, [list(range(300, 324))], inputs=22, targets=2)
    assert len(long["targets"]) == 2  # not 20 / 6
    assert (len(short["inputs"]), len(short["targets"])) == (6, 1)


@pytest.mark.parametrize("preprocessor", [autoregressive.prefix_lm, autoregressive.permutation_lm])
def test_draws_are_a_function_of_the_seed(preprocessor: Callable[..., tf.data.Dataset]) -> None:
    def drawn(number: int) -> list[list[int]]:
        examples = run(preprocessor, [list(range(300, 600))], number, inputs=60, targets=60)
        return [example["targets"].tolist() for example in examples]

    assert drawn(1) == drawn(1) != drawn(2)


def test_lengths_that_cannot_work_are_explained() -> None:
    with pytest.raises(UserError, match="a length of 'targets' of at least 1, not 0"):
        run(autoregressive.causal_lm, DOCUMENTS, inputs=4, targets=0)
    with pytest.raises(UserError, match="a length of 'inputs' of at least 2, not 0"):
        run(autoregressive.prefix_lm, DOCUMENTS, inputs=0, targets=8)
    with pytest.raises(UserError, match="a length of 'inputs' of at least 3, not None"):
        run(autoregressive.permutation_lm, DOCUMENTS, targets=8)
