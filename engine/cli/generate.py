"""`warploom generate`: continue a prompt, or every prompt of a file.

    warploom generate MODEL --prompt "Once upon a time"
    warploom generate MODEL --prompts-file prompts.jsonl --out results.jsonl

A prompts file has one prompt a line: a JSON string, an object with "prompt" and any sampling parameters of its own, or,
in a file that does not end in .jsonl, plain text. Results are appended as they come, one JSON object a line with the
prompt's `index`; run the same command again after an interruption and it does what is missing. A prompt that cannot be
answered gets an `error` instead, and is tried again the next time; the others go on. With --logprobs or
--prompt-logprobs a single prompt is answered by such a JSON object too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ...tokenizer.sources import read_text, write_text
from ..errors import InputError
from ..serving.outputs import EngineError
from ..serving.sampling_params import SamplingParams
from .flags import parse
from .model_argument import ModelOptions, model_first
from .progress import progress

RESULT = '{"index": '  # how each line of results begins


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt, or every prompt of a file."""

    llm: ModelOptions
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prompt: str | None = None
    """The text to continue; without it and without a prompts file, standard input."""
    prompts_file: Path | None = None
    """One prompt a line: JSONL, or plain text."""
    batch: Path | None = None
    """Requests in OpenAI's batch format, one a line; needs warploom[serve]. The same command does what is missing."""
    out: Path | None = None
    """File for the results of a prompts file or a batch, as JSONL; by default standard output."""
    beam_width: int | None = None
    """Search with this many beams instead of sampling."""
    length_penalty: float = 1.0
    """Beam scores are divided by length to this power."""


def run(argv: list[str]) -> int:
    """Entry point of `warploom generate`."""
    options = parse(GenerateOptions, model_first(argv), "generate")
    given = [options.prompt is not None, options.prompts_file is not None, options.batch is not None]
    if sum(given) > 1:
        raise InputError("give one of --prompt, --prompts-file and --batch")
    if options.batch is not None:
        return _answer_batch(options, options.batch)
    if options.out is not None and options.prompts_file is None:
        raise InputError("--out is where the results of --prompts-file go; a single prompt is answered on the screen")
    if options.beam_width is not None and options.prompts_file is not None:
        raise InputError("--beam-width works with --prompt, not with --prompts-file")
    if options.prompts_file is not None:
        return _continue_file(options)
    if options.beam_width is not None:
        _insist_on_search(options.sampling)
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    llm = options.llm.open()
    if options.beam_width is not None:
        return _search(llm, prompt, options)
    return _stream(llm, prompt, options.sampling)


def _answer_batch(options: GenerateOptions, batch: Path) -> int:
    try:
        from ..server.offline_batch import answer_batch, answered, read_batch
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'warploom[serve]'") from None
    done, requests = answered(options.out), read_batch(batch)
    missing = [request for request in requests if request["custom_id"] not in done]
    if not missing:
        return 0
    with _output(options.out) as file:
        failed = answer_batch(options.llm.open, missing, file)
    if failed:
        print(f"{failed} of {len(missing)} requests could not be answered: see their status_code", file=sys.stderr)
    return 1 if failed else 0


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """File to append results to; standard output if none is given."""
    if path is None:
        yield sys.stdout
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        yield file


def _insist_on_search(params: SamplingParams) -> None:
    """Refuse sampling parameters with beam search, which would silently have no effect."""
    for entry in dataclasses.fields(params):
        if entry.name not in ("max_tokens", "seed") and getattr(params, entry.name) != entry.default:
            flag = f"--{entry.name.replace('_', '-')}"
            raise InputError(f"{flag} has no meaning for --beam-width, which searches; --max-tokens has")


def _stream(llm, prompt: str, params: SamplingParams) -> int:
    if params.logprobs is not None or params.prompt_logprobs is not None:
        print(json.dumps(_result(0, llm.generate(prompt, params), llm), ensure_ascii=False))
        return 0
    if params.n > 1:
        for number, output in enumerate(llm.generate(prompt, params).choices, 1):
            print(f"── {number} of {params.n} ({output.finish_reason})\n{output.text}")
        return 0
    for piece in llm.stream(prompt, params):
        print(piece.text, end="", flush=True)
    print()
    return 0


def _search(llm, prompt: str, options: GenerateOptions) -> int:
    max_tokens = options.sampling.max_tokens or llm.max_seq_len
    for output in llm.beam_search(prompt, options.beam_width, max_tokens, options.length_penalty):
        print(output.text)
    return 0


def _continue_file(options: GenerateOptions) -> int:
    """Answer every prompt of the file that has no answer yet."""
    jobs = _read_prompts(options.prompts_file, options.sampling)
    if not jobs:
        raise InputError(f"{options.prompts_file} holds no prompt: write one a line")
    done = _read_results(options.out)
    missing = [(index, prompt, params) for index, (prompt, params) in enumerate(jobs) if index not in done]
    if done:
        print(f"{len(jobs) - len(missing)} of {len(jobs)} prompts are answered already", file=sys.stderr)
    if not missing:
        return 0
    llm = options.llm.open()
    answered = tokens = failed = 0
    try:
        with _output(options.out) as file, progress("answering", unit="tok") as (advance,):
            for index, output in _answers(llm, missing):
                print(json.dumps(_result(index, output, llm), ensure_ascii=False), file=file, flush=True)
                answered += 1
                if isinstance(output, Exception):
                    failed += 1
                else:
                    tokens += sum(len(each.token_ids) for each in output.choices)
                advance(answered, len(missing), tokens)
    except KeyboardInterrupt:
        where = "" if options.out is None else f" in {options.out}; the same command does the rest"
        print(f"\nstopped: {answered} of {len(missing)} answers are saved{where}", file=sys.stderr)
        return 130
    if failed:
        print(f'{failed} of {len(missing)} prompts could not be answered: see their "error"', file=sys.stderr)
    return 1 if failed else 0


def _answers(llm, jobs: list[tuple[int, Any, SamplingParams]]):
    """Yield (index, output or error) of jobs as they finish, keeping enough submitted to fill the batch."""
    queue, running = iter(jobs), {}
    try:
        while True:
            for index, prompt, params in queue:
                try:
                    running[index] = llm.submit(prompt, params)
                except InputError as error:
                    yield index, error
                if len(running) >= 2 * llm.engine.scheduler.max_batch:
                    break
            if not running:
                return
            llm.engine.step()
            for index in [index for index, generation in running.items() if generation.finished]:
                try:
                    yield index, running.pop(index).result()
                except EngineError as error:
                    yield index, error
    finally:
        for generation in running.values():
            generation.cancel()


def _result(index: int, output, llm) -> dict[str, Any]:
    if isinstance(output, Exception):
        return {"index": index, "error": str(output)}
    choices = [
        {"text": choice.text, "finish_reason": choice.finish_reason, "tokens": len(choice.token_ids)}
        | ({} if llm.tokenizer else {"token_ids": list(choice.token_ids)})
        | _logprobs("logprobs", choice.logprobs)
        | _logprobs("prompt_logprobs", choice.prompt_logprobs)
        for choice in output.choices
    ]
    return {"index": index, **choices[0], **({"others": choices[1:]} if len(choices) > 1 else {})}


def _logprobs(name: str, entries) -> dict[str, Any]:
    """Log-probability of each token, and if requested of the most likely ones, as [token id, value]."""
    if entries is None:
        return {}
    best = [[list(pair) for pair in entry.top] for entry in entries]
    return {name: [entry.logprob for entry in entries]} | ({f"top_{name}": best} if any(best) else {})


def _read_prompts(path: Path, params: SamplingParams) -> list[tuple[Any, SamplingParams]]:
    """Read prompts with their parameters from a file; errors name the line."""
    lines = read_text(path).split("\n")
    if path.suffix not in (".jsonl", ".json"):
        return [(line, params) for line in lines if line]
    jobs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            jobs.append(_read_prompt(json.loads(line), params))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} line {number}: {error}") from None
    return jobs


def _read_prompt(value: Any, params: SamplingParams) -> tuple[Any, SamplingParams]:
    value = value if isinstance(value, dict) else {"prompt": value}
    prompt = value.get("prompt")
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
        raise InputError('a line must be a JSON string, a list of token ids, or an object with one of them as "prompt"')
    changes = {name: given for name, given in value.items() if name not in ("prompt", "index")}
    known = {entry.name for entry in dataclasses.fields(SamplingParams)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise InputError(f"{unknown[0]!r} is not a sampling parameter; they are: {', '.join(sorted(known))}")
    return prompt, dataclasses.replace(params, **changes)


def _read_results(path: Path | None) -> set[int]:
    """Indices answered in the output file; errors and a torn last line are removed from it."""
    if path is None or not path.exists():
        return set()
    text = read_text(path)
    *lines, torn = text.split("\n")  # not splitlines, which also splits at what may be in a text
    try:
        if not torn.startswith(RESULT[: len(torn)]):
            raise ValueError
        entries = [(json.loads(line), line) for line in lines]
        answered = {entry["index"]: line for entry, line in entries if "error" not in entry}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a file of results: move it away, or choose another --out") from None
    kept = "".join(f"{line}\n" for line in answered.values())
    if kept != text:
        write_text(path, kept)
    return set(answered)
