import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from huggingface_oracles import (
    VOCAB,
    Oracle,
    assert_close,
    assert_goes_both_ways,
    outputs,
    randomised,
    reloaded,
    right_padded,
    theirs,
)
from safetensors.numpy import load_file, save_file

from t5x_like.architectures.transformer import DecoderLayer
from t5x_like.checkpoints import huggingface
from t5x_like.errors import UserError
from t5x_like.layers.attention import Attend
from t5x_like.layers.chunked_attention import Chunked
from t5x_like.layers.sparse_attention import SlidingWindow
from t5x_like.models.decoder_only import DecoderOnlyModel


def gpt2(**config: object) -> Oracle:
    sizes = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 20}
    ids = {"bos_token_id": 3, "eos_token_id": 2}
    return randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids, **config)))


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(tied: bool, tmp_path: Path) -> None:
    oracle = gpt2(n_inner=None if tied else 33, tie_word_embeddings=tied)
    tokens = right_padded(pad_id=0)
    loaded, real = reloaded(oracle, tmp_path), tokens != 0
    expected = theirs(oracle, input_ids=tokens, attention_mask=real).logits
    assert_close(outputs(loaded, {"decoder_input_tokens": tokens}), expected, real)
    assert (loaded.model.eos_id, loaded.model.converter.start_id) == (2, 3)


def marian(**config: object) -> Oracle:
    halves = {"layers": 2, "attention_heads": 3, "ffn_dim": 33}
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in halves.items()}
    sizes |= {"vocab_size": VOCAB, "d_model": 24, "max_position_embeddings": 20}
    ids = {"pad_token_id": VOCAB - 1, "decoder_start_token_id": VOCAB - 1, "eos_token_id": 0}
    settings = {"scale_embedding": True, "activation_function": "swish", "decoder_ffn_dim": 20, "encoder_layers": 1}
    return randomised(transformers.MarianMTModel(transformers.MarianConfig(**sizes | ids | settings | config)))


@pytest.mark.parametrize("config", [{}, {"scale_embedding": False, "activation_function": "relu"}])
def test_marian(config: dict[str, object], tmp_path: Path) -> None:
    oracle, pad_id = marian(**config), VOCAB - 1
    inputs, outputs_so_far = right_padded(pad_id), np.roll(right_padded(pad_id, length=9), 1, axis=1)
    outputs_so_far[:, 0] = pad_id
    loaded = reloaded(oracle, tmp_path)
    mask = inputs != pad_id
    expected = theirs(oracle, input_ids=inputs, attention_mask=mask, decoder_input_ids=outputs_so_far).logits
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": outputs_so_far}
    assert_close(outputs(loaded, batch), expected)
    assert np.abs(oracle.final_logits_bias.numpy()).max() > 0.5


@pytest.mark.parametrize("make", [gpt2, lambda: gpt2(tie_word_embeddings=False, n_inner=33, embd_pdrop=0.25), marian])
def test_hugging_face_loads_what_was_saved(make: Callable[[], Oracle], tmp_path: Path) -> None:
    assert_goes_both_ways(make(), tmp_path)


def test_gpt2_without_a_prefix(tmp_path: Path) -> None:
    """As published: no head, and masks among the tensors."""
    oracle = gpt2()
    expected = reloaded(oracle, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors | {"h.0.attn.bias": np.tri(20)[None, None]}, tmp_path / "model.safetensors")
    loaded = huggingface.load(tmp_path)
    assert loaded.model == expected.model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)


def with_layers(
    loaded: huggingface.Loaded, change: Callable[[DecoderLayer], DecoderLayer], scan: bool
) -> DecoderOnlyModel:
    network = loaded.model.network
    stack = network.decoder.stack
    layers = dataclasses.replace(stack, pattern=tuple(change(layer) for layer in stack.pattern), scan=scan)
    return dataclasses.replace(loaded.model, network=network.clone(decoder=network.decoder.clone(stack=layers)))


def attending(attend: Attend) -> Callable[[DecoderLayer], DecoderLayer]:
    return lambda layer: layer.clone(self_attention=layer.self_attention.clone(attend=attend))


def test_how_attention_is_computed_and_layers_are_run_does_not_matter(tmp_path: Path) -> None:
    loaded = reloaded(gpt2(), tmp_path / "theirs")
    decoder = dict(loaded.params["decoder"])
    layers = [decoder.pop(f"layers_{i}") for i in range(2)]
    decoder["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *layers)
    chunked = with_layers(loaded, attending(Chunked(4, 4)), scan=True)
    huggingface.save(tmp_path / "ours", chunked, loaded.params | {"decoder": decoder}, "gpt2")
    again = huggingface.load(tmp_path / "ours")
    assert again.model == loaded.model
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_other_decoders_are_not_saved(tmp_path: Path) -> None:
    loaded = reloaded(gpt2(), tmp_path)
    banded = with_layers(loaded, attending(SlidingWindow(4)), scan=False)
    with pytest.raises(UserError, match=r"self_attention\.attend is SlidingWindow, but DotProduct in .*'s gpt2"):
        huggingface.save(tmp_path / "no", banded, loaded.params)
    with pytest.raises(UserError, match=r"Hugging Face's bert cannot be a Gpt"):
        huggingface.save(tmp_path / "no", loaded.model, loaded.params, "bert")
    assert not (tmp_path / "no").exists()


def test_a_bias_of_logits_that_is_zero_is_none(tmp_path: Path) -> None:
    oracle = marian()
    oracle.final_logits_bias.zero_()
    assert not reloaded(oracle, tmp_path).model.network.token_embedder.tokens.output_bias
    assert_goes_both_ways(oracle, tmp_path)
