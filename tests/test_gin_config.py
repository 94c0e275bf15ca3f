"""Gin files: what they mean (plain gin is the oracle) and what is said about each mistake (word for word)."""

import functools
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gin
import pytest

from t5x_like import gin_config
from t5x_like.errors import UserError

PARTS = '''
"""Things to configure."""
from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nowhere import Nothing


@dataclasses.dataclass(frozen=True)
class Layer:
    width: int
    rate: float = 0.0
    name: str | None = None
    activation: Callable[[float], float] | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    layers: Sequence[Layer]
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = (1, 2)
    mode: Literal["fast", "exact"] = "fast"

    @classmethod
    def small(cls, width: int = 4) -> Model:
        return cls((Layer(width),))


@dataclasses.dataclass(frozen=True)
class Dataset:
    task: str
    seed: int = 0
    shuffle: bool = True
    pair: tuple[int, str] = (0, "")
    names: list[str] = dataclasses.field(default_factory=list)


class Trainer:
    """Has an `__init__` of its own."""

    def __init__(self, learning_rate: float = 1e-3, *, clip: float | None = None) -> None:
        if learning_rate < 0:
            raise ValueError("learning_rate must not be negative")
        self.settings = (learning_rate, clip)


def scale(value: float, factor: float = 2.0) -> float:
    return value * factor


def apply(function: Callable[[float], float], value: float) -> float:
    return function(value)


def half_known(nothing: Nothing, count: int = 0) -> tuple[object, int]:
    return nothing, count


def implicit(count: int = None) -> int | None:
    return count


def anything(**options: object) -> object:
    return tuple(sorted(options.items()))


CONSTANT = 3
'''

COMMANDS = '''
"""Two commands; each returns what it was given."""
from toy_lab.parts import Dataset, Layer, Model


def train(*, model: Model, steps: int = 10, data: object = None, model_dir: str = "runs", dry_run: bool = False):
    return {"model": model, "steps": steps, "data": data, "model_dir": model_dir, "dry_run": dry_run}


def evaluate(*, model: Model, data: object = None):
    return model, data


def report():
    from t5x_like.gin_config import operative_config

    return operative_config()
'''

HEADER = """
from __gin__ import dynamic_registration
from toy_lab import commands
from toy_lab import parts
"""  # four lines, the first of them empty


@pytest.fixture(scope="module", autouse=True)
def toy_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_lab").mkdir()
    (folder / "toy_lab" / "__init__.py").write_text("")
    (folder / "toy_lab" / "parts.py").write_text(PARTS)
    (folder / "toy_lab" / "commands.py").write_text(COMMANDS)
    (folder / "toy_lab" / "registry.py").write_text("")
    (folder / "toy_lab" / "other").mkdir()
    (folder / "toy_lab" / "other" / "__init__.py").write_text("")
    (folder / "toy_lab" / "other" / "parts.py").write_text("def two() -> int:\n    return 2\n")
    (folder / "toy_lab" / "needy.py").write_text("import a_package_that_is_missing\n")
    (folder / "toy_lab" / "broken.py").write_text("raise RuntimeError('a bug')\n")
    (folder / "toy_evil.py").write_text("raise AssertionError('imported')\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith("toy_")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "a.gin", header: str = HEADER) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(header + textwrap.dedent(text))
    return name


def command(name: str = "train") -> Callable[..., object]:
    import toy_lab.commands

    return getattr(toy_lab.commands, name)


def load(files: Sequence[str], *bindings: str, verb: str = "train") -> gin_config.LoadedConfig:
    roots = ["toy_lab.commands.train", "toy_lab.commands.evaluate"]
    return gin_config.load(command(verb), files, bindings, allow_imports=["toy_lab"], roots=roots)


def mistake(text: str, *bindings: str, header: str = HEADER, verb: str = "train") -> str:
    with pytest.raises(UserError) as error:
        gin_config.run(load([write(text, header=header)], *bindings, verb=verb))
    return str(error.value)


# What a config means


MEANINGS = {
    "literals": """
        commands.train.model = @parts.Model()
        commands.train.steps = 3
        commands.train.data = {'a': [1, 2.5, None, True], ('b', 2): (3,), 'c': 'x' 'y'}
        parts.Model.layers = ()
    """,
    "blocks, scopes and their inheritance": """
        commands.train:
          model = @parts.Model()
          data = [@train/parts.Dataset(), @train/fine/parts.Dataset(), @parts.Dataset()]
        parts.Model.layers = (@outer/parts.Layer(), @parts.Layer())
        parts.Layer.width = 1
        outer/parts.Layer.width = 2
        parts.Dataset.task = 'any'
        train/parts.Dataset.task = 'train'
        train/parts.Dataset.seed = 1
        train/fine/parts.Dataset.seed = 2
    """,
    "a reference without scope inherits it, one with scope leaves it": """
        commands.train.model = @tower/parts.Model()
        parts.Model.layers = [@parts.Layer(), @other/parts.Layer()]
        parts.Layer.width = 1
        parts.Layer.rate = 0.5
        tower/parts.Layer.width = 2
        tower/parts.Layer.rate = 0.25
        other/parts.Layer.width = 3
    """,
    "a macro's name is the scope of what it holds": """
        WIDTH = 7
        LAYER = @parts.Layer()
        commands.train.model = @tower/parts.Model()
        parts.Model.layers = (%LAYER, [%LAYER], @parts.Layer())
        parts.Layer.width = %WIDTH
        tower/parts.Layer.rate = 0.125
        LAYER/parts.Layer.name = 'by macro'
    """,
    "macros of macros, in containers, scoped": """
        A = %B
        B = (1, %train/C)
        train/C = {'c': %D}
        D = 'd'
        commands.train.data = [%A, {'x': %A}]
        commands.train.model = %MODEL
        MODEL = @parts.Model.small()
        parts.Model.small.width = 9
    """,
    "uncalled functions": """
        commands.train.model = @parts.Model()
        parts.Model.layers = (@parts.Layer(),)
        parts.Layer.width = 1
        commands.train.data = @parts.apply()
        parts.apply.function = @parts.scale
        parts.apply.value = 5.0
        parts.scale.factor = 3.0
    """,
    "the last binding wins": """
        N = 1
        commands.train.model = @parts.Model()
        parts.Model.layers = []
        commands.train.steps = %N
        commands.train.steps = 5
        commands.train.data = %N
        N = 2
    """,
    "a function that takes anything": """
        commands.train.model = None
        commands.train.data = @parts.anything()
        parts.anything.x = 1
        parts.anything.y = @parts.scale()
        parts.scale.value = 4
    """,
}


@pytest.mark.parametrize("text", MEANINGS.values(), ids=MEANINGS.keys())
def test_plain_gin_agrees(text: str) -> None:
    file = write(text)
    ours = gin_config.run(load([file]), dry_run=True)

    gin.clear_config(clear_constants=True)
    gin.parse_config_file(file)
    assert ours == gin.get_configurable(command())(dry_run=True)


@pytest.mark.parametrize("text", MEANINGS.values(), ids=MEANINGS.keys())
def test_the_operative_config_alone_gives_the_same_run(text: str) -> None:
    config = load([write(text)])
    again = load([write(config.operative_config(), "again.gin", header="")])

    assert gin_config.run(again) == gin_config.run(config)
    assert again.operative_config() == config.operative_config()

    gin.clear_config(clear_constants=True)
    gin.parse_config_file("again.gin")
    assert gin.get_configurable(command())() == gin_config.run(config)


def test_the_operative_config_word_for_word() -> None:
    file = write(
        """
        MODEL = @tower/parts.Model()
        SEED = 3
        STEPS = 4
        parts.Model.layers = (@parts.Layer(),)
        tower/parts.Layer.width = 8
        commands.train.model = %MODEL
        commands.train.steps = %STEPS
        """
    )
    assert load([file], "commands.train.model_dir=runs/first").operative_config() == textwrap.dedent(
        """\
        from __gin__ import dynamic_registration
        import toy_lab.commands as commands
        import toy_lab.parts as parts

        MODEL = @tower/parts.Model()
        STEPS = 4

        commands.train.data = None
        commands.train.dry_run = False
        commands.train.model = %MODEL
        commands.train.model_dir = 'runs/first'
        commands.train.steps = %STEPS

        parts.Layer.activation = None
        parts.Layer.name = None
        parts.Layer.rate = 0.0

        parts.Model.layers = (@parts.Layer(),)
        parts.Model.mode = 'fast'
        parts.Model.shape = (1, 2)

        tower/parts.Layer.width = 8
        """
    )


def test_the_operative_config_keeps_imports_that_only_register_something() -> None:
    config = load([write("import toy_lab.registry\ncommands.train.model = None\n")])
    assert "import toy_lab.registry as registry\n" in config.operative_config()


def test_a_running_command_can_ask_for_its_operative_config() -> None:
    config = load([write("", header="")], verb="report")
    assert gin_config.run(config) == config.operative_config() != ""
    assert gin_config.operative_config() == ""


def test_modules_of_the_same_name_get_different_names() -> None:
    text = """
        from toy_lab.other import parts as theirs
        commands.train.model = @parts.Model.small()
        commands.train.steps = @theirs.two()
    """
    written = load([write(text)]).operative_config()
    assert "import toy_lab.parts as toy_lab_parts\n" in written
    assert "import toy_lab.other.parts as toy_lab_other_parts\n" in written
    assert gin_config.run(load([write(written, "b.gin", header="")]))["steps"] == 2


def test_a_thing_that_is_imported_in_two_ways_is_one_thing() -> None:
    text = """
        import toy_lab.parts as again
        import toy_lab.commands
        again.Layer.width = 3
        parts.Layer.rate = 0.5
        commands.train.model = @toy_lab.parts.Layer()
        toy_lab.commands.train.steps = 3
    """
    result = gin_config.run(load([write(text)]))
    assert (result["model"].width, result["model"].rate, result["steps"]) == (3, 0.5, 3)


def test_loads_do_not_disturb_each_other() -> None:
    text = """
        commands.train.model = @parts.Model.small()
        commands.train.data = @parts.scale
        parts.scale.factor = {}
    """
    first = load([write(text.format(3.0), "first.gin")])
    triple = gin_config.run(first)["data"]
    second = load([write(text.format(5.0), "second.gin")])

    assert gin_config.run(second)["data"](1.0) == 5.0
    assert triple(1.0) == 3.0
    assert gin_config.run(first)["data"](1.0) == 3.0


def test_an_uncalled_function_is_itself_or_takes_its_bindings_along() -> None:
    text = """
        commands.train.model = @parts.Model.small()
        commands.train.data = (@parts.scale, @far/parts.scale)
        far/parts.scale.factor = 10.0
    """
    import toy_lab.parts

    near, far = gin_config.run(load([write(text)]))["data"]
    assert near is toy_lab.parts.scale
    assert isinstance(far, functools.partial)
    assert far(1.0) == 10.0


def test_containers_are_built_anew() -> None:
    config = load([write("commands.train.model = None\ncommands.train.data = [[1]]\n")])
    gin_config.run(config)["data"][0].append(2)
    assert gin_config.run(config)["data"] == [[1]]


def test_arguments_of_the_call_override_bindings() -> None:
    config = load([write("commands.train.model = None\ncommands.train.steps = 1\n")])
    assert gin_config.run(config, steps=2)["steps"] == 2


def test_one_file_serves_several_commands() -> None:
    file = write(
        """
        commands.train.model = %MODEL
        commands.evaluate.model = %MODEL
        commands.evaluate.data = @parts.Dataset()
        parts.Dataset.task = 'test'
        MODEL = @parts.Model.small()
        """
    )
    assert gin_config.run(load([file]))["data"] is None
    model, data = gin_config.run(load([file], verb="evaluate"))
    assert (model.layers[0].width, data.task) == (4, "test")


def test_a_file_may_define_standard_macros_that_the_run_does_not_use() -> None:
    file = write(
        """
        MODEL = @parts.Model()
        parts.Model.layers = (@parts.Layer(),)
        parts.Layer.width = %WIDTH
        WIDTH = 3
        BATCH_SIZE = 8
        commands.train.model = None
        """
    )
    assert gin_config.run(load([file]))["model"] is None
    assert "parts." not in load([file]).operative_config().replace("toy_lab.parts", "")


# The command line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("runs/first", "runs/first"),
        ("gs://bucket/run-1", "gs://bucket/run-1"),
        ("/data/a b.txt", "/data/a b.txt"),
        ("hello", "hello"),
        ("true", "true"),
        ("2024-01-01", "2024-01-01"),
        ("1+2", "1+2"),
        ("007", "007"),
        ("a=b", "a=b"),
        ("it's", "it's"),
        ("(1, 2", "(1, 2"),
        ("[a, b]", "[a, b]"),
        ("1\nX = 2", "1\nX = 2"),
        ("", ""),
        ("'quoted'", "quoted"),
        ('"1"', "1"),
        ("1e-3", 1e-3),
        ("-4", -4),
        ("True", True),
        ("None", None),
        ("('a', 1)", ("a", 1)),
        ("{'a': [1]}", {"a": [1]}),
        ("%N", 5),
    ],
)
def test_values_on_the_command_line(text: str, value: object) -> None:
    file = write("commands.train.model = None\ncommands.train.data = (%N, %X)\nN = 5\nX = 0\n")
    found = gin_config.run(load([file], f"X={text}"))["data"][1]
    assert found == value
    assert type(found) is type(value)


def test_the_command_line_overrides_files_and_knows_their_modules() -> None:
    base = write("from toy_lab import parts as p\np.Layer.width = 1\n", "base.gin", header="")
    top = write(
        f"""
        include '{base}'
        commands.train.model = @tower/parts.Model()
        parts.Model.layers = (@parts.Layer(),)
        """,
        "top.gin",
    )
    bindings = ["p.Layer.rate=0.5", "tower/parts.Layer.name=high", "commands.train.data=@parts.Layer()"]
    result = gin_config.run(load([top], *bindings))
    assert (result["model"].layers[0].rate, result["model"].layers[0].name) == (0.5, "high")
    assert (result["data"].width, result["data"].rate, result["data"].name) == (1, 0.5, None)


def test_the_command_itself_needs_no_import() -> None:
    assert gin_config.run(load([], "commands.train.model=None", "commands.train.steps=2"))["steps"] == 2


@pytest.mark.parametrize("binding", ["N", "=3", "a b=3", "N=@", "N=@parts.Layer(", "N=%", "1N=2", "a..b=3"])
def test_what_is_no_binding(binding: str) -> None:
    assert mistake("commands.train.model = None\n", binding) == (
        f"--gin.{binding}: a binding is --gin.NAME=value or --gin.module.function.parameter=value."
    )


# Files


def test_files_are_found_in_search_paths_then_here_then_among_our_configs(folder: Path) -> None:
    text = "commands.train.model = None\ncommands.train.steps = {}\n"
    write(text.format(1), "here.gin")
    write(text.format(2), "elsewhere/here.gin")
    write(text.format(3), "elsewhere/sub/only_there.gin")

    def steps(file: str, *search_paths: str) -> object:
        config = gin_config.load(command(), [file], (), search_paths, ["toy_lab"])
        return gin_config.run(config)["steps"]

    assert steps("here.gin") == 1
    assert steps("here.gin", "elsewhere") == 2
    assert steps("sub/only_there.gin", "nowhere", str(folder / "elsewhere")) == 3
    assert steps(str(folder / "here.gin"), "elsewhere") == 1


def test_our_own_configs_are_found_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("commands.train.model = None\n", "house/configs/models/toy_small.gin")
    for module in ("house/t5x_like/gin_config.py", "house/gin_config.py"):  # in the repository, and installed
        monkeypatch.setattr(gin_config, "__file__", str(folder / module))
        for file in ("models/toy_small.gin", "configs/models/toy_small.gin"):
            assert gin_config.run(load([file]))["model"] is None
    with pytest.raises(UserError, match=r"Did you mean 'models/toy_small.gin'\?$"):
        load(["models/toy_smal.gin"])
    with pytest.raises(UserError, match=r"Did you mean 'models/toy_small.gin'\?$"):
        load(["toy_small.gin"])


def test_a_command_that_is_given_by_name_is_imported_when_the_files_have_been_read() -> None:
    with pytest.raises(UserError, match=r"no file 'none\.gin'"):
        gin_config.load("toy_lab.broken.command", ["none.gin"])
    config = gin_config.load("toy_lab.commands.train", [write("commands.train.model = None\n")], (), (), ["toy_lab"])
    assert gin_config.run(config)["steps"] == 10


def test_a_missing_file(folder: Path) -> None:
    write("", "runs/pretrain.gin")
    write("include 'runs/pretrian.gin'\n", "top.gin", header="")
    home = Path(gin_config.__file__).parent.parent
    looked = f"in {folder / 'extra'}, {folder}, {home}, {home / 'configs'}"
    with pytest.raises(UserError) as error:
        gin_config.load(command(), ["runs/pretran.gin"], search_paths=["extra"])
    assert str(error.value) == (
        f"--gin_file=runs/pretran.gin: no file 'runs/pretran.gin' {looked}. Did you mean 'runs/pretrain.gin'?"
    )
    with pytest.raises(UserError) as error:
        gin_config.load(command(), ["top.gin"], search_paths=["extra"])
    assert str(error.value) == (f"top.gin:1: no file 'runs/pretrian.gin' {looked}. Did you mean 'runs/pretrain.gin'?")


def test_a_circle_of_includes() -> None:
    write("include 'b.gin'\n", "a.gin", header="")
    write("\ninclude 'a.gin'\n", "b.gin", header="")
    with pytest.raises(UserError, match=r"^b.gin:2: a.gin includes itself.$"):
        load(["a.gin"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("X = 1\nY = (1, 2\n", "a.gin:3: '' is not gin: EOF in multi-line statement"),
        ("X = 1\nY 2\n", "a.gin:2: 'Y 2' is not gin: Couldn't parse statement, expected ':' or '='."),
        ("X = nothing\n", "a.gin:1: 'X = nothing' is not gin: malformed node or string"),
        ("X = 1 2\n", "a.gin:1: 'X = 1 2' is not gin: Expected newline."),
        ("a.b:\n  x 3\n", "a.gin:2: 'x 3' is not gin: Expected '='."),
        ("a.b:\n    x = 3\n  y = 4\n", "a.gin:3: 'y = 4' is not gin: unindent does not match"),
        ("X = @\n", "a.gin:1: 'X = @' is not gin: Unexpected token."),
        ("include x\n", "a.gin:1: 'include x' is not gin: malformed node or string"),
        ("X = {[1]: 2}\n", "a.gin:1: 'X = {[1]: 2}' is not gin: unhashable type: 'list'"),
        ("X = '\x00'\n", "a.gin:1: "),
    ],
)
def test_syntax_errors(text: str, message: str) -> None:
    assert mistake(text, header="").startswith(message)


# Names


def test_imports_are_checked_before_anything_is_imported() -> None:
    trusted = "flax, jax, optax, orbax, seqio, t5x_like, toy_lab"
    write("import toy_evil\n", "b.gin", header="")
    for verb in ("import toy_evil", "from toy_evil import x", "import toy_evil as jax", "include 'b.gin'"):
        module = "toy_evil.x" if "from" in verb else "toy_evil"
        place = "b.gin:1" if "include" in verb else "a.gin:2"
        assert mistake(f"import toy_lab.broken\n{verb}\n", header="") == (
            f"{place}: {module!r} may not be used: gin files run code, and only {trusted} are trusted. "
            "If you trust it, add --allow_import=toy_evil."
        )


def test_attributes_do_not_lead_out_of_the_allowed_packages() -> None:
    text = "commands.train.model = @parts.subprocess.run()\n"
    assert mistake(text).startswith("a.gin:5: 'subprocess' may not be used: gin files run code")
    assert mistake("commands.train.model = @parts.scale.__globals__.get()\n") == (
        "a.gin:5: toy_lab.parts.scale has no '__globals__'."
    )


def test_allow_import_takes_top_level_packages() -> None:
    text = "import toy_lab.parts\ncommands.train.model = None\n"
    config = gin_config.load(command(), [write(text, header="from toy_lab import commands\n")], (), (), ["toy_lab.x"])
    assert gin_config.run(config)["model"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "from toy_lab import part",
            "cannot import toy_lab.part: No module named 'toy_lab.part'. Did you mean 'parts'?",
        ),
        (
            "import toy_lab.pats.x",
            "cannot import toy_lab.pats.x: No module named 'toy_lab.pats'. Did you mean 'parts'?",
        ),
        ("from toy_lab import needy", "cannot import toy_lab.needy: No module named 'a_package_that_is_missing'."),
        ("part.Layer.width = 1", "no import gives 'part', of 'part.Layer'."),
        ("X = (1, [@Layer()])", "no import gives 'Layer', of 'Layer'."),
    ],
)
def test_unknown_modules(text: str, message: str) -> None:
    assert mistake(text + "\n", header="") == f"a.gin:1: {message}"


def test_a_bug_in_an_imported_module_is_not_the_users_mistake() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        load([write("from toy_lab import broken\n", header="")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("part.Layer.width = 1", "no import gives 'part', of 'part.Layer'. Did you mean 'parts'?"),
        ("parts.Leyer.width = 1", "toy_lab.parts has no 'Leyer'. Did you mean 'Layer'?"),
        ("X = @parts.Modle()", "toy_lab.parts has no 'Modle'. Did you mean 'Model'?"),
        ("X = {'a': [@parts.Model.smal()]}", "toy_lab.parts.Model has no 'smal'. Did you mean 'small'?"),
        ("X = @parts.CONSTANT", "parts.CONSTANT is a int, not a function or class."),
        ("parts.width = 1", "parts is a module, not a function or class."),
    ],
)
def test_unknown_names(text: str, message: str) -> None:
    assert mistake(text + "\n") == f"a.gin:5: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts.Layer.widht = 1", "10: parts.Layer has no parameter 'widht'. Did you mean 'width'?"),
        ("parts.Layer:\n  widht = 1", "11: parts.Layer has no parameter 'widht'. Did you mean 'width'?"),
        ("a/parts.Layer.self = 1", "10: parts.Layer has no parameter 'self'. It has width, rate, name, activation."),
        ("commands.train.stesp = %WIDTH", "10: commands.train has no parameter 'stesp'. Did you mean 'steps'?"),
        ("evaluate = 1\ncommands.evaluate.modle = %evaluate", "11: commands.evaluate has no parameter 'modle'. "),
    ],
)
def test_unknown_parameters(text: str, message: str) -> None:
    assert mistake(BASE + text + "\n").startswith(f"a.gin:{message}")


def test_unknown_names_on_the_command_line() -> None:
    text = "commands.train.model = None\n"
    assert mistake(text, "parts.Leyer.width=3") == (
        "--gin.parts.Leyer.width=3: toy_lab.parts has no 'Leyer'. Did you mean 'Layer'?"
    )
    assert mistake(text, "X=@optax.adam()") == "--gin.X=@optax.adam(): no import gives 'optax', of 'optax.adam'."


# What is not used


BASE = """
commands.train.model = @parts.Model()
parts.Model.layers = (@a/parts.Layer(), {'x': [@beta/b/parts.Layer()]})
parts.Layer.width = %WIDTH
WIDTH = 3
"""  # lines 6 to 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts.Dataset.task = 'x'", "nothing uses parts.Dataset. Refer to it (@parts.Dataset()), or remove this."),
        ("betta/parts.Layer.rate = 1", "nothing uses parts.Layer in scope 'betta'. Did you mean 'beta'?"),
        ("beta/c/parts.Layer.rate = 1", "nothing uses parts.Layer in scope 'beta/c'. Did you mean 'beta/b'?"),
        ("b/parts.Layer.rate = 1", "nothing uses parts.Layer in scope 'b'. Its scopes are: a, beta, beta/b."),
        ("train/parts.Model.mode = 'fast'", "nothing uses parts.Model in scope 'train'. Its scopes are: none."),
        ("WIDHT = 4", "nothing uses the macro WIDHT. Did you mean 'WIDTH'?"),
        ("width = 4", "nothing uses the macro width. Did you mean 'WIDTH'?"),
        ("OTHER = 4", "nothing uses the macro OTHER."),
        ("A = %B\nB = 1", "nothing uses the macro A."),
        ("parts.Layer.name = %MODEL_DIR", "nothing defines the macro MODEL_DIR. Set it with --gin.MODEL_DIR=value."),
        (
            "parts.Layer.name = %WIDHT",
            "nothing defines the macro WIDHT. Did you mean 'WIDTH'? Set it with --gin.WIDHT=value.",
        ),
        ("NAME = 'x'\nparts.Layer.name = %NAEM", "nothing uses the macro NAME. Did you mean 'NAEM'?"),
    ],
)
def test_unused_and_undefined(text: str, message: str) -> None:
    assert mistake(BASE + text + "\n") == f"a.gin:10: {message}"


def test_a_beta_scope_is_active_inside() -> None:
    text = BASE + "beta/parts.Layer.rate = 0.5\nbeta/b/parts.Layer.name = 'b'\n"
    layers = gin_config.run(load([write(text)]))["model"].layers
    assert (layers[0].rate, layers[1]["x"][0].rate, layers[1]["x"][0].name) == (0.0, 0.5, "b")


def test_standard_macros_on_the_command_line_must_be_used() -> None:
    message = "--gin.SAVE_PERIOD=5: nothing uses the macro SAVE_PERIOD."
    assert mistake(BASE, "SAVE_PERIOD=5") == message
    assert mistake(BASE + "SAVE_PERIOD = 4\n", "SAVE_PERIOD=5") == message


def test_an_override_orphans_nothing() -> None:
    """An experiment may choose another object than the run file that it includes configures."""
    text = BASE + "A = @parts.Dataset()\ncommands.train.data = %A\nparts.Dataset.task = 't'\n"
    assert gin_config.run(load([write(text)], "A=3"))["data"] == 3
    assert gin_config.run(load([write(text), write("commands.train.data = 4\n", "b.gin")]))["data"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A = %B\nB = %A", "a.gin:12: %A -> %B -> %A leads back to itself."),
        (
            "A = @parts.apply()\nparts.apply.function = @parts.scale\nparts.scale.value = %A",
            "a.gin:13: %A -> @A/toy_lab.parts.apply() -> @A/toy_lab.parts.scale -> %A leads back to itself.",
        ),
    ],
)
def test_circles(text: str, message: str) -> None:
    assert message == mistake(BASE + "commands.train.data = %A\n" + text + "\n")


# Types


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("commands.train.steps = 'ten'", "commands.train.steps takes int, not 'ten'."),
        ("commands.train.steps = 1e5", "commands.train.steps takes int, not 100000.0."),
        ("commands.train.steps = True", "commands.train.steps takes int, not True."),
        ("commands.train.steps = None", "commands.train.steps takes int, not None."),
        ("commands.train.model_dir = 3", "commands.train.model_dir takes str, not 3."),
        ("parts.Layer.rate = False", "parts.Layer.rate takes float, not False."),
        ("parts.Layer.name = 1", "parts.Layer.name takes str | None, not 1."),
        ("parts.Model.lengths = [1]", "parts.Model.lengths takes collections.abc.Mapping[str, int], not [1]."),
        (
            "parts.Model.lengths = {'a': 'b'}",
            "parts.Model.lengths takes collections.abc.Mapping[str, int], not {'a': 'b'}.",
        ),
        ("parts.Model.shape = [1, 2]", "parts.Model.shape takes tuple[int, ...], not [1, 2]."),
        ("parts.Model.shape = (1, '2')", "parts.Model.shape takes tuple[int, ...], not (1, '2')."),
        ("parts.Model.mode = 'slow'", "parts.Model.mode takes Literal['fast', 'exact'], not 'slow'."),
        ("parts.Dataset.shuffle = 1", "parts.Dataset.shuffle takes bool, not 1."),
        ("parts.Dataset.pair = (1,)", "parts.Dataset.pair takes tuple[int, str], not (1,)."),
        ("parts.Dataset.pair = (1, 2)", "parts.Dataset.pair takes tuple[int, str], not (1, 2)."),
        ("parts.Dataset.names = ('a',)", "parts.Dataset.names takes list[str], not ('a',)."),
        ("parts.Trainer.clip = 'no'", "parts.Trainer.clip takes float | None, not 'no'."),
        ("parts.half_known.count = 'x'", None),
    ],
)
def test_wrong_types(binding: str, message: str | None) -> None:
    text = BASE + (
        "commands.train.data = [@parts.Dataset(), @parts.Trainer(), @parts.half_known()]\n"
        "parts.Dataset.task = 'x'\nparts.half_known.nothing = 3\n"
    )
    if message:
        assert mistake(f"{text}{binding}\n") == f"a.gin:13: {message}"
    else:  # its annotations cannot be resolved: none of them is checked
        gin_config.run(load([write(f"{text}{binding}\n")]))


def test_a_macro_of_the_wrong_type_is_reported_where_it_is_defined() -> None:
    text = BASE + "commands.train.steps = %TRAIN_STEPS\nTRAIN_STEPS = %N\nN = 'many'\n"
    assert mistake(text) == "a.gin:12: commands.train.steps takes int, not 'many'."
    assert mistake(text, "TRAIN_STEPS=1k") == "--gin.TRAIN_STEPS=1k: commands.train.steps takes int, not '1k'."


@pytest.mark.parametrize(
    "binding",
    [
        "parts.Layer.rate = 1",
        "parts.Layer.name = None",
        "parts.Layer.activation = 'anything'",
        "parts.Model.lengths = {'a': %WIDTH}",
        "parts.Model.shape = ()",
        "parts.Model.shape = (%WIDTH, @parts.scale())\nparts.scale.value = 1.0",
        "commands.train.data = @parts.implicit()\nparts.implicit.count = None",
    ],
)
def test_right_types(binding: str) -> None:
    gin_config.run(load([write(f"{BASE}{binding}\n")]))


# Building


def test_a_required_parameter_of_the_command() -> None:
    assert mistake("commands.train.steps = 3\n") == (
        "commands.train needs model. Bind it in a gin file or with --gin.commands.train.model=value."
    )


def test_a_required_parameter_of_a_part() -> None:
    text = "commands.train.model = @parts.Model()\nparts.Model.layers = [@parts.Layer()]\n"
    assert mistake(text) == (
        "a.gin:6: parts.Layer needs width. Bind it in a gin file or with --gin.parts.Layer.width=value."
    )
    text = "commands.train.model = None\ncommands.train.data = %DATA\nDATA = @parts.apply()\n"
    assert mistake(text) == (
        "a.gin:7: parts.apply needs function, value. Bind it in a gin file or with "
        "--gin.parts.apply.function=value --gin.parts.apply.value=value."
    )


def test_gin_required() -> None:
    text = """
        MODEL_DIR = %gin.REQUIRED
        commands.train.model = None
        commands.train.model_dir = %MODEL_DIR
    """
    assert mistake(text) == "a.gin:6: a value is required here. Set it in a later file or on the command line."
    assert gin_config.run(load(["a.gin"], "MODEL_DIR=x"))["model_dir"] == "x"


def test_only_what_the_command_needs_is_required() -> None:
    file = write(
        """
        commands.train.model = %MODEL
        commands.train.steps = %TRAIN_STEPS
        commands.evaluate.model = %MODEL
        MODEL = None
        TRAIN_STEPS = %gin.REQUIRED
        """
    )
    assert gin_config.run(load([file], verb="evaluate")) == (None, None)


def test_a_constructor_that_refuses_what_it_is_given() -> None:
    text = BASE + "commands.train.data = [1, @parts.Trainer()]\nparts.Trainer.learning_rate = -1\n"
    assert mistake(text) == "a.gin:10: @parts.Trainer(): ValueError: learning_rate must not be negative"


def test_an_error_of_the_command_itself_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(model: object) -> None:
        raise TypeError("a bug in training")

    monkeypatch.setattr("toy_lab.commands.train", train)
    train.__module__, train.__qualname__ = "toy_lab.commands", "train"
    broken = load([write("commands.train.model = None\n")])
    with pytest.raises(TypeError, match=r"^a bug in training$"):
        gin_config.run(broken)


def test_the_operative_config_leaves_out_what_every_caller_overrides(tmp_path: Path) -> None:
    """A binding that no scope uses may lead to what nothing else does: Switch-C has no dense feed-forward block."""
    config = gin_config.load(
        "t5x_like.commands.train.train", ["models/switch_c.gin", "runs/pretrain.gin"], ["MODEL_DIR=x"]
    )
    text = config.operative_config()
    assert "encoder_sparse/transformer.EncoderLayer.mlp = @moe.SparseMlp()" in text
    assert "MlpBlock" not in text
    again = tmp_path / "again.gin"
    again.write_text(text)
    assert gin_config.load("t5x_like.commands.train.train", [str(again)]).operative_config() == text
