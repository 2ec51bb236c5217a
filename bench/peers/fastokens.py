"""fastokens: a Rust drop-in for Hugging Face tokenizers; results as one flat buffer."""

NEEDS = ("fastokens",)


def _tokenizer(work):
    import fastokens

    return fastokens.Tokenizer.from_file(str(work.json))


def encode_array(work):
    def build():
        peer = _tokenizer(work)
        return lambda: peer.encode_batch_flat([work.text])

    return {"fastokens": build} if work.threads == 1 else {}


def encode_documents(work):
    def build():
        peer = _tokenizer(work)
        return lambda: peer.encode_batch_flat(work.documents)

    return {"fastokens": build}
