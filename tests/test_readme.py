"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest

from t5x_like import cli

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def example() -> dict[str, object]:
    block = re.search(r"<!-- tested:.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    names: dict[str, object] = {}
    exec(compile(block[1], "README.md", "exec"), names)
    return names


def test_the_python_example_trains_and_generates(example: dict) -> None:
    losses = example["losses"]
    assert len(losses) == 20
    assert losses[0] > 9 > 6 > losses[-1]
    assert len(example["answers"]) == 1


def test_files_and_verbs_that_the_readme_names_exist() -> None:
    root = Path(__file__).parent.parent
    for path in re.findall(r"(?:configs|scripts|notebooks|tests|docs|t5x_like)/[\w./]+\.\w+", README):
        assert (root / path).exists(), path
    assert set(re.findall(r"^t5x_like (\w+) --", README, re.MULTILINE)) <= set(cli.VERBS)
