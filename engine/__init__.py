"""The model and the programs around it: configuration, training, serving, HTTP server, command line."""

from .lazy import lazily

__getattr__, __all__ = lazily(
    __name__,
    {
        "config": ("ModelConfig",),
        "model": ("Transformer",),
        "generation": ("KVCache", "generate"),
        "formats.model_directory": ("load_model",),
        "formats.model_writer": ("save_model",),
        "training": ("train", "TrainConfig", "AdamW", "SGDDecay", "Muon", "cosine_schedule", "clip_grad_norm"),
        "serving": ("LLM", "SamplingParams", "Output"),
        "rl": ("RLConfig", "reinforce"),
    },
)
