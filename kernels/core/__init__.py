"""The frame of an op: `Op` records, kernel launch under autograd and torch.compile, Triton itself or its stand-in."""
