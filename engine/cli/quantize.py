"""`warploom quantize`: quantize a model to 8 or 4 bits, optionally calibrated, and write a model directory.

With `--calibrate TEXT` the errors of rounding cancel in the activations of that text, or without TEXT in those of one
that the model writes itself; the last tenth is held out, and what the model loses on it is printed."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from ..errors import InputError
from .flag_errors import Parser
from .model_argument import model_first

ROW = 512  # tokens of a row of the text


def run(argv: list[str]) -> int:
    parser = Parser(prog="warploom quantize", description=__doc__)
    parser.add_argument("model", help="the model directory, GGUF file or Hub id to read, of float weights")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of a weight (default: 8)")
    calibrate = "a text file, of the kind the model will see; without one, the model's own samples"
    parser.add_argument("--calibrate", type=Path, nargs="?", const=True, metavar="TEXT", help=calibrate)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of it to use (default: 16384)")
    options = parser.parse_args(model_first(argv))

    from ..formats.model_directory import load_model
    from ..formats.model_info import refuse_repacking
    from ..formats.model_writer import save_packed
    from ..serving import LLM
    from ..serving.calibrate import quantize, sampled_rows
    from ..serving.fidelity import log_probabilities, loss_of
    from ..serving.scheme import INT8, scheme_of

    scheme = f"int{options.bits}"
    refuse_repacking(options.model, scheme, options.bits)
    model, tokenizer = load_model(options.model, "cpu", "float32")
    rows: list[list[int]] = []
    held: list[list[int]] = []
    length = min(ROW, model.config.max_seq_len)
    if options.calibrate is True:
        count = max(1, options.tokens // length)
        llm = LLM(model, tokenizer, max_seq_len=length)
        rows = sampled_rows(llm, count + min(8, -(-count // 9)), length, partial(_say, "sample"))
        rows, held = rows[:count], rows[count:]
    elif options.calibrate:
        rows, held = _rows(options, tokenizer, length)
    exact = log_probabilities(LLM(model, tokenizer), held) if held else []
    chosen = scheme_of(scheme, model.config.parameter_count(), calibrated=bool(rows)) or INT8
    quantize(model, chosen, rows, partial(_say, "layer"))
    save_packed(model, options.out, tokenizer)
    size = sum(file.stat().st_size for file in options.out.glob("*.safetensors"))
    print(f"wrote {options.out}: {scheme}, {size / 1e6:,.1f} MB")
    if held:
        lost = loss_of(LLM(options.out), held, exact)
        whose = " of its own" if options.calibrate is True else ""
        print(
            f"loss on {sum(map(len, held)):,} tokens{whose} held out: KL {lost['kl']:.5f}, perplexity "
            f"{100 * lost['perplexity']:+.2f} %, rms of log-probabilities {lost['rms']:.3f}"
        )
    return 0


def _rows(options: argparse.Namespace, tokenizer, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Split a text into calibration rows and held-out rows."""
    if tokenizer is None:
        raise InputError(f"{options.model} has no tokenizer, so there is no text it could be calibrated on")
    ids = tokenizer.encode(options.calibrate.read_text(encoding="utf-8"))
    rows = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    if len(rows) < 2:
        raise InputError(f"{options.calibrate} has {len(ids)} tokens; calibration needs at least {2 * length}")
    split = len(rows) - -(-len(rows) // 10)
    return rows[: min(split, max(1, options.tokens // length))], rows[split:][:8]


def _say(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{what} {done} of {total}", end=end, file=sys.stderr, flush=True)
