"""The front before the replicas, with a replica that is scripted."""

import asyncio

import pytest

from warploom.engine.server.config import ServerConfig

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
pytest.importorskip("ray.serve", reason="replicas need the extra `cluster`")


class Messages:
    """A stream that begins and never ends, until it is cancelled."""

    def __init__(self):
        self._cancelled = asyncio.Event()

    def cancel(self):
        self._cancelled.set()

    async def __aiter__(self):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        yield [{"type": "http.response.start", "status": 200, "headers": headers}]
        yield [{"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}]
        await self._cancelled.wait()
        raise asyncio.CancelledError


def test_drained_streams_of_replicas_end_with_their_error():
    from warploom.engine.server.cluster.proxy import create_front

    async def visit():
        app, end_streams = create_front(lambda: None, ServerConfig(log=False), (), 1, False, print)
        front, sent, begun = app._app, [], asyncio.Event()

        class Handle:
            class visit:
                remote = staticmethod(lambda **ask: Messages())

        front._handle, front._well = Handle, lambda: asyncio.sleep(0, 1)

        async def receive():
            if not begun.is_set() and not sent:
                return {"type": "http.request", "body": b"{}"}
            await asyncio.sleep(60)

        async def send(message):
            sent.append(message)
            if message.get("body"):
                begun.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        asked = asyncio.create_task(app(scope, receive, send))
        await begun.wait()
        end_streams()
        await asyncio.wait_for(asked, 30)
        return sent

    last = asyncio.run(visit())[-1]
    assert b"engine is stopping" in last["body"] and not last.get("more_body")
