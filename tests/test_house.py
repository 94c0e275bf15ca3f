"""The house rules, checked on the source: who may import whom, what a signature may say, how long is long.

A rule is a function from modules to complaints. Each is tried on planted bad sources first, then on the package.
"""

import ast
import configparser
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parent.parent

# A room imports only from rooms before it. gin_config knows errors alone, so that commands and notebooks can use it.
ROOMS = (
    *("typing", "errors", "gin_config", "sharding", "distributed", "layers", "architectures", "data", "decoding"),
    *("models", "training", "checkpoints", "recipe", "planning", "verification", "rehearsal", "commands"),
    *("interactive", "verbs", "cli", "__main__"),
)

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_COMMAND_PARAMETERS = 12
EXCUSE = "# long because "


class Module(NamedTuple):
    """One source file: its dotted name, its text, and what the text parses to."""

    name: str
    source: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The first part of the name below the package; empty for the package itself."""
        return self.name.partition(".")[2].partition(".")[0]

    def at(self, node: ast.stmt | ast.expr) -> str:
        return f"{self.name}:{node.lineno}"


Modules = dict[str, Module]
Rule = Callable[[Modules], list[str]]


def parse(sources: dict[str, str]) -> Modules:
    return {name: Module(name, source, ast.parse(source)) for name, source in sources.items()}


def package_modules() -> Modules:
    sources = {}
    for path in sorted((REPOSITORY / "t5x_like").rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return parse(sources)


def imports(module: Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every import, also inside functions and under TYPE_CHECKING; `from a import b` gives `a.b`."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def own_imports(modules: Modules, module: Module) -> Iterator[tuple[ast.stmt, str]]:
    """The imports of the package's own modules; the package itself, which holds the version, does not count."""
    for node, name in imports(module):
        target = name if name in modules else name.rpartition(".")[0]
        if target in modules and "." in target:
            yield node, target


def upward_imports(modules: Modules) -> list[str]:
    """A room that imports from one after it in `ROOMS`; the package itself is the porch, and may open any door."""
    complaints = []
    for module in modules.values():
        if module.room and module.room not in ROOMS:
            complaints.append(f"{module.name}: {module.room!r} is no room; give it a place in ROOMS")
            continue
        for node, target in own_imports(modules, module):
            room = modules[target].room
            if module.room and room in ROOMS and ROOMS.index(room) > ROOMS.index(module.room):
                complaints.append(f"{module.at(node)}: {module.room} imports {target} from a room below it")
    return complaints


def import_circles(modules: Modules) -> list[str]:
    """Modules that import each other, in whatever number of steps."""
    graph = {name: sorted({target for _, target in own_imports(modules, modules[name])}) for name in modules}
    complaints, done = [], set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            complaints.append("circle: " + " -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return complaints


def guarded_libraries(modules: Modules) -> list[str]:
    """Linen outside the networks, or gin outside its one module."""
    guards = (("flax.linen", ("layers", "architectures")), ("gin", ("gin_config",)))
    return [
        f"{module.at(node)}: imports {library}, which only {' and '.join(rooms)} may"
        for module in modules.values()
        for node, name in imports(module)
        for library, rooms in guards
        if f"{name}.".startswith(f"{library}.") and module.room not in rooms
    ]


def public_definitions(module: Module) -> Iterator[tuple[str, ast.stmt]]:
    """Public functions, methods and annotated fields; `__init__` and its like are public too."""

    def below(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.stmt]]:
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = node.name
            else:
                continue
            if name.startswith("_") and not name.endswith("__"):
                continue
            if isinstance(node, ast.ClassDef):
                yield from below(node.body, f"{name}.")
            else:
                yield prefix + name, node

    return below(module.tree.body, "")


def any_in_signatures(modules: Modules) -> list[str]:
    """A public signature or field that says `Any`."""
    complaints = []
    for module in modules.values():
        for name, node in public_definitions(module):
            nodes = (
                [node.args, node.returns]
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                else [node.annotation]
            )
            words = [word for part in nodes if part is not None for word in ast.walk(part)]
            if any(getattr(word, "id", getattr(word, "attr", None)) == "Any" for word in words):
                complaints.append(f"{module.at(node)}: {name} says Any")
    return complaints


def too_long(modules: Modules) -> list[str]:
    """Files, functions (without docstring) and signatures over their limits, and no `# long because ...` to say why."""
    complaints = []
    for module in modules.values():
        lines = module.source.splitlines()
        if len(lines) > MAX_FILE_LINES and not any(line.startswith(EXCUSE) for line in lines):
            complaints.append(f"{module.name}: {len(lines)} lines")
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if any(EXCUSE in line for line in lines[node.lineno - 1 : node.body[0].lineno - 1]):
                continue
            docstring = node.body[0] if ast.get_docstring(node) else None
            documented = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            if (length := node.end_lineno - node.lineno + 1 - documented) > MAX_FUNCTION_LINES:
                complaints.append(f"{module.at(node)}: {node.name} has {length} lines")
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(arguments) - (arguments[:1] in (["self"], ["cls"]))
            if count > (MAX_COMMAND_PARAMETERS if module.room == "commands" else MAX_PARAMETERS):
                complaints.append(f"{module.at(node)}: {node.name} has {count} parameters")
    return complaints


# The folder's name comes in by format, so that this file does not name it either.
OUTSIDE = re.compile(r"\.\./{0}|work/{0}|/ *[\"']{0}[\"'/]".format("shared"))


def reads_outside(texts: dict[str, str]) -> list[str]:
    """Lines that reach for the folder beside the repository, which a clone does not have."""
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if OUTSIDE.search(line)
    ]


RULES = (upward_imports, import_circles, guarded_libraries, any_in_signatures, too_long)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Rule) -> None:
    modules = package_modules()
    assert len(modules) > 20
    assert rule(modules) == []


def test_nothing_reads_beside_the_repository() -> None:
    folders = ("t5x_like", "configs", "scripts", "tests", "notebooks", ".ci")
    suffixes = {".py", ".sh", ".gin", ".ipynb", ".md", ""}
    paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.suffix in suffixes]
    texts = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in paths if path.is_file()}
    assert {"t5x_like/cli.py", "scripts/test.sh", ".ci/run"} <= set(texts)
    assert reads_outside(texts) == []


def test_setup_names_every_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    named = set(setup["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(REPOSITORY).parts) for path in (REPOSITORY / "t5x_like").rglob("__init__.py")
    }
    assert named == found | {"t5x_like.configs"}


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * 60
WIDE_FUNCTION = "def f(a, b, c, d, e, f, g, h, i): ...\n"


@pytest.mark.parametrize(
    ("rule", "sources", "complaints"),
    [
        (
            upward_imports,
            {"t5x_like.layers.mlp": "def f():\n    from t5x_like.training import step", "t5x_like.training.step": ""},
            ["t5x_like.layers.mlp:2: layers imports t5x_like.training.step from a room below it"],
        ),
        (
            upward_imports,
            {"t5x_like.typing": "import t5x_like.cli", "t5x_like.cli": ""},
            ["t5x_like.typing:1: typing imports t5x_like.cli from a room below it"],
        ),
        (
            upward_imports,
            {"t5x_like.data.tasks": "from t5x_like.models.contract import Model", "t5x_like.models.contract": ""},
            ["t5x_like.data.tasks:1: data imports t5x_like.models.contract from a room below it"],
        ),
        (upward_imports, {"t5x_like.utils": ""}, ["t5x_like.utils: 'utils' is no room; give it a place in ROOMS"]),
        (
            upward_imports,
            {"t5x_like.cli": "from t5x_like import __version__, errors", "t5x_like.errors": "", "t5x_like": ""},
            [],
        ),
        (upward_imports, {"t5x_like": "from t5x_like.cli import main", "t5x_like.cli": ""}, []),
        (
            import_circles,
            {
                "t5x_like.data.a": "from t5x_like.data import b",
                "t5x_like.data.b": "from t5x_like.data.c import C",
                "t5x_like.data.c": "import t5x_like.data.a",
                "t5x_like.data": "",
            },
            ["circle: t5x_like.data.a -> t5x_like.data.b -> t5x_like.data.c -> t5x_like.data.a"],
        ),
        (
            import_circles,
            {"t5x_like.data.a": "from t5x_like.data import b", "t5x_like.data.b": "", "t5x_like.data": ""},
            [],
        ),
        (
            guarded_libraries,
            {"t5x_like.models.x": "from flax import linen as nn", "t5x_like.layers.x": "import flax.linen as nn"},
            ["t5x_like.models.x:1: imports flax.linen, which only layers and architectures may"],
        ),
        (
            guarded_libraries,
            {"t5x_like.data.x": "def f():\n    import flax.linen.spmd", "t5x_like.data.y": "import flax"},
            ["t5x_like.data.x:2: imports flax.linen, which only layers and architectures may"],
        ),
        (
            guarded_libraries,
            {"t5x_like.cli": "from gin import config_parser", "t5x_like.gin_config": "import gin"},
            ["t5x_like.cli:1: imports gin, which only gin_config may"],
        ),
        (any_in_signatures, {"t5x_like.x": "def f(a: list[Any]): ..."}, ["t5x_like.x:1: f says Any"]),
        (any_in_signatures, {"t5x_like.x": "def f() -> typing.Any: ..."}, ["t5x_like.x:1: f says Any"]),
        (any_in_signatures, {"t5x_like.x": "class C:\n    x: Any = 1"}, ["t5x_like.x:2: C.x says Any"]),
        (
            any_in_signatures,
            {"t5x_like.x": "class C:\n    def __call__(self, **k: Any): ..."},
            ["t5x_like.x:2: C.__call__ says Any"],
        ),
        (any_in_signatures, {"t5x_like.x": "def _f(a: Any): ...\nclass _C:\n    def f(self) -> Any: ..."}, []),
        (too_long, {"t5x_like.x": "x = 1\n" * 501}, ["t5x_like.x: 501 lines"]),
        (too_long, {"t5x_like.x": "# long because it is a table\n" + "x = 1\n" * 500}, []),
        (too_long, {"t5x_like.x": LONG_FUNCTION}, ["t5x_like.x:1: f has 61 lines"]),
        (too_long, {"t5x_like.x": LONG_FUNCTION.replace("\n", "  # long because of x\n", 1)}, []),
        (too_long, {"t5x_like.x": 'def f():\n    """' + "said\n" * 99 + '"""\n'}, []),
        (too_long, {"t5x_like.models.x": WIDE_FUNCTION}, ["t5x_like.models.x:1: f has 9 parameters"]),
        (too_long, {"t5x_like.models.x": WIDE_FUNCTION.replace("(a,", "(self,")}, []),
        (too_long, {"t5x_like.commands.x": WIDE_FUNCTION}, []),
    ],
)
def test_a_rule_finds_what_was_planted(rule: Rule, sources: dict[str, str], complaints: list[str]) -> None:
    assert rule(parse(sources)) == complaints


@pytest.mark.parametrize("line", ["cat ../{}/data/x", "Path(root) / '{}' / 'data'", 'HERE / "{}/data"', "/work/{}"])
def test_reading_beside_the_repository_is_found(line: str) -> None:
    line = line.format("shared")
    assert reads_outside({"a.sh": f"ok\n{line}", "b.py": "shared/embedding"}) == [f"a.sh:2: {line}"]
