"""Turn a model that continues text into one that answers, by training on conversations.

    python docs/examples/fine_tune_on_conversations.py runs/novel chats.jsonl runs/chat

A line of the file is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}; only what
the assistant says is learned.
"""

import sys

from warploom import LLM, SamplingParams, TrainConfig, train


def main(base: str, chats: str, out: str, epochs: float = 2, question: str = "Who are you?") -> str:
    """Fine-tune `base` on `chats` into `out`, and return its answer to a question."""
    train(TrainConfig(data=chats, init_from=base, out=out, epochs=epochs, lr=5e-4))
    llm = LLM(out)
    answer = llm.chat([{"role": "user", "content": question}], SamplingParams(max_tokens=60, temperature=0))
    print(answer.text)
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:4])
