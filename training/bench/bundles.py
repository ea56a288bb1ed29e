"""Cycles of a compiled TPU program, counted on its final bundles: the instruction words of which one issues a cycle.

The compiler writes one file for each operation and one for the top-level program, which calls them. Their scalar
arithmetic decides which bundles run how often (loops, the steps of a kernel's grid, `pl.when`), so that alone is
executed here, and the bundles that a TPU would issue are counted, and the bytes that its copies move to and from HBM.
Waiting for those is not in the count.
"""

import functools
import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

DELAY = 4
"""Bundles after a branch that run before it takes effect, on every generation so far."""

GRANULE = 32
"""Bytes; of them the sizes of copies are multiples."""

LIMIT = 20_000_000
"""Blocks after which a program is taken to be endless."""


class Unreadable(ValueError):
    """The bundles say something that is not understood here."""


class Instruction(NamedTuple):
    """A scalar operation. A register is its name (s3, p0), a spilled one the place where it is."""

    result: str
    operation: str
    operands: tuple[str | int, ...]
    guard: str = ""  # p3, !p3: only if it holds
    otherwise: str = ""  # what the result is if not; itself where empty


class Copy(NamedTuple):
    """Between HBM and a memory of the chip."""

    size: str | int  # in granules
    guard: str


class Branch(NamedTuple):
    """To a region, if the guard holds."""

    guard: str
    region: int


class Bundle(NamedTuple):
    """One instruction word."""

    instructions: tuple[Instruction, ...]
    copies: tuple[Copy, ...]
    calls: tuple[str, ...]
    branch: Branch | None
    regions: tuple[int, ...]  # that start here


class Program(NamedTuple):
    """One operation's bundles. A block runs as a whole."""

    bundles: tuple[Bundle, ...]
    starts: Mapping[int, int]  # region -> bundle


class Count(NamedTuple):
    """Cycles of a program and of what it calls."""

    cycles: int
    bytes: int  # between HBM and the chip
    assumed: int  # branches and copies that depend on data: they were counted
    loops: int  # ends of loops whose length depends on data: there they ended
    operations: Mapping[str, int]  # operation -> cycles of all its runs; the program itself is ""


def flags(folder: str | Path) -> str:
    """LIBTPU_INIT_ARGS of the process that compiles, set before JAX is imported, for bundles in a folder."""
    return " ".join(
        (
            f"--xla_jf_dump_to={folder}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*",
            "--xla_jf_hlo_deduplication_all_unique=true",  # a file for every operation, also for those that are alike
        )
    )


def read(folder: Path) -> dict[str, Program]:
    """The programs that the compiler wrote, by operation; the top-level one is "TLP"."""
    programs = {}
    for path in sorted(folder.glob("*final_bundles.txt")):
        found = re.fullmatch(r"\d+-(.+?)-\d+-final_bundles\.txt", path.name)
        if found:
            programs[found[1]] = parse(path.read_text())
    return programs


def parse(text: str) -> Program:
    """A program from the text of its final bundles."""
    lines = re.split(r"^ *(?:0x[0-9a-f]+|0) (?:[A-Z]{2})? *: ", text, flags=re.MULTILINE)[1:]
    bundles = tuple(_bundle(line) for line in lines)
    starts = {region: at for at, bundle in enumerate(bundles) for region in bundle.regions}
    if bundles and re.search(r"^ *0x[0-9a-f]+ PF: .*exit bundle.*\s*\Z", text, re.MULTILINE):
        # The way out is a region without a name.
        for each in bundles:
            if each.branch:
                starts.setdefault(each.branch.region, len(bundles) - 1)
    return Program(bundles, starts)


_REGISTER = re.compile(r"%\w*_([sp]\d+)|%([sp]\d+)\b")
_INSTRUCTION = re.compile(r"%(\S+) = ([\w.\-]+)\s*(?:\((!?)%([^,)]+)(?:, ([^)]*))?\),?)?\s*(.*)", re.DOTALL)


def _bundle(text: str) -> Bundle:
    body, _, after = text.lstrip("> ").rpartition("}")
    regions = [int(n) for n in re.findall(r"Start(?:/End empty)? region (\d+)", after)]
    instructions, copies, calls, branch = [], [], [], None
    for part in body.lstrip("{").split(";;"):
        comments = " ".join(re.findall(r"/\*(.*?)\*/", part, re.DOTALL))
        found = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", part, flags=re.DOTALL).strip())
        if not found:
            continue
        result, operation, negated, guard, otherwise, operands = found.groups()
        guard = f"{negated}{_place(guard)}" if guard else ""
        if operation == "inlined_call":
            named = re.search(r"%(\S+) =|(<[^>]+>)", comments)
            calls.append((named[1] or named[2]) if named else "?")
        elif operation.startswith("sbr"):
            target = re.search(r"target = \$region(\d+)", operands)
            if target is None or branch is not None:
                raise Unreadable(f"branch without a region: {part.strip()[:80]}")
            branch = Branch(guard, int(target[1]))
        elif operation in ("dma.hbm_to_vmem", "dma.vmem_to_hbm", "dma.hbm_to_smem", "dma.smem_to_hbm", "dma.general"):
            copies.append(_copy(part))
        elif operation == "sst":
            space, _, value = operands.partition("] ")
            instructions.append(Instruction(_place(space + "]"), "smov", (_operand(value),), guard))
        elif re.search(r"_[sp]\d+$", result) and not operation.startswith(("sphi", "pphi", "int_to_ptr")):
            arguments = tuple(_operand(each) for each in re.split(r", ", operands) if each)
            if operation == "inlined_call_operand." and re.match(r"<no memory space> \[shape: [su]32\[\]", operands):
                arguments, operation = (0,), "smov"  # an index, such as that of a loop that calls: as in its first turn
            elif operation == "sld":
                # The number of this core: the first, whose part is as long as any other's.
                arguments = (0,) if re.search(r"core id", comments) else (_place(operands),)
                operation = "smov"
            kept = _place(otherwise) if otherwise else ""
            instructions.append(Instruction(_place(result), operation.partition(".")[0], arguments, guard, kept))
            if operation.startswith("scmp"):
                instructions[-1] = instructions[-1]._replace(operation=".".join(operation.split(".")[:3]))
    return Bundle(tuple(instructions), tuple(copies), tuple(calls), branch, tuple(regions))


def _copy(text: str) -> Copy:
    size = re.search(r"/\*size_in_granules=\*/([^,\s]+)", text)
    guard = re.search(r"(?:\[thread:\$\d+\]|dma\.general) +\((!?)%(\w+)\)", text)
    return Copy(_operand(size[1]) if size else "?", f"{guard[1]}{_place(guard[2])}" if guard else "")


def _place(text: str) -> str:
    """A register's name, or a place in memory as it is written; "?" where that depends on a register."""
    text = text.strip()
    if text.startswith("[smem:"):
        return "?" if "%" in text else text
    found = re.search(r"_([sp]\d+)$", text)
    return found[1] if found else "?"


def _operand(text: str) -> str | int:
    text = text.strip()
    if re.fullmatch(r"-?\d+", text):
        return _signed(int(text))
    return _place(text) if text.startswith("%") else "?"


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _unsigned(value: int) -> int:
    return value % 2**32


_COMPARE = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "sadd": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "smulhi": lambda a, b: (_unsigned(a) * _unsigned(b)) >> 32,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": lambda a, b: a << (b & 31),
    "sshrl": lambda a, b: _unsigned(a) >> (b & 31),
    "sshra": lambda a, b: a >> (b & 31),
    "smin": min,
    "smax": max,
}


@functools.cache
def _function(operation: str) -> Callable[..., Any]:
    """What a scalar operation makes of its operands, of which None is one that is not known."""
    name, *rest = operation.split(".")
    if name == "smov":
        return lambda a: a
    if name == "pmov":
        return lambda a: None if a is None else bool(a)
    if name == "scmp":
        compare, unsigned = _COMPARE[rest[0]], rest[1] == "u32"
        if unsigned:
            return lambda a, b: None if a is None or b is None else compare(_unsigned(a), _unsigned(b))
        return lambda a, b: None if a is None or b is None else compare(a, b)
    if name in _ARITHMETIC:
        function = _ARITHMETIC[name]
        return lambda a, b: None if a is None or b is None else _signed(function(a, b))
    if name == "scalar_select":
        return lambda p, a, b: None if p is None else a if p else b
    if name == "pneg":
        return lambda a: None if a is None else not a
    if name in ("por", "pnor"):
        return lambda a, b: _negated(True if a or b else None if None in (a, b) else False, name == "pnor")
    if name in ("pand", "pnand"):
        known = lambda a, b: False if False in (a, b) else None if None in (a, b) else True  # noqa: E731
        return lambda a, b: _negated(known(a, b), name == "pnand")
    if name == "pxor":
        return lambda a, b: None if None in (a, b) else a != b
    return lambda *_: None


def _negated(value: bool | None, negate: bool) -> bool | None:
    return None if value is None else value != negate


def count(programs: Mapping[str, Program], name: str = "TLP") -> Count:
    """Cycles of a program with everything that it calls.

    A loop whose length depends on data, such as the number of documents in a chunk, runs once.

    Raises Unreadable if a program does not end, or one is missing.
    """
    return _Counter(programs).count(name)


class _Counter:
    def __init__(self, programs: Mapping[str, Program]):
        self.programs = programs
        self.counts: dict[str, Count] = {}

    def count(self, name: str) -> Count:
        if name not in self.counts:
            if name not in self.programs:
                raise Unreadable(f"no bundles of {name}")
            self.counts[name] = self._run(name)
        return self.counts[name]

    def _run(self, name: str) -> Count:
        blocks = _blocks(self.programs[name])
        values: dict[str, Any] = {MOVED: 0, ASSUMED: 0, LOOPS: 0}
        own = 0
        calls: Counter[str] = Counter()
        at: int | None = 0
        for _ in range(LIMIT):
            block = blocks[at]
            own += block.length
            calls.update(block.calls)
            for step in block.steps:
                step(values)
            at = block.following
            if block.branch is not None:
                holds = block.branch(values)
                if holds is None:
                    values[LOOPS if block.backwards else ASSUMED] += 1
                elif holds:
                    at = block.target
            for step in block.late:
                step(values)
            if at is None:
                break
        else:
            raise Unreadable(f"{name}: no end after {LIMIT:,} blocks")
        operations = Counter({"": own})
        moved, assumed, loops = GRANULE * values[MOVED], values[ASSUMED], values[LOOPS]
        for called, times in calls.items():
            inner = self.count(called)
            operations[called] += times * inner.cycles
            moved += times * inner.bytes
            assumed += times * inner.assumed
            loops += times * inner.loops
        return Count(sum(operations.values()), moved, assumed, loops, operations)


MOVED, ASSUMED, LOOPS = "granules", "assumed", "loops"
"""Beside the registers, what is counted while the bundles run."""


class _Block(NamedTuple):
    """Bundles that run one after the other."""

    length: int
    calls: tuple[str, ...]
    steps: tuple[Callable[[dict[str, Any]], None], ...]  # of the bundles before that of the branch
    branch: Callable[[dict[str, Any]], bool | None] | None
    late: tuple[Callable[[dict[str, Any]], None], ...]  # of the branch's own bundle and those in its delay
    target: int | None
    backwards: bool
    following: int | None


def _blocks(program: Program) -> dict[int | None, _Block]:
    bundles, starts = program
    branches = [at for at, bundle in enumerate(bundles) if bundle.branch]
    if any(b - a <= DELAY for a, b in itertools.pairwise(branches)):
        raise Unreadable("a branch in the delay of another")
    needed = _needed(program)
    edges = {0, len(bundles)} | {at + DELAY + 1 for at in branches if at + DELAY + 1 < len(bundles)}
    for at in branches:
        branch = bundles[at].branch
        assert branch is not None
        if branch.region not in starts:
            raise Unreadable(f"a branch to a region that is not there: {branch.region}")
        edges.add(starts[branch.region])
    blocks: dict[int | None, _Block] = {}
    for begin, end in itertools.pairwise(sorted(edges)):
        inside = [at for at in branches if begin <= at < end]
        if inside and inside[0] + DELAY + 1 != end and end != len(bundles):
            raise Unreadable("a branch into the delay of another")
        at = inside[0] if inside else end
        branch = bundles[at].branch if inside else None
        target = None if branch is None else starts[branch.region]
        blocks[begin] = _Block(
            length=end - begin,
            calls=tuple(call for bundle in bundles[begin:end] for call in bundle.calls),
            steps=tuple(step for bundle in bundles[begin:at] if (step := _step(bundle, needed))),
            branch=None if branch is None else _guard(branch.guard),
            late=tuple(step for bundle in bundles[at:end] if (step := _step(bundle, needed))),
            target=target,
            backwards=target is not None and target <= at,
            following=end if end < len(bundles) else None,
        )
    return blocks


def _needed(program: Program) -> set[str]:
    """The registers on which a branch depends, directly or not."""
    writers: dict[str, set[str]] = {}
    needed: set[str] = set()
    for bundle in program.bundles:
        if bundle.branch:
            needed.add(bundle.branch.guard.lstrip("!"))
        for copy in bundle.copies:
            needed |= {copy.guard.lstrip("!"), str(copy.size)}
        for each in bundle.instructions:
            reads = {o for o in each.operands if isinstance(o, str)} | {each.guard.lstrip("!"), each.otherwise}
            writers.setdefault(each.result, set()).update(reads)
    todo = list(needed)
    while todo:
        for read in writers.get(todo.pop(), ()):
            if read not in needed:
                needed.add(read)
                todo.append(read)
    return needed - {"", "?"}


def _step(bundle: Bundle, needed: set[str]) -> Callable[[dict[str, Any]], None] | None:
    """All of a bundle's operations at once: they read before any of them writes."""
    work = [
        (each.result, _function(each.operation), each.operands, _guard(each.guard), each.otherwise or each.result)
        for each in bundle.instructions
        if each.result in needed
    ]
    copies = [(each.size, _guard(each.guard)) for each in bundle.copies]
    if not work and not copies:
        return None

    def step(values: dict[str, Any]) -> None:
        written = []
        for size, guard in copies:
            holds = guard(values)
            granules = values.get(size) if isinstance(size, str) else size
            values[ASSUMED] += holds is None or (holds and granules is None)
            values[MOVED] += 0 if holds is False else granules or 0
        for result, function, operands, guard, otherwise in work:
            holds = guard(values)
            old = values.get(otherwise)
            if holds is False:
                written.append((result, old))
                continue
            new = function(*(values.get(o) if isinstance(o, str) else o for o in operands))
            written.append((result, new if holds or new == old else None))
        values.update(written)

    return step


def _guard(guard: str) -> Callable[[dict[str, Any]], bool | None]:
    if not guard:
        return lambda values: True
    register, negated = guard.lstrip("!"), guard.startswith("!")
    return lambda values: None if (value := values.get(register)) is None else bool(value) != negated
