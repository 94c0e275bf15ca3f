"""Trees that differ in known places by known amounts."""

import math

import numpy as np
import pytest

from t5x_like.verification.compare import compare, said, same_bits

EXPECTED = {
    "loss": np.float32(4.0),
    "decoder": {"layers_0": {"query": {"kernel": np.array([[1.0, -2.0], [0.5, 0.0]], np.float32)}}},
    "encoder": {"scale": np.array([0.25, 1e-9], np.float32)},
}


def changed(name: str, value: object) -> dict:
    return EXPECTED | {name: value}


def test_equal_trees_have_all_of_the_bound_left() -> None:
    comparison = compare(EXPECTED, EXPECTED, 1e-5)
    assert (comparison.difference, comparison.margin, comparison.passed) == (0.0, 1.0, True)
    assert comparison.first_difference is None


def test_a_difference_counts_relative_to_the_largest_entry() -> None:
    found = changed("encoder", {"scale": np.array([0.25, 0.125], np.float32)})
    comparison = compare(found, EXPECTED, 1.0)  # (0.125 - 1e-9) / 0.25
    assert comparison.difference == pytest.approx(0.5, rel=1e-6)
    assert comparison.margin == pytest.approx(0.5, rel=1e-6)
    assert comparison.passed


def test_the_first_that_differs_is_named_with_its_place_and_both_values() -> None:
    kernel = np.array([[1.0, -2.0], [0.75, 0.0]], np.float32)
    found = {"loss": EXPECTED["loss"], "decoder": {"layers_0": {"query": {"kernel": kernel}}}}
    found["encoder"] = {"scale": np.array([0.0, 0.0], np.float32)}  # worse, but later
    comparison = compare(found, EXPECTED, 1e-5)
    assert comparison.first_difference == "decoder/layers_0/query/kernel[1, 0]: 0.75 instead of 0.5"
    assert comparison.difference == 1.0
    assert comparison.margin == -1.0
    assert not comparison.passed


def test_a_scale_is_never_smaller_than_asked_for() -> None:
    tiny, zero = {"bias": np.array([3e-9])}, {"bias": np.array([1e-9])}
    assert not compare(tiny, zero, 1e-5).passed
    assert compare(tiny, zero, 1e-5, least_scale=1e-3).difference == pytest.approx(2e-6)


@pytest.mark.parametrize(
    ("found", "said_of_it"),
    [
        ({"a": np.ones(2), "b": np.ones(3)}, "b: shape (3,) instead of (2,)"),
        ({"a": np.ones(2)}, "b: missing"),
        ({"a": np.ones(2), "b": np.ones(2), "c": np.ones(1)}, "c: nobody asked for it"),
        ({"a": np.ones(2), "b": np.array([1.0, np.nan])}, "b[1]: nan instead of 1"),
    ],
)
def test_what_cannot_be_measured_is_infinitely_wrong(found: dict, said_of_it: str) -> None:
    comparison = compare(found, {"a": np.ones(2), "b": np.ones(2)}, 1e30)
    assert comparison.first_difference == said_of_it
    assert comparison.difference == math.inf
    assert comparison.margin == -1.0


def test_the_same_bits_are_the_same_bits() -> None:
    x = np.array([1.0, 2.0], np.float32)
    assert same_bits({"x": x, "step": np.int32(3)}, {"x": x.copy(), "step": np.int32(3)}).passed
    nearly = same_bits({"x": np.nextafter(x, np.float32(9))}, {"x": x})
    assert nearly.first_difference == "x[1]: 2 instead of 2"  # as far as seven digits go
    assert nearly.margin == -1.0
    assert same_bits({"step": np.int32(4)}, {"step": np.int32(3)}).first_difference == "step: 4 instead of 3"


def test_infinities_that_agree_are_equal() -> None:
    x = {"x": np.array([np.inf, np.nan, 1.0])}
    assert compare(x, x, 1e-5).difference == 0.0


def test_what_is_so_passes_and_what_is_not_fails() -> None:
    assert said(True, "lost").passed
    assert said(False, "lost").first_difference == "lost"
