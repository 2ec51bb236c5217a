"""Model checker for the barriers of warp-specialized kernels, without a GPU.

Such a kernel has no order of its own: a producer asks the copy engine for tiles, consumers multiply them, and mbarriers
alone say which tile is full and which is free. A barrier too few is a tile overwritten while it is read, or a kernel
that never ends; on a device either may show once in a thousand runs.

So every role runs here as a thread, on the compiler's last TTGIR, under random schedules. Scalars, barriers (phases,
arrivals, bytes still expected), copies that land at any time and reads of shared tiles are modelled; the numbers in the
tiles, memory proxies and layouts are not. Each schedule holds one party back as long as anything else can move: one
role, or the copies into one tile. A `Hazard` is a deadlock, a read of a tile that is not there or is being overwritten,
a copy into a tile in use, or tiles read in another order than they were copied.
"""

import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from .ttgir import Region, Statement, matched

Role = Generator[Callable[[], bool] | None, None, None]
"""Statements of one role: it yields where others may come in between, with a condition where it waits."""
BYTES = {"bf16": 2, "f16": 2, "f32": 4}
COMPARISONS = {"slt": operator.lt, "sle": operator.le, "sgt": operator.gt, "sge": operator.ge,
               "eq": operator.eq, "ne": operator.ne}  # fmt: skip


class Results(list):
    """Several values returned by a loop."""


class Hazard(Exception):
    """Schedule under which the kernel deadlocks or reads a tile it should not (a race)."""


@dataclass(slots=True)
class Barrier:
    """mbarrier: its phase flips when all threads have arrived and all bytes have landed."""

    count: int
    pending: int
    missing_bytes: int = 0
    phase: int = 0

    def arrive(self, count: int = 0, expected: int = 0) -> None:
        """Count arrivals and expected bytes (negative: landed)."""
        self.pending -= count
        self.missing_bytes += expected
        if self.pending < 0:
            raise Hazard("more arrivals at a barrier than it counts")
        if self.pending == 0 and self.missing_bytes == 0:
            self.phase, self.pending = 1 - self.phase, self.count


@dataclass(slots=True)
class Tile:
    """Tile of shared memory: which copy it holds, and who reads or writes it."""

    copy: int = -1
    copying: bool = False
    readers: int = 0


def check(kernel: Region, arguments: Mapping[str, object], schedules: int) -> None:
    """Run a program under so many random schedules; raise the first `Hazard`.

    Arguments left out are 16, as strides are; `pid` is the program's number."""
    for seed in range(schedules):
        Run(kernel, arguments, random.Random(seed)).to_the_end()


class Run:
    """One program under one schedule."""

    def __init__(self, kernel: Region, arguments: Mapping[str, object], choose: random.Random):
        self.kernel, self.choose, self.pid = kernel, choose, arguments["pid"]
        self.scope = {name: arguments.get(name[1:], 16) for name in kernel.parameters}
        self.barriers: dict[object, Barrier] = {}
        self.tiles: dict[object, Tile] = {}
        self.depths: list[int] = []
        """Tiles of each allocation."""
        self.landing: list[tuple[Barrier, int, Tile, tuple]] = []
        self.copies: Counter = Counter()
        self.reads: Counter = Counter()
        self.roles: dict[object, Role] = {}

    def to_the_end(self) -> None:
        """Run the common part, then all warp roles."""
        for _ in self._statements(self.kernel, self.scope, "prologue"):
            pass
        if not self.roles:
            raise ValueError("the kernel is not warp-specialized")
        held_back = self.choose.choice([None, *self.roles, *(("copies", n) for n in range(len(self.depths)))])
        waiting: dict[object, Callable[[], bool]] = {}
        while self.roles or self.landing:
            able: list[Any] = [role for role in self.roles if role not in waiting or waiting[role]()]
            able += {("copies", where[0]) for *_, where in self.landing}
            if not able:
                raise Hazard(f"deadlock of {', '.join(map(str, self.roles))}")
            party = self.choose.choice([one for one in able if one != held_back] or able)
            if party not in self.roles:
                self._land(party)
                continue
            waiting.pop(party, None)
            try:
                condition = next(self.roles[party])
            except StopIteration:
                del self.roles[party]
                continue
            if condition is not None:
                waiting[party] = condition

    def _land(self, party: tuple) -> None:
        """Let one of the pending copies into an allocation land."""
        index = self.choose.choice([i for i, (*_, where) in enumerate(self.landing) if where[0] == party[1]])
        barrier, size, tile, _ = self.landing.pop(index)
        tile.copying = False
        barrier.arrive(expected=-size)

    def _statements(self, region: Region, scope: dict, role: object) -> Role:
        for statement in region.body:
            act = _ACTS.get(statement.name)
            if act is not None:
                yield from act(self, statement, scope, role)
            elif statement.result:
                scope[statement.result] = self._value(statement, [_find(scope, name) for name in statement.operands])

    def _value(self, statement: Statement, given: list) -> object:
        """Value of a scalar or tile address; None if irrelevant."""
        kind, text = statement.name.rpartition(".")[2], statement.text.strip()
        if kind == "constant":
            found = re.match(r"(-?\d+) :|(true)|(false)", text)
            return None if found is None else int(found[1]) if found[1] else int(found[2] is not None)
        if kind == "get_program_id":
            return self.pid
        if None in given or kind not in _VALUES:
            return None
        return _VALUES[kind](text, *given)

    def _specialize(self, statement: Statement, scope: dict, role: object) -> Role:
        handed = [_find(scope, name) for name in statement.operands]
        for number, region in enumerate(statement.regions):
            own = dict(scope) if number == 0 else dict(zip(region.parameters, handed))
            self.roles[f"role {number}"] = self._statements(region, own, number)
        return
        yield

    def _loop(self, statement: Statement, scope: dict, role: object) -> Role:
        (region,) = statement.regions
        begin, end, step, *carried = (_find(scope, name) for name in statement.operands)
        for number in range(begin, end, step):
            scope.update(zip(region.parameters, [number, *carried]))
            yield from self._statements(region, scope, role)
            carried = [_find(scope, name) for name in region.body[-1].operands]
        if statement.result:
            scope[statement.result] = Results(carried)

    def _branch(self, statement: Statement, scope: dict, role: object) -> Role:
        taken = statement.regions[0 if _find(scope, statement.operands[0]) else 1 :][:1]
        for region in taken:
            yield from self._statements(region, scope, role)

    def _yield(self, statement: Statement, scope: dict, role: object) -> Role:
        return
        yield

    def _allocate(self, statement: Statement, scope: dict, role: object) -> Role:
        scope[statement.result] = (len(self.depths),)
        depth = matched(r"memdesc<(\d+)x", statement.text)
        self.depths.append(int(depth[1]))
        if statement.operands:  # with what registers hold
            self.tiles[scope[statement.result]] = Tile(copy=0)
        return
        yield

    def _initialize(self, statement: Statement, scope: dict, role: object) -> Role:
        count = _number(statement)
        self.barriers[_find(scope, statement.operands[0])] = Barrier(count, count)
        return
        yield

    def _expect(self, statement: Statement, scope: dict, role: object) -> Role:
        yield None
        self.barriers[_find(scope, statement.operands[0])].arrive(1, _number(statement))

    def _arrive(self, statement: Statement, scope: dict, role: object) -> Role:
        yield None
        self.barriers[_find(scope, statement.operands[0])].arrive(_number(statement))

    def _wait(self, statement: Statement, scope: dict, role: object) -> Role:
        where, parity = (_find(scope, name) for name in statement.operands[:2])
        barrier = self.barriers[where]
        if barrier.phase == parity:
            yield lambda: barrier.phase != parity
        if barrier.phase == parity:
            raise Hazard(f"role {role} was overtaken at a barrier")

    def _copy(self, statement: Statement, scope: dict, role: object) -> Role:
        yield None
        places = [_find(scope, name) for name in statement.operands]
        where, barrier = [place for place in places if isinstance(place, tuple)][:2]
        tile = self.tiles.setdefault(where, Tile())
        if tile.readers or tile.copying:
            raise Hazard(f"role {role} copies into a tile that is being {'read' if tile.readers else 'copied into'}")
        tile.copying, tile.copy = True, self.copies[where[0]]
        self.copies[where[0]] += 1
        self.landing.append((self.barriers[barrier], _size(statement), tile, where))

    def _read(self, statement: Statement, scope: dict, role: object) -> Role:
        places = [place for place in (_find(scope, n) for n in statement.operands) if isinstance(place, tuple)]
        tiles = [self.tiles.setdefault(place, Tile()) for place in places]
        for place, tile in zip(places, tiles):
            if tile.copying or tile.copy < 0:
                raise Hazard(f"role {role} reads a tile that is not there: {statement.text.strip()[:60]}")
            tile.readers += 1
            self._in_order(place, tile, (role, id(statement), place[0]))
        yield None
        for tile in tiles:
            tile.readers -= 1

    def _in_order(self, place: tuple, tile: Tile, reader: tuple) -> None:
        """Check that the n-th read of a ring of tiles finds its n-th copy."""
        if self.depths[place[0]] > 1 and tile.copy != self.reads[reader]:
            raise Hazard(f"role {reader[0]} reads copy {tile.copy} of a ring in place of copy {self.reads[reader]}")
        self.reads[reader] += 1


def _find(scope: Mapping, name: str) -> Any:
    """Look up a value by name; `%loop#2` is the third of several."""
    base, _, index = name.partition("#")
    value = scope.get(base)
    return value[int(index or 0)] if isinstance(value, Results) else value


def _number(statement: Statement) -> int:
    """First number behind a barrier operand: a count, or bytes."""
    return int(matched(r", (\d+)", statement.text)[1])


def _size(statement: Statement) -> int:
    """Bytes of the tile that a copy fills."""
    *shape, kind = matched(r"-> !ttg.memdesc<([\dx]+x\w+),", statement.text)[1].split("x")
    size = BYTES[kind]
    for extent in shape:
        size *= int(extent)
    return size


def _divided(a: int, b: int) -> int:
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else 0


_VALUES: dict[str, Callable] = {
    "addi": lambda _, a, b: a + b,
    "subi": lambda _, a, b: a - b,
    "muli": lambda _, a, b: a * b,
    "divsi": lambda _, a, b: _divided(a, b),
    "divui": lambda _, a, b: _divided(a, b),
    "remsi": lambda _, a, b: a - b * _divided(a, b),
    "remui": lambda _, a, b: a - b * _divided(a, b),
    "ceildivsi": lambda _, a, b: -(-a // b),
    "minsi": lambda _, a, b: min(a, b),
    "maxsi": lambda _, a, b: max(a, b),
    "andi": lambda _, a, b: a & b,
    "ori": lambda _, a, b: a | b,
    "xori": lambda _, a, b: a ^ b,
    "select": lambda _, condition, a, b: a if condition else b,
    "cmpi": lambda text, a, b: int(COMPARISONS[text.split(",")[0]](a, b)),
    "trunci": lambda text, a: a & 1 if text.endswith("i1") else a,
    "extsi": lambda _, a: a,
    "extui": lambda _, a: a,
    "index_cast": lambda _, a: a,
    "addptr": lambda _, pointer, offset: pointer[offset:] if isinstance(pointer, list) else None,
    "load": lambda _, pointer: pointer[0] if isinstance(pointer, list) else None,
    "memdesc_index": lambda _, where, index: (*where, index),
    "memdesc_trans": lambda _, where: where,
    "memdesc_reshape": lambda _, where: where,
    "memdesc_reinterpret": lambda _, where: where,
}
_ACTS: dict[str, Callable[[Run, Statement, dict, object], Role]] = {
    "ttg.warp_specialize": Run._specialize,
    "scf.for": Run._loop,
    "scf.if": Run._branch,
    "scf.yield": Run._yield,
    "ttg.local_alloc": Run._allocate,
    "ttg.local_load": Run._read,
    "ttng.init_barrier": Run._initialize,
    "ttng.barrier_expect": Run._expect,
    "ttng.wait_barrier": Run._wait,
    "ttng.arrive_barrier": Run._arrive,
    "ttng.async_tma_copy_global_to_local": Run._copy,
    "ttng.warp_group_dot": Run._read,
}
