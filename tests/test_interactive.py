import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model

from t5x_like import InteractiveModel
from t5x_like.data.vocabularies import byte_vocabulary
from t5x_like.errors import UserError
from t5x_like.training.optimizers import adafactor


@pytest.fixture(scope="module")
def model(trained: Path) -> InteractiveModel:
    return InteractiveModel.load(trained)


def test_a_run_a_checkpoint_and_a_moved_folder_load(model: InteractiveModel, trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained, tmp_path / "elsewhere")
    batch = {"encoder_input_tokens": np.array([[5, 6, 1, 0]]), "decoder_input_tokens": np.array([[0, 7, 8]])}
    logits = model.logits(batch)
    assert logits.shape == (1, 3, 8192)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(InteractiveModel.load(str(trained / "checkpoints" / "6")).logits(batch), logits)
    np.testing.assert_array_equal(InteractiveModel.load(moved).logits(batch), logits)
    assert not np.array_equal(InteractiveModel.load(trained / "checkpoints" / "2").logits(batch), logits)


def test_padding_is_not_attended_to(model: InteractiveModel) -> None:
    decoder = np.array([[0, 7, 8]])
    short = model.logits({"encoder_input_tokens": np.array([[5, 6, 1]]), "decoder_input_tokens": decoder})
    padded = model.logits({"encoder_input_tokens": np.array([[5, 6, 1, 0, 0]]), "decoder_input_tokens": decoder})
    np.testing.assert_allclose(short, padded, atol=1e-5)


def test_score_is_the_log_likelihood_of_the_target_with_its_end(model: InteractiveModel) -> None:
    inputs, targets = (
        ["supersense: dog: an animal", "supersense: a much longer input than the first: one"],
        ["animal", "act"],
    )
    scores = model.score(inputs, targets)
    for text, target, score in zip(inputs, targets, scores, strict=True):
        source = np.array([[*model.vocabulary.encode(text), 1]])
        tokens = np.array([*model.vocabulary.encode(target), 1])
        shifted = np.array([[0, *tokens[:-1]]])
        logits = model.logits({"encoder_input_tokens": source, "decoder_input_tokens": shifted})[0].astype(np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(score, log_probabilities[np.arange(len(tokens)), tokens].sum(), rtol=1e-5)


def test_generation_modes(model: InteractiveModel) -> None:
    inputs = ["supersense: dog: an animal", "supersense: oak: a tree", "translate English to Spanish: Amen"]
    greedy = model.generate(inputs, max_length=6)
    assert model.generate(inputs[:1], max_length=6) == greedy[:1]  # others in the batch do not matter
    assert model.generate(inputs, temperature=0.9, top_k=1, max_length=6) == greedy
    first, again, other = (model.generate(inputs, temperature=1.0, top_p=0.9, max_length=6, seed=s) for s in (1, 1, 2))
    assert first == again != other
    greedy_scores, beam_scores = (
        model.score(inputs, outputs) for outputs in (greedy, model.generate(inputs, num_beams=4, max_length=6))
    )
    assert np.isfinite([*greedy_scores, *beam_scores]).all()
    assert model.generate([]) == []


def test_fit_learns_pairs(trained: Path) -> None:
    model = InteractiveModel.load(trained)
    pairs = [("one", "uno"), ("two", "dos"), ("three", "tres")]
    before = model.score(*zip(*pairs, strict=True))
    losses = model.fit(pairs, steps=30, batch_size=3, optimizer=adafactor(0.1))
    assert len(losses) == 30
    assert losses[-1] < 0.8 * losses[0]
    assert (model.score(*zip(*pairs, strict=True)) > before).all()
    assert InteractiveModel.load(trained).fit(pairs, 2, 3, adafactor(0.1)) == losses[:2]


def test_mistakes_are_explained(model: InteractiveModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a run's folder"):
        InteractiveModel.load(tmp_path)
    with pytest.raises(UserError, match="ask for one of them"):
        model.generate(["x"], num_beams=2, temperature=1.0)
    with pytest.raises(UserError, match="2 inputs but 1 targets"):
        model.score(["a", "b"], ["c"])
    with pytest.raises(UserError, match="no pairs"):
        model.fit([], steps=1)
    with pytest.raises(UserError, match="has no vocabulary"):
        InteractiveModel(model.model, model.params).generate(["x"])


def test_any_model_with_any_vocabulary() -> None:
    import jax

    small = tiny_model(vocab_size=384)
    batch = small.converter.convert([[]], {"inputs": 4, "targets": 4}, packed=False)
    model = InteractiveModel(small, jax.jit(lambda: small.init(jax.random.key(0), batch))(), byte_vocabulary())
    assert len(model.generate(["ä", "b"], max_length=3)) == 2
