"""A step that fails ends the request that causes it, and changes not a token of the others."""

import pytest

from warploom.engine.serving import LLM, EngineError, SamplingParams

POISON = 96
INNOCENT = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8, seed=5, logit_bias={POISON: -100})


class Flammable:
    """Makes steps fail that compute the poisonous token, before or after they were computed."""

    def __init__(self, llm, where: str):
        self.runner, self.failed = llm.engine.runner, []
        self.work = getattr(self.runner, where)
        self.plans = []
        setattr(self.runner, where, self)
        if where == "collect":
            launch = self.runner.launch
            self.runner.launch = lambda plan: self.plans.append(plan) or launch(plan)

    def __call__(self, work):
        plan = self.plans.pop(0) if self.plans else work
        result = self.work(work)
        if any(POISON in chunk.tokens for chunk in plan.chunks):
            self.failed.append(len(plan.chunks))
            raise RuntimeError("on fire")
        return result


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_failed_step_ends_the_culprit_alone(model, where):
    prompts = [[3, 1, 4, 1 + number] * 5 for number in range(6)]
    expected = LLM(model).generate(prompts, INNOCENT)
    llm = LLM(model)
    fire = Flammable(llm, where)
    going = [llm.submit(prompt, INNOCENT) for prompt in prompts]
    llm.engine.drive(lambda: going[0].streams[0].metrics.generated_tokens > 5)
    culprit = llm.submit([5, POISON, 7], SamplingParams(max_tokens=4))
    late = llm.submit(prompts[0], INNOCENT)
    with pytest.raises(EngineError, match="on fire"):
        culprit.result()
    outputs = [generation.result() for generation in (*going, late)]
    assert [output.token_ids for output in outputs] == [each.token_ids for each in (*expected, expected[0])]
    assert fire.failed[0] > 1 and fire.failed[-1] == 1 and llm.engine.failed_alone == 1
    assert len(fire.failed) == 2, "the newest is tried first"
    llm.engine.call(llm.engine.scheduler.check)
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_pages


def test_failed_step_with_few_pages_and_several_culprits(model):
    """They are found one after the other even where not all sequences fit into the pool at once."""
    prompts = [[2, 7, 1 + number] * 8 for number in range(5)]
    expected = LLM(model).generate(prompts, INNOCENT)
    llm = LLM(model, kv_memory=120_000)
    assert llm.engine.scheduler.pool.num_pages < 5 * 3
    Flammable(llm, "launch")
    going = [llm.submit(prompt, INNOCENT) for prompt in prompts]
    culprits = [llm.submit([1, 2, POISON] + [3] * number, SamplingParams(max_tokens=4)) for number in range(3)]
    for culprit in culprits:
        with pytest.raises(EngineError, match="on fire"):
            culprit.result()
    assert [each.result().token_ids for each in going] == [each.token_ids for each in expected]
    assert llm.engine.scheduler.idle


def test_failed_step_keeps_scores_and_grammars(tiny_model, tokenizer):
    pytest.importorskip("llguidance")
    model = tiny_model(vocab_size=tokenizer.vocab_size + 5)
    scored = SamplingParams(max_tokens=4, ignore_eos=True, prompt_logprobs=0, logprobs=0, seed=1)
    strict = SamplingParams(regex="[a-c]{9}-[0-9]{9}", max_tokens=30, seed=2, n=2)
    alone = LLM(model, tokenizer)
    expected = alone.generate(["a prompt of some length", "x"], [scored, strict])
    llm = LLM(model, tokenizer, max_batch_tokens=64)
    work, count = llm.engine.runner.collect, iter(range(1000))

    def fail_sometimes(flight):
        result = work(flight)
        if next(count) in (1, 6, 12):
            raise RuntimeError("on fire")
        return result

    llm.engine.runner.collect = fail_sometimes
    outputs = llm.generate(["a prompt of some length", "x"], [scored, strict])
    assert [each.text for each in outputs[1].choices] == [each.text for each in expected[1].choices]
    assert outputs[0].token_ids == expected[0].token_ids and llm.engine.failures == 3
    assert len(outputs[0].prompt_logprobs) == len(expected[0].prompt_logprobs)
    assert [entry.logprob for entry in outputs[0].prompt_logprobs] == pytest.approx(
        [entry.logprob for entry in expected[0].prompt_logprobs], abs=1e-5
    )
