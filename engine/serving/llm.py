"""`LLM`: a model ready to generate, in one object.

    llm = LLM("runs/demo")
    print(llm.generate("Once upon a time", SamplingParams(max_tokens=50)).text)

It puts the pieces together (model, pages, scheduler, runner, engine) and offers them as plain calls. Everything goes
through the one engine, so calls from several threads share its batches.
"""

import functools
import os
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path

import torch

from ...tokenizer.chat import encode_chat
from ..device import DTYPES, memory_bytes, pick_device
from ..hub import load_model
from ..model import Transformer
from .beam import beam_search
from .engine import Engine, Generation
from .grammar import compile_grammar
from .outputs import Output, Piece
from .pages import PagePool
from .params import SamplingParams
from .quantize import serving_model
from .runner import Runner
from .scheduler import Scheduler
from .speculation import NGramDraft
from .store import PageStore, set_workers

Prompt = str | Items[int]


class LLM:
    """Generates with a model directory or a `Transformer`.

    `kv_memory` bounds the cache in bytes; by default it is what `max_batch` full contexts need, as far as memory goes.
    `quantize="int8"` keeps weights in 8 bits. `speculate` is how many tokens an n-gram lookup may guess ahead: it
    changes the speed, not the output. `step_tokens` bounds the tokens of one step.
    """

    def __init__(
        self,
        model: str | os.PathLike | Transformer,
        tokenizer=None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_batch: int = 64,
        kv_memory: int | None = None,
        page_size: int = 16,
        quantize: str | None = None,
        step_tokens: int | None = None,
        max_context: int | None = None,
        speculate: int = 0,
        prefix_cache: bool = True,
    ):
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize must be None or 'int8', got {quantize!r}")
        self._source = model
        self.model, self.tokenizer = _open(model, tokenizer, device, dtype)
        self.config = self.model.config
        self.max_context = min(max_context or self.config.max_seq_len, self.config.max_seq_len)
        where, cache_dtype = self.model.device, self.model.embedding.weight.dtype
        set_workers()
        self.model, head = serving_model(self.model, quantize, release=not isinstance(model, Transformer))
        pages = _count_pages(self.config, page_size, cache_dtype, where, kv_memory, max_batch, self.max_context)
        store = PageStore(self.config, pages, page_size, cache_dtype, where)
        runner = Runner(self.model, store, max_batch=max_batch, context=self.max_context, head=head)
        scheduler = Scheduler(
            PagePool(pages, page_size, prefix_cache),
            max_batch=max_batch,
            step_tokens=max(step_tokens or (8192 if where.type == "cuda" else 512), max_batch),
            context=self.max_context,
            depth=2 if where.type == "cuda" and not speculate else 1,
            draft=NGramDraft(speculate) if speculate else None,
        )
        self.engine = Engine(scheduler, runner, self.tokenizer, _end_tokens(self.tokenizer))

    @functools.cached_property
    def plain_model(self) -> Transformer:
        """The model with every step in PyTorch, to look inside; read again if it came from a directory."""
        given = self._source
        return given.eval() if isinstance(given, Transformer) else load_model(given, self.model.device)[0]

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, **options) -> Generation:
        """Ask for a generation without waiting; `options` are those of `Engine.submit`. For servers."""
        params = params or SamplingParams()
        grammar = compile_grammar(params, self.tokenizer, self.config.vocab_size) if params.constrained else None
        return self.engine.submit(self.encode(prompt), params, grammar=grammar, **options)

    def generate(
        self, prompts: Prompt | Items[Prompt], params: SamplingParams | Items[SamplingParams] | None = None
    ) -> Output | list[Output]:
        """Continue prompts, together; one prompt gives one Output, a list gives a list in its order."""
        if _is_prompt(prompts):
            return self.submit(prompts, params).result()
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params has {len(each)} entries for {len(prompts)} prompts: give one, or one for each")
        generations = []
        try:
            for prompt, chosen in zip(prompts, each):
                generations.append(self.submit(prompt, chosen))
            return [generation.result() for generation in generations]
        finally:
            for generation in generations:
                generation.cancel()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """Pieces of the text as they become certain; joined, they are the text. Leaving the loop cancels."""
        return iter(self.submit(prompt, params))

    def chat(self, messages: list[dict], params: SamplingParams | None = None) -> Output:
        """The next message of a conversation: [{"role": "user", "content": "…"}, …]."""
        return self.submit(self.encode_chat(messages), params).result()

    def beam_search(
        self, prompt: Prompt, beam_width: int = 4, max_tokens: int = 64, length_penalty: float = 1.0
    ) -> list[Output]:
        """The most likely continuations found by keeping the best `beam_width` at every step, best first."""
        return beam_search(self, self.encode(prompt), beam_width, max_tokens, length_penalty)

    def score(self, texts: Prompt | Items[Prompt]) -> list:
        """Log-probabilities of each text's tokens from the second on, by the model alone."""
        one = _is_prompt(texts)
        outputs = self.generate([texts] if one else texts, SamplingParams(max_tokens=0, prompt_logprobs=0))
        scores = [[entry.logprob for entry in output.prompt_logprobs] for output in outputs]
        return scores[0] if one else scores

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt as token ids; text never becomes a special token."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give the prompt as token ids")
        return self.tokenizer.encode(prompt)

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """A conversation as token ids, by the tokenizer's chat template or a plain one."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: a conversation cannot be encoded")
        return encode_chat(self.tokenizer, messages)


def _open(model, tokenizer, device, dtype) -> tuple[Transformer, object]:
    if isinstance(model, (str, os.PathLike)):
        loaded, found = load_model(Path(model), device, dtype)
        return loaded, tokenizer or found
    if not isinstance(model, Transformer):
        raise ValueError(f"model must be a model directory or a Transformer, got {type(model).__name__}")
    wanted = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    device = model.device if device is None else pick_device(device)
    if device != model.device or wanted not in (None, model.embedding.weight.dtype):
        copy = Transformer(model.config).to(device, wanted)
        copy.load_state_dict(model.state_dict())
        model = copy
    return model.eval(), tokenizer


def _end_tokens(tokenizer) -> frozenset[int]:
    end = getattr(tokenizer, "eos_id", None)
    specials = getattr(tokenizer, "special_tokens", None) or {}
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
    return frozenset({*(() if end is None else (end,)), *(specials[name] for name in names if name in specials)})


def _count_pages(config, page_size, dtype, device, kv_memory, max_batch, context) -> int:
    """As many pages as memory allows, and no more than a full batch could fill."""
    cost = PageStore.bytes_per_page(config, page_size, dtype)
    enough = max_batch * -(-context // page_size)
    if kv_memory is None:
        free = torch.cuda.mem_get_info(device)[0] * 0.85 if device.type == "cuda" else memory_bytes(device) / 4
        return max(1, min(enough, int(free // cost)))
    if kv_memory < cost:
        raise ValueError(f"kv_memory={kv_memory} bytes is less than one page of {page_size} tokens, {cost} bytes")
    return min(enough, kv_memory // cost)


def _is_prompt(prompts) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
