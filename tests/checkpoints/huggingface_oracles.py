"""What every test of another family needs: models of Hugging Face made random, and their logits."""

from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from tiny_t5 import quick_jit

from t5x_like.checkpoints import huggingface
from t5x_like.typing import PyTree

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Oracle = transformers.PreTrainedModel

VOCAB = 31
ENCODER_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 33,
    "max_position_embeddings": 40,
}


def randomised(model: Oracle) -> Oracle:
    """Every parameter matters: scales are not 1 and biases not 0, those of logits and of norms included."""
    generator = torch.Generator().manual_seed(0)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name == "final_logits_bias"]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]  # sinusoids are not
    for name, parameter in [*trained, *buffers]:
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2 and "embed" not in name and name not in ("final_logits_bias", "model.shared.weight"):
            inputs = parameter.shape[0 if name.startswith("transformer.h") else 1]
            drawn *= 1.5 * inputs**-0.5
        elif parameter.ndim == 1:
            drawn = drawn / 4 + name.endswith("weight")
        parameter.data = drawn
    return model.eval()


def right_padded(pad_id: int, length: int = 15, rows: int = 3) -> np.ndarray:
    """Random tokens; the first row has no padding."""
    tokens = np.random.default_rng(0).integers(4, VOCAB, (rows, length))
    for row, padded in enumerate(range(0, 2 * rows, 2)):
        tokens[row, length - padded :] = pad_id
    return tokens.astype(np.int32)


def theirs(model: Oracle, **inputs: np.ndarray) -> transformers.utils.ModelOutput:
    """What a model puts out."""
    with torch.no_grad():
        return model(**{name: torch.tensor(array, dtype=torch.long) for name, array in inputs.items()})


def outputs(loaded: huggingface.Loaded, batch: dict[str, np.ndarray]) -> PyTree:
    """What the loaded network puts out."""
    return quick_jit(loaded.model.forward)(loaded.params, batch)[0]


def reloaded(model: Oracle, folder: Path) -> huggingface.Loaded:
    """The model, through a folder."""
    model.save_pretrained(folder)
    return huggingface.load(folder)


def assert_close(ours: PyTree, theirs: torch.Tensor, real: np.ndarray | None = None) -> None:
    """Within 1e-4, at `real` tokens, of numbers that are large enough for that to mean something."""
    found, expected = np.asarray(ours), theirs.numpy()
    if real is not None:
        found, expected = found[real], expected[real]
    assert expected.std() > 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def assert_goes_both_ways(oracle: Oracle, folder: Path) -> None:
    """Saved here, a model is the same over there and here again."""
    loaded = reloaded(oracle, folder / "theirs")
    huggingface.save(folder / "ours", *loaded)
    restored = type(oracle).from_pretrained(folder / "ours")
    for name, tensor in oracle.state_dict().items():
        unread = "head" not in loaded.params and name.startswith("pooler.")
        if not unread and "embed_positions" not in name:  # sinusoids, in a table of another length
            assert torch.equal(restored.state_dict()[name], tensor), name
    again = huggingface.load(folder / "ours")
    assert again.model == loaded.model
    assert again.model_type == oracle.config.model_type
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
