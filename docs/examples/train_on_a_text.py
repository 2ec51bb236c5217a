"""Train a model of your own on a text file, look at what it learned, and let it write.

python docs/examples/train_on_a_text.py novel.txt runs/novel
"""

import sys

from warploom import LLM, SamplingParams, TrainConfig, train

SIZE = {"d_model": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "max_seq_len": 256}


def main(text: str, out: str, steps: int = 1000, **size: int) -> str:
    """Train on `text`, write the model directory `out`, and return what the model writes."""
    config = TrainConfig(data=text, out=out, tokenizer="bpe", model=SIZE | size, steps=steps, lr=2e-3)
    result = train(config)  # Ctrl-C ends it after the step, with a checkpoint; resume=True goes on from there
    print(result)
    output = LLM(out).generate("The ", SamplingParams(max_tokens=100, temperature=0.8, seed=1))
    print(output.text)
    return output.text


if __name__ == "__main__":
    main(*sys.argv[1:3])
