"""splintr: a Rust tokenizer that reads tiktoken rank files."""

NEEDS = ("splintr",)


def _tokenizer(work):
    import splintr

    return splintr.Tokenizer(str(work.ranks), work.pattern)


def encode_array(work):
    def build():
        peer = _tokenizer(work)
        return lambda: peer.encode_flat(work.text)

    return {"splintr": build} if work.threads == 1 else {}


def encode_list(work):
    def build():
        peer = _tokenizer(work)
        return lambda: peer.encode_ordinary(work.text)

    return {"splintr": build}


def decode(work, ids):
    def build():
        peer, numbers = _tokenizer(work), ids.tolist()
        return lambda: peer.decode_bytes(numbers)

    return {"splintr (lists)": build}
