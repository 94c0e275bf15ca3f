import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_t5 import quick_jit, random_params, tiny_t5

from t5x_like.checkpoints import huggingface
from t5x_like.checkpoints.huggingface.t5 import T5Family
from t5x_like.decoding.greedy import Greedy
from t5x_like.errors import UserError
from t5x_like.layers.mlp import MlpBlock
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.typing import Params

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 33,
    "num_heads": 3,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
}
Oracle = transformers.PreTrainedModel


def t5(**config: object) -> Oracle:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES | config))


def mt5(**config: object) -> Oracle:
    return transformers.MT5ForConditionalGeneration(transformers.MT5Config(**SIZES | config))


def umt5(**config: object) -> Oracle:
    return transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**SIZES | config))


def untied(model: Oracle) -> Oracle:
    """Release 5 ties every T5 that it makes, but keeps a head put in afterwards."""
    model.lm_head.weight = torch.nn.Parameter(torch.empty(model.lm_head.weight.shape))
    return model


CASES: dict[str, Callable[[], Oracle]] = {
    "t5 1.0": t5,
    "t5 1.1": lambda: untied(
        t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_layers=2, num_decoder_layers=1)
    ),
    "t5 1.1, tied": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5 1.0, untied": lambda: untied(t5(feed_forward_proj="gelu", dropout_rate=0.25, layer_norm_epsilon=1e-2)),
    "t5, other ids and buckets": lambda: untied(
        t5(
            feed_forward_proj="gated-silu",
            pad_token_id=5,
            decoder_start_token_id=7,
            relative_attention_num_buckets=10,
            relative_attention_max_distance=33,
        )
    ),
    "mt5": lambda: untied(mt5()),
    "mt5, tied": mt5,
    "umt5": lambda: untied(umt5(num_layers=2, num_decoder_layers=3)),
    "umt5, tied": umt5,
}


def make(case: str, eos_id: int = 1) -> Oracle:
    """A model of `CASES`, made random."""
    return randomised(CASES[case](), eos_id)


def randomised(model: Oracle, eos_id: int = 1) -> Oracle:
    """Every parameter matters: norms' scales are not 1, bias tables are as large as logits."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            drawn = 0.5 + torch.rand(parameter.shape, generator=generator)
        else:
            wide = name in ("shared.weight", "lm_head.weight") or "relative" in name
            drawn = torch.randn(parameter.shape, generator=generator) * (1.0 if wide else parameter.shape[1] ** -0.5)
        parameter.data = drawn
    model.config.eos_token_id = eos_id
    model.generation_config.eos_token_id = eos_id
    return model.eval()


def make_batch(pad_id: int, encoder_length: int = 150, length: int = 140) -> dict[str, np.ndarray]:
    """Further apart than 128, where the last bucket begins; encoder rows are padded at no, the right, and both ends."""
    rng = np.random.default_rng(0)
    inputs, outputs = rng.integers(8, 61, (3, encoder_length)), rng.integers(8, 61, (3, length))
    inputs[1, -20:] = inputs[2, :7] = inputs[2, -3:] = outputs[2, -9:] = pad_id
    outputs[:, 0] = 0
    return {
        "encoder_input_tokens": inputs.astype(np.int32),
        "decoder_input_tokens": outputs.astype(np.int32),
    }


def oracle_logits(model: Oracle, batch: dict[str, np.ndarray]) -> np.ndarray:
    inputs = torch.tensor(batch["encoder_input_tokens"], dtype=torch.long)
    outputs = torch.tensor(batch["decoder_input_tokens"], dtype=torch.long)
    real = (inputs != model.config.pad_token_id).long()
    with torch.no_grad():
        return model(input_ids=inputs, attention_mask=real, decoder_input_ids=outputs).logits.numpy()


def logits(loaded: huggingface.Loaded, batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(quick_jit(loaded.model.logits)(loaded.params, batch))


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, Path]:
    model, folder = make(request.param), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """T5 1.1."""
    make("t5 1.1").save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **entries: object) -> None:
    """None removes an entry."""
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder: Path, **tensors: np.ndarray | None) -> None:
    """None removes a tensor; `__` stands for a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    found = load_file(folder / "model.safetensors") | named
    save_file({k: v for k, v in found.items() if v is not None}, folder / "model.safetensors")


def test_logits_are_those_of_hugging_face(saved: tuple[Oracle, Path]) -> None:
    oracle, folder = saved
    batch = make_batch(oracle.config.pad_token_id)
    expected = oracle_logits(oracle, batch)
    assert expected.std() > 0.5  # so that an absolute 1e-4 means something
    np.testing.assert_allclose(logits(huggingface.load(folder), batch), expected, rtol=0, atol=1e-4)


def test_hugging_face_loads_what_was_saved(saved: tuple[Oracle, Path], tmp_path: Path) -> None:
    oracle, folder = saved
    loaded = huggingface.load(folder)
    huggingface.save(tmp_path, *loaded)
    restored = type(oracle).from_pretrained(tmp_path).eval()
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name
    for name in T5Family.names(loaded.model_type):
        if name not in ("tie_word_embeddings", "scale_decoder_outputs"):  # theirs: always True, and T5's only
            assert getattr(restored.config, name) == getattr(oracle.config, name), name
    batch = make_batch(oracle.config.pad_token_id, 12, 9)
    np.testing.assert_array_equal(oracle_logits(restored, batch), oracle_logits(oracle, batch))

    again = huggingface.load(tmp_path)
    assert again.model == loaded.model
    assert again.model_type == oracle.config.model_type
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize(("case", "eos_id"), [("t5 1.1", 53), ("umt5", 45), ("t5, other ids and buckets", 56)])
def test_greedy_outputs_are_those_of_hugging_face(case: str, eos_id: int, tmp_path: Path) -> None:
    oracle = make(case, eos_id)
    oracle.save_pretrained(tmp_path)
    loaded = huggingface.load(tmp_path)
    pad_id = oracle.config.pad_token_id
    inputs = make_batch(pad_id, encoder_length=30)["encoder_input_tokens"]
    with torch.no_grad():
        expected = oracle.generate(
            torch.tensor(inputs, dtype=torch.long),
            attention_mask=torch.tensor(inputs != pad_id, dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            use_cache=False,  # their cache has as many decoder layers as there are encoder layers
        ).numpy()[:, 1:]
    ends = (expected == eos_id).any(axis=1)
    assert ends.any() and not ends.all()
    generate = quick_jit(loaded.model.generate, static_argnames=("decoder", "max_length"))
    tokens = generate(loaded.params, {"encoder_input_tokens": inputs}, decoder=Greedy(), max_length=12).tokens
    np.testing.assert_array_equal(tokens[:, 0], np.where(expected == pad_id, 0, expected))


def test_reads_shards(folder: Path, tmp_path: Path) -> None:
    whole = huggingface.load(folder)
    make("t5 1.1").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    shards = huggingface.load(tmp_path / "shards")
    assert shards.model == whole.model
    jax.tree.map(np.testing.assert_array_equal, shards.params, whole.params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reads_half_precision_into_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    oracle = make("t5 1.0").to(dtype)
    oracle.save_pretrained(tmp_path)
    table = huggingface.load(tmp_path).params["token_embedder"]["embedding"]
    assert table.dtype == jnp.float32
    np.testing.assert_array_equal(table, oracle.shared.weight.float().detach().numpy())


def test_writes_the_dtype_of_the_parameters(folder: Path, tmp_path: Path) -> None:
    loaded = huggingface.load(folder)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    huggingface.save(tmp_path / "half", loaded.model, params)
    restored = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto")
    expected = np.asarray(params["decoder"]["logits_dense"]["kernel"]).T.astype(np.float32)
    assert restored.lm_head.weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(restored.lm_head.weight.float().detach().numpy(), expected)


def test_scaling_in_folders_older_than_transformers_5(tmp_path: Path) -> None:
    for case, tied, scaled in [("t5 1.0", True, True), ("t5 1.1", False, False), ("umt5", False, False)]:
        make(case).save_pretrained(tmp_path / case)
        edit_config(tmp_path / case, scale_decoder_outputs=None, tie_word_embeddings=tied)
        assert huggingface.load(tmp_path / case).model.network.scale_decoder_output == scaled


def test_old_defaults(folder: Path) -> None:
    expected = huggingface.load(folder)
    added = ["relative_attention_max_distance", "decoder_start_token_id", "dropout_rate", "layer_norm_epsilon"]
    edit_config(folder, **dict.fromkeys(added))
    assert huggingface.load(folder).model == expected.model
    edit_config(
        folder, feed_forward_proj=None, num_decoder_layers=None
    )  # relu, and as many as there are encoder layers
    with pytest.raises(
        UserError, match=r"decoder\.block\.0\.layer\.2\.DenseReluDense\.wi\.weight \(33, 24\) is missing"
    ):
        huggingface.load(folder)


def test_dropout_rate_and_epsilon_are_read(tmp_path: Path) -> None:
    make("t5 1.0, untied").save_pretrained(tmp_path)
    encoder = huggingface.load(tmp_path).model.network.encoder
    (layer,) = encoder.stack.pattern
    assert [encoder.dropout_rate, layer.dropout_rate, layer.attention.dropout_rate, layer.mlp.dropout_rate] == [
        0.25
    ] * 4
    assert encoder.norm.epsilon == layer.norm.epsilon == 1e-2


def test_copies_of_the_embedding_in_old_folders(folder: Path) -> None:
    expected = huggingface.load(folder).params
    table = np.asarray(expected["token_embedder"]["embedding"])
    unused = {"decoder__block__0__layer__1__EncDecAttention__relative_attention_bias__weight": table}
    edit_tensors(folder, encoder__embed_tokens__weight=table, decoder__embed_tokens__weight=table, **unused)
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder).params, expected)
    edit_tensors(folder, shared__weight=None, encoder__embed_tokens__weight=None)  # as in MADLAD's
    jax.tree.map(np.testing.assert_array_equal, huggingface.load(folder).params, expected)
    edit_tensors(folder, encoder__embed_tokens__weight=table + 1)
    with pytest.raises(UserError, match=r"decoder\.embed_tokens\.weight is not equal"):
        huggingface.load(folder)


def test_a_head_equal_to_the_embedding_is_tied(folder: Path) -> None:
    table = np.asarray(huggingface.load(folder).params["token_embedder"]["embedding"])
    edit_tensors(folder, lm_head__weight=table)
    loaded = huggingface.load(folder)
    assert loaded.model.network.decoder.logits_dense is None
    assert "logits_dense" not in loaded.params["decoder"]


def test_saves_scanned_layers_one_by_one(tmp_path: Path) -> None:
    def stacked(half: Params) -> Params:
        names = sorted(name for name in half if name.startswith("layers_"))
        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *(half[name] for name in names))
        return {name: half[name] for name in half if name not in names} | {"layers": layers}

    for per_layer in (False, True):
        looped = EncoderDecoderModel(tiny_t5(bias_per_layer=per_layer))
        params = random_params(looped)
        scanned = EncoderDecoderModel(tiny_t5(scan=True, remat="full", bias_per_layer=per_layer))
        together = params | {half: stacked(params[half]) for half in ("encoder", "decoder")}
        huggingface.save(tmp_path, scanned, together)
        loaded = huggingface.load(tmp_path)
        assert loaded.model_type == ("umt5" if per_layer else "t5")
        assert loaded.model == looped
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_what_hugging_face_has_not_is_refused(tmp_path: Path) -> None:
    def save(model_type: str | None = None, **settings: object) -> None:
        model = EncoderDecoderModel(tiny_t5(**settings))
        huggingface.save(tmp_path, model, {}, model_type)

    with pytest.raises(UserError, match=r"network\.scale_decoder_output is True, but False in Hugging Face's mt5"):
        save("mt5", tied=True)
    with pytest.raises(
        UserError, match=r"network\.encoder\.stack\.pattern\[0\]\.relpos_bias is RelativePositionBias, but None"
    ):
        save("t5", bias_per_layer=True)
    with pytest.raises(UserError, match="'t6' is not one of t5, mt5, umt5"):
        save("t6")
    network = tiny_t5()
    (layer,) = network.encoder.stack.pattern
    wide = layer.clone(mlp=MlpBlock(3, ("gelu", "linear")))
    stack = dataclasses.replace(network.encoder.stack, pattern=(wide,))
    with pytest.raises(UserError, match=r"network\.decoder\.stack\.pattern\[0\]\.mlp\.mlp_dim is 14, but 3"):
        huggingface.save(tmp_path, EncoderDecoderModel(network.clone(encoder=network.encoder.clone(stack=stack))), {})
    odd = dataclasses.replace(stack, pattern=(layer.clone(mlp=MlpBlock(3, ("linear",))),))
    with pytest.raises(UserError, match=r"cannot be this network: \('linear',\)"):
        huggingface.save(tmp_path, EncoderDecoderModel(network.clone(encoder=network.encoder.clone(stack=odd))), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "longt5"}, r"config\.json: model_type is 'longt5'; those known here are t5, mt5, umt5"),
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj is 'gated-tanh'; those known here are relu, "),
        ({"d_model": None}, "d_model is missing; it must be one int"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]; it must be one int"),
        ({"num_layers": 1}, r"encoder\.block\.1\.layer\.0\.SelfAttention\.k\.weight \(15, 24\) has no place in it"),
        ({"d_kv": 4}, r"decoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight is \(15, 24\) and should be \(12, 24\)"),
    ],
)
def test_a_config_that_cannot_be_used(entries: dict[str, object], message: str, folder: Path) -> None:
    edit_config(folder, **entries)
    with pytest.raises(UserError, match=message) as raised:
        huggingface.load(folder)
    assert str(folder) in str(raised.value)


def test_tensors_that_do_not_fit(folder: Path) -> None:
    edit_tensors(folder, decoder__final_layer_norm__weight=None, extra=np.zeros(2), shared__weight=np.zeros((24, 61)))
    with pytest.raises(UserError) as raised:
        huggingface.load(folder)
    first, *wrong = str(raised.value).splitlines()
    assert first.startswith(f"{folder}: the tensors are not those")
    assert [line.strip() for line in wrong] == [
        "decoder.final_layer_norm.weight (24,) is missing",
        "extra (2,) has no place in it",
        "shared.weight is (24, 61) and should be (61, 24)",
    ]


def test_quantised_weights(folder: Path) -> None:
    edit_tensors(folder, shared__weight=np.zeros((61, 24), np.int8))
    with pytest.raises(UserError, match=r"model\.safetensors: shared\.weight is I8"):
        huggingface.load(folder)
    edit_tensors(folder, shared__weight=np.zeros((61, 24), ml_dtypes.float8_e4m3fn))
    with pytest.raises(UserError, match=r"model\.safetensors: shared\.weight is F8_E4M3"):
        huggingface.load(folder)


def test_files_missing_or_broken(folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"model\.safetensors is broken"):
        huggingface.load(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        huggingface.load(folder)
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: Expecting"):
        huggingface.load(folder)
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        huggingface.load(folder)


def test_needs_no_torch() -> None:
    code = "import sys; import t5x_like.checkpoints.huggingface; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
