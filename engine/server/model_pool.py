"""Several models in one server, loaded on first use and evicted by LRU.

What they may take together is bounded; the one that was least recently used, and has nothing to do, goes first. Loading
happens beside everything else: only requests for the model itself wait for it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from .async_engine import AsyncEngine
from .handlers import Service
from .openai import errors

logger = logging.getLogger("warploom.server")


@dataclass(frozen=True, slots=True)
class FurtherModel:
    """A model that can be loaded: loader, bytes of its weights and pages."""

    make: Callable[[], Any]
    size: int


class ModelPool:
    """Pool of models by the names that requests use."""

    def __init__(self, first: Service, further: Mapping[str, FurtherModel], memory: int) -> None:
        for name, model in further.items():
            if model.size > memory:
                short = f"model {name!r} needs {_gigabytes(model.size)} for weights and pages"
                raise InputError(f"{short}; model_memory leaves {_gigabytes(memory)} beside the first: raise it")
        self.first, self._further, self._memory = first, further, memory
        first.further = tuple(further)
        self.loaded: dict[str, Service] = {}  # the least recently used first
        self._busy: dict[str, int] = {}  # requests being read or answered, streams aside
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Service]:
        """Context with a model's service, loaded if need be and kept while the block lasts."""
        if name is None or name not in self._further:
            yield self.first
            return
        self._busy[name] = self._busy.get(name, 0) + 1
        try:
            yield await self._ready(name)
        finally:
            self._busy[name] -= 1

    @property
    def engines(self) -> dict[str, AsyncEngine]:
        """Loaded engines by model name."""
        services = {self.first.config.name: self.first, **self.loaded}
        return {name: service.bridge for name, service in services.items()}

    async def stop(self) -> None:
        """Stop all engines but the first."""
        async with self._changing:
            for name in list(self.loaded):
                await self._unload(name)

    async def _ready(self, name: str) -> Service:
        service = self.loaded.get(name)
        if service is None or not service.bridge.engine_ready:
            async with self._changing:
                service = self.loaded.get(name)
                if service is None or not service.bridge.engine_ready:
                    service = await self._load(name)
        self.loaded[name] = self.loaded.pop(name)  # the most recently used
        return service

    async def _load(self, name: str) -> Service:
        if name in self.loaded:  # it has failed
            await self._unload(name)
        model = self._further[name]
        while sum(self._further[each].size for each in self.loaded) + model.size > self._memory:
            idle = [each for each, service in self.loaded.items() if not (self._busy.get(each) or service.bridge.flows)]
            if not idle:
                raise errors.unavailable(f"serving other models, and there is no memory for {name!r} beside them")
            await self._unload(idle[0])
        config = replace(self.first.config, name=name, served_model_name=())
        bridge = AsyncEngine(model.make, config)
        service = self.loaded[name] = Service(bridge, config, self.first.metrics)
        await bridge.start()
        while bridge.state == "loading":
            await asyncio.sleep(0.01)
        if not bridge.engine_ready:
            await self._unload(name)
            logger.error("the model %r could not be loaded: %s", name, bridge.error or "see above")
            raise errors.APIError(503, f"the model {name!r} could not be loaded: {bridge.error or 'see the log'}")
        return service

    async def _unload(self, name: str) -> None:
        service = self.loaded.pop(name)
        await service.bridge.stop()
        service.bridge.llm = None
        gc.collect()


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
