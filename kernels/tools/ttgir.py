"""Parser for TTGIR, Triton's last IR in which tiles, barriers and warp roles are explicit.

It keeps what decides when a warp waits and which tile it touches: barriers, copies, reads of shared tiles, control
flow, and the scalars these are computed from. Tensors, which only carry numbers, are dropped.
"""

import re
from dataclasses import dataclass, field

NAME = r"%[\w.$-]+(?:#\d+)?"
LOCATION = re.compile(r"\s?loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
ATTRIBUTES = re.compile(r" \{[^{}]*\}")
STATEMENT = re.compile(r'^(?:(%[\w.$-]+)(?::\d+)? = )?"?([a-z_]+(?:\.[a-z_0-9]+)*)"?(.*)$')
LOOP = re.compile(rf"^ ({NAME}) = ({NAME}) to ({NAME}) step ({NAME})(?:.* iter_args\((.*?)\))?")
EFFECTS = {
    "ttg.warp_specialize", "scf.for", "scf.if", "scf.yield", "ttg.local_alloc", "ttg.local_load",
    "ttng.init_barrier", "ttng.barrier_expect", "ttng.wait_barrier", "ttng.arrive_barrier",
    "ttng.async_tma_copy_global_to_local", "ttng.warp_group_dot",
}  # fmt: skip


@dataclass(slots=True)
class Region:
    """Block of statements; a loop's parameters are its counter and loop-carried values."""

    parameters: list[str]
    body: "list[Statement]"


@dataclass(slots=True)
class Statement:
    """One operation. `text` is what follows its name, without attributes and locations."""

    name: str
    result: str
    operands: list[str]
    text: str
    regions: list[Region] = field(default_factory=list)


def parse(ttgir: str) -> Region:
    """Parse a kernel's parameters and statements, without those that only compute tensors."""
    lines = [LOCATION.sub("", line).strip() for line in ttgir.splitlines() if not line.startswith("#")]
    begin = next(n for n, line in enumerate(lines) if line.startswith("tt.func public"))
    end = next(n for n in range(begin, len(lines)) if lines[n].endswith("{"))
    parameters = re.findall(r"(%[\w.$-]+): ", "".join(lines[begin : end + 1]))
    body, _ = _block(lines, end + 1)
    needed: set[str] = set()
    while (more := needed | _operands(body, needed)) != needed:
        needed = more
    return Region(parameters, _without_tensors(body, needed))


def matched(pattern: str | re.Pattern, text: str) -> re.Match:
    """Match a pattern that must be present."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"TTGIR {text[:120]!r} is not understood")
    return found


def _block(lines: list[str], n: int) -> tuple[list[Statement], int]:
    """Statements up to the closing brace, and its line."""
    body: list[Statement] = []
    while not lines[n].startswith("}"):
        if not lines[n]:
            n += 1
            continue
        result, name, rest = matched(STATEMENT, lines[n]).groups()
        statement = Statement(name, result or "", [], rest)
        n = _REGIONS.get(name, _plain)(lines, n, statement)
        body.append(statement)
    return body, n


def _plain(lines: list[str], n: int, statement: Statement) -> int:
    statement.text = ATTRIBUTES.sub("", statement.text)
    statement.operands = re.findall(NAME, statement.text.split(" : ")[0])
    if not lines[n].endswith("({"):  # a reduction brings its arithmetic along
        return n + 1
    return next(i for i in range(n, len(lines)) if lines[i].startswith("})")) + 1


def _loop(lines: list[str], n: int, statement: Statement) -> int:
    counter, *bounds, carried = matched(LOOP, statement.text).groups()
    pairs = re.findall(rf"({NAME}) = ({NAME})", carried or "")
    statement.operands = [*bounds, *(start for _, start in pairs)]
    body, end = _block(lines, n + 1)
    statement.regions = [Region([counter, *(name for name, _ in pairs)], body)]
    return end + 1


def _branch(lines: list[str], n: int, statement: Statement) -> int:
    statement.operands = re.findall(NAME, statement.text)[:1]
    body, end = _block(lines, n + 1)
    statement.regions = [Region([], body)]
    if "else" in lines[end]:
        body, end = _block(lines, end + 1)
        statement.regions.append(Region([], body))
    return end + 1


def _roles(lines: list[str], n: int, statement: Statement) -> int:
    """Regions of `warp_specialize`: the default warps' and each partition's, with its arguments."""
    statement.operands = re.findall(NAME, statement.text.split(")")[0])
    n += 1
    while lines[n].startswith(("default", "partition")):
        parameters = re.findall(r"(%[\w.$-]+): ", lines[n])
        body, end = _block(lines, n + 1)
        statement.regions.append(Region(parameters, body))
        n = end + 1 if lines[end] == "}" else end
    return n + 1


_REGIONS = {"scf.for": _loop, "scf.if": _branch, "ttg.warp_specialize": _roles}


def _operands(body: list[Statement], needed: set[str]) -> set[str]:
    """Operands of all statements that have an effect or define something needed."""
    found: set[str] = set()
    for statement in body:
        if _is_kept(statement, needed):
            found.update(name.partition("#")[0] for name in statement.operands)
        for region in statement.regions:
            found |= _operands(region.body, needed)
    return found


def _is_kept(statement: Statement, needed: set[str]) -> bool:
    return statement.name in EFFECTS or (statement.result in needed and "tensor<" not in statement.text)


def _without_tensors(body: list[Statement], needed: set[str]) -> list[Statement]:
    for statement in body:
        for region in statement.regions:
            region.body = _without_tensors(region.body, needed)
    return [statement for statement in body if _is_kept(statement, needed)]
