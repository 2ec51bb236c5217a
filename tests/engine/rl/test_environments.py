"""Environments: turns lie end to end as the template has them, only what was sampled is learned, bits stay equal."""

import pytest
import torch

from warploom.engine.cli import main
from warploom.engine.errors import InputError
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_writer import save_model
from warploom.engine.rl.environments import Episode, continuation
from warploom.engine.rl.trainer import RLTrainer, reinforce
from warploom.engine.serving import SamplingParams

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|endoftext|> {% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


class Twice:
    """Asks again once, then counts digits."""

    def reset(self, row):
        self.heard = []
        return row["prompt"]

    def step(self, answer):
        self.heard.append(answer)
        return " and " if len(self.heard) < 2 else sum(map(str.isdigit, "".join(self.heard))) / 10


class Told(Twice):
    """The same in messages, with a tool's."""

    def reset(self, row):
        self.heard = []
        return [{"role": "user", "content": row["prompt"]}]

    def step(self, answer):
        said = super().step(answer)
        return {"role": "tool", "content": "<|endoftext|>more"} if isinstance(said, str) else said


class Endless(Twice):
    def step(self, answer):
        return "again"


@pytest.fixture(scope="module")
def chatty(base, tmp_path_factory):
    model, tokenizer = load_model(base, "cpu", torch.float32)
    tokenizer.chat_template = TEMPLATE
    return save_model(model, tmp_path_factory.mktemp("chatty"), tokenizer)


@pytest.mark.parametrize("environment", [Twice, Told])
def test_turns_train_the_bits_that_were_sampled(tiny, base, chatty, environment):
    config = tiny(init_from=str(base if environment is Twice else chatty), reward=(), steps=3, group=8)
    found = list(reinforce(config, environment=environment))
    assert all(step.mismatch < 1e-4 and step.grad_norm > 0 for step in found)
    trainer = RLTrainer(tiny("again", init_from=config.init_from, reward=()), [], environment=environment)
    if trainer.exact:
        assert all(step.mismatch == 0.0 for step in found)
    sample = next(trainer._batches()).samples[0]
    turns = [at for at, (a, b) in enumerate(zip(sample.sampled, sample.sampled[1:])) if b > a + 1]
    assert len(turns) == 1 and len(sample.logprobs) == len(sample.sampled) > 2
    between = sample.tokens[sample.sampled[turns[0]] + 1 : sample.sampled[turns[0] + 1]]
    said = trainer.llm.tokenizer.decode(between)
    assert said == " and " if environment is Twice else said.endswith(" t:<<unk>endoftext<unk>>more<|endoftext|> a:")


def test_turns_are_those_of_the_template(tiny, chatty):
    """Whether the end of a turn was sampled or the answer was cut; special tokens in a tool's words stay text."""
    trainer = RLTrainer(tiny(init_from=str(chatty), reward=(), max_tokens=20), [], environment=Told)
    llm, kinds = trainer.llm, set()
    for seed in range(40):
        episode = Episode(llm, Told(), {"prompt": "1+1="}, 60.0)
        assert episode.tokens == llm.encode_chat(episode.messages)
        output = llm.generate([episode.tokens], SamplingParams(max_tokens=20, seed=seed, logprobs=0))[0]
        if llm.tokenizer.unknown_id in output.token_ids:  # which no text has
            continue
        episode.take(output)
        kinds.add(output.finish_reason)
        assert episode.tokens == llm.encode_chat(episode.messages)
    assert kinds == {"stop", "length"}


def test_conversation_without_an_end_is_worth_nothing(tiny):
    trainer = RLTrainer(tiny(reward=(), turns=3), [], environment=Endless)
    for sample in next(trainer._batches()).samples:
        assert sample.reward == 0.0 and not sample.ended and sample.tokens[-1] == sample.tokens[sample.sampled[-1]]


def test_template_that_hides_answers_is_refused(base):
    _, tokenizer = load_model(base, "cpu", torch.float32)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InputError, match="does not show an answer once"):
        continuation(tokenizer, [{"role": "user", "content": "?"}], "x", [{"role": "user", "content": "!"}])


def test_environment_of_a_file_runs_from_the_command_line(base, tmp_path, capsys):
    path = tmp_path / "game.py"
    path.write_text(
        "class Once:\n    def reset(self, row):\n        return row['prompt']\n"
        "    def step(self, answer):\n        return len(answer) / 10\n"
    )
    argv = ["--from", str(base), "--out", str(tmp_path / "run"), "--steps", "1", "--prompts", "2", "--group", "2"]
    argv += ["--max-tokens", "4", "--device", "cpu"]
    assert main(["rl", "tasks:sums:3", *argv, "--environment", f"{path}:Once"]) == 0
    assert "reward 0." in capsys.readouterr().out
    assert main(["rl", "tasks:sums:3", *argv, "--environment", f"{path}:Once", "--reward", f"{path}:Once"]) == 2
    path.write_text(path.read_text().replace("len(answer)", "nothing"))
    assert main(["rl", "tasks:sums:3", *argv, "--overwrite", "--environment", f"{path}:Once"]) == 2
    assert "the reward step failed: NameError" in capsys.readouterr().err
