import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from t5x_like.checkpoints import huggingface
from t5x_like.data.features import PermutationFeatures
from t5x_like.errors import UserError
from t5x_like.models.permutation_lm import PermutationLMModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {"vocab_size": 23, "d_model": 12, "n_layer": 2, "n_head": 3, "d_inner": 20}
SETTINGS = {"mem_len": 7, "dropout": 0.2, "layer_norm_eps": 1e-3, "ff_activation": "relu", "pad_token_id": 4}


@pytest.fixture
def oracle() -> transformers.XLNetLMHeadModel:
    torch.manual_seed(0)
    model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**SIZES, **SETTINGS)).eval()
    for weights in model.parameters():
        torch.nn.init.normal_(weights, 0.0, 0.5)
    return model


def test_there_and_back(oracle: transformers.XLNetLMHeadModel, tmp_path: Path) -> None:
    """`tests/architectures/test_xlnet.py` has the logits."""
    oracle.save_pretrained(tmp_path / "theirs")
    loaded = huggingface.load(tmp_path / "theirs")
    model = loaded.model
    assert isinstance(model, PermutationLMModel)
    assert model.converter == PermutationFeatures(pad_id=4)
    assert model.network.encoder.stack.pattern[0].attention.memory_length == 7
    tokens = np.array([[5, 6, 7, 4]], np.int32)
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens), attention_mask=torch.tensor(tokens != 4).float()).logits
    np.testing.assert_allclose(model.logits(loaded.params, {"input_tokens": tokens}), expected, atol=1e-4)

    huggingface.save(tmp_path / "ours", model, loaded.params)
    again = transformers.XLNetLMHeadModel.from_pretrained(tmp_path / "ours")
    assert again.config.to_dict().items() >= (SIZES | SETTINGS).items()
    for name, weights in oracle.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], weights, err_msg=name)
    reloaded = huggingface.load(tmp_path / "ours")
    assert reloaded.model == model
    jax.tree.map(np.testing.assert_array_equal, reloaded.params, loaded.params)


@pytest.mark.parametrize(("entry", "value"), [("attn_type", "uni"), ("clamp_len", 8), ("bi_data", True)])
def test_what_is_not_known_here_is_named(
    oracle: transformers.XLNetLMHeadModel, tmp_path: Path, entry: str, value: object
) -> None:
    oracle.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {entry: value}))
    with pytest.raises(UserError, match=entry):
        huggingface.load(tmp_path)
