"""Op framework: `Op` records, kernel launch under autograd and torch.compile, optional Triton."""
