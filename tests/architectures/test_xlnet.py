"""XLNet against Hugging Face's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_t5 import quick_jit
from transformers import XLNetConfig, XLNetLMHeadModel

from t5x_like import gin_config
from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.transformer import Encoder, EncoderLayer
from t5x_like.architectures.variables import named_leaves
from t5x_like.architectures.xlnet import XLNet
from t5x_like.checkpoints import huggingface
from t5x_like.layers.embeddings import Embedding
from t5x_like.layers.mlp import MlpBlock
from t5x_like.layers.norms import LayerNorm
from t5x_like.layers.residual import PostNorm
from t5x_like.layers.two_stream_attention import TwoStreamAttention
from t5x_like.models.permutation_lm import PermutationLMModel
from t5x_like.training.train_state import count_parameters
from t5x_like.typing import Array, Params

VOCAB, EMBED, HEADS, MLP, LAYERS, PAD = 23, 12, 3, 20, 2, 5
ROWS, LENGTH, TARGETS, MEMORY = 3, 9, 4, 13


def network(scan: bool = False) -> XLNet:
    attention = TwoStreamAttention(HEADS, EMBED // HEADS, memory_length=MEMORY)
    mlp = MlpBlock(MLP, ("gelu_exact",), use_bias=True)
    layer = EncoderLayer(attention, mlp, norm=LayerNorm(1e-12), residual=PostNorm())
    encoder = Encoder(LayerStack((layer,), LAYERS, scan), norm=None)
    return XLNet(Embedding(VOCAB, EMBED, output_bias=True), encoder, pad_id=PAD)


def text(seed: int) -> dict[str, Array]:
    """With padding, two segments, and a random mask, under which some see nothing."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(6, VOCAB, (ROWS, LENGTH))
    tokens[1, -2:], tokens[2, :3] = PAD, PAD
    batch = {
        "input_tokens": tokens,
        "perm_mask": rng.uniform(size=(ROWS, LENGTH, LENGTH)) < 0.5,
        "target_positions": np.stack([rng.permutation(LENGTH)[:TARGETS] for _ in range(ROWS)]),
        "segment_ids": rng.integers(0, 2, (ROWS, LENGTH)),
    }
    return {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}


@functools.cache
def oracle() -> XLNetLMHeadModel:
    torch.manual_seed(0)
    sizes = {"d_model": EMBED, "n_layer": LAYERS, "n_head": HEADS, "d_inner": MLP, "vocab_size": VOCAB}
    model = XLNetLMHeadModel(XLNetConfig(**sizes, mem_len=MEMORY)).eval()
    for weights in model.parameters():
        torch.nn.init.normal_(weights, 0.0, 0.5)
    return model


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    """The oracle's."""
    folder = tmp_path_factory.mktemp("xlnet")
    oracle().save_pretrained(folder)
    return huggingface.load(folder, "float32").params


def stacked(params: Params) -> Params:
    """From a loop's parameters to a scan's."""
    layers = [params["encoder"][f"layers_{i}"] for i in range(LAYERS)]
    return params | {"encoder": {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *layers)}}


@pytest.mark.parametrize("scan", [False, True])
def test_two_texts_with_all_masks_the_second_remembering_the_first(params: Params, scan: bool) -> None:
    forward = quick_jit(functools.partial(network(scan).apply, mutable=["cache"]))
    variables, theirs = {"params": stacked(params) if scan else params}, None
    for seed in range(2):
        batch = text(seed)
        arrays = {name: torch.tensor(np.array(array)) for name, array in batch.items()}
        with torch.no_grad():
            expected = oracle()(
                arrays["input_tokens"],
                attention_mask=(arrays["input_tokens"] != PAD).float(),
                perm_mask=arrays["perm_mask"].float(),
                target_mapping=torch.eye(LENGTH)[arrays["target_positions"]],
                token_type_ids=arrays["segment_ids"],
                mems=theirs,
                use_mems=True,
            )
        logits, memory = forward(variables, **batch)
        np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
        variables, theirs = variables | memory, expected.mems
    encoder = memory["cache"]["encoder"]
    for i, states in enumerate(theirs):
        layer = jax.tree.map(lambda x, i=i: x[i], encoder["layers"]) if scan else encoder[f"layers_{i}"]
        np.testing.assert_allclose(layer["attention"]["memory"], states.swapaxes(0, 1), atol=1e-5)


def test_without_targets_it_is_an_encoder(params: Params) -> None:
    tokens = text(0)["input_tokens"]
    theirs = torch.tensor(np.array(tokens))
    with torch.no_grad():
        expected = oracle()(theirs, attention_mask=(theirs != PAD).float()).logits
    np.testing.assert_allclose(quick_jit(network().apply)({"params": params}, tokens), expected, atol=1e-4)


def test_parameters_by_name_and_shape(params: Params) -> None:
    layer = {
        "attention/content_bias": (3, 4),
        "attention/distance/kernel": (12, 3, 4),
        "attention/distance_bias": (3, 4),
        "attention/key/kernel": (12, 3, 4),
        "attention/out/kernel": (3, 4, 12),
        "attention/query/kernel": (12, 3, 4),
        "attention/segment_bias": (3, 4),
        "attention/segment_embedding": (2, 3, 4),
        "attention/value/kernel": (12, 3, 4),
        "mlp/wi/bias": (20,),
        "mlp/wi/kernel": (12, 20),
        "mlp/wo/bias": (12,),
        "mlp/wo/kernel": (20, 12),
        "post_attention_layer_norm/bias": (12,),
        "post_attention_layer_norm/scale": (12,),
        "post_mlp_layer_norm/bias": (12,),
        "post_mlp_layer_norm/scale": (12,),
    }
    expected = {f"encoder/layers_{i}/{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    expected |= {"mask_embedding": (12,), "token_embedder/bias": (23,), "token_embedder/embedding": (23, 12)}
    made = jax.eval_shape(lambda: PermutationLMModel(network()).init(jax.random.key(0), text(0)))
    assert {name: leaf.shape for name, leaf in named_leaves(made)} == expected
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, made)


@pytest.mark.parametrize(
    ("name", "sizes", "millions"),
    [
        ("base", {"d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072}, 116.8),
        ("large", {"d_model": 1024, "n_layer": 24, "n_head": 16, "d_inner": 4096}, 360.3),
    ],
)
def test_configs_have_as_many_parameters_as_the_released_checkpoints(name: str, sizes: dict, millions: float) -> None:
    model = gin_config.run(gin_config.load(PermutationLMModel, [f"models/xlnet_{name}.gin"], ["DROPOUT_RATE=0.1"]))
    batch = model.converter.convert([[]], {"inputs": 8, "targets": 2}, packed=False)
    count = count_parameters(jax.eval_shape(lambda: model.init(jax.random.key(0), batch)))
    with torch.device("meta"):
        assert count == sum(weights.numel() for weights in XLNetLMHeadModel(XLNetConfig(**sizes)).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
