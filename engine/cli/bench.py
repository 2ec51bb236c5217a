"""`warploom bench`: measure this machine's warploom beside its peers.

A bench is a module of `warploom.bench` with a `parts(options)`; it is imported only when asked for. Flags come from
its `Options` dataclass through argparse, not tyro: this verb has to run where little more than torch is installed.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

from ... import bench as benches
from ...bench import table
from ...bench.harness import Options, Outcome, run_bench
from ...tokenizer.sources import write_text
from ..errors import InputError
from .flag_errors import Parser

BENCHES = ("kernels", "tokenizer", "train", "tune", "serve", "quantization", "rl", "data", "kills")


def run(argv: list[str]) -> int:
    """Run the benchmark that `argv` names, or all; exit code 1 if a part failed."""
    if argv[:1] == ["chart"]:
        return _chart(argv[1:])
    bench = _chooser().parse_args(argv if argv[:1] in (["-h"], ["--help"]) else argv[:1]).bench
    if bench != "all" and not _exists(bench):
        there = ", ".join(filter(_exists, BENCHES))
        raise InputError(f"there is no {bench!r} bench yet (no {bench}.py in warploom/bench); there are: {there}")
    begin, failed = time.monotonic(), 0
    for name in filter(_exists, BENCHES) if bench == "all" else [bench]:
        spent = (time.monotonic() - begin) / 60
        failed += _run_one(name, argv[1:], spent)
    return 1 if failed else 0


def _run_one(bench: str, argv: list[str], spent: float) -> int:
    """Run one benchmark within the remaining minutes; return the number of failed parts."""
    module = importlib.import_module(_module_name(bench))
    options = _options(bench, getattr(module, "Options", Options), argv)
    device = options.device or getattr(module, "DEVICE", "")
    options = dataclasses.replace(options, minutes=options.minutes - spent, device=device)
    outcome = run_bench(bench, module.parts(options), options, rooms=getattr(module, "ROOMS", None))
    table.show(outcome.record)
    for part, reason in outcome.failed.items():
        print(f"{bench}: {part} failed: {reason}", file=sys.stderr)
    if outcome.stale:
        print(f"{bench}: still to measure: {', '.join(outcome.stale)}; the same command goes on there", file=sys.stderr)
    if options.plot and outcome.record.parts:
        _draw(module, outcome)
    print(outcome.record.to_json(), flush=True)
    return len(outcome.failed)


def _chart(argv: list[str]) -> int:
    """Draw the README's chart from the saved records."""
    from ...bench import chart

    parser = Parser(prog="warploom bench chart", description=chart.__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=chart.RESULTS, help="where the records are")
    parser.add_argument("--device", default=chart.DEVICE, help="whose records (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/chart.svg"), help="default: %(default)s")
    options = parser.parse_args(argv)
    write_text(options.out, chart.draw(options.results, options.device))
    print(f"drawn: {options.out}")
    return 0


def _draw(module: ModuleType, outcome: Outcome) -> None:
    from ...bench import plots

    picture = outcome.path.with_suffix(".png")
    getattr(module, "draw", plots.draw)(outcome.record, picture)
    print(f"drawn: {picture}", file=sys.stderr)


def _exists(bench: str) -> bool:
    return importlib.util.find_spec(_module_name(bench)) is not None


def _module_name(bench: str) -> str:
    return f"{benches.__name__}.{bench}"


def _chooser() -> Parser:
    parser = Parser(prog="warploom bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "bench", choices=(*BENCHES, "all", "chart"), help="what to measure; NAME --help shows its flags"
    )
    _add_flags(parser, Options)
    return parser


def _options(bench: str, kind: type[Options], argv: list[str]) -> Options:
    parser = Parser(prog=f"warploom bench {bench}")
    _add_flags(parser, kind)
    return kind(**vars(parser.parse_args(argv)))


def _add_flags(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Add a flag for each field of the dataclass: name, type, default, help."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        default, (convert, *text) = getattr(kind, name), get_args(hint) or (hint,)
        flag, text = f"--{name.replace('_', '-')}", " ".join(text)
        if convert is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            shown = f"{text} (default: {default})" if str(default) else text
            parser.add_argument(flag, type=convert, default=default, metavar=convert.__name__.upper(), help=shown)
