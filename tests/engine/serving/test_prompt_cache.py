"""Prompts' pages over a restart: the same answers from them, and nothing from a file that lies."""

import contextlib
import random

import pytest

from warploom.engine.errors import InputError
from warploom.engine.serving import LLM, SamplingParams, prompt_cache

PROMPTS = [
    "a prompt that is longer than one page of sixteen tokens, " + end for end in ("and so on", "or not", "x" * 70)
]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture
def make(tiny_model, tokenizer):
    return lambda seed=0, **options: LLM(tiny_model(seed=seed), tokenizer, max_batch=4, **options)


@pytest.fixture
def saved(make, tmp_path):
    llm = make()
    answers = [output.text for output in llm.generate(PROMPTS, GREEDY)]
    llm.submit(PROMPTS[0], GREEDY, salt=(b"key", "salt")).result()
    path = tmp_path / "m.pages"
    assert prompt_cache.save(llm, path) > 7 and path.stat().st_mode & 0o077 == 0
    return path, answers


def cached(llm, prompt, salt=None):
    output = llm.submit(prompt, GREEDY, salt=salt).result()
    return output.metrics.cached_tokens, output.text


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "bfloat16"}, {"kv_dtype": "fp8"}, {"quantize": "int8"}])
def test_restored_pages_answer_as_computed_ones(make, tmp_path, options):
    before, path = make(**options), tmp_path / "m.pages"
    answers = [output.text for output in before.generate(PROMPTS, GREEDY)]
    prompt_cache.save(before, path)
    llm = make(**options)
    assert prompt_cache.restore(llm, path) > 7
    llm.engine.call(llm.engine.scheduler.check)
    for prompt, answer in zip(PROMPTS, answers):
        tokens, text = cached(llm, prompt)
        assert tokens >= len(prompt) - 17 and text == answer


def test_salts_are_kept_apart(make, saved):
    llm = make()
    prompt_cache.restore(llm, saved[0])
    assert cached(llm, PROMPTS[0], (b"key", "salt"))[0] > 0 and cached(llm, PROMPTS[0], (b"key", "other"))[0] == 0


def test_pages_of_another_model_are_refused(make, saved):
    for other in (make(seed=1), make(kv_dtype="bfloat16"), make(page_size=32)):
        with pytest.raises(InputError, match="another model, or computed it in another way"):
            prompt_cache.restore(other, saved[0])
        assert cached(other, PROMPTS[0])[0] == 0


def test_small_pool_takes_what_was_used_last(make, saved):
    page = prompt_cache._page_bytes(make().engine.runner.store)
    llm = make(kv_memory=8 * page)
    assert 0 < prompt_cache.restore(llm, saved[0]) <= 8
    assert cached(llm, PROMPTS[0], (b"key", "salt"))[0] > 0


def test_lying_files_give_nothing_wrong(make, saved):
    """Cut, flipped or invented: refused, or their good pages taken; what is answered stays right."""
    path, answers = saved
    whole, rng = path.read_bytes(), random.Random(0)
    lies = [b"", whole[:20], whole[:-1], whole + b"x", rng.randbytes(4096), whole[:17] + b"\xff" * 8 + whole[25:]]
    lies += [whole.replace(b'"pages": ', b'"pages": 9'), whole.replace(b'"salts": [', b'"salts": 0["')]
    for place in [*range(0, 400, 9), *(rng.randrange(len(whole)) for _ in range(40))]:
        lies.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    llm = make()
    for lie in lies:
        path.write_bytes(lie)
        llm.engine.scheduler.pool.forget()
        with contextlib.suppress(InputError):
            prompt_cache.restore(llm, path)
        llm.engine.call(llm.engine.scheduler.check)
        assert cached(llm, PROMPTS[2])[1] == answers[2]


def test_cache_needs_pages_in_this_process(make, tiny_model):
    prompt_cache.check(make())
    with pytest.raises(InputError, match="prompt_cache needs a model in one process"):
        prompt_cache.check(make(draft_model=tiny_model(seed=3)))
