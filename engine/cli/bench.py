"""`warploom bench`: measure this machine's warploom beside its peers.

A bench is a module of `warploom.bench` with a `parts(options)`; it is imported only when asked for. Flags come from
its `Options` dataclass through argparse, not tyro: this verb has to run where little more than torch is installed.
"""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType

from ...bench.harness import Options, run_bench

BENCHES = ("kernels", "tokenizer", "train", "serve")


def run(argv: list[str]) -> int:
    """Run the bench (or `all`) that `argv` names; 0 if every part asked for is on record, 1 if one failed."""
    chooser = argparse.ArgumentParser(prog="warploom bench", description=__doc__.splitlines()[0], add_help=False)
    chooser.add_argument("bench", choices=(*BENCHES, "all"), help="what to measure")
    if not argv or argv[0] in ("-h", "--help"):
        _add_flags(chooser, Options)
        chooser.add_argument(
            "-h", "--help", action="help", help="show this help (a bench may have more flags: bench NAME --help)"
        )
        chooser.parse_args(argv)
    bench = chooser.parse_args(argv[:1]).bench
    try:
        return max(_run_one(name, argv[1:], alone=bench != "all") for name in (BENCHES if bench == "all" else (bench,)))
    except ValueError as error:
        print(f"warploom bench: {error}", file=sys.stderr)
        return 2


def _run_one(bench: str, argv: list[str], alone: bool) -> int:
    module = _module(bench)
    if module is None:
        print(
            f"warploom bench: there is no {bench!r} bench yet; one will appear as warploom/bench/{bench}.py",
            file=sys.stderr,
        )
        return 2 if alone else 0
    options = _options(bench, getattr(module, "Options", Options), argv)
    from ...bench import table

    outcome = run_bench(bench, module.parts(options), options, rooms=getattr(module, "ROOMS", None))
    table.show(outcome.record)
    for part, reason in outcome.failed.items():
        print(f"{part}: failed: {reason}", file=sys.stderr)
    if outcome.stale:
        print(f"still to measure: {', '.join(outcome.stale)}; the same command goes on", file=sys.stderr)
    if options.plot and outcome.record.parts:
        from ...bench import plots

        getattr(module, "draw", plots.draw)(outcome.record, outcome.path.with_suffix(".png"))
    print(outcome.record.to_json())
    return 1 if outcome.failed else 0


def _module(bench: str) -> ModuleType | None:
    name = f"{__package__.rsplit('.', 2)[0]}.bench.{bench}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise


def _options(bench: str, kind: type[Options], argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog=f"warploom bench {bench}")
    _add_flags(parser, kind)
    return kind(**vars(parser.parse_args(argv)))


def _add_flags(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """A flag for each field of the dataclass: its name, type, default and help."""
    for field in dataclasses.fields(kind):
        flag, text = f"--{field.name.replace('_', '-')}", field.metadata.get("help", "")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            convert = Path if isinstance(field.default, Path) else type(field.default)
            parser.add_argument(
                flag,
                type=convert,
                default=field.default,
                metavar=convert.__name__.upper(),
                help=f"{text} (default: %(default)s)",
            )
