"""gigatoken: a Rust tokenizer with SIMD splitting and a word cache; the fastest peer."""

NEEDS = ("gigatoken",)


def _tokenizer(work):
    import gigatoken

    return gigatoken.Tokenizer.from_json(work.json.read_bytes()).backend


def encode_array(work):
    def build():
        peer = _tokenizer(work)
        if work.threads > 1:
            documents = [work.text[i : i + 20_000] for i in range(0, len(work.text), 20_000)]
            return lambda: peer.encode_batch(documents)
        return lambda: peer.encode(work.text)

    return {"gigatoken (20 KB documents)" if work.threads > 1 else "gigatoken": build}


def encode_list(work):
    def build():
        peer = _tokenizer(work)
        return lambda: peer.encode_batch_list([work.text], parallel=False)[0]

    return {"gigatoken": build}


def encode_documents(work):
    def build():
        peer = _tokenizer(work)
        return lambda: peer.encode_batch(work.documents, parallel=False)

    return {"gigatoken": build}


def decode(work, ids):
    def build():
        import numpy as np

        peer, numbers = _tokenizer(work), ids.astype(np.uint32)
        return lambda: peer.decode(numbers)

    return {"gigatoken": build}


def train_tokenizer(path, vocab_size, pattern):
    def build():
        from gigatoken.gigatoken_rs import train_bpe

        return lambda: train_bpe(path, vocab_size, [])

    return {"gigatoken (GPT-2 pattern)": build}
