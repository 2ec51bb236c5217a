"""Prefix-aware routing: send a request to the replica that has its prefix cached, unless it is too busy.

Each replica remembers the keys and values of the prompts it has seen, so a conversation that comes back to the same
replica costs only what is new in it. Three rules, all of them local, none of which asks a replica anything:

* *memory*: a prompt is cut into blocks, each hashed together with everything before it, so equal hashes mean equal
  beginnings. Who has served a block is remembered; the longest block that somebody has served decides.
* *rendezvous*: a beginning that nobody has served goes to the replica that scores highest in a hash of both. When a
  replica goes, only its own prompts move.
* *bounded load*: no replica with more than a few requests takes more than a quarter more than its share of those under
  way; what does not fit goes to the next best, which from then on has that beginning too.

The hashes are Python's own, salted in each process: nobody can craft prompts that collide, and nobody needs to, since
a wrong guess costs a cache miss and nothing else.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

CHARACTERS, TOKENS = 64, 16  # a block
BLOCKS = 256  # beyond so many, a prompt's end says nothing new about where it should go
Chain = tuple[int, ...]


def prefix_hashes(body: bytes, salt: Hashable = None) -> Chain:
    """Chained hashes of a request's prompt, block by block; empty for a request without one."""
    try:
        asked = json.loads(body)
        prompt = _prompt(asked) if isinstance(asked, dict) else None
    except (ValueError, RecursionError):  # whoever gets it will refuse it
        return ()
    if not prompt:
        return ()
    size = CHARACTERS if isinstance(prompt, str) else TOKENS
    ends = range(size, min(len(prompt), size * BLOCKS) + 1, size)
    hashes, link = [], hash(("salt", salt))
    for end in ends or (len(prompt),):
        block = prompt[end - size if ends else 0 : end]
        link = hash((link, block if isinstance(block, str) else str(block)))
        hashes.append(link)
    return tuple(hashes)


class Affinity:
    """Table of which replicas have served which prefixes."""

    def __init__(self, slack: float = 1.25, few: int = 4, remembered: int = 1 << 16) -> None:
        self._slack, self._few, self._remembered = slack, few, remembered
        self._served: OrderedDict[int, dict[str, None]] = OrderedDict()  # block to replicas, least recently used first

    def rank(self, chain: Chain, loads: Mapping[str, int]) -> list[str]:
        """Rank all replicas, best first; `loads` has the requests in progress on each.

        Requests without a prompt (pages, descriptions) all have the same first choice, whatever its load: a page that
        keeps a conversation with its server finds that server again.
        """
        first = chain[0] if chain else 0
        order = sorted(loads, key=lambda name: hash(f"{first} {name}"), reverse=True)
        if not chain:
            return order
        limit = self.limit(loads.values())
        free = [name for name in order if loads[name] < limit]
        known = self._holders(chain, free)
        return sorted(order, key=lambda name: (name not in free, name not in known, loads[name] if known else 0))

    def limit(self, loads: Iterable[int]) -> int:
        """Load from which a replica gets no further request; always above the least loaded one's."""
        loads = list(loads)
        return max(self._few, math.ceil(self._slack * (sum(loads) + 1) / len(loads)))

    def remember(self, chain: Chain, name: str) -> None:
        """Record that a replica was given this prompt."""
        for block in chain:
            self._served.setdefault(block, {})[name] = None
            self._served.move_to_end(block)
        while len(self._served) > self._remembered:
            self._served.popitem(last=False)

    def _holders(self, chain: Chain, names: Sequence[str]) -> set[str]:
        """Replicas that have served the longest cached prefix."""
        for block in reversed(chain):
            if found := self._served.get(block, {}).keys() & set(names):
                return found
        return set()


def _prompt(asked: dict[str, Any]) -> str | list | None:
    """Hash chain of a request's prefix: what the cache of a replica is looked up with, or something that begins alike
    whenever that does."""
    if messages := asked.get("messages"):
        return json.dumps([asked.get("tools"), messages])
    prompt = asked.get("prompt") or asked.get("idx")
    while isinstance(prompt, list) and prompt and isinstance(prompt[0], (list, str)):
        prompt = prompt[0]
    return prompt if isinstance(prompt, (str, list)) else None
