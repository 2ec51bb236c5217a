"""Plain PyTorch training, eager or compiled: nanoGPT's recipe at the given shape."""

NEEDS = ("torch",)


def train(shape, compiled: bool = False):
    """GPT-2 or Llama in `torch.nn`, full logits into cross-entropy."""

    def build():
        import torch

        from ..train import step_of
        from ._plain import PlainTransformer

        torch.manual_seed(0)
        with torch.device(shape.device):
            model = PlainTransformer(shape.model, shape.time)
        return step_of(model, shape, torch.compile(model) if compiled else model)

    return {"torch compiled" if compiled else "torch": build}
