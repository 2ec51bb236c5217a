"""Claims about the verbs `generate` and `chat`."""

import io
import json

import pytest

from warploom.engine.cli import main
from warploom.engine.formats.model_writer import save_model


@pytest.fixture(scope="module")
def directory(tiny_model, tokenizer, tmp_path_factory):
    return str(
        save_model(tiny_model(vocab_size=tokenizer.vocab_size), tmp_path_factory.mktemp("m") / "model", tokenizer)
    )


@pytest.fixture
def type_in(monkeypatch):
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_generate_prompt_from_flag_or_pipe(directory, capsys, type_in):
    """Generate continues a prompt from a flag or a pipe."""
    flags = ["generate", "--model", directory, "--seed", "1", "--max-tokens", "8"]
    assert main([*flags, "--prompt", "hello"]) == 0
    said = capsys.readouterr().out
    type_in("hello")
    assert main(flags) == 0
    assert capsys.readouterr().out == said and len(said) > 1
    assert main([*flags, "--prompt", "hello", "--draft-model", directory, "--draft-tokens", "3"]) == 0
    assert capsys.readouterr().out == said
    assert main([*flags, "--prompt", "hello", "--beam-width", "2"]) == 0
    capsys.readouterr()
    assert main([*flags, "--prompt", "hello", "--logprobs", "2", "--prompt-logprobs", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == said[:-1] and len(result["prompt_logprobs"]) == len("hello") - 1
    for value, best in zip(result["logprobs"], result["top_logprobs"], strict=True):
        assert value <= best[0][1] and len(best) == 2 and best[0][1] >= best[1][1]


def test_generate_file_continues_where_stopped(directory, tmp_path, capsys):
    """Generate answers a file and goes on where it was stopped."""
    source, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps(f"prompt {i}") for i in range(5)] + [json.dumps({"prompt": "own", "max_tokens": 2, "n": 2})]
    source.write_text("\n".join(lines))
    command = ["generate", "--model", directory, "--prompts-file", str(source), "--out", str(out), "--seed", "1"]
    assert main([*command, "--max-tokens", "6", "--ignore-eos"]) == 0
    whole = out.read_text()
    results = {result["index"]: result for result in map(json.loads, whole.splitlines())}
    assert sorted(results) == list(range(6))
    assert results[0]["tokens"] == 6 and results[5]["tokens"] == 2 and len(results[5]["others"]) == 1
    kept = whole.splitlines(keepends=True)[:3]
    out.write_text("".join(kept) + '{"index": 9, "te')
    assert main([*command, "--max-tokens", "6", "--ignore-eos"]) == 0
    assert sorted(out.read_text().splitlines()) == sorted(whole.splitlines())
    assert "3 of 6 prompts are answered already" in capsys.readouterr().err


def test_generate_bad_prompt_said_goes_on(directory, tmp_path, capsys):
    """Generate says what cannot be answered and goes on."""
    source, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    command = ["generate", "--model", directory, "--prompts-file", str(source), "--out", str(out), "--max-tokens", "3"]
    source.write_text('"first"\n""\n{"prompt": [1, 2]}\n"' + "x" * 300 + '"\n"a line\u2028break"\n')
    assert main([*command, "--echo"]) == 1
    results = {result["index"]: result for result in map(json.loads, out.read_text().split("\n")[:-1])}
    assert "empty" in results[1]["error"] and "300 tokens, too many" in results[3]["error"]
    assert all(results[i]["tokens"] for i in (0, 2, 4)) and "2 of 5 prompts" in capsys.readouterr().err
    source.write_text(source.read_text().replace('""', '"not empty any more"').replace("x" * 300, "short"))
    assert main(command) == 0
    assert "3 of 5 prompts are answered already" in capsys.readouterr().err
    answered = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert sorted(result["index"] for result in answered) == [0, 1, 2, 3, 4]
    precious = tmp_path / "precious.txt"
    precious.write_text("not results")
    assert main([*command, "--out", str(precious)]) == 2 and precious.read_text() == "not results"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x", "--temperature", "-1"], "temperature must be a number between 0 and 100, got -1"),
        (["--prompt", "x", "--prompts-file", "y"], "give one of --prompt, --prompts-file and --batch"),
        (["--prompt", "x", "--out", "y"], "--prompts-file"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--beam-width", "2", "--top-k", "3"], "--top-k has no meaning for --beam-width"),
        (["--prompt", "x", "--page-size", "0"], "page_size must be at least 1, got 0"),
        (["--prompt", "x", "--max-batch-tokens", "0"], "max_batch_tokens must be at least 1, got 0"),
        (["--prompt", "x" * 300], "300 tokens, too many for a context of 256"),
    ],
)
def test_generate_refuses_with_one_line(directory, flags, message, capsys):
    assert main(["generate", "--model", directory, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_chat_works_through_a_pipe_and_obeys_its_commands(directory, tmp_path, capsys, type_in):
    saved = tmp_path / "talk.json"
    settings = "/system be brief\n/temp 0\n/topk 5\n/topp 0.9\n/tokens 4\n"
    type_in(f"{settings}hello\n/temp hot\n/save {saved}\n/nonsense\nexit\nlost")
    assert main(["chat", "--model", directory]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "temperature is 0.0" in lines and "temperature needs a number, got 'hot'" in lines
    assert "/nonsense is not a command; /help lists them" in lines
    messages = json.loads(saved.read_text())
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[2]["content"] in "\n".join(lines)


def test_chat_forgets_oldest_keeps_system(directory):
    """Chat forgets the oldest exchange but never the system prompt."""
    from warploom.engine.cli.chat import Chat
    from warploom.engine.serving import LLM, SamplingParams

    chat = Chat(LLM(directory), SamplingParams(max_tokens=20), system="keep me")
    turns = [(role, i) for i in range(4) for role in ("user", "assistant")]
    chat.messages = [{"role": role, "content": f"{role} {i} " + "x" * 30} for role, i in turns]
    chat.messages.append({"role": "user", "content": "the question"})
    text = chat.llm.tokenizer.decode(chat.prompt())
    assert "keep me" in text and "the question" in text and "user 0" not in text
    assert len(chat.prompt()) <= 256 - 20 and len(chat.messages) == 9, "it is still there to be saved"
