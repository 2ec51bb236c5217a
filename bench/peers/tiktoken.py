"""OpenAI's tiktoken: a regex engine and merging in Rust, results as lists (or an array made from one)."""

NEEDS = ("tiktoken",)


def _encoding(work):
    import tiktoken

    ours = work.tokenizer
    return tiktoken.Encoding(
        "bench", pat_str=work.pattern, mergeable_ranks=ours.vocab, special_tokens=ours.special_tokens
    )


def encode_array(work):
    def build():
        peer = _encoding(work)
        if work.threads > 1:
            documents = [work.text[i : i + 20_000] for i in range(0, len(work.text), 20_000)]
            return lambda: peer.encode_ordinary_batch(documents, num_threads=work.threads)
        return lambda: peer.encode_to_numpy(work.text, disallowed_special=())

    return {"tiktoken (20 KB documents)" if work.threads > 1 else "tiktoken": build}


def encode_list(work):
    def build():
        peer = _encoding(work)
        return lambda: peer.encode_ordinary(work.text)

    return {"tiktoken": build}


def encode_documents(work):
    def build():
        peer = _encoding(work)
        return lambda: peer.encode_ordinary_batch(work.documents, num_threads=1)

    return {"tiktoken": build}


def decode(work, ids):
    def build():
        peer, numbers = _encoding(work), ids.tolist()
        return lambda: peer.decode_bytes(numbers)

    return {"tiktoken (lists)": build}
