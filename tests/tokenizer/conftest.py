"""A small corpus in many languages and shapes, and tokenizers trained on it, for every tokenizer test."""

import random

import pytest

from warploom.tokenizer import BPETokenizer

ENGLISH = (
    "It was the best of times, it was the worst of times; it wasn't HIS best, it wasn't the dog's worst.\n"
    "They'll say we've won, and I'd say: 1234567 times no!  Wait...   what?\n\n\tTabs\tand\r\nnewlines \n \n end \n"
)
CODE = (
    "def f(x):\n    if x != 0x1F2e and not (x in {1, 22, 333, 4444}):\n        return [i**2 for i in range(x)]\n\n"
    "class HTTPServer2(BaseServer):\n\tpath = '/usr/local//bin'\n\tdon = \"it's\"\r\n\r\n    ...\n"
)
MANY = (
    "Привет, мир! Это — тест.\nΚαλημέρα κόσμε.\n你好，世界。今天天气很好！\n「こんにちは」カタカナ。\n안녕하세요 세계\n"
    "हिन्दी में लिखा हुआ पाठ।\nสวัสดีชาวโลก\nمرحبا بالعالم ١٢٣٤\nשלום עולם\nCafé naïve ÅNGSTRÖM straße ǅungla ﬁn ½ ² Ⅷ\n"
    "emoji 👍🏽 👩‍👩‍👧‍👦 🇫🇷🇩🇪 e\u0301 a\u0300\u0301\n"
    "　　全角　空白\u00a0nbsp\u2028line\u0085next\u200bzero\ufeffbom\n'ſ 'S 'LL it'ſ\n"
)
ADVERSARIAL = [
    "a" * 3000,
    "ab" * 1000,
    " " * 500,
    "\n" * 500,
    " \n" * 300,
    "1" * 1000,
    "!" * 777,
    "'" * 300,
    "'s" * 200,
]

TEXTS = [ENGLISH, CODE, MANY, ENGLISH + MANY + CODE, "", " ", "\n", "a", "'", "é", *ADVERSARIAL]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Natural, code, multilingual, emoji and adversarial texts, and nearly empty ones."""
    return TEXTS


@pytest.fixture(scope="session")
def samples() -> dict[str, str]:
    """The texts to train on, by name."""
    return {"english": ENGLISH, "code": CODE, "many": MANY}


@pytest.fixture(scope="session")
def noise():
    """The maker of random texts: noise(seed, length)."""
    return make_noise


def make_noise(seed: int, length: int) -> str:
    """Characters that matter to the patterns, and some that should not, in random order."""
    draw = random.Random(seed)
    alphabet = "aZszſK'’.,/-_()09½²٣ \t\n\r\x0b\x85\xa0\u3000\u2028éßΣςǅʰª你ก\u0301\u093f\u200d👍\U000e0100\ue000\u0378"
    return "".join(draw.choice(alphabet) for _ in range(length))


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return [ENGLISH * 3, CODE * 2, MANY * 2]


@pytest.fixture(scope="session", params=["gpt2", "gpt4", "o200k"])
def tok(request, corpus) -> BPETokenizer:
    specials = ("<|endoftext|>", "<|end|>", "<|endof|>")
    return BPETokenizer.train(corpus, 700, pattern=request.param, special_tokens=specials)
