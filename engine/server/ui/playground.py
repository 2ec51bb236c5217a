"""Playground (Gradio): chat, completion with token probabilities, attention maps.

Gradio builds the page from what is written here and ships its own fonts and scripts, so it works without a network. It
takes seconds to import, so it is imported when somebody first opens the page: a server nobody looks at never pays.
Generations run through the same bridge as everybody's: they queue, they are measured, and Stop frees their pages.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable
from html import escape
from importlib.util import find_spec
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse

from ....tokenizer.chat import DEFAULT
from ...attention_maps import attention_maps
from ...serving import SamplingParams
from ..async_engine import Ask
from ..handlers import Service
from ..openai.chat import encode_conversation
from ..openai.conversation import Message
from ..openai.errors import APIError
from ..request_body import client_of
from .token_views import CSS, facts, heat_map, token_view

# What the page asks for; whatever else comes here, a client of some API has mistaken.
PATHS = {"", "gradio_api", "config", "theme.css", "static", "assets", "svelte", "favicon.ico", "manifest.json"}
PATHS |= {"robots.txt", "pwa_icon"}
REDRAW = 0.08  # seconds between two pictures of a growing text
MAP_TOKENS = 48
CHATS = "This model has a chat template: it answers."
CONTINUES = "This model has no chat template: it continues the conversation as it would any text."
WAITING = "<!doctype html><meta http-equiv=refresh content=1><p style='font-family:system-ui'>The model is {} …</p>"


def available() -> bool:
    """Return whether gradio is installed."""
    return find_spec("gradio") is not None


class Playground:
    """ASGI application that builds the Gradio page on first use."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._page: Any = None
        self._life: asyncio.Task | None = None
        self._built = asyncio.Event()
        self._closing = asyncio.Event()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["path"].removeprefix(scope.get("root_path", "")).split("/")[1] not in PATHS:
            raise HTTPException(404)
        state = self._service.bridge.state
        if self._page is None and self._service.bridge.llm is None:
            return await HTMLResponse(WAITING.format(state), 503)(scope, receive, send)
        if self._life is None:
            self._life = asyncio.create_task(self._live())
        await self._built.wait()
        if self._page is None:
            raise RuntimeError("the playground could not be built")
        await self._page(scope, receive, send)

    async def close(self) -> None:
        """Stop the page's tasks."""
        self._closing.set()
        if self._life is not None:
            await self._life

    async def _live(self) -> None:
        """Run Gradio's lifespan in one task, as it requires."""
        try:
            page = await asyncio.to_thread(build, self._service)
            async with page.router.lifespan_context(page):
                self._page = page
                self._built.set()
                await self._closing.wait()
        finally:
            self._built.set()


def build(service: Service) -> Any:
    """Build the page as an ASGI application."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio
    from fastapi import FastAPI

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gradio.themes.Default(primary_hue="violet", secondary_hue="violet", neutral_hue="slate", **fonts)
    options = {"footer_links": [], "run_history": False, "ssr_mode": False, "pwa": False, "max_file_size": "1kb"}
    host = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gradio.mount_gradio_app(host, _blocks(gradio, service), path="/", theme=theme, css=CSS, **options)


def _blocks(gradio: Any, service: Service) -> Any:
    llm = service.llm
    config = llm.config
    about = f"{config.parameter_count():,} parameters · {config.n_layers} layers · context {llm.max_seq_len:,} tokens"
    with gradio.Blocks(title=f"{service.config.name} · warploom", analytics_enabled=False) as blocks:
        gradio.HTML(f"<div class=loom-title><b>{escape(service.config.name)}</b><span>{about}</span></div>")
        with gradio.Row():
            main = gradio.Column(scale=3, min_width=320)
            with gradio.Column(scale=1, min_width=290, elem_id="settings") as side:
                settings = _settings(gradio, llm.max_seq_len)
        with main, gradio.Tabs():
            with gradio.Tab("Chat") as chat:
                _chat_tab(gradio, service, settings)
            with gradio.Tab("Complete") as complete:
                _completion_tab(gradio, service, settings)
            with gradio.Tab("Attention") as attention:
                _attention_tab(gradio, service)
        for tab in (chat, complete, attention):  # sampling means nothing to an attention map
            tab.select(
                lambda shown=tab is not attention: gradio.Column(visible=shown), None, side, show_progress="hidden"
            )
    return blocks.queue(default_concurrency_limit=None)


def _settings(gradio: Any, context: int) -> list[Any]:
    slider = gradio.Slider
    longest = max(context - 1, 2)
    return [
        slider(0.0, 2.0, 0.8, step=0.05, label="Temperature (0: the most likely)", elem_id="temperature"),
        slider(0, 200, 0, step=1, label="Top-k (0: all)"),
        slider(0.05, 1.0, 0.95, step=0.01, label="Top-p"),
        slider(0.0, 1.0, 0.0, step=0.01, label="Min-p"),
        slider(1.0, 2.0, 1.0, step=0.05, label="Repetition penalty"),
        slider(1, longest, min(512, longest), step=1, label="Max new tokens", elem_id="max-tokens"),
        gradio.Number(-1, label="Seed (-1: a new one each time)", precision=0, elem_id="seed"),
    ]


def _chat_tab(gradio: Any, service: Service, settings: list[Any]) -> None:
    template = getattr(service.llm.tokenizer, "chat_template", None)
    history = gradio.Chatbot(
        height=None,
        feedback_options=None,
        allow_tags=False,
        latex_delimiters=[],
        buttons=["copy"],
        editable="user",
        elem_id="chat",
        show_label=False,
        placeholder=CHATS if template else CONTINUES,
    )
    with gradio.Row(elem_id="chat-line"):
        speed = gradio.HTML(elem_id="chat-speed")
        proceed = gradio.Button("Continue", size="sm", visible=False, elem_id="continue-chat", scale=0)
    sending = {"submit_btn": "Send", "stop_btn": False}
    message = gradio.Textbox(
        show_label=False, container=False, placeholder="Say something", elem_id="message", autofocus=True, **sending
    )
    with gradio.Accordion("System message and template", open=False):
        system = gradio.Textbox(label="System message", placeholder="How the model should behave", max_lines=6)
        gradio.Textbox(template or DEFAULT, label="Chat template", lines=4, max_lines=12, buttons=["copy"])

    async def answer(
        request: Any, turns: list[dict], system: str | None, chosen: tuple, begun: str = ""
    ) -> AsyncIterator[Any]:
        """Generate the answer, or continue it; yields history, message, speed and whether it can continue."""
        said = [{"role": "system", "content": system}] if system else []
        said += [*turns, *([{"role": "assistant", "content": begun}] if begun else [])]
        messages = [Message(role=turn["role"], content=_plain(turn["content"])) for turn in said]

        def asks(llm: Any) -> Iterable[Ask]:
            yield encode_conversation(llm.tokenizer, messages, continue_last=bool(begun)), _params(chosen)

        busy, more = gradio.Textbox(value="", submit_btn=False, stop_btn="Stop"), gradio.Button(visible=False)
        async for progress in _generate(gradio, service, asks, request):
            if progress.reason:
                busy, more = gradio.Textbox(**sending), gradio.Button(visible=progress.reason == "length")
            shown = [*turns, {"role": "assistant", "content": begun + progress.text}]
            yield shown, busy, progress.facts, more
            busy = gradio.Textbox()

    async def send(request: Any, text: str, turns: list[dict], system: str | None, *chosen: Any) -> Any:
        if not (text or "").strip():
            yield turns, gradio.Textbox(), "", gradio.Button(visible=False)
            return
        async for shown in answer(request, [*turns, {"role": "user", "content": text}], system, chosen):
            yield shown

    async def retry(request: Any, text: str, turns: list[dict], system: str | None, *chosen: Any) -> Any:
        asked = max((index for index, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
        async for shown in answer(request, turns[: asked + 1], system, chosen):
            yield shown

    async def edit(request: Any, data: Any, text: str, turns: list[dict], system: str | None, *chosen: Any) -> Any:
        place = data.index if isinstance(data.index, int) else data.index[0]
        changed = [*turns[:place], {"role": "user", "content": data.value}]
        async for shown in answer(request, changed, system, chosen):
            yield shown

    async def go_on(request: Any, text: str, turns: list[dict], system: str | None, *chosen: Any) -> Any:
        if turns and turns[-1]["role"] == "assistant":
            async for shown in answer(request, turns[:-1], system, chosen, _plain(turns[-1]["content"])):
                yield shown

    inputs, outputs = [message, history, system, *settings], [history, message, speed, proceed]
    for run in (send, retry, edit, go_on):  # Gradio fills in a parameter by its type
        run.__annotations__["request"] = gradio.Request
    edit.__annotations__["data"] = gradio.EditData
    triggers = ((message.submit, send), (history.retry, retry), (history.edit, edit), (proceed.click, go_on))
    running = [trigger(run, inputs, outputs, show_progress="hidden") for trigger, run in triggers]
    for each in running:
        each.failure(lambda: gradio.Textbox(**sending), None, message)
    message.stop(lambda: gradio.Textbox(**sending), None, message, cancels=running)
    history.clear(lambda: ("", gradio.Button(visible=False)), None, [speed, proceed], cancels=running)


def _completion_tab(gradio: Any, service: Service, settings: list[Any]) -> None:
    prompt = gradio.Textbox("Once upon a time", label="Prompt", lines=4, max_lines=12, elem_id="prompt")
    start = gradio.Button("Continue", variant="primary", elem_id="start")
    stop = gradio.Button("Stop", elem_id="stop", visible=False)
    speed = gradio.HTML(elem_id="speed")
    tokens = gradio.HTML(elem_id="tokens")
    with gradio.Accordion("As plain text", open=False):
        plain = gradio.Textbox(show_label=False, lines=6, buttons=["copy"], elem_id="plain")

    async def complete(request: gradio.Request, text: str, *chosen: Any) -> Any:
        def asks(llm: Any) -> Iterable[Ask]:
            yield llm.encode(text or ""), _params(chosen)

        async for progress in _generate(gradio, service, asks, request):
            shown = token_view(text, progress.entries, service.words), progress.facts, text + progress.text
            yield *shown, *buttons(progress.reason is None)

    def buttons(runs: bool = False) -> tuple[Any, Any]:
        """Enable Continue or Stop, whichever applies."""
        return gradio.Button(visible=not runs), gradio.Button(visible=runs)

    both = [start, stop]
    running = start.click(complete, [prompt, *settings], [tokens, speed, plain, *both], show_progress="hidden")
    running.failure(buttons, None, both)
    stop.click(buttons, None, both, cancels=[running])


def _attention_tab(gradio: Any, service: Service) -> None:
    config = service.llm.config
    gradio.Markdown("Each row is a token; its cells say how much it attends to each token before it.")
    text = gradio.Textbox("The weaver pulled the thread and the loom sang", label="Text", elem_id="attention-text")
    with gradio.Row():
        layer = gradio.Slider(1, config.n_layers, 1, step=1, label="Layer", interactive=config.n_layers > 1)
        head = gradio.Slider(0, config.n_heads, 0, step=1, label="Head (0: mean)")
    draw = gradio.Button("Draw", variant="primary", elem_id="draw")
    picture = gradio.HTML(elem_id="heat")

    def show(text: str, layer: int, head: int) -> str:
        llm, words = service.llm, service.words
        tokens = llm.encode(text or "")[: min(MAP_TOKENS, llm.max_seq_len)]
        if not tokens:
            raise gradio.Error("the text is empty", print_exception=False)
        weights_HTS = attention_maps(llm.plain_model, tokens)[int(layer) - 1]
        weights_TS = weights_HTS[int(head) - 1] if head else weights_HTS.mean(0)
        return heat_map([words.text(token) for token in tokens], weights_TS.tolist())

    inputs = [text, layer, head]
    draw.click(show, inputs, picture)
    for control in (layer, head):
        control.release(show, inputs, picture, show_progress="hidden")


class _Progress:
    """Progress of a generation."""

    def __init__(self) -> None:
        self.text, self.entries, self.facts = "", [], facts(0, None, 0, None)
        self.reason: str | None = None


async def _generate(gradio: Any, service: Service, asks: Any, request: Any) -> AsyncIterator[_Progress]:
    """Run a generation with periodic updates; its pages are always freed."""
    progress, start, first, drawn = _Progress(), time.monotonic(), None, 0.0
    try:
        scope = request.request.scope
        who = {"salt": scope.get("salt"), "client": client_of(scope), "party": scope.get("party")}
        flow = await service.bridge.submit(asks, 1, streaming=True, **who)
    except APIError as error:
        raise gradio.Error(error.message, print_exception=False) from None
    try:
        yield progress
        async for events in flow.batches():
            reason = None
            for _, piece, _ in events:
                progress.text += piece.text
                progress.entries += piece.logprobs
                reason = piece.finish_reason or reason
            now = time.monotonic()
            first = first or now - start
            if reason or now - drawn > REDRAW:
                drawn = now
                progress.reason = reason
                progress.facts = facts(len(progress.entries), first, now - start, reason)
                yield progress
    except APIError as error:
        raise gradio.Error(error.message, print_exception=False) from None
    finally:
        flow.close()
        service.metrics.request(flow)


def _params(chosen: tuple) -> SamplingParams:
    temperature, top_k, top_p, min_p, penalty, most, seed = chosen
    return SamplingParams(
        max_tokens=int(most),
        temperature=temperature,
        top_k=int(top_k),
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        seed=None if seed is None or seed < 0 else int(seed),
        logprobs=5,
    )


def _plain(content: Any) -> str:
    """Text of a turn: Gradio gives some as lists of parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
    return str(content)
