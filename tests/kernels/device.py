"""Where kernels run in tests: on a GPU, or in the interpreter. Without Hypothesis, which a GPU machine may lack."""

import pytest
import torch

from warploom.kernels.core.lang import HAS_TRITON, INTERPRET

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        not HAS_TRITON or (DEVICE == "cpu" and not INTERPRET), reason="needs triton and TRITON_INTERPRET=1 or a GPU"
    ),
    # log(0) is meant
    pytest.mark.filterwarnings("ignore:.* encountered in (exp|log|subtract|multiply|matmul):RuntimeWarning"),
]
