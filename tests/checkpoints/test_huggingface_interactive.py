"""Folders of other families as a notebook uses them: text in, scores and continuations out."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from t5x_like import InteractiveModel
from t5x_like.decoding.greedy import Greedy

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "on", "the", "mat", "##s", "."]


def test_pseudo_log_likelihood_of_a_bert_with_its_own_vocabulary(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    theirs = transformers.BertForMaskedLM(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    ours = InteractiveModel.load(tmp_path)

    given, scored = [2, 5, 6, 3], [9, 10, 11, 12]  # [CLS] a cat [SEP]; the mat ##s .
    tokens, expected = [*given, *scored, 3], 0.0
    segments = torch.tensor([[0] * 4 + [1] * 5])
    for place, token in enumerate(scored, len(given)):
        masked = torch.tensor([[4 if i == place else each for i, each in enumerate(tokens)]])
        with torch.no_grad():
            logits = theirs(masked, token_type_ids=segments).logits[0, place]
        expected += float(torch.log_softmax(logits, dim=-1)[token])
    assert ours.score(["A cat"], ["the mats."]) == pytest.approx([expected], abs=1e-4)
    assert ours.perplexity(["the mats."], ["A cat"]) == pytest.approx(np.exp(-expected / 4), rel=1e-4)


def test_continuations_of_gpt2(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=39)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path)
    loaded = InteractiveModel.load(tmp_path)
    prompts = np.array([[5, 6, 7, 8], [9, 10, 11, 12]], np.int32)
    expected = theirs.generate(torch.tensor(prompts), max_new_tokens=8, do_sample=False, pad_token_id=0).numpy()[:, 4:]
    batch = {"decoder_input_tokens": prompts, "decoder_causal_attention": np.ones_like(prompts)}
    found = loaded.model.generate(loaded.params, batch, Greedy(), 8)
    np.testing.assert_array_equal(found.tokens[:, 0], np.pad(expected, ((0, 0), (0, 8 - expected.shape[1]))))
