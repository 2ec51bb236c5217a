"""Hugging Face `transformers`: training, generation, continuous batching."""

NEEDS = ("torch", "transformers")
PAGE = 256  # tokens: theirs, by default
STATIC = 128  # rows of a padded batch: with more, its cache would not fit beside the others'


def train(shape, compiled: bool = False):
    """The same architecture as a causal LM with its own loss, in the same loop."""

    def build():
        import torch

        from ..train import step_of

        torch.manual_seed(0)
        with torch.device(shape.device):
            model = causal_lm(shape.model)
        run = torch.compile(model) if compiled else model
        return step_of(model, shape, lambda tokens, _: run(input_ids=tokens, labels=tokens, use_cache=False).loss)

    return {"transformers compiled" if compiled else "transformers": build}


def serve(job):
    """`generate` on static, left-padded batches, and their continuous batching."""
    if job.quantize:
        return {}
    return {
        "transformers": lambda: static(job),
        "transformers continuous": lambda: continuous(job),
    }


def static(job):
    """Static batches in the order of arrival, each until its longest request is done."""
    import time

    import torch

    from ..serve import Reply

    model = loaded(job)

    def answer(requests, begin):
        longest = max(len(request.prompt) for request in requests)
        padding = [[0] * (longest - len(request.prompt)) for request in requests]
        tokens = torch.tensor([pad + r.prompt for pad, r in zip(padding, requests)], device=job.device)
        mask = torch.tensor([[0] * len(pad) + [1] * len(r.prompt) for pad, r in zip(padding, requests)])
        times = []

        def note(ids, scores, **_):
            times.append(time.perf_counter() - begin)
            return torch.zeros(len(requests), dtype=torch.bool, device=ids.device)

        count = max(request.tokens for request in requests)
        out = model.generate(
            tokens, attention_mask=mask.to(job.device), do_sample=False, max_new_tokens=count,
            pad_token_id=0, eos_token_id=None, stopping_criteria=[note],
        )  # fmt: skip
        new = out[:, longest:].tolist()
        return [Reply(ids[: r.tokens], times[: r.tokens]) for ids, r in zip(new, requests)]

    def run(requests):
        begin = time.perf_counter()
        size = min(job.batch, STATIC)
        groups = [requests[i : i + size] for i in range(0, len(requests), size)]
        with torch.inference_mode():
            return [reply for group in groups for reply in answer(group, begin)]

    return run


def continuous(job):
    """Continuous batching, started once, with a cache that holds the whole batch."""
    import time

    from transformers import ContinuousBatchingConfig, GenerationConfig

    from ..serve import Reply

    pages = job.pages(PAGE) + 8
    manager = loaded(job).init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(num_blocks=pages, max_requests_per_batch=job.batch),
    )
    manager.start()

    def run(requests):
        begin = time.perf_counter()
        names = [manager.add_request(r.prompt, max_new_tokens=r.tokens, record_timestamps=True) for r in requests]
        done = {}
        while len(done) < len(names):
            result = manager.get_result(timeout=60)
            if result is None or result.error:
                raise RuntimeError(result.error if result else "no answer within a minute")
            done[result.request_id] = result
        replies = [done[name] for name in names]
        return [Reply(list(reply.generated_tokens), [t - begin for t in reply.timestamps or []]) for reply in replies]

    run.close = lambda: manager.stop(block=True, timeout=10)
    return run


def cold_start(start):
    """Load and generate one token by `generate`."""
    if start.quantize:
        return {}
    program = """
import torch
begin = clock()
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
tokens = torch.tensor([prompt], device=device)
model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=1, pad_token_id=0)
"""
    return {"transformers": program}


def loaded(job):
    """Load the model directory that we wrote."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = getattr(torch, job.dtype)
    return AutoModelForCausalLM.from_pretrained(job.directory, dtype=dtype).to(job.device).eval()


def causal_lm(config):
    """Randomly initialized model of a `ModelConfig`'s architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ...engine.formats.families import to_hf_config
    from . import Unavailable

    values = to_hf_config(config)
    kind = values.pop("model_type")
    if kind == "warploom":
        raise Unavailable("no such architecture in transformers")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), attn_implementation="sdpa")
