import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import seqio
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_like.data.objectives import span_corruption
from t5x_like.data.vocabularies import byte_vocabulary, sentencepiece_vocabulary
from t5x_like.errors import UserError

VOCABULARY = sentencepiece_vocabulary()
FEATURES = {name: seqio.Feature(VOCABULARY) for name in ("inputs", "targets")}
TOP = VOCABULARY.vocab_size - 1
Example = dict[str, np.ndarray]


def seeds(seed: int) -> tuple[tuple[tf.Tensor, tf.Tensor], ...]:
    return (tf.constant(seed), tf.constant(0)), (tf.constant(seed), tf.constant(1))


def uncorrupt(inputs: Sequence[int], targets: Sequence[int]) -> list[int]:
    """What a reader does with paper and pencil: puts each span where its sentinel stands."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token > TOP - 100:
            spans[token] = []
        else:
            spans[max(spans, key=lambda sentinel: -sentinel)].append(token)  # the latest sentinel is the lowest
    return [original for token in inputs for original in spans.get(token, [token])]


def corrupt_documents(documents: list[list[int]], lengths: dict[str, int], seed: int = 0) -> list[Example]:
    dataset = tf.data.Dataset.from_generator(
        lambda: ({"targets": document} for document in documents),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)},
    )
    with seqio.utils.map_seed_manager(seed):
        return list(span_corruption.span_corruption(dataset, lengths, FEATURES).as_numpy_iterator())


@pytest.mark.parametrize(
    ("inputs_length", "mean_noise_span_length", "raw_length", "targets_length"),
    [
        (512, 3.0, 568, 114),  # T5: 568 = 483 + 85; 85 tokens in 28 spans; 483 + 28 + 1, 85 + 28 + 1
        (1024, 3.0, 1137, 229),  # mT5: 1137 = 966 + 171; 171 tokens in 57 spans
        (1024, 20.0, 1193, 189),  # ByT5: 1193 = 1014 + 179; 179 tokens in 9 spans
    ],
)
def test_lengths_are_those_of_the_published_models(
    inputs_length: int, mean_noise_span_length: float, raw_length: int, targets_length: int
) -> None:
    found = span_corruption.raw_length_and_targets(inputs_length, 0.15, mean_noise_span_length)
    assert found == (raw_length, targets_length)


@pytest.mark.parametrize(("noise_density", "mean"), [(0.15, 3.0), (0.15, 1.0), (0.5, 3.0), (0.9, 2.0), (0.15, 32.0)])
def test_lengths_are_the_longest_that_fit_by_brute_force(noise_density: float, mean: float) -> None:
    def corrupted(raw_length: int) -> tuple[int, int]:
        """Counts the tokens of a corrupted sequence that is written out, its noise last."""
        noise, spans = span_corruption.noise_counts(raw_length, noise_density, mean)
        inputs = ["text"] * (raw_length - noise) + ["sentinel"] * spans + ["eos"]
        targets = ["noise"] * noise + ["sentinel"] * spans + ["eos"]
        return len(inputs), len(targets)

    sizes = {n: corrupted(n) for n in range(1, 1500)}
    for inputs_length in [*range(2, 70), 100, 128]:
        fitting = [n for n, (inputs, _) in sizes.items() if inputs <= inputs_length]
        expected = (max(fitting), sizes[max(fitting)][1])
        assert span_corruption.raw_length_and_targets(inputs_length, noise_density, mean) == expected


@pytest.mark.parametrize(
    ("length", "density", "mean", "counts"),
    [
        (1, 0.15, 3.0, (1, 1)),  # all noise
        (2, 0.15, 3.0, (1, 1)),
        (10, 0.15, 3.0, (2, 1)),  # 1.5 is rounded to even, as in T5
        (20, 0.15, 1.0, (3, 3)),
        (100, 0.15, 3.0, (15, 5)),
        (10, 0.9, 1.0, (9, 1)),  # one token is left to precede a span
        (10, 0.99, 3.0, (9, 1)),
    ],
)
def test_noise_counts(length: int, density: float, mean: float, counts: tuple[int, int]) -> None:
    assert span_corruption.noise_counts(length, density, mean) == counts


def test_one_span_by_hand() -> None:
    found = span_corruption.corrupt_spans(tf.range(11, 16), tf.constant(2), tf.constant(1), TOP, seeds(1))
    assert found["inputs"].numpy().tolist() == [11, 12, 13, TOP]
    assert found["targets"].numpy().tolist() == [TOP, 14, 15]


@given(
    length=st.integers(1, 200),
    density=st.sampled_from([0.05, 0.15, 0.5, 0.9]),
    mean=st.sampled_from([1.0, 3.0, 10.0]),
    seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_corruption_can_be_undone_and_has_the_exact_noise(length: int, density: float, mean: float, seed: int) -> None:
    tokens = list(range(1000, 1000 + length))
    noise, spans = span_corruption.noise_counts(length, density, mean)
    counts = tf.constant(noise), tf.constant(spans)
    found = span_corruption.corrupt_spans(tf.constant(tokens), *counts, TOP, seeds(seed))
    inputs, targets = found["inputs"].numpy().tolist(), found["targets"].numpy().tolist()
    sentinels = [TOP - i for i in range(spans)]
    assert [token for token in inputs if token > TOP - 100] == sentinels
    assert [token for token in targets if token > TOP - 100] == sentinels
    assert len(targets) == noise + spans
    assert len(inputs) == length - noise + spans
    assert targets[0] == TOP
    assert inputs[-1] == sentinels[-1]
    assert not any(a > TOP - 100 and b > TOP - 100 for a, b in itertools.pairwise(targets))
    assert uncorrupt(inputs, targets) == tokens


def test_every_segmentation_is_equally_likely() -> None:
    @tf.function
    def segment(seed: tf.Tensor) -> tf.Tensor:
        return span_corruption.random_segmentation(tf.constant(5), tf.constant(3), (seed, seed + 7))

    found = tf.map_fn(segment, tf.range(3000))
    counts = Counter(map(tuple, found.numpy().tolist()))
    # 5 = 1+1+3 = 1+2+2 = ... in 4 * 3 / 2 ways; four standard deviations of a count are 81.
    assert counts.keys() == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    assert all(abs(count - 500) < 81 for count in counts.values())


def test_segmentation_of_nothing_and_of_single_items() -> None:
    def segment(items: int, segments: int) -> list[int]:
        seed = (tf.constant(1), tf.constant(2))
        return span_corruption.random_segmentation(tf.constant(items), tf.constant(segments), seed).numpy().tolist()

    assert segment(0, 1) == [0]
    assert segment(7, 1) == [7]
    assert segment(4, 4) == [1, 1, 1, 1]


def test_no_token_is_lost_and_the_last_chunk_is_kept_even_with_one_token() -> None:
    documents = [
        list(range(300, 700)),
        [],
        list(range(2000, 2700)),
        list(range(5000, 5037)),
    ]  # 1137 = 2 * 568 + 1
    tokens = [token for document in documents for token in document]
    examples = corrupt_documents(documents, {"inputs": 512, "targets": 114})
    chunks = [uncorrupt(example["inputs"].tolist(), example["targets"].tolist()) for example in examples]
    assert [len(chunk) for chunk in chunks] == [568, 568, 1]
    assert [token for chunk in chunks for token in chunk] == tokens
    assert [(len(e["inputs"]), len(e["targets"])) for e in examples] == [
        (511, 113),
        (511, 113),
        (1, 2),
    ]  # + EOS
    assert all(example["inputs"].dtype == example["targets"].dtype == np.int32 for example in examples)


def test_the_noise_is_a_function_of_the_seed() -> None:
    documents = [list(range(300, 3000))]
    lengths = {"inputs": 128, "targets": 32}

    def corrupted(seed: int) -> list[list[int]]:
        return [example["inputs"].tolist() for example in corrupt_documents(documents, lengths, seed)]

    assert corrupted(1) == corrupted(1)
    assert all(a != b for a, b in zip(corrupted(1)[:-1], corrupted(2)[:-1], strict=True))
    spans = [[i for i, token in enumerate(inputs) if token > TOP - 100] for inputs in corrupted(1)[:-1]]
    assert len({tuple(places) for places in spans}) == len(spans)  # each example has a seed of its own


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (None, "needs the lengths of inputs and targets, not None"),
        ({"inputs": 512}, "needs the lengths of inputs and targets"),
        ({"inputs": 512, "targets": 113}, "568 raw ones, whose targets need a length of 114; it is 113"),
        (
            {"inputs": 2048, "targets": 512},
            "inputs of 2048 tokens need 114 sentinels; the vocabulary has 100",
        ),
        ({"inputs": 1, "targets": 9}, "inputs of at least 2 tokens, not 1"),
    ],
)
def test_lengths_that_cannot_work_are_explained(lengths: dict[str, int] | None, message: str) -> None:
    dataset = tf.data.Dataset.from_tensors({"targets": tf.range(300, 310)})
    with pytest.raises(UserError, match=message):
        span_corruption.span_corruption(dataset, lengths, FEATURES)


def test_noise_that_cannot_work_is_explained() -> None:
    with pytest.raises(UserError, match=r"noise_density is 1\.0; it must lie between 0 and 1"):
        span_corruption.raw_length_and_targets(512, noise_density=1.0)
    with pytest.raises(UserError, match=r"mean_noise_span_length is 0\.5"):
        span_corruption.raw_length_and_targets(512, mean_noise_span_length=0.5)
    mixed = {"inputs": seqio.Feature(byte_vocabulary()), "targets": seqio.Feature(VOCABULARY)}
    dataset = tf.data.Dataset.from_tensors({"targets": tf.range(300, 310)})
    with pytest.raises(UserError, match="those of inputs and targets differ"):
        span_corruption.span_corruption(dataset, {"inputs": 512, "targets": 114}, mixed)
