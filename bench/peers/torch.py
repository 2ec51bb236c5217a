"""Plain PyTorch: the model and loop one writes first, after nanoGPT's recipe and with the shape asked for."""

NEEDS = ("torch",)


def train(shape, compiled: bool = False):
    """A GPT-2 or Llama of the shape in `torch.nn`, its full logits into cross-entropy."""

    def build():
        import torch

        from ..train import step_of
        from ._plain import PlainTransformer

        torch.manual_seed(0)
        with torch.device(shape.device):
            model = PlainTransformer(shape.model, shape.time)
        return step_of(model, shape, torch.compile(model) if compiled else model)

    return {"torch compiled" if compiled else "torch": build}
