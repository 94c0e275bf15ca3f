"""Where our parameters lie in Hugging Face's tensors: what those are called, and which way round they are."""

import math
import re
from collections.abc import Iterator

import numpy as np

_MODULES = {
    "token_embedder": "shared",
    "encoder/relpos_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "encoder/layers_#/relpos_bias": "encoder.block.#.layer.0.SelfAttention.relative_attention_bias",
    "encoder/layers_#/pre_attention_layer_norm": "encoder.block.#.layer.0.layer_norm",
    "encoder/layers_#/attention/query": "encoder.block.#.layer.0.SelfAttention.q",
    "encoder/layers_#/attention/key": "encoder.block.#.layer.0.SelfAttention.k",
    "encoder/layers_#/attention/value": "encoder.block.#.layer.0.SelfAttention.v",
    "encoder/layers_#/attention/out": "encoder.block.#.layer.0.SelfAttention.o",
    "encoder/layers_#/pre_mlp_layer_norm": "encoder.block.#.layer.1.layer_norm",
    "encoder/layers_#/mlp/wi": "encoder.block.#.layer.1.DenseReluDense.wi",
    "encoder/layers_#/mlp/wi_0": "encoder.block.#.layer.1.DenseReluDense.wi_0",
    "encoder/layers_#/mlp/wi_1": "encoder.block.#.layer.1.DenseReluDense.wi_1",
    "encoder/layers_#/mlp/wo": "encoder.block.#.layer.1.DenseReluDense.wo",
    "encoder/layers_#/mlp/router/router_weights": "encoder.block.#.layer.1.mlp.router.classifier",
    "encoder/layers_#/mlp/expert_#/wi": "encoder.block.#.layer.1.mlp.experts.expert_#.wi",
    "encoder/layers_#/mlp/expert_#/wo": "encoder.block.#.layer.1.mlp.experts.expert_#.wo",
    "encoder/encoder_norm": "encoder.final_layer_norm",
    "decoder/relpos_bias": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "decoder/layers_#/relpos_bias": "decoder.block.#.layer.0.SelfAttention.relative_attention_bias",
    "decoder/layers_#/pre_self_attention_layer_norm": "decoder.block.#.layer.0.layer_norm",
    "decoder/layers_#/self_attention/query": "decoder.block.#.layer.0.SelfAttention.q",
    "decoder/layers_#/self_attention/key": "decoder.block.#.layer.0.SelfAttention.k",
    "decoder/layers_#/self_attention/value": "decoder.block.#.layer.0.SelfAttention.v",
    "decoder/layers_#/self_attention/out": "decoder.block.#.layer.0.SelfAttention.o",
    "decoder/layers_#/pre_cross_attention_layer_norm": "decoder.block.#.layer.1.layer_norm",
    "decoder/layers_#/encoder_decoder_attention/query": "decoder.block.#.layer.1.EncDecAttention.q",
    "decoder/layers_#/encoder_decoder_attention/key": "decoder.block.#.layer.1.EncDecAttention.k",
    "decoder/layers_#/encoder_decoder_attention/value": "decoder.block.#.layer.1.EncDecAttention.v",
    "decoder/layers_#/encoder_decoder_attention/out": "decoder.block.#.layer.1.EncDecAttention.o",
    "decoder/layers_#/pre_mlp_layer_norm": "decoder.block.#.layer.2.layer_norm",
    "decoder/layers_#/mlp/wi": "decoder.block.#.layer.2.DenseReluDense.wi",
    "decoder/layers_#/mlp/wi_0": "decoder.block.#.layer.2.DenseReluDense.wi_0",
    "decoder/layers_#/mlp/wi_1": "decoder.block.#.layer.2.DenseReluDense.wi_1",
    "decoder/layers_#/mlp/wo": "decoder.block.#.layer.2.DenseReluDense.wo",
    "decoder/layers_#/mlp/router/router_weights": "decoder.block.#.layer.2.mlp.router.classifier",
    "decoder/layers_#/mlp/expert_#/wi": "decoder.block.#.layer.2.mlp.experts.expert_#.wi",
    "decoder/layers_#/mlp/expert_#/wo": "decoder.block.#.layer.2.mlp.experts.expert_#.wo",
    "decoder/decoder_norm": "decoder.final_layer_norm",
    "decoder/logits_dense": "lm_head",
}
"""Our modules, one parameter each, and theirs; every # stands for a number."""

_TRANSPOSED = ("kernel", "rel_embedding")


def pieces(name: str, array: np.ndarray, pattern: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """Views of a parameter, one for each tensor over there: scanned layers and experts are kept apart.

    Args:
      name: `encoder/layers/layers_1/mlp/expert/wi/kernel`.
      array: experts come first in it, and repetitions of scanned layers second (see `LayerStack`).
      pattern: how many layers one repetition has.

    Yields:
      `encoder/layers_3/mlp/expert_0/wi/kernel` and that expert's matrix, and so on.
    """
    if scanned := re.search(r"/layers/(?:layers_(\d+)/)?", name):
        for repetition in range(array.shape[1]):
            number = repetition * pattern + int(scanned[1] or 0)
            yield from pieces(name.replace(scanned[0], f"/layers_{number}/"), array[:, repetition])
    elif "/expert/" in name:
        yield from ((name.replace("/expert/", f"/expert_{i}/"), matrix) for i, matrix in enumerate(array))
    else:
        yield name, array


def tensor_name(name: str, model_type: str) -> str:
    """`encoder/layers_3/mlp/wo/kernel` -> `encoder.block.3.layer.1.DenseReluDense.wo.weight`, for a piece of a T5."""
    module = name.rpartition("/")[0]
    numbered = r"(?<=layers_)\d+|(?<=expert_)\d+"
    numbers = iter(re.findall(numbered, module))
    theirs = re.sub("#", lambda _: next(numbers), _MODULES[re.sub(numbered, "#", module)])
    if model_type == "switch_transformers":
        theirs = theirs.replace("DenseReluDense", "mlp")
    return f"{theirs}.weight"


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A piece's shape over there, where matrices are `[out, in]` and bias tables `[buckets, heads]`."""
    if not name.endswith(_TRANSPOSED):
        return shape
    inputs = 2 if name.endswith("/out/kernel") else 1
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def as_stored(name: str, array: np.ndarray) -> np.ndarray:
    """A piece as it lies over there."""
    shape = stored_shape(name, array.shape)
    stored = array.reshape(shape[::-1]).T if name.endswith(_TRANSPOSED) else array
    return np.ascontiguousarray(stored)  # save_file writes memory as it lies


def fill(name: str, piece: np.ndarray, tensor: np.ndarray) -> None:
    """Writes a tensor into the piece of a parameter that it is: the inverse of `as_stored`."""
    piece[...] = (tensor.T if name.endswith(_TRANSPOSED) else tensor).reshape(piece.shape)
