"""Large configs made small: sizes written out by hand, everything else as it was."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from shipped_models import model_of

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.variables import named_leaves
from t5x_like.layers.attention import DotProduct
from t5x_like.layers.chunked_attention import Chunked
from t5x_like.models.contract import Model
from t5x_like.verification.batches import Source
from t5x_like.verification.changes import changed, fields_of, with_values
from t5x_like.verification.shrink import Small, shrink


def small(name: str, *bindings: str, inputs: int = 512, targets: int = 128) -> Small:
    return shrink(model_of(name, *bindings), {"inputs": inputs, "targets": targets})


def shapes_of(model: Model, lengths: dict[str, int]) -> dict[str, tuple[int, ...]]:
    batch = model.converter.convert([[]], lengths, packed=False)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))
    return {name: leaf.shape for name, leaf in named_leaves(params)}


def test_t5_xxl_keeps_its_proportions() -> None:
    """Width 4,096, 64 heads of 64 (as wide as the model), an MLP 2.5 times as wide, 24 + 24 layers."""
    model, lengths, changes = small("t5_1_1_xxl", "SCAN_LAYERS=True", "REMAT='full'", "DTYPE='bfloat16'")
    assert lengths == {"inputs": 24, "targets": 6}
    shapes = shapes_of(model, lengths)
    assert shapes["token_embedder/embedding"] == (64, 16)
    assert shapes["encoder/layers/attention/query/kernel"] == (16, 2, 4, 4)
    assert shapes["decoder/layers/mlp/wi_1/kernel"] == (16, 2, 40)
    assert shapes["decoder/logits_dense/kernel"] == (16, 64)
    assert shapes["encoder/relpos_bias/rel_embedding"] == (4, 8)
    stack = model.network.encoder.stack
    assert (stack.repeats, stack.scan, stack.remat) == (2, True, "full")
    assert {f.value for f in fields_of(model) if f.name == "dtype"} == {"float32"}
    assert {"embed_dim 4096 -> 16", "repeats 24 -> 2", "vocab_size 32128 -> 64"} <= set(changes)


def test_heads_may_be_wider_than_the_model() -> None:
    """T5 11B: 128 heads of 128 in a width of 1,024, 16 times as wide; four times is as far as it goes."""
    model, lengths, _ = small("t5_1_0_11b", "SCAN_LAYERS=False")
    assert shapes_of(model, lengths)["encoder/layers_1/attention/query/kernel"] == (16, 4, 16)


def test_a_sparse_pattern_stays_and_the_rest_of_a_router_too() -> None:
    before = model_of("st_moe_32b")
    model, lengths, _ = shrink(before, {"inputs": 512, "targets": 512})
    for half in ("encoder", "decoder"):
        old, new = (getattr(m.network, half).stack for m in (before, model))
        assert [type(layer) for layer in new.pattern] == [type(layer) for layer in old.pattern]
        assert new.repeats == 1
        assert new.pattern[3].mlp.router == old.pattern[3].mlp.router
        assert new.pattern[3].mlp.capacity == old.pattern[3].mlp.capacity
    shapes = shapes_of(model, lengths)
    assert shapes["encoder/layers_3/mlp/router/router_weights/kernel"] == (16, 4)
    assert [name for name in shapes if "expert" in name and "encoder/" in name and "wi_0" in name] == [
        "encoder/layers_3/mlp/expert/wi_0/kernel"
    ]


@pytest.mark.parametrize(("group_size", "expected"), [("None", None), ("1024", 16), ("64", 8)])
def test_several_rows_in_a_group_stay_several(group_size: str, expected: int | None) -> None:
    """Of 128 and 40 tokens, 24 and 8 are left; two of the shorter make a group where there were two."""
    model, lengths, _ = small("switch_tiny", f"GROUP_SIZE={group_size}", inputs=128, targets=40)
    assert lengths == {"inputs": 24, "targets": 8}
    assert {f.value for f in fields_of(model) if f.name == "group_size"} == {expected}


def test_token_ids_fit_into_the_small_vocabulary() -> None:
    before = model_of("bert_tiny")
    assert before.mask_id > 64
    model, lengths, _ = shrink(before, {"inputs": 64, "targets": 10})
    assert model.mask_id == 63
    assert model.network.pad_id == before.network.pad_id == 0
    assert shapes_of(model, lengths)["token_embedder/segments/embedding"] == (2, 16)
    assert model.converter == before.converter


def test_what_is_small_stays_as_it_is() -> None:
    once = small("t5_1_1_tiny", inputs=24, targets=24)
    assert shrink(once.model, once.lengths) == Small(once.model, once.lengths, [])


class Mine(nn.Module):
    """A user's own layer, with sizes under the library's names and others."""

    mlp_dim: int
    rank: int


@dataclasses.dataclass(frozen=True)
class Holder:
    parts: tuple[object, ...]
    dropout_rate: float = 0.0


def test_fields_are_changed_wherever_they_stand() -> None:
    tree = Holder((Mine(512, 3), (Holder((Chunked(512, 512),)),)))
    found = changed(tree, lambda f: 8 if f.name in ("mlp_dim", "query_block") else f.value)
    assert found == Holder((Mine(8, 3), (Holder((Chunked(8, 512),)),)))
    assert with_values(tree, {"dropout_rate": 0.5}) == Holder((Mine(512, 3), (Holder((Chunked(512, 512),), 0.5),)), 0.5)
    assert tree.parts[0] == Mine(512, 3)


def test_an_object_is_swapped_for_another() -> None:
    model = changed(model_of("t5_1_1_tiny"), lambda f: DotProduct() if isinstance(f.value, Chunked) else f.value)
    assert {f.value for f in fields_of(model) if f.name == "attend"} == {DotProduct()}


def test_batches_hold_padding_several_examples_and_pairs_of_equal_lengths() -> None:
    model, lengths, _ = small("t5_1_1_tiny", inputs=96, targets=96)
    source = Source(model, lengths)
    assert source.packs
    batch = source.batch(source.rows(packed=True), packed=True)
    segments = batch["encoder_segment_ids"]
    assert segments.shape == (16, 24)
    assert segments.max(axis=1).tolist() == [1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 3, 3, 1, 1, 0, 0]
    assert (segments[0] == 1).all()
    assert (segments[2:] == 0).any(axis=1).sum() > 8
    np.testing.assert_array_equal(segments[0::2], segments[1::2])
    tokens = batch["encoder_input_tokens"]
    assert (tokens[0::2] != tokens[1::2]).any()
    assert set(np.unique(tokens[segments > 0])) <= set(range(2, 64))


def test_repeats_is_a_size_of_stacks_alone() -> None:
    stacks = [f.value for f in fields_of(small("t5_1_1_tiny").model) if isinstance(f.value, LayerStack)]
    assert [stack.repeats for stack in stacks] == [2, 2]
