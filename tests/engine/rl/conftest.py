import pytest
import torch

from warploom.engine import ModelConfig, Transformer
from warploom.engine.formats.model_directory import save_model
from warploom.tokenizer import CharTokenizer

CHARACTERS = "0123456789+=<>, abcdefghijklmnopqrstuvwxyz:()[]{}-"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A model directory with random weights whose characters cover the built-in tasks."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = CharTokenizer.train([CHARACTERS])
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=64, max_seq_len=96
    )
    save_model(Transformer(config), folder, tokenizer)
    return folder
