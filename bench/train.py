"""Training benchmark: one optimizer step beside the same step of peers.

Every contestant trains the same architecture on the same tokens in the same number format, with AdamW and the gradient
norm clipped to 1: a plain PyTorch loop as one would write it first, and `transformers`. Shares are model FLOPs
(6 N + 12 L H D T a token) over the matrix product measured in the same run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from . import peers
from .harness import Machine, Options, Part
from .schema import Row

ROOMS = ("engine/config.py", "engine/model.py", "engine/training", "kernels", "csrc")
SLOW_BF16 = 1.2  # a CPU whose bf16 product is not this much faster than its float32 one emulates it


@dataclass(frozen=True, slots=True)
class Shape:
    """Model and batch shape to train."""

    preset: str
    overrides: tuple[tuple[str, int], ...]
    batch: int
    time: int
    dtype: str
    device: str

    @property
    def model(self):
        """The `ModelConfig`."""
        from ..engine.config import ModelConfig

        return ModelConfig.preset(self.preset, **dict(self.overrides))

    def batches(self, count: int = 4) -> Iterator:
        """Random tokens and next-token targets, cycled."""
        import torch

        generator = torch.Generator().manual_seed(0)
        size = (count, self.batch, self.time + 1)
        tokens = torch.randint(self.model.vocab_size, size, generator=generator).to(self.device)
        while True:
            yield from ((rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens)


def parts(options: Options) -> list[Part]:
    """On a CPU the demo's model, a 24M one and a small character model, in the fast dtype there; on a GPU well-known
    shapes. Compiled peers come last."""
    from .environment import find_device

    if find_device(options.device) == "cuda":
        return _gpu_parts()
    from ..engine.device import pick_dtype

    dtype = str(pick_dtype("auto", "cpu")).removeprefix("torch.")
    tiny = {"preset": "llama-tiny", "batch": 16, "time": 256, "dtype": dtype}
    larger = tiny | {"n_layers": 12, "d_model": 384, "n_heads": 6, "n_kv_heads": 6, "vocab_size": 8192}
    small = tiny | {"preset": "llama-characters", "batch": 12, "time": 64}
    shapes = {"llama-tiny": tiny, "llama-24m": larger, "llama-characters": small}
    parts = [Part(f"{name} {dtype}", compare_step, shape, minutes=1.5) for name, shape in shapes.items()]
    return parts + [replace(p, name=f"{p.name} compiled", config=p.config | {"compiled": True}) for p in parts]


def _gpu_parts() -> list[Part]:
    gpt2 = {"preset": "gpt2-124m", "batch": 32, "time": 1024, "dtype": "bfloat16"}
    billion = {"preset": "llama-1b", "batch": 4, "time": 2048, "dtype": "bfloat16"}
    tiny = {"preset": "llama-tiny", "batch": 256, "time": 256, "dtype": "bfloat16"}
    return [
        Part("gpt2-124m", compare_step, gpt2, minutes=1),
        Part("llama-1b", compare_step, billion, minutes=1.5),
        Part("gpt2-124m compiled", compare_step, gpt2 | {"compiled": True}, minutes=3),
        Part("llama-tiny", compare_step, tiny, minutes=1),
    ]


def compare_step(
    machine: Machine, preset: str, batch: int, time: int, dtype: str, compiled: bool = False, **overrides: int
) -> list[Row]:
    """Ours against every peer, eager or compiled, on one shape."""
    shape = Shape(preset, tuple(overrides.items()), batch, time, dtype, machine.device)
    case = f"{preset if not overrides else 'llama'} {dtype}, batch {batch} × {time}"
    if dtype == "bfloat16" and machine.ceiling("matmul bfloat16") < SLOW_BF16 * machine.ceiling("matmul float32"):
        return [Row(case, "ours", missing="this machine multiplies bfloat16 no faster than float32")]
    tokens = batch * time
    limit = f"matmul {dtype}"
    machine.ceiling(limit)  # loads the libraries before anyone's memory is measured
    builders = {"ours": partial(ours, shape)} | peers.build("train", shape, compiled=compiled)
    calls, extra = machine.prepare(builders)
    losses: dict[str, object] = {}
    kept = {who: call if isinstance(call, peers.Missing) else _keep(call, losses, who) for who, call in calls.items()}
    flops = shape.model.flops_per_token(time) * tokens
    rows = machine.compare(case, kept, amount=tokens, unit="tok", limits={limit: flops}, extra=extra)
    return [replace(row, extra=row.extra | _loss(losses.get(row.who))) for row in rows]


def ours(shape: Shape) -> Callable[[], object]:
    """Our training step as a run does it: masters, clipping, schedule, checks, AdamW."""
    from ..engine.data.loader import Batch
    from ..engine.memory import keep_freed
    from ..engine.training import TrainConfig
    from ..engine.training.trainer import Trainer

    folder = TemporaryDirectory()
    text = Path(folder.name) / "text.txt"
    text.write_text("A run is made of some text; the batches timed here are others. " * 100)
    config = TrainConfig(
        data=str(text), tokenizer="char", out=f"{folder.name}/run", model=shape.model, batch_size=shape.batch,
        context=shape.time, lr=3e-4, warmup=0, steps=10**6, device=shape.device, dtype=shape.dtype,
    )  # fmt: skip
    trainer = Trainer(config, [])
    if shape.device == "cpu":
        keep_freed(True)
    batches = (Batch(tokens, targets) for tokens, targets in shape.batches())

    def step() -> float:
        return trainer.one_step(next(batches))[0]

    step.folder = folder  # the run's directory lives as long as the step
    return step


def step_of(model, shape: Shape, loss_of: Callable) -> Callable[[], object]:
    """Training step as most people write it: autocast, backward, clip, fused AdamW."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    half = torch.autocast(shape.device, dtype=torch.bfloat16, enabled=shape.dtype == "bfloat16")
    batches = shape.batches()

    def step():
        with half:
            loss = loss_of(*next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _keep(call: Callable[[], object], results: dict[str, object], who: str) -> Callable[[], None]:
    def step() -> None:
        results[who] = call()

    return step


def _loss(value: object) -> dict[str, float]:
    return {} if value is None else {"loss": float(value)}
