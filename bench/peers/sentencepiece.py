"""Google's SentencePiece; merges characters within whitespace words: another algorithm, for comparison."""

NEEDS = ("sentencepiece",)


def train_tokenizer(path, vocab_size, pattern):
    def build():
        import tempfile

        import sentencepiece

        def run():
            with tempfile.TemporaryDirectory() as folder:
                sentencepiece.SentencePieceTrainer.train(
                    input=str(path),
                    model_prefix=f"{folder}/model",
                    vocab_size=vocab_size,
                    model_type="bpe",
                    byte_fallback=True,
                    hard_vocab_limit=False,
                    num_threads=1,
                    minloglevel=2,
                    max_sentence_length=1 << 20,
                )

        return run

    return {} if vocab_size > 1_000 else {"sentencepiece (no byte-level BPE)": build}
