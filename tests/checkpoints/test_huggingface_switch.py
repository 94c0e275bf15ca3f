import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from test_huggingface import Oracle, edit_config, edit_tensors, logits, oracle_logits, randomised
from tiny_t5 import quick_jit

from t5x_like.architectures.stack import LayerStack
from t5x_like.architectures.variables import named_leaves, router_reports
from t5x_like.checkpoints import huggingface
from t5x_like.checkpoints.huggingface.t5 import T5Family
from t5x_like.decoding.greedy import Greedy
from t5x_like.errors import UserError
from t5x_like.interactive import InteractiveModel
from t5x_like.layers.moe import REPORTS, SparseMlp
from t5x_like.layers.routing import CapacityFactor, FixedCapacity, HashRouter, Router, TopK
from t5x_like.models.encoder_decoder import EncoderDecoderModel
from t5x_like.typing import Params

SIZES = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 33,
    "num_heads": 3,
    "num_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 4,
    "num_sparse_decoder_layers": 2,
    "num_experts": 3,
    "expert_capacity": 100,
    "decoder_start_token_id": 0,
}


def switch(**config: object) -> Oracle:
    return transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**SIZES | config)
    )


CASES: dict[str, Callable[[], Oracle]] = {
    "every second layer": switch,
    "few slots": lambda: switch(expert_capacity=3, router_jitter_noise=0, router_ignore_padding_tokens=True),
    "all layers": lambda: switch(
        num_sparse_encoder_layers=2,
        num_decoder_layers=1,
        num_sparse_decoder_layers=1,
        dense_act_fn="gelu_new",
        tie_word_embeddings=False,
    ),
    "dense decoder": lambda: switch(num_decoder_layers=1, num_sparse_decoder_layers=2, num_experts=1),
    "dense encoder, other ids": lambda: switch(
        num_sparse_encoder_layers=3,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        pad_token_id=5,
        decoder_start_token_id=7,
    ),
    "a step that does not divide the layers": lambda: switch(
        num_layers=5, encoder_sparse_step=3, num_decoder_layers=3, decoder_sparse_step=2, dropout_rate=0.25
    ),
    "dense": lambda: switch(  # what is said of experts is then forgotten
        num_sparse_encoder_layers=3, num_sparse_decoder_layers=5, num_experts=8, expert_capacity=64
    ),
}
SPARSE_LAYERS = {
    "every second layer": ["encoder/layers_1", "decoder/layers_1", "decoder/layers_3"],
    "few slots": ["encoder/layers_1", "decoder/layers_1", "decoder/layers_3"],
    "all layers": ["encoder/layers_0", "encoder/layers_1", "decoder/layers_0"],
    "dense decoder": ["encoder/layers_1"],
    "dense encoder, other ids": ["decoder/layers_1"],
    "a step that does not divide the layers": ["encoder/layers_1", "encoder/layers_4", "decoder/layers_1"],
    "dense": [],
}
"""By hand; a test compares them with Hugging Face's modules."""


def make(case: str, eos_id: int = 1) -> Oracle:
    model = randomised(CASES[case](), eos_id)
    if not model.config.tie_word_embeddings:  # three tables over there, and one in the paper
        for half in (model.encoder, model.decoder):
            half.embed_tokens.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    return model


def make_batch(pad_id: int, encoder_length: int = 30, length: int = 20) -> dict[str, np.ndarray]:
    """Rows with nothing padded, and with much and little padding on the right."""
    rng = np.random.default_rng(0)
    inputs, outputs = rng.integers(8, 61, (3, encoder_length)), rng.integers(8, 61, (3, length))
    inputs[1, 12:] = inputs[2, -3:] = outputs[2, 11:] = pad_id
    outputs[:, 0] = 0
    return {"encoder_input_tokens": inputs.astype(np.int32), "decoder_input_tokens": outputs.astype(np.int32)}


def real(rows: np.ndarray) -> np.ndarray:
    """Those of logits that stand at a real token of `make_batch`: sparse layers pass over padding, theirs do not."""
    return np.concatenate([rows[:2].reshape(-1, rows.shape[-1]), rows[2, :11]])


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Oracle, Path]:
    model, folder = make(request.param), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("every second layer").save_pretrained(tmp_path)
    return tmp_path


def test_logits_are_those_of_hugging_face(saved: tuple[str, Oracle, Path]) -> None:
    _, oracle, folder = saved
    batch = make_batch(oracle.config.pad_token_id)
    expected = real(oracle_logits(oracle, batch))
    assert expected.std() > 0.2  # so that an absolute 1e-4 means something
    np.testing.assert_allclose(real(logits(huggingface.load(folder), batch)), expected, rtol=0, atol=1e-4)


def test_sparse_layers_are_those_of_hugging_face(saved: tuple[str, Oracle, Path]) -> None:
    case, oracle, folder = saved
    halves = {"encoder": oracle.encoder.block, "decoder": oracle.decoder.block}
    theirs = [f"{half}/layers_{i}" for half, blocks in halves.items() for i, b in enumerate(blocks) if b.is_sparse]
    names = [name for name, _ in named_leaves(huggingface.load(folder).params)]
    ours = {name.split("/mlp/")[0] for name in names if "/router/" in name}
    assert ours == set(theirs) == set(SPARSE_LAYERS[case])


def test_few_slots_drop_tokens(tmp_path: Path) -> None:
    make("few slots").save_pretrained(tmp_path)
    loaded, batch = huggingface.load(tmp_path), make_batch(0)
    apply = quick_jit(loaded.model.network.apply, static_argnames="mutable")
    _, variables = apply({"params": loaded.params}, *map(jnp.asarray, batch.values()), mutable=(REPORTS,))
    # Of 30 + 12 + 27 and 20 + 20 + 11 real tokens, three experts take three of every row, and so 27 at most.
    least = {"encoder/layers_1": 69 - 27, "decoder/layers_1": 51 - 27, "decoder/layers_3": 51 - 27}
    for name, report in router_reports(variables, loaded.params).items():
        assert report.dropped >= least.pop(name)
    assert not least


def test_padding_on_the_right_changes_nothing(tmp_path: Path) -> None:
    make("few slots").save_pretrained(tmp_path)
    loaded, batch = huggingface.load(tmp_path), make_batch(0)
    alone = {"encoder_input_tokens": batch["encoder_input_tokens"][1:2, :12]}
    alone |= {"decoder_input_tokens": batch["decoder_input_tokens"][1:2]}
    np.testing.assert_allclose(logits(loaded, batch)[1], logits(loaded, alone)[0], rtol=0, atol=1e-5)


def test_padding_on_the_left_changes_nothing_where_slots_are_ample(folder: Path) -> None:
    batch = make_batch(0)
    batch["encoder_input_tokens"][0, :7] = 0
    expected = real(oracle_logits(make("every second layer"), batch))
    np.testing.assert_allclose(real(logits(huggingface.load(folder), batch)), expected, rtol=0, atol=1e-4)


def test_hugging_face_loads_what_was_saved(saved: tuple[str, Oracle, Path], tmp_path: Path) -> None:
    case, oracle, folder = saved
    loaded = huggingface.load(folder)
    huggingface.save(tmp_path, *loaded)
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(folder / "model.safetensors"))
    restored = type(oracle).from_pretrained(tmp_path).eval()
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name
    for name in T5Family.names(loaded.model_type).values():
        assert getattr(restored.config, name) == getattr(oracle.config, name), name
    sparse = SPARSE_LAYERS[case]
    assert restored.config.num_sparse_encoder_layers == len([name for name in sparse if name.startswith("encoder")])
    assert restored.config.num_sparse_decoder_layers == len([name for name in sparse if name.startswith("decoder")])
    batch = make_batch(oracle.config.pad_token_id)
    # Not bit for bit: what torch computes depends on where in memory the weights lie.
    np.testing.assert_allclose(oracle_logits(restored, batch), oracle_logits(oracle, batch), rtol=0, atol=1e-6)

    again = huggingface.load(tmp_path)
    assert again.model == loaded.model
    assert again.model_type == "switch_transformers"
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


@pytest.mark.parametrize(("tied", "scaled"), [(True, False), (False, True)])
def test_tied_and_scaled_are_two_things(tied: bool, scaled: bool, tmp_path: Path) -> None:
    oracle = make("dense decoder")
    oracle.config.tie_word_embeddings = scaled  # which says that of the output, too
    head = oracle.shared.weight if tied else oracle.shared.weight.flip(0)
    oracle.lm_head.weight = torch.nn.Parameter(head.detach().clone())
    oracle.save_pretrained(tmp_path / "theirs")
    batch = make_batch(0)
    loaded = huggingface.load(tmp_path / "theirs")
    assert loaded.model.network.scale_decoder_output == scaled
    assert ("logits_dense" in loaded.params["decoder"]) == (not tied)
    np.testing.assert_allclose(real(logits(loaded, batch)), real(oracle_logits(oracle, batch)), rtol=0, atol=1e-4)
    huggingface.save(tmp_path / "ours", *loaded)
    restored = type(oracle).from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(oracle_logits(restored, batch), oracle_logits(oracle, batch), rtol=0, atol=1e-6)
    assert huggingface.load(tmp_path / "ours").model == loaded.model


def test_greedy_outputs_are_those_of_hugging_face(tmp_path: Path) -> None:
    eos_id = 35
    oracle = make("all layers", eos_id)
    oracle.save_pretrained(tmp_path)
    loaded = huggingface.load(tmp_path)
    inputs = make_batch(0)["encoder_input_tokens"]
    with torch.no_grad():
        expected = oracle.generate(
            torch.tensor(inputs, dtype=torch.long),
            attention_mask=torch.tensor(inputs != 0, dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            use_cache=False,  # see test_huggingface
        ).numpy()[:, 1:]
    ends = (expected == eos_id).any(axis=1)
    assert ends.any() and not ends.all()
    generate = quick_jit(loaded.model.generate, static_argnames=("decoder", "max_length"))
    tokens = generate(loaded.params, {"encoder_input_tokens": inputs}, decoder=Greedy(), max_length=12).tokens
    np.testing.assert_array_equal(tokens[:, 0], expected)


def test_interactive_model(folder: Path) -> None:
    batch = make_batch(0)
    expected = oracle_logits(make("every second layer"), batch)
    np.testing.assert_allclose(real(InteractiveModel.load(folder).logits(batch)), real(expected), rtol=0, atol=1e-4)


def test_what_training_needs_is_read(folder: Path) -> None:
    edit_config(folder, router_jitter_noise=0.5, router_aux_loss_coef=0.25, router_z_loss_coef=2, dropout_rate=0.125)
    dense, sparse = huggingface.load(folder).model.network.decoder.stack.pattern
    assert sparse.mlp.router == Router(TopK(), jitter_noise=0.5, balance_loss=0.25, z_loss=2.0)
    assert sparse.mlp.capacity == FixedCapacity(100)
    assert [dense.mlp.dropout_rate, sparse.mlp.expert.dropout_rate, sparse.dropout_rate] == [0.125] * 3


def test_old_defaults(folder: Path) -> None:
    expected = huggingface.load(folder)
    steps = ["encoder_sparse_step", "decoder_sparse_step"]
    edit_config(folder, **dict.fromkeys([*steps, "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise"]))
    assert huggingface.load(folder).model == expected.model
    edit_config(folder, num_sparse_encoder_layers=0)  # gives transformers one sparse layer, and us
    assert huggingface.load(folder).model == expected.model
    assert transformers.SwitchTransformersForConditionalGeneration.from_pretrained(folder).encoder.block[1].is_sparse


@pytest.mark.parametrize("case", ["every second layer", "all layers"])
def test_saves_scanned_layers_one_by_one(case: str, tmp_path: Path) -> None:
    def scanned(half: Params, stack: LayerStack) -> Params:
        period, rest = len(stack.pattern), {name: half[name] for name in half if not name.startswith("layers_")}
        layers = {
            f"layers_{j}": jax.tree.map(
                lambda *leaves: jnp.stack(leaves, axis=1),
                *(half[f"layers_{r * period + j}"] for r in range(stack.repeats)),
            )
            for j in range(period)
        }
        return rest | {"layers": layers if period > 1 else layers["layers_0"]}

    make(case).save_pretrained(tmp_path / "theirs")
    loaded = huggingface.load(tmp_path / "theirs")
    network, params = loaded.model.network, dict(loaded.params)
    for half in ("encoder", "decoder"):
        stack = getattr(network, half).stack
        params[half] = scanned(params[half], stack)
        scan = getattr(network, half).clone(stack=dataclasses.replace(stack, scan=True))
        network = network.clone(**{half: scan})
    model = dataclasses.replace(loaded.model, network=network)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), make_batch(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

    huggingface.save(tmp_path / "ours", model, params)
    again = huggingface.load(tmp_path / "ours")
    assert again.model == loaded.model
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def test_what_hugging_face_has_not_is_refused(folder: Path, tmp_path: Path) -> None:
    loaded = huggingface.load(folder)
    network = loaded.model.network
    dense, sparse = network.encoder.stack.pattern

    def save(*pattern: SparseMlp, model_type: str | None = None) -> None:
        layers = tuple(dense if mlp is None else sparse.clone(mlp=mlp) for mlp in pattern)
        encoder = network.encoder.clone(stack=LayerStack(layers, 1))
        huggingface.save(tmp_path / "new", EncoderDecoderModel(network.clone(encoder=encoder)), {}, model_type)

    for capacity in (CapacityFactor(), None):
        with pytest.raises(UserError, match=r"SparseMlp\.capacity is .*; build the model with FixedCapacity\(slots\)"):
            save(None, sparse.mlp.clone(capacity=capacity))
    path = r"save: network\.encoder\.stack\.pattern\[1\]\.mlp"
    with pytest.raises(UserError, match=rf"{path}\.router\.choose\.choices is 2, but 1 in Hugging Face's switch_"):
        save(None, sparse.mlp.clone(router=Router(TopK(2))))
    with pytest.raises(UserError, match=rf"{path}\.group_size is 64, but None in Hugging Face's switch_"):
        save(None, sparse.mlp.clone(group_size=64))
    with pytest.raises(UserError, match=r"cannot be this network: .*HashRouter.* has no attribute .*jitter_noise"):
        save(None, sparse.mlp.clone(router=HashRouter()))
    with pytest.raises(UserError, match=r"switch_transformers cannot be this network: \('gelu', 'linear'\)"):
        save(sparse.mlp.clone(expert=sparse.mlp.expert.clone(activations=("gelu", "linear"))))
    with pytest.raises(UserError, match=r"pattern\[0\]\.mlp is SparseMlp, but MlpBlock in Hugging Face's switch_"):
        save(sparse.mlp, None)
    with pytest.raises(UserError, match=r"pattern\[1\] is EncoderLayer, but None in Hugging Face's t5"):
        save(None, sparse.mlp, model_type="t5")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"router_bias": True}, "router_bias is True; those known here are False"),
        ({"router_dtype": "bfloat16"}, "router_dtype is 'bfloat16'; those known here are float32"),
        (
            {"dense_act_fn": "gated-gelu"},
            "dense_act_fn is 'gated-gelu'; those known here are relu, gelu, gelu_new",
        ),
        ({"expert_capacity": 0}, "expert_capacity is 0; it must be 1 or more"),
        ({"num_experts": "8"}, "num_experts is '8'; it must be one int"),
        ({"encoder_sparse_step": None, "num_sparse_encoder_layers": 0.5}, "encoder_sparse_step is missing; it must"),
        ({"num_experts": 2}, r"block\.1\.layer\.2\.mlp\.experts\.expert_2\.wi\.weight \(33, 24\) has no place in it"),
        ({"num_experts": 4}, r"block\.1\.layer\.2\.mlp\.experts\.expert_3\.wi\.weight \(33, 24\) is missing"),
        (
            {"encoder_sparse_step": 1},
            r"block\.0\.layer\.1\.mlp\.router\.classifier\.weight \(3, 24\) is missing",
        ),
        ({"model_type": "t5"}, r"encoder\.block\.0\.layer\.1\.DenseReluDense\.wi\.weight \(33, 24\) is missing"),
    ],
)
def test_a_config_that_cannot_be_used(entries: dict[str, object], message: str, folder: Path) -> None:
    edit_config(folder, **entries)
    with pytest.raises(UserError, match=message) as raised:
        huggingface.load(folder)
    assert str(folder) in str(raised.value)


def test_tensors_that_do_not_fit(folder: Path) -> None:
    bias = {"encoder__block__1__layer__1__mlp__router__classifier__bias": np.zeros(3)}
    missing = {"decoder__block__3__layer__2__mlp__experts__expert_1__wo__weight": None}
    edit_tensors(folder, **bias, **missing)
    with pytest.raises(UserError) as raised:
        huggingface.load(folder)
    assert [line.strip() for line in str(raised.value).splitlines()[1:]] == [
        "decoder.block.3.layer.2.mlp.experts.expert_1.wo.weight (24, 33) is missing",
        "encoder.block.1.layer.1.mlp.router.classifier.bias (3,) has no place in it",
    ]
