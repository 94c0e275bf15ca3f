"""A compiled program, read from XLA's text: its instructions, how often each runs, and what that costs a device.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs; here loops count by their trips.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=?]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_SEVERAL = re.compile(r"\b(?:branch|called)_computations=\{([^}]*)\}")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
CALLS = frozenset({"call", "conditional", "async-start", "custom-call"})
"""What runs other computations, one of them or all, or none. A TPU7x has its SparseCores talk by such."""
FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
    | {"partition-id", "replica-id", "after-all", "opt-barrier", "async-start", "async-update"}
)
"""What moves no memory by itself."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array.

    Attributes:
      bits: of an element.
      dims: sizes.
      space: of memory: 0 the device's main one, 5 the host's, anything else on the chip.
    """

    bits: int
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """In memory, without padding."""
        return math.prod(self.dims) * self.bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: its own.
      opcode: such as `fusion`.
      shapes: of what it makes; several if that is a tuple.
      operands: names.
      attributes: the rest of the line.
      root: whether its computation returns it.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def value(self) -> int:
        """Of a constant; 0 of one that is no whole number."""
        text = self.attributes.partition(")")[0]
        return int(text) if text.isdigit() else 0

    @property
    def index(self) -> int:
        """Which element a `get-tuple-element` gets."""
        return int(self.attributes.partition("index=")[2].partition(",")[0])

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations by what they are to it: `body`, `condition`, `calls` ...; several of a kind have numbers."""
        found = dict(_CALLED.findall(self.attributes))
        if several := _SEVERAL.search(self.attributes):
            found |= {str(i): name.strip(" %") for i, name in enumerate(several[1].split(","))}
        return found


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name.

    Attributes:
      computations: their instructions by name, in order.
      entry: the name of the one that runs.
    """

    computations: Mapping[str, Computation]
    entry: str

    def executed(self, name: str | None = None, times: float = 1.0) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction that runs by itself, where it stands, and how often; fusions are one instruction."""
        computation = self.computations[name or self.entry]
        for instruction in computation.values():
            yield computation, instruction, times
            called = instruction.called
            if instruction.opcode == "while":
                trips = self.trips(instruction)
                yield from self.executed(called["body"], times * trips)
            elif instruction.opcode in CALLS:
                for inner in called.values():
                    yield from self.executed(inner, times)

    def trips(self, loop: Instruction) -> int:
        """How often a counted loop runs: how many steps its counter, which starts at 0, takes to its bound."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = (self.computations[loop.called[name]] for name in ("condition", "body"))
        bound = max((each.value for each in condition.values() if each.opcode == "constant"), default=1)
        counters = [each for each in condition.values() if each.opcode == "get-tuple-element"]
        return -(-bound // (self._step(body, counters[0].index) if len(counters) == 1 else 1))

    def _step(self, body: Computation, index: int) -> int:
        """What a body adds to an element of the tuple that it is given."""
        root = next(each for each in body.values() if each.root)
        step, each = 0, body[root.operands[index]]
        while each.opcode in ("add", "copy"):
            terms = [body[name] for name in each.operands]
            step += sum(term.value for term in terms if term.opcode == "constant")
            each = next((term for term in terms if term.opcode != "constant"), root)
        return step or 1


def parse(text: str) -> Program:
    """Reads the text of an optimised module."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    return Program(computations, entry)


_BITS = {"pred": 8, "c64": 64, "c128": 128}


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, after = rest[end:].strip().partition("(")
    close = _closing(after, -1)
    literal = opcode in ("constant", "parameter")  # what stands in the parentheses is a value, or a number
    operands = () if literal else tuple(re.findall(r"%([\w.\-]+)", after[:close]))
    attributes = after if literal else after[close:]
    return Instruction(name, opcode, tuple(_shapes(rest[:end])), operands, attributes, root)


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(re.sub(r"/\*.*?\*/", "", text)):
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype) or (int(digits[0]) if digits else 0)
        space = re.search(r"S\((\d+)\)", layout)
        yield Shape(bits, tuple(int(n.strip("<=")) for n in dims.split(",") if n), int(space[1]) if space else 0)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes; -1 stands for one in front of the text."""
    depth = 1 if start < 0 else 0
    for place in range(max(start, 0), len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


# ---- Arithmetic ----


def flops(program: Program) -> float:
    """Floating point operations in matrix products (dots and convolutions) that one device does."""
    return sum((times * instruction_flops(program, place, each) for place, each, times in program.executed()), 0.0)


def instruction_flops(program: Program, place: Computation, instruction: Instruction) -> float:
    """The same of one instruction, with what is fused into it."""
    if instruction.opcode == "fusion":
        inner = program.computations[instruction.called["calls"]]
        return sum((instruction_flops(program, inner, each) for each in inner.values()), 0.0)
    if instruction.opcode == "dot":
        return 2.0 * math.prod(instruction.shapes[0].dims) * _contracted(place, instruction)
    if instruction.opcode == "convolution":
        return 2.0 * _multiplications(place, instruction)
    return 0.0


def _contracted(place: Computation, dot: Instruction) -> int:
    left = place[dot.operands[0]].shapes[0].dims
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    return math.prod(left[int(dim)] for dim in found[1].split(",") if dim) if found else 1


def _multiplications(place: Computation, convolution: Instruction) -> int:
    """How many products a convolution sums up: on a TPU, that is what matrix products become.

    Dimensions of a batch become spatial ones, whose windows reach beyond the input: what is padding does not count.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None, convolution.attributes
    left, kernel = (place[name].shapes[0].dims for name in convolution.operands[:2])
    out = convolution.shapes[0].dims
    sizes = {f"i{label}": size for label, size in zip(labels[1], left, strict=True)}
    sizes |= {f"k{label}": size for label, size in zip(labels[2], kernel, strict=True)}
    sizes |= {f"o{label}": size for label, size in zip(labels[3], out, strict=True)}
    total = sizes["ob"] * sizes["of"] * sizes["ki"]  # ki is per group already
    window = _window(convolution.attributes)
    for i, label in enumerate(sorted(label for label in labels[3] if label.isdigit())):
        total *= _overlaps(
            sizes[f"i{label}"], sizes[f"k{label}"], sizes[f"o{label}"], {k: v[i] for k, v in window.items()}
        )
    groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    return total // (int(groups[1]) if groups else 1)


def _window(attributes: str) -> dict[str, list[tuple[int, int]]]:
    """For each spatial dimension `(low, high)` padding, and strides and dilations as pairs whose second is unused."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    count = len(fields.get("size", "").split("x")) if fields else 0
    window = {}
    for name in ("stride", "lhs_dilate", "rhs_dilate"):
        values = fields.get(name, "x".join(["1"] * count))
        window[name] = [(int(value), 0) for value in values.split("x") if value]
    pads = fields.get("pad", "x".join(["0_0"] * count))
    window["pad"] = [(int(p.split("_")[0]), int(p.split("_")[1])) for p in pads.split("x") if p]
    return window


def _overlaps(size: int, kernel: int, out: int, window: Mapping[str, tuple[int, int]]) -> int:
    """In how many pairs of an output position and a place in the window there is an entry of the input."""
    stride, dilate, spread, low = (window[name][0] for name in ("stride", "lhs_dilate", "rhs_dilate", "pad"))
    if kernel == 1 and low == 0 and dilate == 1:
        return out
    positions = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * spread - low
    return int(((positions >= 0) & (positions % dilate == 0) & (positions // dilate < size)).sum())


# ---- Memory ----


def memory_bytes(program: Program, place: Computation, instruction: Instruction) -> int:
    """Bytes that one instruction reads from the device's main memory and writes to it."""
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0
    if instruction.opcode == "custom-call" and instruction.called:
        return 0  # counted where it calls
    if instruction.opcode.removesuffix("-start") in (*COLLECTIVES, "send", "recv"):
        return 0  # counted as communication
    if instruction.opcode == "copy-start":  # what is written, what is read, and a flag
        return sum(shape.bytes for shape in instruction.shapes[:2] if shape.space == 0)
    if instruction.opcode == "fusion":
        return _fused_bytes(program.computations[instruction.called["calls"]], place, instruction)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * sum(shape.bytes for shape in instruction.shapes if shape.space == 0)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _bytes_of(place, instruction.operands[1])
    read = sum(_bytes_of(place, name) for name in instruction.operands)
    return read + sum(shape.bytes for shape in instruction.shapes if shape.space == 0)


def _bytes_of(place: Computation, name: str) -> int:
    return sum(shape.bytes for shape in place[name].shapes if shape.space == 0) if name in place else 0


def _fused_bytes(inner: Computation, place: Computation, fusion: Instruction) -> int:
    """Operands of which the fusion only takes slices count as those, and what it updates in place as the update."""
    users: dict[str, list[tuple[str, Instruction]]] = {}  # with the operand as which they use it
    for each in inner.values():
        for name in each.operands:
            users.setdefault(name, []).append((name, each))

    def uses(name: str) -> list[tuple[str, Instruction]]:
        found = users.get(name, [])
        return [use for pair in found for use in (uses(pair[1].name) if pair[1].opcode == "bitcast" else [pair])]

    parameters = (each for each in inner.values() if each.opcode == "parameter")
    by_number = {int(each.attributes.strip("()").partition(")")[0]): each.name for each in parameters}
    read = kept = 0
    for number, operand in enumerate(fusion.operands):
        size, users_of = _bytes_of(place, operand), uses(by_number[number])
        if users_of and all(use.opcode in ("dynamic-slice", "slice", "gather") for _, use in users_of):
            size = min(size, sum(shape.bytes for _, use in users_of for shape in use.shapes))
        elif users_of and all(use.opcode == "dynamic-update-slice" and use.operands[0] == n for n, use in users_of):
            kept += size - min(size, sum(_bytes_of_any(inner, use.operands[1]) for _, use in users_of))
            size = 0
        read += size
    return read + max(sum(shape.bytes for shape in fusion.shapes if shape.space == 0) - kept, 0)


def _bytes_of_any(place: Computation, name: str) -> int:
    return sum(shape.bytes for shape in place[name].shapes)


# ---- Communication ----


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind within groups of devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      group: places in the mesh, in row-major order, of those that the first device talks with.
      sent: bytes that each device sends, and as many that it receives.
      times: how often.
    """

    kind: str
    group: tuple[int, ...]
    sent: float
    times: float


def collectives(program: Program, devices: int) -> list[Collective]:
    """All that a step sends."""
    found = []
    for place, instruction, times in program.executed():
        for inner, each, kind in _communicating(program, place, instruction):
            group = _group(each.attributes, devices)
            if len(group) > 1 and not _goes_on(instruction, each):
                found.append(Collective(kind, group, _sent(kind, inner, each, len(group)), times))
    return found


def _communicating(
    program: Program, place: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction, str]]:
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        yield place, instruction, kind
    elif kind == "send" and (across := re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)):
        yield place, instruction, across[1].lower().replace("_", "-")  # to other slices
    elif instruction.opcode == "fusion":
        name = instruction.called["calls"]
        inner = program.computations[name]
        for each in inner.values():
            for found in _communicating(program, inner, each):
                # How a TPU reduces and scatters in one go.
                scattered = found[2] == "all-reduce" and name.startswith("all-reduce-scatter")
                yield (*found[:2], "reduce-scatter") if scattered else found


def _goes_on(instruction: Instruction, each: Instruction) -> bool:
    """Whether this is a later part of a collective that a TPU spreads over a chain of fusions, all of which name it."""
    return "chain_id=" in each.attributes and not instruction.name.startswith("async-collective-start")


def _sent(kind: str, place: Computation, instruction: Instruction, count: int) -> float:
    """With rings, which send the least (Thakur et al. 2005): a part to every other device, twice to sum and share."""
    size = float(sum(_bytes_of_any(place, name) for name in instruction.operands))
    if kind == "collective-permute":
        return size
    if kind == "all-gather":
        return size * (count - 1)
    return size * (count - 1) / count * (2 if kind == "all-reduce" else 1)


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The group in which the first device is, or another if it is in none."""
    if slices := re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', attributes):
        ranges = [[int(n) for n in part.split(":")] for part in slices[1].split(",")]
        count = sum(part[-1] - part[0] + 1 for part in ranges)
        return tuple(range(0, devices, devices // count))  # slices follow each other
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return (int(pairs[1]), int(pairs[2])) if pairs[1] != pairs[2] else (int(pairs[1]),)
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:,?\s*device_ids=\S+)?\s*\{([^}]*)\}", attributes):
        return _mesh_group(mesh[1], mesh[2])
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        dims = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else list(range(len(dims)))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(int(iota[1]), int(iota[2]))
        return tuple(ids[0].tolist())
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in groups[1].split(","))
    return tuple(range(devices))


def _mesh_group(sizes: str, axes: str) -> tuple[int, ...]:
    """`'axis_0'=4,'axis_1'=2` and `'axis_1'`: those that differ in it only (`'axis_0':(2)2`: in a part of an axis)."""
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    dims: list[int] = []
    varying: list[int] = []
    parts = {name: (int(before), int(size)) for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", axes)}
    whole = set(re.findall(r"'([^']+)'", axes)) - set(parts)
    for name, size in shape.items():
        before, middle = parts.get(name, (1, size))
        if name in parts or name in whole:
            varying.append(len(dims) + 1)
        dims += [before, middle, size // (before * middle)]
    ids = np.arange(math.prod(dims)).reshape(dims)
    index: list[slice | int] = [slice(None) if dim in varying else 0 for dim in range(len(dims))]
    return tuple(np.ravel(ids[tuple(index)]).tolist())


def mesh_axes(group: Sequence[int], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(np.asarray(group), tuple(mesh_shape.values())))
    return tuple(name for name, row in zip(mesh_shape, places, strict=True) if len(set(row.tolist())) > 1)
