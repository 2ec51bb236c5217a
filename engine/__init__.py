"""The model, and what runs it: configuration, training, serving, the server and the command line.

Names are looked up when first used, so that `import warploom.engine` costs nothing and the command line starts at once.
"""

from importlib import import_module

_HOMES = {
    "config": ("ModelConfig",),
    "model": ("Transformer",),
    "cache": ("KVCache", "generate"),
    "hub": ("save_model", "load_model"),
    "training": ("train", "TrainConfig", "AdamW", "SGDDecay", "Muon", "cosine_schedule", "clip_grad_norm"),
    "serving": ("LLM", "SamplingParams", "Output"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name in _HOME_OF:
        return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
