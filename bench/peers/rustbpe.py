"""rustbpe: nanochat's trainer in Rust."""

NEEDS = ("rustbpe",)


def train_tokenizer(path, vocab_size, pattern):
    def build():
        import rustbpe

        def run():
            documents = path.read_text("utf-8").splitlines(keepends=True)
            rustbpe.Tokenizer().train_from_iterator(iter(documents), vocab_size, pattern=pattern)

        return run

    return {"rustbpe": build}
