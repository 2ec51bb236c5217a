"""`LLM`: the Python API for generation.

    llm = LLM("runs/demo")
    print(llm.generate("Once upon a time", SamplingParams(max_tokens=50)).text)

It assembles model, KV cache, scheduler, runner and engine, and offers plain calls. Everything goes through one engine,
so calls from several threads share its batches.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import nullcontext
from typing import Any, TypeGuard, cast, overload

import torch

from ...tokenizer.chat import encode_chat
from ...tokenizer.files import read_stop_ids
from ..device import DTYPES, pick_device, pick_dtype
from ..errors import InputError, refuse_below
from ..formats.adapters import Adapter
from ..formats.model_directory import load_model, read_model
from ..formats.model_info import base_of, refuse_repacking
from ..formats.model_source import resolve_model
from ..formats.packed_weight import describe, is_packed
from ..model import Block, Transformer
from .beam_search import beam_search
from .engine import Engine, Generation
from .execution.gpu_model import keeps_latents
from .execution.kv_cache import HAS_NATIVE, TILE, PagedKVCache, set_threads
from .execution.lora import ServedAdapters, open_adapters
from .execution.model_runner import Runner, memory_for_pages
from .execution.native_matrix import keeps_packed, refuse_float8
from .execution.outlier_smoothing import has_outlier_key_biases, is_supported
from .execution.serving_model import serving_model
from .execution.speculative import make_runner, model_draft, ngram_draft
from .outputs import Output, Piece
from .sampling_params import SamplingParams
from .scheduling.pace import StepPace
from .scheduling.page_pool import PagePool
from .scheduling.scheduler import Scheduler
from .scheme import Scheme, scheme_of
from .structured_output import GrammarCompiler

Prompt = str | Items[int]
MOST_ROWS = 256  # default maximum batch: 160 streams were 19 % faster together than 64 at a time


class LLM:
    """Generation with a model directory, a Hub id or a `Transformer`.

    `max_batch` bounds the sequences computed together; by default it is 256 on a CPU, or what memory holds a
    quarter of the context for, and 64 elsewhere. `kv_memory` bounds the cache in bytes; by default it is what
    `max_batch` full contexts need, as far as memory goes. `quantize="int8"` keeps weights in 8 bits, "int4" in 4
    (of small models not all), "fp8" in float8 (on a GPU), a `Scheme` as it says; on a CPU keys and values are in 8
    bits then too, unless keys have biases far larger than themselves. `kv_dtype` chooses their format by itself:
    the name of a dtype, "int8" or "fp8", which loses more; 8 bits are half the bytes of bfloat16, so twice the
    tokens in the same memory, read in half the time. `max_batch_tokens` bounds the tokens of one step; by default a
    step that others wait for takes 200 ms at most. `ngram_draft_tokens` is how many tokens an n-gram lookup may
    guess ahead, `draft_model` a smaller model of the same vocabulary that guesses `draft_tokens` ahead: either
    changes the speed, not the output. `tensor_parallel` spreads the model over that many processes, each with a GPU
    of its own where there are GPUs; `close` ends them. `batch_invariant=False` lets PyTorch multiply as it likes:
    what a request gets may then depend, in the last bits, on its company. `adapters` are directories of LoRA
    adapters by name: each request may name one, and one batch may hold many. A directory of one adapter that is
    itself the `model` is merged, and costs nothing.
    """

    def __init__(
        self,
        model: str | os.PathLike | Transformer,
        tokenizer: Any = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_batch: int | None = None,
        kv_memory: int | None = None,
        page_size: int = 16,
        quantize: str | Scheme | None = None,
        kv_dtype: str | None = None,
        max_batch_tokens: int | None = None,
        max_seq_len: int | None = None,
        ngram_draft_tokens: int = 0,
        draft_model: str | os.PathLike | Transformer | None = None,
        draft_tokens: int = 4,
        prefix_cache: bool = True,
        tensor_parallel: int = 1,
        batch_invariant: bool = True,
        adapters: Mapping[str, str | os.PathLike | Adapter] | None = None,
    ):
        scheme = scheme_of(quantize, 0)  # a wrong name is refused before anything is loaded
        refuse_below(0, ngram_draft_tokens=ngram_draft_tokens)
        refuse_below(
            1,
            max_batch=max_batch,
            page_size=page_size,
            max_batch_tokens=max_batch_tokens,
            max_seq_len=max_seq_len,
            draft_tokens=draft_tokens,
            tensor_parallel=tensor_parallel,
        )
        if tensor_parallel > 1 and adapters:
            raise InputError(f"tensor_parallel must be 1 with adapters, got {tensor_parallel}: merge one instead")
        if ngram_draft_tokens and draft_model is not None:
            raise InputError("ngram_draft_tokens and draft_model are two ways to guess ahead: give one of them")
        if isinstance(model, (str, os.PathLike)):
            model = resolve_model(model)
        if isinstance(draft_model, (str, os.PathLike)):
            draft_model = resolve_model(draft_model)
        if scheme is not None and not isinstance(model, Transformer):
            refuse_repacking(base_of(model), quantize, scheme.bits)
        self._source = model
        sources = [model] if draft_model is None else [model, draft_model]
        where = model.device if device is None and isinstance(model, Transformer) else pick_device(device)
        paced, fitted = max_batch_tokens is None, max_batch is None
        max_batch = max_batch or (MOST_ROWS if where.type == "cpu" and tensor_parallel == 1 else 64)
        max_batch_tokens = max(max_batch_tokens or (8192 if where.type == "cuda" else 512), max_batch)
        refuse_float8(scheme is not None and scheme.float8 and where.type == "cpu" and HAS_NATIVE)
        packed = quantize is None and keeps_packed(where)
        tp_runner = None
        if tensor_parallel > 1:
            from .execution.tensor_parallel import start_workers

            tp_runner = start_workers(sources, tensor_parallel, where, dtype, packed, max_batch_tokens, max_batch)
        with tp_runner or nullcontext():
            self.model, self.tokenizer = _open(model, tokenizer, where, dtype, tp_runner and tp_runner.group, packed)
            self.packing = describe(self.model)
            halves = self.model.embedding.weight.dtype == torch.float16
            if packed and self.packing and halves and where.type == "cpu" and tp_runner is None:
                self.model.float()  # what is not packed: C++ knows float32 and bfloat16
            self._packing = where, dtype, quantize, batch_invariant
            self.config = self.model.config
            self.adapters = open_adapters(adapters or {}, model)
            limit = self.config.max_seq_len
            if max_seq_len is not None and max_seq_len > limit:
                raise InputError(f"max_seq_len is {max_seq_len}; the model reads at most {limit} tokens")
            self.max_seq_len = max_seq_len or limit
            cache_dtype = _page_dtype(kv_dtype, quantize, self.model, page_size)
            set_threads()
            models = [self.model] if draft_model is None else [self.model, self._open_draft(draft_model)]
            memory = _cache_memory(tp_runner, self.model, kv_memory, max_batch_tokens, max_batch)
            cost = self._page_bytes(models, page_size, cache_dtype, where)
            if kv_memory is not None and kv_memory < cost:
                raise InputError(
                    f"kv_memory={kv_memory} bytes is less than one page of {page_size} tokens, {cost} bytes"
                )
            if fitted:  # a quarter of the context each, as conversations are; who outgrows that may be preempted
                max_batch = min(max_batch, max(16, memory // cost * page_size * 4 // self.max_seq_len))
            pages = max(1, min(max_batch * -(-self.max_seq_len // page_size), memory // cost))
            options = {"pages": pages, "page_size": page_size, "quantize": quantize, "batch_invariant": batch_invariant}
            options |= {"max_batch": max_batch, "context": self.max_seq_len, "kv_dtype": cache_dtype}
            options |= {"release": tuple(not isinstance(source, Transformer) for source in sources)}
            served = ServedAdapters(self.adapters) if self.adapters else None
            runner = tp_runner.begin(models, options) if tp_runner else make_runner(models, **options, adapters=served)
        self.model = runner.model
        guess = ngram_draft if ngram_draft_tokens else None if draft_model is None else model_draft
        scheduler = Scheduler(
            PagePool(pages, page_size, prefix_cache),
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            context=self.max_seq_len,
            depth=2 if where.type == "cuda" and guess is None else 1,
            draft=guess,
            most_drafts=ngram_draft_tokens or draft_tokens,
        )
        self.grammars = GrammarCompiler(self.tokenizer, self.config.vocab_size)
        self.engine = Engine(scheduler, runner, self.tokenizer, _stop_ids(model, self.tokenizer))
        if paced:
            self.engine.pace = StepPace(max_batch_tokens)

    def _page_bytes(self, models: list[Any], page_size: int, dtype: torch.dtype, where: torch.device) -> int:
        """Bytes of a page for each model: the served one and its draft."""
        tuned = self.adapters or None, None
        latent = (keeps_latents(each.config, where, own) for each, own in zip(models, tuned))
        return sum(
            PagedKVCache.bytes_per_page(each.config, page_size, dtype, where, own) for each, own in zip(models, latent)
        )

    def _open_draft(self, source) -> Transformer:
        """Load the draft model, checked to have the same vocabulary."""
        draft_model, tokenizer = _open(source, None, self.model.device, self.model.embedding.weight.dtype)
        ours, theirs = self.config.vocab_size, draft_model.config.vocab_size
        if ours != theirs or not _same_tokens(self.tokenizer, tokenizer):
            raise InputError(f"draft_model needs the model's vocabulary of {ours} tokens; it has another, of {theirs}")
        if draft_model.config.max_seq_len < self.max_seq_len:
            limit = draft_model.config.max_seq_len
            raise InputError(f"draft_model reads {limit} tokens, not {self.max_seq_len}: set max_seq_len={limit}")
        return draft_model

    @functools.cached_property
    def plain_model(self) -> Transformer:
        """The model with every step in PyTorch, for inspection; read again if it came from a directory."""
        given = self._source
        return given.eval() if isinstance(given, Transformer) else read_model(given, self.model.device)

    def close(self) -> None:
        """Stop the engine and the worker processes; automatic at program exit."""
        self.engine.stop()
        self.engine.runner.close()

    def refresh(self) -> None:
        """Reload the current weights of the given `Transformer`: requantize, and drop cached prefixes."""
        runner = self.engine.runner
        if not isinstance(self._source, Transformer) or not isinstance(runner, Runner):
            raise InputError("refresh needs an LLM of a Transformer, in one process and without draft_model")
        self.engine.call(lambda: self._refresh(runner))
        self.model = runner.model

    def _refresh(self, runner: Runner) -> None:
        scheduler = self.engine.scheduler
        if not scheduler.idle:
            raise InputError("refresh needs an idle engine: requests in progress began with the old weights")
        where, dtype, quantize, batch_invariant = self._packing
        model, _ = _open(self._source, None, where, dtype)
        native_pages = runner.store.layers is not None
        packing = quantize, False, batch_invariant, native_pages
        runner.model, runner.head = serving_model(model, *packing, runner.adapters)
        if quantize is not None:
            runner.graphs = None  # they were recorded with the old ones; without, the twin shares the model's weights
        scheduler.pool.forget()

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None, **options
    ) -> Generation:
        """Submit a request without waiting, to the model or an adapter; `options` are those of `Engine.submit`. For
        servers."""
        params = params or SamplingParams()
        if adapter is not None and adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise InputError(f"adapter {adapter!r} is not loaded; loaded: {known}")
        if params.constrained and "grammar" not in options:
            options["grammar"] = self.grammars.compile(params)
        return self.engine.submit(self.encode(prompt), params, adapter=adapter, **options)

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]  # a str is a Sequence[str] too
        self, prompts: str | Items[int], params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Output: ...

    @overload
    def generate(
        self,
        prompts: Items[Prompt],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        adapter: str | Items[str | None] | None = None,
    ) -> list[Output]: ...

    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        adapter: str | Items[str | None] | None = None,
    ) -> Output | list[Output]:
        """Generate for prompts as one batch; one prompt gives one Output, a list gives a list in its order.

        `params` and `adapter` are those of all prompts, or a list of one for each.
        """
        if _is_prompt(prompts):
            if not (params is None or isinstance(params, SamplingParams)):
                raise InputError(f"params has {len(params)} entries for one prompt: give one")
            if not (adapter is None or isinstance(adapter, str)):
                raise InputError(f"adapter has {len(adapter)} entries for one prompt: give one")
            return self.submit(prompts, params, adapter=adapter).result()
        several = _prompts(prompts)
        each = [params] * len(several) if params is None or isinstance(params, SamplingParams) else list(params)
        names = [adapter] * len(several) if adapter is None or isinstance(adapter, str) else list(adapter)
        for name, given in (("params", each), ("adapter", names)):
            if len(given) != len(several):
                raise InputError(
                    f"{name} has {len(given)} entries for {len(several)} prompts: give one, or one for each"
                )
        generations = []
        try:
            for index, (prompt, chosen, name) in enumerate(zip(several, each, names)):
                try:
                    generations.append(self.submit(prompt, chosen, adapter=name))
                except InputError as error:
                    raise InputError(f"prompts[{index}]: {error}") from None
            return [generation.result() for generation in generations]
        finally:
            for generation in generations:
                generation.cancel()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[Piece]:
        """Stream pieces of text; joined, they are the whole text. Leaving the loop cancels."""
        return iter(self.submit(prompt, params, adapter=adapter))

    def chat(self, messages: list[dict], params: SamplingParams | None = None, *, adapter: str | None = None) -> Output:
        """Generate the next message of a conversation: [{"role": "user", "content": "…"}, …]."""
        return self.submit(self.encode_chat(messages), params, adapter=adapter).result()

    def beam_search(
        self, prompt: Prompt, beam_width: int = 4, max_tokens: int = 64, length_penalty: float = 1.0
    ) -> list[Output]:
        """Beam search: keep the best `beam_width` continuations at every step; best first."""
        return beam_search(self.engine, self.encode(prompt), beam_width, max_tokens, length_penalty)

    @overload
    def score(  # pyright: ignore[reportOverlappingOverload]
        self, texts: str | Items[int], *, adapter: str | None = None
    ) -> list[float]: ...

    @overload
    def score(self, texts: Items[Prompt], *, adapter: str | None = None) -> list[list[float]]: ...

    def score(self, texts: Prompt | Items[Prompt], *, adapter: str | None = None) -> list[float] | list[list[float]]:
        """Log-probabilities of each text's tokens from the second on, by the model (and an adapter) alone."""
        outputs = self.generate(_prompts(texts), SamplingParams(max_tokens=0, prompt_logprobs=0), adapter=adapter)
        scores = [[entry.logprob for entry in output.prompt_logprobs or ()] for output in outputs]
        return scores[0] if _is_prompt(texts) else scores

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokenize a prompt; special tokens in text are not recognized.

        A text gets the tokens that its tokenizer's post-processor puts before every text (Llama's <s>), unless they
        are there already; a conversation does not: its template writes them.
        """
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: give the prompt as token ids")
        prefix, ids = list(self.tokenizer.prefix_ids), self.tokenizer.encode(prompt)
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Tokenize a conversation with the tokenizer's chat template, or a plain one."""
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: a conversation cannot be encoded")
        return encode_chat(self.tokenizer, messages)


def _open(model, tokenizer, device, dtype, group=None, packed=False) -> tuple[Transformer, Any]:
    if isinstance(model, (str, os.PathLike)):
        if tokenizer is not None:
            return read_model(model, device, dtype, group, packed), tokenizer
        return load_model(model, device, dtype, group, packed)
    if not isinstance(model, Transformer):
        raise InputError(f"model must be a model directory or a Transformer, got {type(model).__name__}")
    device = model.device if device is None else pick_device(device)
    if is_packed(model):
        return model.eval(), tokenizer
    wanted = None if dtype is None else pick_dtype(dtype, device)
    if device != model.device or wanted not in (None, model.embedding.weight.dtype):
        copy = Transformer(model.config).to(device, wanted)
        copy.load_state_dict(model.state_dict())
        model = copy
    return model.eval(), tokenizer


def _stop_ids(model, tokenizer) -> frozenset[int]:
    """Token ids that end a generation, from the tokenizer and the model's files."""
    named = frozenset() if isinstance(model, Transformer) else read_stop_ids(base_of(model))
    return named if tokenizer is None else named | tokenizer.stop_ids


def _cache_memory(
    tp_runner: Any, model: Transformer, kv_memory: int | None, max_batch_tokens: int, max_batch: int
) -> int:
    """Bytes for the KV cache: as given, or as free. Tensor-parallel processes measure in any case."""
    if tp_runner is None and kv_memory is not None:
        return kv_memory
    free = (tp_runner.memory_for_pages if tp_runner else memory_for_pages)(model, max_batch_tokens, max_batch)
    return free if kv_memory is None else kv_memory


def _page_dtype(kv_dtype: str | None, quantize: str | Scheme | None, model: Transformer, page_size: int) -> torch.dtype:
    """Dtype of the KV cache."""
    device, formats = model.device, {**DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    if kv_dtype is None:
        eight = quantize is not None or is_packed(model)
        eight = eight and device.type == "cpu" and HAS_NATIVE and page_size % TILE == 0
        eight = (
            eight
            and is_supported(model.config)
            and not any(map(has_outlier_key_biases, cast("list[Block]", model.blocks)))
        )
        return torch.int8 if eight else model.embedding.weight.dtype
    if kv_dtype not in formats:
        raise InputError(f"kv_dtype must be None or one of {', '.join(formats)}, got {kv_dtype!r}")
    if kv_dtype == "int8" and device.type == "cpu" and HAS_NATIVE and page_size % TILE:
        raise InputError(f"page_size must be a multiple of {TILE} with kv_dtype='int8', got {page_size}")
    if kv_dtype == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return torch.float8_e5m2  # what older GPUs can convert has fewer digits
    return formats[kv_dtype]


def _same_tokens(ours, theirs) -> bool:
    """Return whether two tokenizers agree on the ids of all tokens; True if one is missing."""
    return ours is None or theirs is None or getattr(ours, "vocab", None) == getattr(theirs, "vocab", None)


def _is_prompt(prompts: Prompt | Items[Prompt]) -> TypeGuard[Prompt]:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _prompts(prompts: Prompt | Items[Prompt]) -> list[Prompt]:
    """Normalize one prompt or several to a list."""
    return [prompts] if _is_prompt(prompts) else list(cast("Items[Prompt]", prompts))
