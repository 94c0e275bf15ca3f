"""A loop's parameters and a scan's, written out by hand."""

import numpy as np

from t5x_like.verification.layouts import laid_out, looped

Q0, Q1, A0, B0, A1, B1 = (np.full(3, i, np.float32) for i in range(6))
SCANNED = {
    "encoder": {"layers": {"query": np.stack([Q0, Q1], axis=1)}, "norm": np.ones(3)},
    "decoder": {"layers": {"layers_0": {"wi": np.stack([A0, A1], 1)}, "layers_1": {"wo": np.stack([B0, B1], 1)}}},
}
LOOPED = {
    "encoder/layers_0/query": Q0,
    "encoder/layers_1/query": Q1,
    "encoder/norm": np.ones(3),
    "decoder/layers_0/wi": A0,
    "decoder/layers_1/wo": B0,
    "decoder/layers_2/wi": A1,
    "decoder/layers_3/wo": B1,
}


def test_scanned_layers_get_the_names_of_a_loop() -> None:
    found = looped(SCANNED)
    assert found.keys() == LOOPED.keys()
    for name, leaf in LOOPED.items():
        np.testing.assert_array_equal(found[name], leaf)


def test_a_loop_is_laid_out_as_a_scan() -> None:
    found = laid_out(LOOPED, SCANNED)
    np.testing.assert_array_equal(found["encoder"]["layers"]["query"], [[0, 1]] * 3)
    np.testing.assert_array_equal(found["decoder"]["layers"]["layers_1"]["wo"], [[3, 5]] * 3)
    np.testing.assert_array_equal(found["encoder"]["norm"], np.ones(3))


def test_a_loop_stays_one() -> None:
    tree = {"student": {"layers_0": {"scale": np.arange(2)}}}
    np.testing.assert_array_equal(laid_out(looped(tree), tree)["student"]["layers_0"]["scale"], [0, 1])
