import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from huggingface_oracles import (
    ENCODER_SIZES,
    Oracle,
    assert_close,
    assert_goes_both_ways,
    outputs,
    randomised,
    reloaded,
    right_padded,
    theirs,
)
from tiny_t5 import quick_jit

from t5x_like.architectures.heads import TokenClassificationHead
from t5x_like.checkpoints import huggingface
from t5x_like.errors import UserError
from t5x_like.models.classification import ClassificationModel
from t5x_like.models.masked_lm import MaskedLMModel

BATCH = right_padded(pad_id=0)
SEGMENTS = (np.arange(15) > np.array([6, 4, 9])[:, None]).astype(np.int32)
PADDED = right_padded(pad_id=1)
REAL = BATCH != 0
INPUTS = {"encoder_input_tokens": BATCH, "segment_ids": SEGMENTS}
THEIRS = {"input_ids": BATCH, "token_type_ids": SEGMENTS, "attention_mask": REAL}


def bert(head: str, **config: object) -> Oracle:
    return randomised(getattr(transformers, f"Bert{head}")(transformers.BertConfig(**ENCODER_SIZES | config)))


def roberta(head: str) -> Oracle:
    config = transformers.RobertaConfig(**ENCODER_SIZES, type_vocab_size=1, layer_norm_eps=1e-5, hidden_act="gelu_new")
    return randomised(getattr(transformers, f"Roberta{head}")(config))


def longformer() -> Oracle:
    config = transformers.LongformerConfig(**ENCODER_SIZES, attention_window=[4, 8])
    return randomised(transformers.LongformerForMaskedLM(config))


def compare(ours: np.ndarray, expected: torch.Tensor, real: np.ndarray) -> None:
    """Of every token, or of the sequence."""
    if expected.ndim == 3:
        assert_close(ours, expected, real)
    else:
        assert_close(ours[:, 0], expected)


def test_bert_for_pretraining(tmp_path: Path) -> None:
    oracle = bert("ForPreTraining", hidden_act="relu")
    loaded, expected = reloaded(oracle, tmp_path), theirs(oracle, **THEIRS)
    ours = outputs(loaded, INPUTS)
    assert isinstance(loaded.model, MaskedLMModel)
    assert_close(ours.tokens, expected.prediction_logits, REAL)
    assert_close(ours.next_sentence[:, 0], expected.seq_relationship_logits)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("ForMaskedLM", "logits"),
        ("ForTokenClassification", "logits"),
        ("ForSequenceClassification", "logits"),
        ("Model", "last_hidden_state"),
    ],
)
def test_bert_with_other_heads(head: str, name: str, tmp_path: Path) -> None:
    oracle = bert(head, num_labels=5)
    loaded, expected = reloaded(oracle, tmp_path), theirs(oracle, **THEIRS)[name]
    ours = np.asarray(quick_jit(loaded.model.logits)(loaded.params, INPUTS))
    assert isinstance(loaded.model, MaskedLMModel if head == "ForMaskedLM" else ClassificationModel)
    compare(ours, expected, REAL)


def test_bert_for_question_answering(tmp_path: Path) -> None:
    oracle = bert("ForQuestionAnswering")
    loaded, expected = reloaded(oracle, tmp_path), theirs(oracle, **THEIRS)
    ours = outputs(loaded, INPUTS)
    assert_close(ours[:, 0], expected.start_logits, REAL)
    assert_close(ours[:, 1], expected.end_logits, REAL)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
def test_roberta(head: str, tmp_path: Path) -> None:
    oracle = roberta(head)
    loaded = reloaded(oracle, tmp_path)
    expected = theirs(oracle, input_ids=PADDED, attention_mask=PADDED != 1).logits
    ours = np.asarray(quick_jit(loaded.model.logits)(loaded.params, {"encoder_input_tokens": PADDED}))
    compare(ours, expected, PADDED != 1)


def test_what_a_folder_does_not_tell(tmp_path: Path) -> None:
    """Without a vocabulary, nobody knows which token masks; padding is known."""
    loaded = reloaded(roberta("ForMaskedLM"), tmp_path)
    assert loaded.model.converter.pad_id == loaded.model.network.pad_id == 1
    targets = {"target_positions": PADDED[:, :1], "target_tokens": PADDED[:, :1], "target_weights": PADDED[:, :1]}
    with pytest.raises(UserError, match="mask_id is None: tokens are scored masked"):
        loaded.model.score(loaded.params, {"encoder_input_tokens": PADDED} | targets)


def test_longformer(tmp_path: Path) -> None:
    oracle = longformer()
    loaded = reloaded(oracle, tmp_path)
    is_global = np.zeros_like(PADDED)
    is_global[0, [0, 7]] = is_global[1, 3] = 1  # the third row has none
    real = PADDED != 1
    expected = theirs(oracle, input_ids=PADDED, attention_mask=real, global_attention_mask=is_global).logits
    batch = {"encoder_input_tokens": PADDED, "global_attention_mask": is_global}
    ours = np.asarray(quick_jit(loaded.model.logits)(loaded.params, batch))
    assert_close(ours, expected, real)


@pytest.mark.parametrize(
    "make",
    [
        lambda: bert("ForPreTraining", hidden_act="relu", hidden_dropout_prob=0.25, pad_token_id=3),
        lambda: bert("ForSequenceClassification", num_labels=5),
        lambda: bert("ForQuestionAnswering"),
        lambda: bert("Model"),
        lambda: roberta("ForMaskedLM"),
        lambda: roberta("ForTokenClassification"),
        longformer,
    ],
)
def test_hugging_face_loads_what_was_saved(make: Callable[[], Oracle], tmp_path: Path) -> None:
    assert_goes_both_ways(make(), tmp_path)


def test_names_of_the_first_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = bert("ForPreTraining")
    loaded = reloaded(oracle, tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {name: tensor.detach() for name, tensor in oracle.state_dict().items()}
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    again = huggingface.load(tmp_path)
    assert again.model == loaded.model
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)

    torch.save(tensors | {"bert.pooler.dense.bias": torch.zeros(24, dtype=torch.int8)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: bert\.pooler\.dense\.bias is torch\.int8; only unquant"):
        huggingface.load(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pytorch_model\.bin takes torch: pip install torch, or convert the folder"):
        huggingface.load(tmp_path)


def test_a_classifier_of_tokens_that_kept_its_pooler(tmp_path: Path) -> None:
    oracle = bert("ForTokenClassification")
    oracle.bert.pooler = bert("Model").pooler  # as older releases left it
    assert isinstance(reloaded(oracle, tmp_path).model.network.head, TokenClassificationHead)


def test_what_is_not_an_encoder_is_refused(tmp_path: Path) -> None:
    reloaded(bert("Model"), tmp_path)
    config = tmp_path / "config.json"
    entries = json.loads(config.read_text())
    for name, value, message in [
        ("is_decoder", True, "is_decoder is True; those known here are False"),
        ("hidden_act", "mish", "hidden_act is 'mish'; those known here are relu, gelu, "),
        ("model_type", None, "model_type is missing; those known here are t5, .*bert"),
        ("intermediate_size", 3, r"bert\.encoder\.layer\.0\.intermediate\.dense\.bias is \(33,\) and should be \(3,\)"),
    ]:
        config.write_text(json.dumps(entries | {name: value}))
        with pytest.raises(UserError, match=message):
            huggingface.load(tmp_path)


def test_an_untied_output_is_refused(tmp_path: Path) -> None:
    oracle = bert("ForMaskedLM", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"cls\.predictions\.decoder\.weight is not equal to bert\.embeddings\.word"):
        reloaded(oracle, tmp_path)


def test_other_encoders_are_not_saved(tmp_path: Path) -> None:
    loaded = reloaded(roberta("ForMaskedLM"), tmp_path)
    with pytest.raises(UserError, match=r"network\.token_embedder\.positions\.max_length is 38, but 40 in .*'s bert"):
        huggingface.save(tmp_path / "no", loaded.model, loaded.params)
    assert not (tmp_path / "no").exists()
