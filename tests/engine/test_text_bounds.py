"""Begin and end of text: one notion from a published directory to a saved one, and what serving makes of it."""

import json

import pytest
import torch

from warploom.engine.config import ModelConfig
from warploom.engine.formats.model_directory import load_model
from warploom.engine.formats.model_info import read_tokenizer
from warploom.engine.formats.model_writer import save_model
from warploom.engine.model import Transformer
from warploom.engine.serving import LLM, SamplingParams
from warploom.tokenizer import BPETokenizer, load_tokenizer

SPECIALS = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257, "<|eot_id|>": 258, "<|eom_id|>": 259}
ROLES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [256], "tokens": ["<|begin_of_text|>"]}},
}


def make(vocab_size: int = 260) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=vocab_size, d_model=32, n_layers=1, n_heads=2, max_seq_len=64)).eval()


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def directory(tmp_path):
    """As Llama-3-Instruct is published: several ends, of which the tokenizer names one and config.json another."""
    tokenizer = BPETokenizer({bytes([i]): i for i in range(256)}, [], SPECIALS)
    save_model(make(), tmp_path / "model", tokenizer)
    edit(tmp_path / "model" / "tokenizer_config.json", **ROLES)
    edit(tmp_path / "model" / "tokenizer.json", post_processor=BOS_FIRST)
    edit(tmp_path / "model" / "config.json", bos_token_id=256, eos_token_id=257)
    edit(tmp_path / "model" / "generation_config.json", bos_token_id=256, eos_token_id=[258, 259])
    return tmp_path / "model"


def test_text_bounds_survive_load_and_save(directory, tmp_path):
    model, tokenizer = load_model(directory, device="cpu")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 258)
    assert tokenizer.stop_ids == {257, 258, 259}
    save_model(model, tmp_path / "again", tokenizer)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "again" / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (256, [258, 257, 259]), name
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text()).items() >= ROLES.items()
    assert load_tokenizer(tmp_path / "again").stop_ids == tokenizer.stop_ids


def test_added_specials_keep_the_end(directory):
    tokenizer = load_tokenizer(directory)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert tokenizer.eos_id == 258 and tokenizer.stop_ids == {257, 258, 259}


def test_llm_stops_at_every_named_end(directory):
    llm = LLM(directory, device="cpu")
    assert llm.engine.eos == {257, 258, 259}
    for end in (257, 259):
        output = llm.generate("x", SamplingParams(max_tokens=4, temperature=0, logit_bias={end: 100.0}))
        assert output.finish_reason == "stop"
    assert LLM(directory, BPETokenizer({bytes([i]): i for i in range(256)}, []), device="cpu").engine.eos == {
        257, 258, 259,
    }  # fmt: skip


def test_raw_prompt_begins_once(directory):
    """By the post-processor: a text gets <|begin_of_text|>, token ids stay, a template writes its own."""
    llm = LLM(directory, device="cpu")
    assert llm.encode("hi") == [256, *b"hi"] and llm.encode("") == [256]
    assert llm.encode([256, 104]) == [256, 104] and llm.encode([104]) == [104]
    assert llm.encode("<|begin_of_text|>")[:2] == [256, ord("<")]
    llm.tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    assert llm.encode_chat([{"role": "user", "content": "hi"}]) == [256, *b"hi"]


def test_raw_prompt_without_post_processor_is_bare(directory):
    edit(directory / "tokenizer.json", post_processor=None)
    edit(directory / "tokenizer_config.json", add_bos_token=True)
    assert LLM(directory, device="cpu").encode("hi") == [*b"hi"]


def test_unreadable_tokenizer_is_told(directory):
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    with pytest.raises(ValueError, match="tokenizer"):
        load_model(directory, device="cpu")
    assert LLM(directory, BPETokenizer({b"x": 0} | {bytes([i]): i for i in range(256)}, []), device="cpu").tokenizer


def test_added_token_past_the_table_opens(directory):
    """Gemma 3: 262,144 rows, and <image_soft_token> is number 262,144. As a prompt's token it is refused."""
    edit(directory / "config.json", vocab_size=258)
    tokenizer = read_tokenizer(directory)
    assert tokenizer.vocab_size == 260
    save_model(make(258), directory, tokenizer)
    with pytest.raises(ValueError, match="token id 259"):
        LLM(directory, device="cpu").generate([259])
    edit(directory / "config.json", vocab_size=200)
    with pytest.raises(ValueError, match="256 tokens, but the model's vocab_size is 200"):
        read_tokenizer(directory)
