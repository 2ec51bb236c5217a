"""Speculative decoding by n-gram lookup or a draft model; the output is exactly that of a run without.

Decoding reads every weight to make one token; verifying k drafts reads them once for k + 1. The model computes the
*drafts* in the same step as the token before them, samples after each, and goes on as long as a draft is
what it sampled itself. The draw at a position depends only on (seed, position) and the logits there, so the tokens are
exactly those of a run without drafts, at any temperature; only the number of steps changes.

Two ways to draft:

* `ngram_draft` looks for the last few tokens earlier in the sequence and proposes what followed them there;
* a `DraftRunner` asks a smaller model of the same vocabulary. Its cache lies in pages of the same numbers: page 7 of
  the draft holds the same tokens as page 7 of the model. So whatever the scheduler does to pages (share, copy, take
  away, find again) holds for both, and the draft needs no scheduler, only the same plans. It draws with the same
  parameters and the *same noise* as the model, so where both expect the same, they choose the same.
"""

from dataclasses import replace

import torch

from ...model import Transformer
from ..scheduling.sequence import Sequence
from ..scheduling.step import UNKNOWN, Chunk, StepPlan
from .gpu_model import keeps_latents
from .kv_cache import PagedKVCache
from .lora import ServedAdapters
from .model_runner import InFlightStep, Runner
from .serving_model import serving_model


def ngram_draft(sequence: Sequence, most: int, longest: int = 4, shortest: int = 2, window: int = 2048) -> list[int]:
    """Prompt-lookup drafts: up to `most` tokens that followed an earlier occurrence of the last few tokens."""
    tokens = sequence.tokens[-window:]
    last = len(tokens) - 1
    candidates = [i for i in range(last - 1, -1, -1) if tokens[i] == tokens[last]]
    for size in range(longest, shortest - 1, -1):
        tail = tokens[-size:]
        for end in candidates:
            if end >= size - 1 and tokens[end - size + 1 : end + 1] == tail:
                return tokens[end + 1 : end + 1 + most]
    return []


def model_draft(sequence: Sequence, most: int) -> list[int]:
    """Placeholders for `most` drafts, which a `DraftRunner` fills in."""
    return [UNKNOWN] * most


class DraftRunner:
    """Runner with a draft model: the draft fills in the plan's drafts, then the model verifies them."""

    alive = True
    close = Runner.close

    def __init__(self, runner: Runner, draft: Runner):
        self.model, self.runner, self.draft = runner.model, runner, draft

    def launch(self, plan: StepPlan) -> InFlightStep:
        """Start running a plan; drafts go from model to model on the device."""
        silent = {"logprobs": None, "prompt_logprobs": None}
        admitted = (replace(each, params=replace(each.params, **silent), grammar=None, pooling=None)
                    for each in plan.admitted)  # fmt: skip
        self.draft.launch(StepPlan(tuple(map(_draft_chunk, plan.chunks)), tuple(admitted), plan.copies))
        guessing = [chunk for chunk in plan.chunks if chunk.sampled > 1]
        for n in range(2, max((chunk.sampled for chunk in guessing), default=0)):
            going = (chunk for chunk in guessing if n < chunk.sampled)
            chunks = (Chunk(chunk.row, _known(chunk) + n - 2, (UNKNOWN,), 1, 0, ()) for chunk in going)
            self.draft.launch(StepPlan(tuple(chunks)))
        for chunk in guessing:
            drafts = chunk.row, slice(_known(chunk), _known(chunk) + chunk.sampled - 1)
            self.runner.tokens[drafts] = self.draft.tokens[drafts]
        return self.runner.launch(plan)

    def collect(self, flight: InFlightStep):
        """Wait for a step and return its result."""
        return self.runner.collect(flight)


def make_runner(
    models: list[Transformer],
    *,
    pages: int,
    page_size: int,
    max_batch: int,
    context: int,
    quantize: str | None,
    kv_dtype: torch.dtype,
    release: tuple[bool, ...],
    batch_invariant: bool,
    adapters: ServedAdapters | None = None,
) -> Runner | DraftRunner:
    """Make the runner of a model, or of a model and its draft, with a KV cache of `pages` pages each.

    `release` says for each whether it may be used up, because nobody else has it. `adapters` are of the first: what a
    draft guesses without them is checked as ever.
    """
    runners = []
    for model, own in zip(models, release):
        c, (heads, kv_heads, _) = model.config, model.blocks[0].attention.heads
        ours = replace(c, n_heads=heads, n_kv_heads=kv_heads, head_dim=c.head_size)  # of a model in several processes
        mine = None if runners else adapters
        latent = keeps_latents(c, model.device, mine)
        store = PagedKVCache(ours, pages, page_size, kv_dtype, model.device, latent)
        served, head = serving_model(model, quantize, own, batch_invariant, store.layers is not None, mine)
        sizes = {"max_batch": max_batch, "context": context}
        runners.append(Runner(served, store, **sizes, head=head, batch_invariant=batch_invariant, adapters=mine))
    return DraftRunner(*runners) if len(runners) > 1 else runners[0]


def _known(chunk: Chunk) -> int:
    """Position of a chunk's first draft."""
    return chunk.start + len(chunk.tokens) - max(chunk.sampled - 1, 0)


def _draft_chunk(chunk: Chunk) -> Chunk:
    """The draft model's chunk: the same tokens up to the first draft, which it samples.

    It starts one token early, for a draft that proved right and that nothing was guessed after was never computed.
    """
    early = min(chunk.start, 1)
    tokens = chunk.tokens[: _known(chunk) - chunk.start]
    return replace(chunk, start=chunk.start - early, tokens=(UNKNOWN,) * early + tokens, sampled=int(chunk.sampled > 1))
