"""`warploom train`: pretraining, fine-tuning, LoRA and DPO, from token files or raw text.

Every field of `TrainConfig` and of `ModelConfig` is a flag. `--preset` sets their defaults, then the run that
`--resume` continues, then `--config FILE.toml`; flags override all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ...tokenizer.sources import read_text
from ..config import ModelConfig, current_names
from ..errors import InputError
from ..training.config import BUDGETS, TrainConfig
from ..training.distributed.failures import report_first_failure
from .flag_errors import Parser
from .flags import parse, renamed_settings

if TYPE_CHECKING:
    from ..training.callbacks import Callback


@dataclass(frozen=True)
class RunFlags(TrainConfig):
    """Options of a training run: data, budget, optimization."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A dataset directory (`warploom data`), 'stdlib', tasks:NAME (a task's solved problems; of a chat model,
    conversations), or a file, folder or glob of texts or of conversations: rows (JSON lines or array, parquet) of
    messages, also as ShareGPT, Alpaca, prompt and completion, or preference pairs (chosen and rejected, with loss
    dpo)."""
    model: tyro.conf.Suppress[None] = None
    resume: bool = False
    """Continue from the last complete checkpoint in `out`, with the flags of that run unless given again; without a
    checkpoint, start."""
    init_from: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Model directory to fine-tune: the run starts from its weights."""
    config: str | None = None
    """A TOML file with any of these flags as `name = value`, for example `batch_size = 32`."""

    def __post_init__(self) -> None:
        """No check here: TrainConfig checks."""


@dataclass(frozen=True)
class ModelFlags(ModelConfig):
    """Architecture; defaults are the preset's."""

    vocab_size: int = 0
    """Rows of the embedding table, and the size of a tokenizer trained here; 0 = as the tokenizer (or preset) has."""
    rope_scaling: str | None = None
    """RoPE scaling for longer contexts, as JSON: {"rope_type": "linear"|"ntk"|"dynamic"|"yarn"|"llama3", …}."""
    local_rope: str | None = None
    """RoPE of sliding-window layers, where it differs, as JSON: {"rope_theta": 1e4}."""

    def __post_init__(self) -> None:
        """No check here: ModelConfig checks."""


@dataclass(frozen=True)
class Flags:
    """Train a model: a dataset directory or a text file in, a model directory out."""

    run: RunFlags
    model: ModelFlags


def run(argv: list[str]) -> int:
    with report_first_failure():
        config = read(argv)
        from ..training.trainer import train

        result = train(config, [callback()])
    if result.stopped_by:
        return 130 if result.stopped_by == "SIGINT" else 143
    if result.history:  # only the leader of many processes has one
        print(f"{result.directory}: {result.evaluation or 'no validation text'}")
    return 0


def callback() -> Callback:
    """Live panel on a terminal, log lines elsewhere."""
    from ..training.callbacks import ConsoleLogger, LivePanel

    return LivePanel() if sys.stderr.isatty() else ConsoleLogger()


def read(argv: list[str]) -> TrainConfig:
    """Parse a command line into a `TrainConfig`."""
    early = Parser(prog="warploom train", add_help=False, allow_abbrev=False)
    for name in ("config", "preset", "out", *BUDGETS):
        early.add_argument(f"--{name}")
    early.add_argument("--resume", action="store_true")
    given = {name: value for name, value in vars(early.parse_known_args(argv)[0]).items() if value}
    settings = renamed_settings(_read_toml(given["config"])) if "config" in given else {}
    chosen = {**settings, **given}
    if chosen.get("resume"):
        saved = saved_settings(chosen.get("out", TrainConfig.out), chosen.get("preset"))
        settings = {**(saved or {"data": NOTHING}), **settings}
    if any(name in chosen for name in BUDGETS):
        settings = {name: value for name, value in settings.items() if name in chosen or name not in BUDGETS}
    preset = given.get("preset") or settings.get("preset", TrainConfig.preset)
    flags = parse(Flags, argv, "train", _defaults(preset, settings))
    check_given(flags.run.data, flags.run.out)
    chosen = {field.name: getattr(flags.run, field.name) for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{**chosen, "preset": preset, "model": _model(flags.model)})


JSON_FIELDS = ("rope_scaling", "local_rope")
NOTHING = ""  # the data of a run that is to be resumed, and is not there
OF_A_START = ("out", "device", "dp", "fsdp", "tp", "ep", "resume", "overwrite")  # may differ when a run goes on


def saved_settings(out: str, preset: str | None) -> dict[str, Any]:
    """Settings of the run in `out` when it last saved; without the architecture if a preset is given."""
    states = Path(out, "checkpoints").glob("step-*/state.json")
    for path in sorted(states, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # torn: training will say so
            told = renamed_settings(json.loads(path.read_text(encoding="utf-8"))["run"]["config"])
            model = told.pop("model") or {}
            return {
                name: value for name, value in {**({} if preset else model), **told}.items() if name not in OF_A_START
            }
    return {}


def check_given(data: str, out: str) -> None:
    """Refuse to resume without data where no run was saved."""
    if data == NOTHING:
        raise InputError(f"{out} holds no checkpoint to resume: give the data to start a run")


def _defaults(preset: str, settings: dict[str, Any]) -> Flags:
    of_model = {field.name for field in dataclasses.fields(ModelConfig)}
    of_run = {field.name for field in dataclasses.fields(TrainConfig)} - {"model"}
    settings = current_names(settings)
    unknown = sorted(set(settings) - of_model - of_run)
    if unknown:
        raise InputError(f"the configuration has no field {', '.join(unknown)}")
    shape = {**ModelConfig.preset(preset).to_dict(), "vocab_size": 0}
    shape |= {key: value for key, value in settings.items() if key in of_model}
    shape |= {name: json.dumps(shape[name]) for name in JSON_FIELDS if shape[name] is not None}
    run_settings = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items() if key in of_run
    }
    return Flags(RunFlags(**{"data": tyro.MISSING, **run_settings}), ModelFlags(**shape))


def _model(flags: ModelFlags) -> dict[str, Any]:
    """Fields of a ModelConfig from the flags; vocab_size 0 is filled in from the tokenizer."""
    fields = dataclasses.asdict(flags)
    for name in JSON_FIELDS:
        try:
            fields[name] = None if fields[name] is None else json.loads(fields[name])
        except ValueError as error:
            raise InputError(f"{name} must be JSON, not {fields[name]!r}: {error}") from error
    return fields


def _read_toml(path: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
