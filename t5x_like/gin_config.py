"""Gin files without surprises: every mistake is a `UserError` with file:line and the nearest right name.

The language is plain gin's, read by gin's own parser, and a file accepted here means the same to plain gin (the tests
compare the two). Gin's run time is not used: it keeps one config for the whole process, so that loading a second one
silently changes functions built from the first; it ignores what nothing reads; and its errors come without a place.
Here a config is a value: `load` reads, imports and checks, `run` builds and calls.

One thing differs from plain gin, on purpose: a function that is passed on uncalled (`@fn`, no parentheses) takes its
bindings along from where it is passed, instead of looking them up again in the scope of whoever calls it.
"""

import contextvars
import dataclasses
import difflib
import functools
import importlib
import inspect
import io
import pkgutil
import pprint
import sys
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gin import config_parser

from t5x_like.errors import UserError

ALLOWED_PACKAGES = frozenset({"t5x_like", "seqio", "jax", "flax", "optax", "orbax"})
STANDARD_MACROS = (
    "MODEL MIXTURE_OR_TASK_NAME TASK_FEATURE_LENGTHS TRAIN_STEPS BATCH_SIZE MODEL_DIR DROPOUT_RATE VOCABULARY "
    "SAVE_PERIOD EVAL_PERIOD SEED"
).split()
"""A file may define these for runs that do not use them; any other macro, or one on the command line, must be used."""

_MACRO = "gin.macro"


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/name` or, if called, `@scope/name()`; without a scope, that of the place where it stands applies.

    As in gin, `%NAME` is a call of the function `gin.macro(value)` in scope NAME, and `NAME = 1` binds `value` there.
    """

    scope: str
    name: str  # a dotted path, in full once it is linked
    called: bool

    def __repr__(self) -> str:
        return f"%{self.scope}" if self.name == _MACRO else f"@{self.key}{'()' * self.called}"

    @property
    def key(self) -> str:
        """What stands on the left of its bindings in a file."""
        return f"{self.scope}/{self.name}".removeprefix("/").removesuffix(f"/{_MACRO}")


class Binding(NamedTuple):
    """A value and where it was written."""

    value: object
    location: str


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A reference with all that it leads to: a node of the tree that `run` builds."""

    target: Callable[..., object]
    reference: Reference
    location: str
    arguments: Mapping[str, object]

    def __repr__(self) -> str:
        return repr(self.reference)


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """What `load` found to be right and `run` takes.

    Attributes:
      command: the function to run.
      bindings: by scope and name of a function, then by parameter; later files have overridden earlier ones.
      targets: functions and classes by name.
    """

    command: Reference
    bindings: Mapping[tuple[str, str], Mapping[str, Binding]]
    targets: Mapping[str, Callable[..., object]]

    def bound(self, reference: Reference) -> dict[str, Binding]:
        """What a function gets: bindings in scope `a/b` override those in `a`, and these the ones without a scope."""
        bound: dict[str, Binding] = {}
        for scope in _outer_scopes(reference.scope):
            bound |= self.bindings.get((scope, reference.name), {})
        return bound

    def operative_config(self) -> str:
        """A gin file that runs as it is: what the command leads to, and the defaults of all that is called."""
        calls = _follow(self, [self.command])
        aliases: dict[str, str] = {}
        for module in sorted({_module(call.reference.name) for call in calls} - {""}):
            last = module.rpartition(".")[2]
            aliases[module] = module.replace(".", "_") if last in aliases.values() else last

        def local(name: str) -> str:
            return aliases[_module(name)] + name.removeprefix(_module(name))

        macros: dict[str, object] = {}
        blocks: dict[str, dict[str, object]] = {}
        for call in calls:
            for scope in _outer_scopes(call.reference.scope):
                owner = _rename(local, dataclasses.replace(call.reference, scope=scope))
                block = macros if owner.name == _MACRO else blocks.setdefault(owner.key, {})
                if call.reference.called and not scope:
                    block |= _defaults(call.target)
                for name, binding in self.bindings.get((scope, call.reference.name), {}).items():
                    value = _map(functools.partial(_rename, local), binding.value)
                    block[scope if block is macros else name] = value

        def lines(block: Mapping[str, object], indent: str) -> list[str]:
            text = functools.partial(pprint.pformat, width=100, sort_dicts=False)
            return [f"{indent}{name} = {text(value)}" for name, value in sorted(block.items())]

        result = ["from __gin__ import dynamic_registration"]
        for module, alias in aliases.items():
            parent, _, last = module.rpartition(".")
            result.append(
                f"{f'from {parent} ' * bool(parent)}import {last}{f' as {alias}' * (alias != last)}"
            )
        result += ["", *lines(macros, "")]
        for key, block in sorted(blocks.items()):
            result += ["", f"{key}:", *lines(block, "  ")] if block else []
        return "\n".join(result) + "\n"


def load(
    command: Callable[..., object],
    files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    allow_imports: Sequence[str] = (),
    roots: Sequence[str] = (),
) -> LoadedConfig:
    """Reads gin files, imports what they name, and checks all of it; builds nothing.

    Args:
      command: the function that `run` will call.
      files: paths; later files override earlier. Looked for in `search_paths`, in the current folder, and among the
        configs of t5x_like (`models/t5_1_1_small.gin`, or with `configs/` before it).
      bindings: `NAME=value` or `scope/module.function.parameter=value`, which override the files. Modules are called
        what the files call them, and a value that is no literal, macro or reference is a string.
      search_paths: folders for `files` and their includes.
      allow_imports: top-level packages that files may import besides `ALLOWED_PACKAGES`.
      roots: dotted names of other commands whose bindings count as used, so that one file can serve several.

    Raises:
      UserError: a mistake in a file or binding; the message starts with its place.
    """
    loader = _Loader(ALLOWED_PACKAGES | {name.partition(".")[0] for name in allow_imports})
    loader.symbols[command.__module__.rpartition(".")[2]] = command.__module__
    for file in files:
        loader.add_file(file, _search_folders(search_paths), f"--gin_file={file}: ")
    for binding in bindings:
        loader.add_command_line(binding)
    loader.import_modules()
    root = Reference("", loader.add(f"{command.__module__}.{command.__qualname__}", command), True)
    config = LoadedConfig(root, loader.link(), loader.targets)
    _check_all_used(config, [Reference("", name, True) for name in roots if name in loader.targets])
    return config


_running: contextvars.ContextVar[LoadedConfig | None] = contextvars.ContextVar("running", default=None)


def run(config: LoadedConfig, **arguments: object) -> object:
    """Builds what the command's parameters are bound to and calls it; `arguments` (e.g. `dry_run`) override the config.

    Raises:
      UserError: a required parameter is not bound, or a constructor refused what it was given.
    """
    command = _follow(config, [config.command])[-1]
    _check_complete(command, command.arguments | arguments)
    bound = {name: value for name, value in command.arguments.items() if name not in arguments}
    built = _map(_build, bound)
    token = _running.set(config)
    try:
        return command.target(**built, **arguments)
    finally:
        _running.reset(token)


def operative_config() -> str | None:
    """The operative config of the command that `run` is running; `None` outside of one."""
    config = _running.get()
    return config.operative_config() if config else None


def nearest(name: str, candidates: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no candidate is close; upper and lower case count as the same."""
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    match = difflib.get_close_matches(name.lower(), by_lower_case, 1)
    return f" Did you mean {by_lower_case[match[0]]!r}?" if match else ""


# ---- Reading and linking: from files to bindings of functions


class _Delegate:
    """What gin's parser makes of `@` and `%`."""

    def configurable_reference(self, scoped_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, name: str) -> Reference:
        return Reference(name, _MACRO, True)


def _macro(value: object) -> object:
    return value


class _Statement(NamedTuple):
    """A binding as parsed, and what its file calls the modules that it imports."""

    parsed: config_parser.BindingStatement
    symbols: Mapping[str, str]
    location: str


class _Loader:
    """Collects statements in the order in which they take effect, then imports, then finds what names mean."""

    def __init__(self, allowed: frozenset[str]) -> None:
        self.allowed = allowed
        self.symbols: dict[str, str] = {}  # for the command line: those of all files
        self.statements: list[_Statement] = []
        self.imports: list[tuple[str, str]] = []  # module, location
        self.targets: dict[str, Callable[..., object]] = {_MACRO: _macro}

    def add_file(
        self, file: str, folders: Sequence[Path], asked_by: str, inside: tuple[Path, ...] = ()
    ) -> None:
        """Reads a file, with its includes where they stand; as in gin, a file sees its own imports only."""
        path = _find(file, folders, asked_by)
        if path in inside:
            raise UserError(f"{asked_by}{file} includes itself.")
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        symbols: dict[str, str] = {}
        for parsed in _parse(path.read_text("utf-8"), str(shown)):
            location = f"{shown}:{parsed.location.line_num}"
            if isinstance(parsed, config_parser.IncludeStatement):
                self.add_file(parsed.filename, folders, f"{location}: ", (*inside, path))
            elif isinstance(parsed, config_parser.BindingStatement):
                self.statements.append(_Statement(parsed, symbols, location))
            elif isinstance(parsed, config_parser.ImportStatement):
                self.check_allowed(parsed.module, location)
                self.imports.append((parsed.module, location))
                whole_path = parsed.is_from or parsed.alias
                symbols[parsed.bound_name()] = (
                    parsed.module if whole_path else parsed.module.partition(".")[0]
                )
        self.symbols |= symbols

    def add_command_line(self, text: str) -> None:
        """Reads `NAME=value`; whatever gin's grammar does not know as a value is a string."""
        key, equals, value = text.partition("=")
        parsed = _parse_binding(f"{key} = {value}")
        if parsed is None and not value.startswith(("@", "%")):
            parsed = _parse_binding(f"{key} = {value!r}")
        if parsed is None or not equals:
            raise UserError(
                f"--gin.{text}: not a binding. Write --gin.NAME=value or --gin.module.function.parameter=value, "
                "where the value is a literal, %MACRO, @module.function() or plain text."
            )
        self.statements.append(_Statement(parsed, self.symbols, f"--gin.{text}"))

    def check_allowed(self, module: str, location: str) -> None:
        top = module.partition(".")[0]
        if top not in self.allowed | {"__gin__"}:
            raise UserError(
                f"{location}: {module!r} may not be used: gin files run code, and only "
                f"{', '.join(sorted(self.allowed))} are trusted. If you trust it, add --allow_import={top}."
            )

    def import_modules(self) -> None:
        for module, location in self.imports:
            if module == "__gin__.dynamic_registration":  # always on here
                continue
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                missing = error.name or ""
                if not f"{module}.".startswith(f"{missing}."):
                    raise UserError(f"{location}: {module} needs {missing}, not installed.") from error
                parent = missing.rpartition(".")[0]
                siblings = pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", []))
                hint = nearest(missing, [f"{parent}.{sibling.name}" for sibling in siblings])
                raise UserError(f"{location}: there is no module {missing!r}.{hint}") from error

    def link(self) -> dict[tuple[str, str], dict[str, Binding]]:
        """Finds all names; the last of several bindings of one parameter wins."""
        bindings: dict[tuple[str, str], dict[str, Binding]] = {}
        for parsed, symbols, location in self.statements:
            find = functools.partial(self.find, symbols=symbols, location=location)
            value = _map(functools.partial(_rename, find), parsed.value)
            scope, name, parameter = parsed.scope, parsed.selector, parsed.arg_name
            if parameter:
                name = find(name)
                _check_parameter(self.targets[name], name, parameter, location)
            else:
                scope, name, parameter = Reference(scope, name, False).key, _MACRO, "value"
            bindings.setdefault((scope, name), {})[parameter] = Binding(value, location)
        return bindings

    def find(self, name: str, symbols: Mapping[str, str], location: str) -> str:
        """Follows a dotted path from an imported module, but into no module whose import would be refused."""
        head, *attributes = name.split(".")
        if head not in symbols:
            raise UserError(f"{location}: no import gives {head!r}, of {name!r}.{nearest(head, symbols)}")
        path, found = symbols[head], sys.modules[symbols[head]]
        for attribute in attributes:
            if attribute.startswith("__") or not hasattr(found, attribute):
                public = [known for known in dir(found) if not known.startswith("_")]
                raise UserError(f"{location}: {path} has no {attribute!r}.{nearest(attribute, public)}")
            path, found = f"{path}.{attribute}", getattr(found, attribute)
            if inspect.ismodule(found):
                self.check_allowed(found.__name__, location)
        if not callable(found):
            raise UserError(f"{location}: {name} is a {type(found).__name__}, not a function or class.")
        return self.add(path, found)

    def add(self, path: str, target: Callable[..., object]) -> str:
        """Names a function or class; one that can be reached by several paths is called by the first."""
        path = next((known for known, other in self.targets.items() if other == target), path)
        self.targets.setdefault(path, target)
        return path


def _search_folders(search_paths: Sequence[str]) -> list[Path]:
    package = Path(__file__).parent
    home = package if (package / "configs").is_dir() else package.parent  # installed, or in the repository
    return [*(Path(path).absolute() for path in search_paths), Path.cwd(), home, home / "configs"]


def _find(file: str, folders: Sequence[Path], asked_by: str) -> Path:
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    shipped = [str(path.relative_to(folders[-1])) for path in folders[-1].glob("*/*.gin")]
    beside = [str(Path(file).with_name(p.name)) for f in folders for p in (f / file).parent.glob("*.gin")]
    looked = ", ".join(dict.fromkeys(map(str, folders)))
    raise UserError(f"{asked_by}no file {file!r} in {looked}.{nearest(file, shipped + beside)}")


def _parse(text: str, path: str) -> Iterator[NamedTuple]:
    """Gin's statements; a block comes as its declaration, then its bindings."""
    try:
        yield from config_parser.ConfigParser(io.StringIO(text), _Delegate())
    except (SyntaxError, tokenize.TokenError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        content = dict(enumerate(text.splitlines(), 1)).get(line, "").strip()
        message = " ".join(str(error.args[0]).split())
        raise UserError(f"{path}:{line}: {content!r} is not gin: {message}") from None


def _parse_binding(text: str) -> config_parser.BindingStatement | None:
    try:
        (parsed,) = _parse(text, "")
    except ValueError:  # not gin (UserError), or not just one statement
        return None
    return parsed if isinstance(parsed, config_parser.BindingStatement) else None


# ---- Checking: from bindings to a tree of calls


def _check_parameter(target: Callable[..., object], name: str, parameter: str, location: str) -> None:
    parameters = _parameters(target)
    known = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    anything_goes = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if parameter not in known and not anything_goes:
        hint = nearest(parameter, known) or f" It has {', '.join(known)}."
        raise UserError(f"{location}: {_short(name)} has no parameter {parameter!r}.{hint}")


def _follow(config: LoadedConfig, roots: Iterable[Reference]) -> list[Call]:
    """Everything that references lead to, parts before wholes; checks types on the way, and refuses circles."""
    calls: list[Call] = []

    def call(reference: Reference, location: str, path: tuple[str, ...]) -> object:
        if repr(reference) in path:
            circle = " -> ".join((*path, repr(reference)))
            raise UserError(f"{location}: {circle} leads back to itself.")
        target, arguments = config.targets[reference.name], {}
        for name, binding in config.bound(reference).items():
            arguments[name] = value(binding, reference.scope, (*path, repr(reference)))
            _check_type(target, f"{_short(reference.name)}.{name}", arguments[name], origin(binding))
        calls.append(Call(target, reference, location, arguments))
        return arguments["value"] if reference.name == _MACRO and arguments else calls[-1]

    def value(binding: Binding, scope: str, path: tuple[str, ...]) -> object:
        def follow(leaf: object) -> object:
            if not isinstance(leaf, Reference):
                return leaf
            return call(dataclasses.replace(leaf, scope=leaf.scope or scope), binding.location, path)

        return _map(follow, binding.value)

    def origin(binding: Binding) -> str:
        """Where a value comes from; for a macro, where that is defined."""
        macro = isinstance(binding.value, Reference) and binding.value.name == _MACRO
        inner = config.bound(binding.value).get("value") if macro else None
        return origin(inner) if inner else binding.location

    for root in roots:
        call(root, "", ())
    return calls


def _check_all_used(config: LoadedConfig, roots: Iterable[Reference]) -> None:
    """Compares what is bound with what the commands lead to."""
    macros = {s: bound["value"].location for (s, name), bound in config.bindings.items() if name == _MACRO}
    spare = [n for n in STANDARD_MACROS if n in macros and not macros[n].startswith("--gin.")]
    calls = _follow(config, [config.command, *roots, *(Reference(n, _MACRO, True) for n in spare)])
    scopes: dict[str, set[str]] = {_MACRO: set()}
    for call in calls:
        scopes.setdefault(call.reference.name, set()).update(_outer_scopes(call.reference.scope))

    unused = {name: location for name, location in macros.items() if name not in scopes[_MACRO]}
    empty = {c.reference.scope: c.location for c in calls if c.reference.name == _MACRO and not c.arguments}
    undefined = {name: location for name, location in empty.items() if name != "gin.REQUIRED"}
    for name, location in unused.items():
        hint = nearest(name, undefined or scopes[_MACRO])
        if hint or not undefined:
            raise UserError(f"{location}: nothing uses the macro {name}.{hint}")
    for name, location in undefined.items():
        hint = f"{nearest(name, macros)} Set it with --gin.{name}=value."
        raise UserError(f"{location}: nothing defines the macro {name}.{hint}")
    for (scope, name), bound in config.bindings.items():
        location, short = next(iter(bound.values())).location, _short(name)
        if name not in scopes:
            hint = f"{nearest(name, scopes)} Refer to it (@{short}()), or remove this."
            raise UserError(f"{location}: nothing uses {short}.{hint}")
        if scope not in scopes[name]:
            known = sorted(scopes[name] - {""})
            hint = nearest(scope, known) or f" Its scopes are: {', '.join(known) or 'none'}."
            raise UserError(f"{location}: nothing uses {short} in scope {scope!r}.{hint}")


def _check_complete(call: Call, arguments: Mapping[str, object]) -> None:
    parameters = _parameters(call.target).items()
    missing = [name for name, p in parameters if p.default is p.empty and name not in arguments]
    if missing and call.reference.name == _MACRO:
        raise UserError(f"{call.location}: needs a value. Bind it in a later file or on the command line.")
    if missing:
        short, place = _short(call.reference.name), f"{call.location}: " * bool(call.location)
        flags = " ".join(f"--gin.{short}.{name}=value" for name in missing)
        raise UserError(f"{place}{short} needs {', '.join(missing)}. Bind it in a gin file or with {flags}.")


def _check_type(target: Callable[..., object], name: str, value: object, location: str) -> None:
    parameter = name.rpartition(".")[2]
    annotation, declared = _hints(target).get(parameter), _parameters(target).get(parameter)
    default = declared.default if declared else inspect.Parameter.empty
    if not _accepts(annotation, value) and not _same(default, value):
        expected = inspect.formatannotation(annotation)
        raise UserError(f"{location}: {name} takes {expected}, not {value!r}.")


def _accepts(annotation: object, value: object) -> bool:
    """Whether a literal fits an annotation made of Python's plain types; any other annotation accepts all."""
    origin, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if isinstance(value, Call):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(arg, value) for arg in args)
    if origin is typing.Literal:
        return any(_same(arg, value) for arg in args)
    if origin is tuple and args and args[-1] is not ...:
        return type(value) is tuple and len(value) == len(args) and all(map(_accepts, args, value))
    if origin in (list, tuple, Sequence):
        kinds = (list, tuple) if origin is Sequence else (origin,)
        return type(value) in kinds and all(_accepts(arg, item) for arg in args[:1] for item in value)
    if origin in (dict, Mapping):
        return type(value) is dict and (not args or all(all(map(_accepts, args, i)) for i in value.items()))
    if origin is float:
        return type(value) in (float, int)
    return type(value) is origin if origin in (bool, int, str, types.NoneType) else True


def _same(left: object, right: object) -> bool:
    return type(left) is type(right) and left == right


def _hints(target: Callable[..., object]) -> Mapping[str, object]:
    """Annotations, without those that cannot be resolved (names imported for type checkers only)."""
    owner = target.__init__ if inspect.isclass(target) and not dataclasses.is_dataclass(target) else target
    try:
        return typing.get_type_hints(owner)
    except Exception:
        hints = {name: p.annotation for name, p in _parameters(target).items()}
        return {name: hint for name, hint in hints.items() if not isinstance(hint, str)}


def _parameters(target: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return {}


def _defaults(target: Callable[..., object]) -> dict[str, object]:
    """Parameters whose defaults can be written in a gin file."""
    defaults = {name: p.default for name, p in _parameters(target).items()}
    read = {name: _parse_binding(f"x = {default!r}") for name, default in defaults.items()}
    return {n: value for n, value in defaults.items() if read[n] and _same(read[n].value, value)}


# ---- Building, and what all parts need


def _build(value: object) -> object:
    """Calls what is to be called, from the inside out."""
    if not isinstance(value, Call):
        return value
    arguments = _map(_build, value.arguments)
    if not value.reference.called:
        return functools.partial(value.target, **arguments) if arguments else value.target
    _check_complete(value, arguments)
    try:
        return value.target(**arguments)
    except (TypeError, ValueError, LookupError, OSError) as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{value.location}: @{_short(value.reference.name)}(): {kind}{error}") from error


def _map(function: Callable[[object], object], value: object) -> object:
    """A copy of a gin value with `function` applied to whatever is not a container."""
    if isinstance(value, dict):
        return {_map(function, key): _map(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(function, item) for item in value)
    return function(value)


def _rename(rename: Callable[[str], str], leaf: object) -> object:
    keep = not isinstance(leaf, Reference) or leaf.name == _MACRO
    return leaf if keep else dataclasses.replace(leaf, name=rename(leaf.name))


def _outer_scopes(scope: str) -> list[str]:
    """`a/b` -> ["", "a", "a/b"]."""
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:count]) for count in range(len(parts) + 1)]


def _short(name: str) -> str:
    """How a file that imports the module of a function calls it."""
    return ".".join(name.split(".")[-2:])


def _module(name: str) -> str:
    """The module part of a dotted name; nothing for a macro."""
    while name and name not in sys.modules:
        name = name.rpartition(".")[0]
    return name
