"""The introduction as a newcomer runs it: in a kernel of its own, from top to bottom, only with fewer steps."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from t5x_like.data import corpora

REPOSITORY = Path(__file__).parent.parent
NOTEBOOK = REPOSITORY / "notebooks" / "introduction.ipynb"
STEPS = 6

SAVE_VALUES = """
names = "curve inputs outputs classes before after losses outputs_after"
values = {name: globals()[name] for name in names.split()}
values |= {"scores": scores, "first_token": probabilities, "words": list(words)}
Path("values.json").write_text(json.dumps(values, default=lambda array: array.tolist()))
"""


class Executed:
    """What is left when every cell has run."""

    def __init__(self, notebook: nbformat.NotebookNode, values: dict) -> None:
        self.cells = {cell.id: cell for cell in notebook.cells}
        self.values = values

    def printed(self, cell: str) -> str:
        """Standard output of a cell; its other output may come in between."""
        outputs = self.cells[cell].outputs
        return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(SAVE_VALUES))
    environment = os.environ | {
        "T5X_LIKE_NOTEBOOK_STEPS": str(STEPS),
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": "",  # one device, as on a laptop
        "IPYTHONDIR": str(folder / "ipython"),
    }
    # With no folders of kernels to look into there is but one: ipykernel in the Python that runs this test.
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    NotebookClient(notebook, km=kernel, timeout=300).execute(cleanup_kc=True, cwd=str(folder), env=environment)
    return Executed(notebook, json.loads((folder / "values.json").read_text()))


def test_it_is_committed_without_outputs_and_opens_in_colab(committed: nbformat.NotebookNode) -> None:
    title, *_ = committed.cells
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id) for cell in committed.cells)  # made by hand: they stay
    assert max(len(cell.source.splitlines()) for cell in code) <= 30
    assert committed.metadata.kernelspec.name == "python3"
    assert "colab.research.google.com/github/t5x-like/t5x_like/blob/main/notebooks/introduction.ipynb" in title.source
    assert "pip" in code[0].source
    assert "jax.devices()" in code[0].source


@pytest.mark.parametrize(
    ("folder", "present", "asked_for"),
    [
        (REPOSITORY / "notebooks", "", ["--editable", f"{REPOSITORY}[notebooks]"]),
        (REPOSITORY, "nvidia-smi", ["--editable", f"{REPOSITORY}[notebooks,gpu]"]),
        (Path("/"), "libtpu", ["t5x_like[notebooks,tpu] @ git+https://github.com/t5x-like/t5x_like"]),
    ],
)
def test_the_first_cell_installs_what_is_missing(
    committed: nbformat.NotebookNode,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    present: str,
    asked_for: list[str],
) -> None:
    commands = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == present or None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == present else None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.chdir(folder)
    with pytest.raises(RuntimeError, match="restart the session"):  # because NumPy is loaded here
        exec(committed.cells[1].source, {})
    (command,) = commands
    assert command[1:] == ["-m", "pip", "install", "--quiet", *asked_for]


def test_it_finds_the_device(executed: Executed) -> None:
    assert executed.printed("setup") == "1 x cpu (cpu)\n"


def test_it_shows_the_tasks_as_they_are(executed: Executed) -> None:
    verse, sense = corpora.bible("train")[0], corpora.wordnet("train")[0]
    printed = executed.printed("data-text")
    assert f"translate English to Spanish: {verse.english}\n  targets: {verse.spanish}\n" in printed
    assert f"supersense: {sense.word}: {sense.definition}\n  targets: {sense.supersense}\n" in printed
    assert "1=''" in executed.printed("data-ids")


def test_its_corrupted_spans_fill_the_gaps_of_the_novel(executed: Executed) -> None:
    inputs, targets = re.fullmatch(r"inputs: (.*)\ntargets: (.*)\n", executed.printed("data-spans")).groups()
    _, *spans = re.split(r"<extra_id_\d+>", targets)
    gaps = iter(spans)
    text = re.sub(r"<extra_id_\d+>", lambda _: next(gaps), inputs)
    novel = "".join(paragraph.text for paragraph in corpora.austen("train")[:5])
    assert len(spans) >= 3
    assert re.sub(r"\s", "", novel).startswith(re.sub(r"\s", "", text))


def test_its_packed_row_holds_whole_examples(executed: Executed) -> None:
    lines = executed.printed("data-packed-texts").splitlines()
    known = {(f"supersense: {s.word}: {s.definition}", s.supersense) for s in corpora.wordnet("train")}
    assert len(lines) >= 3
    assert all(tuple(line.split("  ", 1)[1].split("  ->  ")) in known for line in lines)


@pytest.mark.parametrize("cell", ["data-picture", "train-loss"])
def test_it_draws(executed: Executed, cell: str) -> None:
    (picture,) = executed.cells[cell].outputs
    assert picture.data["image/png"]


def test_it_trains(executed: Executed) -> None:
    steps, losses = zip(*executed.values["curve"], strict=True)
    assert list(steps) == list(range(1, STEPS + 1))
    assert losses[-1] < losses[0]
    assert "runs/introduction/report.html" in executed.printed("train-folder")


def test_it_generates_and_scores(executed: Executed) -> None:
    values = executed.values
    assert list(values["outputs"]) == ["greedy", "beam", "sampled"]
    assert all(len(found) == len(values["inputs"]) == 5 for found in values["outputs"].values())
    assert len(values["scores"]) == len(values["classes"]) == 5
    assert max(values["scores"]) < 0
    assert sum(values["first_token"]) == pytest.approx(1, abs=1e-5)
    assert "float32 (1, 1, 8192)\n" in executed.printed("use-logits")


def test_it_learns_the_pairs(executed: Executed) -> None:
    values = executed.values
    assert len(values["losses"]) == 30
    assert values["losses"][-1] < values["losses"][0]
    assert all(after > before for before, after in zip(values["before"], values["after"], strict=True))
    rows = executed.printed("use-fit").splitlines()[1:]
    assert [row.split()[0] for row in rows] == values["words"]
