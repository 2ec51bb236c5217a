"""Hugging Face `transformers`: the library most people train and generate with."""

NEEDS = ("torch", "transformers")


def train(shape, compiled: bool = False):
    """The causal language model of the same architecture, its own loss, in the same loop."""

    def build():
        import torch

        from ..train import step_of

        torch.manual_seed(0)
        with torch.device(shape.device):
            model = causal_lm(shape.model)
        run = torch.compile(model) if compiled else model
        return step_of(model, shape, lambda tokens, _: run(input_ids=tokens, labels=tokens, use_cache=False).loss)

    return {"transformers compiled" if compiled else "transformers": build}


def causal_lm(config):
    """A randomly initialized model of theirs with the architecture of a `ModelConfig`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ...engine.architectures import describe
    from . import Unavailable

    values = describe(config)
    kind = values.pop("model_type")
    if kind == "warploom":
        raise Unavailable("no such architecture in transformers")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), attn_implementation="sdpa")
