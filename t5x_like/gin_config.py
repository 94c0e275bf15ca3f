# long because reading, checking and building share one vocabulary; a file of each would import the others
"""Gin files without surprises: every mistake is a `UserError` with file:line and the nearest right name.

The language is plain gin's, read by gin's own parser, and means what it means to plain gin (the tests compare them).
Gin's run time is not used: it has one config for the whole process, so that loading a second one changes functions
built from the first; it ignores what nothing reads; and its errors do not say where. Here a config is a value: `load`
reads, imports and checks, `run` builds and calls. One thing differs, on purpose: a function that is passed on uncalled
(`@fn`, no parentheses) takes its bindings along, instead of looking them up in the scope of whoever calls it later.
"""

import contextlib
import contextvars
import dataclasses
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

from gin import config_parser

from t5x_like.errors import UserError, nearest

ALLOWED_PACKAGES = frozenset({"t5x_like", "seqio", "jax", "flax", "optax", "orbax"})
STANDARD_MACROS = frozenset(
    {"MODEL", "MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS", "TRAIN_STEPS", "BATCH_SIZE", "MODEL_DIR"}
    | {"DROPOUT_RATE", "VOCABULARY", "SAVE_PERIOD", "EVAL_PERIOD", "SEED"}
)
"""Files may define these for runs that do not use them; any other, or on the command line, must be used."""

_MACRO = "gin.macro"


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/name` or, if called, `@scope/name()`; without a scope, that of where it stands applies.

    As in gin, `%NAME` calls a function `gin.macro(value)` in scope NAME; `NAME = 1` binds its value there.
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


class Binding(typing.NamedTuple):
    """A value and where it was written."""

    value: object
    location: str


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A reference with all that it leads to: a node of the tree that `run` builds."""

    target: Callable[..., object]
    reference: Reference
    location: str
    arguments: dict[str, object]


@dataclasses.dataclass(frozen=True)
class LoadedConfig:
    """What `load` found to be right and `run` takes."""

    command: Reference
    bindings: Mapping[tuple[str, str], Mapping[str, Binding]]  # by scope and name of a function, by parameter
    targets: Mapping[str, Callable[..., object]]  # functions and classes by name
    imports: Sequence[str]  # modules; some register things, so that they count even when nothing in them is bound

    def bound(self, reference: Reference) -> dict[str, Binding]:
        """What a function gets: the scope `a/b` overrides `a`, which overrides no scope."""
        layers = (self.bindings.get((scope, reference.name), {}) for scope in _outer_scopes(reference.scope))
        return {name: binding for layer in layers for name, binding in layer.items()}

    def operative_config(self) -> str:
        """A gin file that runs as it is: what the command leads to, and defaults of all that is called."""
        calls = _follow(self, [self.command])
        names = {call.reference.name for call in calls} - {_MACRO}
        modules = sorted({*self.imports, *map(_module, names)})
        tails = [_tail(module, 1) for module in modules]
        aliases = {m: _tail(m, 1) if tails.count(_tail(m, 1)) == 1 else m.replace(".", "_") for m in modules}
        local = {name: aliases[_module(name)] + name.removeprefix(_module(name)) for name in names} | {_MACRO: _MACRO}

        settings: dict[str, object] = {}
        for call in calls:
            for scope in _outer_scopes(call.reference.scope):
                owner = Reference(scope, local[call.reference.name], False)
                here = self.bindings.get((scope, call.reference.name), {})
                bound = {n: b.value for n, b in self.bound(call.reference).items() if b is here.get(n)}
                defaults = _defaults(call.target) if call.reference.called and not scope else {}
                for name, value in (defaults | bound).items():
                    key = owner.key if owner.name == _MACRO else f"{owner.key}.{name}"
                    settings[key] = _map(functools.partial(_rename, local.__getitem__), value)

        lines = ["from __gin__ import dynamic_registration"]
        lines += [f"import {module}" + f" as {alias}" * (alias != module) for module, alias in aliases.items()]
        group = None
        for key, value in sorted(settings.items(), key=lambda item: ("." in item[0], item)):
            lines += [""] * (group != (group := key.rpartition(".")[0]))
            lines.append(f"{key} = {pprint.pformat(value, width=100, sort_dicts=False)}")
        return "\n".join(lines) + "\n"


def load(
    command: Callable[..., object] | str,
    files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    allow_imports: Sequence[str] = (),
    roots: Sequence[str] = (),
) -> LoadedConfig:
    """Reads gin files, imports what they name, and checks all of it; builds nothing.

    Args:
      command: the function that `run` will call; one that is given by its dotted name is imported after files are read.
      files: later ones override earlier; looked for in `search_paths`, here, and in t5x_like's own `configs/`.
      bindings: `NAME=value` or `scope/module.function.parameter=value`, overriding files and naming modules as they do;
        a value that is no literal, macro or reference is a string.
      search_paths: folders for `files` and their includes.
      allow_imports: top-level packages that files may import besides `ALLOWED_PACKAGES`.
      roots: dotted names of other commands whose bindings count as used, so that one file can serve several.

    Raises:
      UserError: a mistake in a file or binding; the message starts with its place.
    """
    package = Path(__file__).parent
    home = package if (package / "configs").is_dir() else package.parent  # installed, or in the repository
    folders = [*(Path(path).absolute() for path in search_paths), Path.cwd(), home, home / "configs"]
    loader = _Loader(folders, ALLOWED_PACKAGES | {name.partition(".")[0] for name in allow_imports})
    for file in files:
        loader.add_file(file, f"--gin_file={file}: ")
    for binding in bindings:
        loader.add_command_line(binding)
    loader.import_modules()
    target: Callable[..., object] = pkgutil.resolve_name(command) if isinstance(command, str) else command
    loader.symbols.setdefault(_tail(target.__module__, 1), target.__module__)
    root = Reference("", loader.add(f"{target.__module__}.{target.__qualname__}", target), True)
    config = LoadedConfig(root, loader.link(), loader.targets, [module for module, _ in loader.imports])
    others = [Reference("", name, True) for name in roots if name in loader.targets]
    _check_all_used(config, others, loader.overridden)
    return config


_running: contextvars.ContextVar[LoadedConfig | None] = contextvars.ContextVar("running", default=None)


def run(config: LoadedConfig, instead: Callable[..., object] | None = None, **arguments: object) -> object:
    """Builds what the parameters of the command are bound to, overridden by `arguments`, and calls it.

    Args:
      config: what `load` made.
      instead: called with those of the command's parameters that it has too; only they are built.
      arguments: by parameter.

    Raises:
      UserError: a required parameter is not bound, or a constructor refused what it was given.
    """
    command = _follow(config, [config.command])[-1]
    target, takes = instead or command.target, _parameters(instead or command.target)
    bound = {n: v for n, v in command.arguments.items() if n not in arguments and (not instead or n in takes)}
    _check_complete(dataclasses.replace(command, target=target), bound | arguments)
    token = _running.set(config)
    try:
        return target(**{name: _map(_build, value) for name, value in bound.items()}, **arguments)
    finally:
        _running.reset(token)


def operative_config() -> str:
    """The operative config of the command that `run` is running; empty outside of one."""
    config = _running.get()
    return config.operative_config() if config else ""


class _Delegate:
    """What gin's parser makes of `@` and `%`."""

    def configurable_reference(self, scoped_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, name: str) -> Reference:
        return Reference(name, _MACRO, True)


class _Loader:
    """Collects statements in the order in which they take effect, imports, then finds what names mean."""

    def __init__(self, folders: Sequence[Path], allowed: frozenset[str]) -> None:
        self.folders, self.allowed = folders, allowed
        self.symbols: dict[str, str] = {}  # for the command line: those of all files
        self.statements: list[tuple[config_parser.BindingStatement, Mapping[str, str], str]] = []
        self.imports: list[tuple[str, str]] = []  # module, location
        self.targets: dict[str, Callable[..., object]] = {_MACRO: lambda value: value}
        self.overridden: list[Reference] = []  # what they lead to counts as used: an override orphans nothing

    def add_file(self, file: str, asked_by: str, inside: tuple[Path, ...] = ()) -> None:
        """Reads a file, with its includes where they stand; as in gin, a file sees its own imports only."""
        path = _find(file, self.folders, asked_by)
        if path in inside:
            raise UserError(f"{asked_by}{file} includes itself.")
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        symbols: dict[str, str] = {}
        for parsed in _parse(path.read_text("utf-8", "replace"), str(shown)):
            location = f"{shown}:{parsed.location.line_num}"
            if isinstance(parsed, config_parser.IncludeStatement):
                self.add_file(parsed.filename, f"{location}: ", (*inside, path))
            elif isinstance(parsed, config_parser.BindingStatement):
                self.statements.append((parsed, symbols, location))
            elif getattr(parsed, "module", "__gin__.dynamic_registration") != "__gin__.dynamic_registration":
                self.check_allowed(parsed.module, location)
                self.imports.append((parsed.module, location))
                symbols[parsed.bound_name()] = parsed.module if parsed.alias else parsed.partial_path()
        self.symbols |= symbols

    def add_command_line(self, text: str) -> None:
        """Reads `NAME=value`; whatever gin's grammar does not know as a value is a string."""
        key, equals, value = text.partition("=")
        parsed = _parse_binding(f"{key} = {value}")
        if parsed is None and not value.startswith(("@", "%")):
            parsed = _parse_binding(f"{key} = {value!r}")
        if parsed is None or not equals:
            raise UserError(f"--gin.{text}: a binding is --gin.NAME=value or --gin.module.function.parameter=value.")
        self.statements.append((parsed, self.symbols, f"--gin.{text}"))

    def check_allowed(self, module: str, location: str) -> None:
        top = module.partition(".")[0]
        if top not in self.allowed:
            trusted = ", ".join(sorted(self.allowed))
            why = f"gin files run code, and only {trusted} are trusted. If you trust it, add --allow_import={top}."
            raise UserError(f"{location}: {module!r} may not be used: {why}")

    def import_modules(self) -> None:
        for module, location in self.imports:
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                parent, _, missing = (error.name or "").rpartition(".")
                siblings = pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", []))
                hint = nearest(missing, (sibling.name for sibling in siblings))
                raise UserError(f"{location}: cannot import {module}: {error}.{hint}") from error

    def link(self) -> dict[tuple[str, str], dict[str, Binding]]:
        """Finds all names; the last of several bindings of one parameter wins."""
        bindings: dict[tuple[str, str], dict[str, Binding]] = {}
        for parsed, symbols, location in self.statements:
            find = functools.partial(self.find, symbols=symbols, location=location)
            value = _map(functools.partial(_rename, find), parsed.value)
            if parsed.arg_name:
                key, parameter = (parsed.scope, find(parsed.selector)), parsed.arg_name
            else:
                key, parameter = (Reference(parsed.scope, parsed.selector, False).key, _MACRO), "value"
            block = bindings.setdefault(key, {})
            if parameter in block:
                _map(functools.partial(self.note_overridden, key[0]), block[parameter].value)
            block[parameter] = Binding(value, location)
        return bindings

    def note_overridden(self, scope: str, leaf: object) -> None:
        if isinstance(leaf, Reference):
            self.overridden.append(dataclasses.replace(leaf, scope=leaf.scope or scope))

    def find(self, name: str, symbols: Mapping[str, str], location: str) -> str:
        """Follows a dotted path from an imported module, into none that may not be imported."""
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
        path = next((known for known, other in self.targets.items() if other is target), path)
        self.targets.setdefault(path, target)
        return path


def _find(file: str, folders: Sequence[Path], asked_by: str) -> Path:
    if path := next((folder / file for folder in folders if (folder / file).is_file()), None):
        return path
    shipped = [str(path.relative_to(folders[-1])) for path in folders[-1].glob("*/*.gin")]
    beside = [str(Path(file).with_name(p.name)) for f in folders for p in (f / file).parent.glob("*.gin")]
    looked = ", ".join(dict.fromkeys(map(str, folders)))
    raise UserError(f"{asked_by}no file {file!r} in {looked}.{nearest(file, shipped + beside)}")


def _parse(text: str, path: str) -> Iterator[typing.Any]:
    """Gin's statements; a block comes as its declaration, then its bindings."""
    try:
        parser = config_parser.ConfigParser(io.StringIO(text), _Delegate())
        yield from parser
    except (SyntaxError, tokenize.TokenError, TypeError) as error:  # TypeError: a dictionary with a list as key
        here = error.args[1] if len(error.args) > 1 else parser.current_token.start
        line = getattr(error, "lineno", None) or here[0]
        content = dict(enumerate(text.splitlines(), 1)).get(line, "").strip()
        message = " ".join(str(error.args[0]).split())
        raise UserError(f"{path}:{line}: {content!r} is not gin: {message}") from None


def _parse_binding(text: str) -> config_parser.BindingStatement | None:
    try:
        (parsed,) = _parse(text, "")
    except ValueError:  # not gin (UserError), or not just one statement
        return None
    return parsed if isinstance(parsed, config_parser.BindingStatement) else None


def _follow(config: LoadedConfig, roots: Iterable[Reference]) -> list[Call]:
    """Everything that references lead to, parts before wholes; checks arguments, and refuses circles."""
    calls: list[Call] = []

    def follow(scope: str, location: str, path: tuple[Reference, ...], leaf: object) -> object:
        if not isinstance(leaf, Reference):
            return leaf
        reference = dataclasses.replace(leaf, scope=leaf.scope or scope)
        if reference in path:
            circle = " -> ".join(map(repr, (*path[path.index(reference) :], reference)))
            raise UserError(f"{location}: {circle} leads back to itself.")
        call = Call(config.targets[reference.name], reference, location, {})
        for name, binding in config.bound(reference).items():
            inside = functools.partial(follow, reference.scope, binding.location, (*path, reference))
            call.arguments[name] = _map(inside, binding.value)
            _check_argument(call, name, binding, _origin(config, binding))
        calls.append(call)
        return call.arguments["value"] if reference.name == _MACRO and call.arguments else call

    for root in roots:
        follow("", "", (), root)
    return calls


def _origin(config: LoadedConfig, binding: Binding) -> Binding:
    """For a macro, the binding that defines it."""
    value = binding.value
    inner = config.bound(value).get("value") if isinstance(value, Reference) and value.name == _MACRO else None
    return _origin(config, inner) if inner else binding


def _check_all_used(config: LoadedConfig, roots: Sequence[Reference], overridden: Iterable[Reference]) -> None:
    """Compares what is bound with what the commands lead to."""
    macros = {s: bound["value"].location for (s, name), bound in config.bindings.items() if name == _MACRO}
    spare = [name for name in macros if name in STANDARD_MACROS and not macros[name].startswith("--gin.")]
    spares = (Reference(name, _MACRO, True) for name in spare)
    used: dict[str, set[str]] = {_MACRO: set()}  # the scopes in which something is reached
    for call in _follow(config, [config.command, *roots, *overridden, *spares]):
        used.setdefault(call.reference.name, set()).update(_outer_scopes(call.reference.scope))

    for name, location in macros.items():
        if name not in used[_MACRO]:
            raise UserError(f"{location}: nothing uses the macro {name}.{nearest(name, used[_MACRO])}")
    for call in _follow(config, [config.command, *roots]):
        name = call.reference.scope
        if call.reference.name == _MACRO and not call.arguments and name != "gin.REQUIRED":
            hint = f"{nearest(name, macros)} Set it with --gin.{name}=value."
            raise UserError(f"{call.location}: nothing defines the macro {name}.{hint}")
    for (scope, name), bound in config.bindings.items():
        location, short = next(iter(bound.values())).location, _tail(name, 2)
        if name not in used:
            hint = nearest(_tail(name, 1), [_tail(other, 1) for other in used])
            raise UserError(f"{location}: nothing uses {short}.{hint} Refer to it (@{short}()), or remove this.")
        if scope not in used[name]:
            known = sorted(used[name] - {""})
            hint = nearest(scope, known) or f" Its scopes are: {', '.join(known) or 'none'}."
            raise UserError(f"{location}: nothing uses {short} in scope {scope!r}.{hint}")


def _check_complete(call: Call, given: Iterable[str]) -> None:
    missing = [n for n, p in _parameters(call.target).items() if p.default is p.empty and n not in given]
    if missing and call.reference.name == _MACRO:
        raise UserError(f"{call.location}: a value is required here. Set it in a later file or on the command line.")
    if missing:
        short, place = _tail(call.reference.name, 2), f"{call.location}: " * bool(call.location)
        flags = " ".join(f"--gin.{short}.{name}=value" for name in missing)
        raise UserError(f"{place}{short} needs {', '.join(missing)}. Bind it in a gin file or with {flags}.")


def _check_argument(call: Call, parameter: str, binding: Binding, written: Binding) -> None:
    parameters = _parameters(call.target)
    short, value = _tail(call.reference.name, 2), call.arguments[parameter]
    if parameters and parameter not in parameters:
        hint = nearest(parameter, parameters) or f" It has {', '.join(parameters)}."
        raise UserError(f"{binding.location}: {short} has no parameter {parameter!r}.{hint}")
    if (
        (known := parameters.get(parameter))
        and not _accepts(known.annotation, value)
        and not _same(known.default, value)
    ):
        expected = inspect.formatannotation(known.annotation)
        raise UserError(f"{written.location}: {short}.{parameter} takes {expected}, not {written.value!r}.")


def _accepts(annotation: object, value: object) -> bool:
    """Whether a literal fits an annotation made of Python's plain types; any other accepts all."""
    origin, args = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if isinstance(value, Call):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(arg, value) for arg in args)
    if origin is typing.Literal:
        return any(_same(arg, value) for arg in args)
    if origin is tuple and args and args[-1] is not ...:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(_accepts, args, value))
    if origin in (list, tuple, Sequence):
        items = value if isinstance(value, list | tuple) and origin in (type(value), Sequence) else None
        return items is not None and all(_accepts(arg, item) for arg in args[:1] for item in items)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(all(map(_accepts, args, item)) for item in value.items())
    plain = origin in (bool, int, float, str, types.NoneType)
    return not plain or type(value) is origin or (origin is float and type(value) is int)


def _same(left: object, right: object) -> bool:
    return type(left) is type(right) and left == right


def _parameters(target: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """What can be bound; nothing if that is not known, or anything can be."""
    parameters: Mapping[str, inspect.Parameter] = {}
    for eval_str in (False, True):  # some built-in functions have no signature, and some annotations no value
        with contextlib.suppress(Exception):
            parameters = inspect.signature(target, eval_str=eval_str).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {}
    return {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _defaults(target: Callable[..., object]) -> dict[str, object]:
    """Parameters whose defaults can be written in a gin file."""
    defaults = {}
    for name, p in _parameters(target).items():
        written = _parse_binding(f"x = {p.default!r}")
        if written and _same(written.value, p.default):
            defaults[name] = p.default
    return defaults


def _build(value: object) -> object:
    """Calls what is to be called, from the inside out."""
    if not isinstance(value, Call):
        return value
    arguments = {name: _map(_build, argument) for name, argument in value.arguments.items()}
    if not value.reference.called:
        return functools.partial(value.target, **arguments) if arguments else value.target
    _check_complete(value, arguments)
    try:
        return value.target(**arguments)
    except (TypeError, ValueError, LookupError, OSError) as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{value.location}: @{_tail(value.reference.name, 2)}(): {kind}{error}") from error


def _map(function: Callable[[object], object], value: object) -> object:
    """A copy of a gin value with `function` applied to whatever is not a container."""
    if isinstance(value, dict):
        return {_map(function, key): _map(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(function, item) for item in value)
    return function(value)


def _rename(rename: Callable[[str], str], leaf: object) -> object:
    if not isinstance(leaf, Reference) or leaf.name == _MACRO:
        return leaf
    return dataclasses.replace(leaf, name=rename(leaf.name))


def _outer_scopes(scope: str) -> list[str]:
    """`a/b` -> ["", "a", "a/b"]."""
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:count]) for count in range(len(parts) + 1)]


def _tail(name: str, count: int) -> str:
    return ".".join(name.split(".")[-count:])


def _module(name: str) -> str:
    """The module part of a dotted name."""
    while name and name not in sys.modules:
        name = name.rpartition(".")[0]
    return name
