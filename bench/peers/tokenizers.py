"""Hugging Face tokenizers, through `encode_batch_fast`; whole texts are given as documents, the way it is used."""

NEEDS = ("tokenizers",)


def _tokenizer(work):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(work.json))


def encode_list(work):
    def build():
        peer = _tokenizer(work)
        return lambda: peer.encode(work.text, add_special_tokens=False).ids

    return {} if len(work.text) > 100_000 else {"tokenizers": build}


def encode_documents(work):
    def build():
        import os

        os.environ["TOKENIZERS_PARALLELISM"] = "true" if work.threads > 1 else "false"
        peer = _tokenizer(work)
        return lambda: peer.encode_batch_fast(work.documents, add_special_tokens=False)

    return {"tokenizers": build}


def decode(work, ids):
    def build():
        peer, numbers = _tokenizer(work), ids.tolist()
        return lambda: peer.decode(numbers, skip_special_tokens=False).encode()

    return {"tokenizers (lists)": build}


def train_tokenizer(path, vocab_size, pattern):
    def build():
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

        def run():
            peer = Tokenizer(models.BPE())
            peer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            peer.train([str(path)], trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet))

        return run

    return {"tokenizers": build}
