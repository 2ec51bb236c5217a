"""warploom trains language models from raw text, tunes them and serves them, on kernels of its own.

from warploom import LLM, SamplingParams, ModelConfig, Transformer, TrainConfig, train, load_model, save_model

The names below are loaded when first used: `import warploom` takes milliseconds and imports no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.config import ModelConfig
    from .engine.formats.model_directory import load_model
    from .engine.formats.model_writer import save_model
    from .engine.generation import generate
    from .engine.model import Transformer
    from .engine.rl.config import RLConfig
    from .engine.rl.trainer import reinforce
    from .engine.serving.llm import LLM
    from .engine.serving.outputs import Output
    from .engine.serving.sampling_params import SamplingParams
    from .engine.training.config import TrainConfig
    from .engine.training.trainer import train
    from .tokenizer import BPETokenizer, CharTokenizer, WordTokenizer, load_tokenizer

__version__ = "0.2.0"
_ENGINE = (
    *("LLM", "ModelConfig", "Output", "RLConfig", "SamplingParams", "TrainConfig", "Transformer"),
    *("generate", "load_model", "reinforce", "save_model", "train"),
)
_TOKENIZER = ("BPETokenizer", "CharTokenizer", "WordTokenizer", "load_tokenizer")

__all__ = [
    "LLM",
    "BPETokenizer",
    "CharTokenizer",
    "ModelConfig",
    "Output",
    "RLConfig",
    "SamplingParams",
    "TrainConfig",
    "Transformer",
    "WordTokenizer",
    "generate",
    "load_model",
    "load_tokenizer",
    "reinforce",
    "save_model",
    "train",
]


def __getattr__(name: str):
    if name in _ENGINE:
        from . import engine

        return getattr(engine, name)
    if name in _TOKENIZER:
        from . import tokenizer

        return getattr(tokenizer, name)
    raise AttributeError(f"module 'warploom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
