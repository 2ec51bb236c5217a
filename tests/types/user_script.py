"""A user's script: the type checker must know every name and type in it (never run; see `make types`)."""

from warploom import (
    LLM,
    BPETokenizer,
    ModelConfig,
    Output,
    SamplingParams,
    TrainConfig,
    Transformer,
    generate,
    load_model,
    load_tokenizer,
    save_model,
    train,
)
from warploom.kernels import attention, rms_norm, swiglu


def tokenize(path: str) -> list[int]:
    tokenizer = BPETokenizer.train(path, vocab_size=512, special_tokens=["<|endoftext|>"])
    tokenizer.save("runs/tokenizer")
    ids: list[int] = load_tokenizer("runs/tokenizer").encode("to be or not to be")
    return ids


def fit() -> Transformer:
    config = ModelConfig(vocab_size=512, d_model=64, n_layers=2, n_heads=4, max_seq_len=128, ffn="swiglu")
    train(TrainConfig(data="novel.txt", out="runs/novel", steps=100))
    model, tokenizer = load_model("runs/novel", dtype="float32")
    save_model(model, "runs/copy", tokenizer)
    first: list[int] = list(generate(model, [1, 2, 3], max_tokens=4, temperature=0.8))
    print(first, model.config.n_layers, config.parameter_count())
    return model


def ask(model: Transformer) -> str:
    llm = LLM(model, max_batch=4, quantize="int8")
    one: Output = llm.generate("the empire")
    several: list[Output] = llm.generate(["the empire", "a ship"], SamplingParams(max_tokens=8, temperature=0.7))
    by_ids: Output = llm.generate([1, 2, 3])
    each: list[list[float]] = llm.score(["the empire", "a ship"])
    for piece in llm.stream("the empire", SamplingParams(stop=("\n",))):
        print(piece.text, end="")
    speed: float | None = one.metrics.tokens_per_second
    print(speed, each, by_ids.token_ids, llm.chat([{"role": "user", "content": "hello"}]).text)
    return one.text + several[0].text


def wrong(model: Transformer) -> None:
    """Mistakes that the checker must see: an ignore that is not needed is an error of its own."""
    SamplingParams(max_token=8)  # pyright: ignore[reportCallIssue]
    ModelConfig(vocab_size=512, ffn="swiglue")  # pyright: ignore[reportArgumentType]
    text: str = LLM(model).generate("the empire")  # pyright: ignore[reportAssignmentType]
    rms_norm(model.embedding.weight, model.embedding.weight, eps="small")  # pyright: ignore[reportArgumentType]
    swiglu()  # pyright: ignore[reportCallIssue]
    attention(text)  # pyright: ignore
