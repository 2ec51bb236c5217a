"""Claims about structured output."""

import json
import re
import time

import pytest
import torch

from warploom.engine.serving import LLM, EngineError, SamplingParams
from warploom.engine.serving import structured_output as grammar
from warploom.tokenizer import BPETokenizer

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def llm(tiny_model, tokenizer):
    return LLM(tiny_model(vocab_size=tokenizer.vocab_size + 5), tokenizer)


def test_regex_constrained_text_matches(llm):
    """Text matches the regular expression whatever the model would say."""
    params = [SamplingParams(regex=r"[a-c]{3}-\d{2,4}", seed=seed, temperature=2.0) for seed in range(8)]
    outputs = llm.generate(["x"] * 8, params)
    assert all(re.fullmatch(r"[a-c]{3}-\d{2,4}", output.text) for output in outputs)
    assert len({output.text for output in outputs}) > 1
    assert all(output.finish_reason == "stop" for output in outputs)


def test_regex_classes_are_ascii():
    r"""As in JSON schemas' patterns, \d and \w are ASCII's, and a backslash is one: a model once wrote digits as 🯸."""
    tokenizer = BPETokenizer({bytes([byte]): byte for byte in range(256)}, [], {"<|endoftext|>": 256}, "gpt4")
    compiler = grammar.GrammarCompiler(tokenizer, 257)

    def matches(pattern, text):
        matcher = compiler.compile(SamplingParams(regex=pattern))()
        for byte in (*text.encode(), tokenizer.eos_id):
            matcher.mask(row := torch.zeros(257))
            if row[byte] != 0:
                return False
            matcher.accept(byte)
        return True

    for pattern, text, other in (
        (r"\d+", "12", "١٢"),
        (r"[\w.-]+@x", "a_1.b-c@x", "é@x"),
        (r"[^\d]\W", "é ", "éa"),
        (r"\\d\n", "\\d\n", "\\1\n"),
    ):
        assert matches(pattern, text) and not matches(pattern, other), pattern


def test_text_is_one_of_the_choices(llm):
    choices = ("yes", "no", 'a "quoted" one')
    outputs = llm.generate(
        ["x"] * 12, [SamplingParams(choice=choices, seed=seed, temperature=3.0) for seed in range(12)]
    )
    assert {output.text for output in outputs} <= set(choices) and len({output.text for output in outputs}) > 1


def test_json_schema_beside_free_requests(llm):
    """Text is json that satisfies the schema beside free neighbours."""
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    strict = SamplingParams(json_schema=schema, max_tokens=60, seed=1, n=3)
    free = SamplingParams(max_tokens=9, seed=2)
    alone = llm.generate("b", free)
    output, neighbour = llm.generate(["a", "b"], [strict, free])
    assert neighbour.token_ids == alone.token_ids
    for choice in output.choices:
        value = json.loads(choice.text)
        assert set(value) == {"name", "age"} and value["name"] in ("Ann", "Bo") and 0 <= value["age"] <= 99


@pytest.mark.parametrize(
    "params",
    [{"regex": "(unclosed"}, {"json_schema": "not json"}, {"json_schema": {"type": "no such type"}}],
)
def test_grammar_invalid_refused_engine_goes_on(llm, params):
    """What cannot be compiled is refused and the engine goes on."""
    with pytest.raises(ValueError, match=f"{next(iter(params))} cannot be compiled"):
        llm.generate("x", SamplingParams(**params))
    assert llm.generate("x", SamplingParams(max_tokens=3, ignore_eos=True)).finish_reason == "length"


def test_without_a_tokenizer_a_grammar_is_refused(model):
    with pytest.raises(ValueError, match="need a tokenizer"):
        LLM(model).generate([1], SamplingParams(regex="a"))


def test_grammar_outgrowing_limits_ends_alone(llm):
    """A grammar that outgrows its limits ends its own request and nobody elses."""
    wide = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1500)}}
    strict, free = SamplingParams(json_schema=wide), SamplingParams(seed=2, max_tokens=9)
    alone = llm.generate("b", free)
    failing, going = llm.submit("a", strict), llm.submit("b", free)
    with pytest.raises(EngineError, match="max is 2000"):
        failing.result()
    assert going.result().token_ids == alone.token_ids and llm.engine.failures == 0
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_pages


def test_grammar_slow_to_compile_refused(llm, monkeypatch):
    """A grammar that takes too long to compile is refused."""
    monkeypatch.setattr(grammar, "TIME_LIMIT", 0.0)
    many = {f"p{i}": {"type": "string", "pattern": "^(a|b){1,500}$"} for i in range(300)}
    with pytest.raises(ValueError, match="json_schema takes more than 0 seconds"):
        llm.generate("x", SamplingParams(json_schema={"type": "object", "properties": many}))


def test_choices_by_the_thousand_are_one_expression(llm):
    """Compiled in linear time; a Lark rule of 2,500 failed at its second token."""
    choices = (*(f"c{i}" for i in range(2500)), "a.b*[c]", 'say "x" \\ y', "a #&-/{$}^+?|()")
    outputs = llm.generate(["x"] * 4, [SamplingParams(choice=choices, seed=seed, temperature=3.0) for seed in range(4)])
    assert {output.text for output in outputs} <= set(choices)
    for choice in choices[-3:]:
        assert llm.generate("x", SamplingParams(choice=(choice,), max_tokens=50)).text == choice


def test_grammar_too_large_is_refused_with_numbers(llm):
    for field, value in (("regex", "a" * 70_000), ("choice", ("a" * 999,) * 70), ("grammar", "start: " + "a" * 65_530)):
        with pytest.raises(ValueError, match=rf"{field} has \d+ characters; at most 65536 are compiled"):
            llm.generate("x", SamplingParams(**{field: value}))


@pytest.mark.parametrize("source", ['start: "a" b+\nb: /[0-9]/ "x"', 'root ::= "a" ([0-9] "x")+'])
def test_text_satisfies_a_lark_or_gbnf_grammar(llm, source):
    text = llm.generate("x", SamplingParams(grammar=source, max_tokens=9, seed=3)).text
    assert re.fullmatch(r"a([0-9]x)*[0-9]?", text) and len(text) > 2


@pytest.mark.parametrize("source", ["\U000fa85bs\x12\u00cb\x88", "root ::= (", "start: ???"])
def test_grammar_malformed_is_refused(llm, source):
    with pytest.raises(ValueError, match="grammar cannot be compiled"):
        llm.generate("x", SamplingParams(grammar=source, max_tokens=2))


def test_compiled_grammars_are_kept(llm, monkeypatch):
    built, build = [], grammar._build
    monkeypatch.setattr(grammar, "_build", lambda *source: built.append(source) or build(*source))
    for number in (*range(grammar.CACHED), 0, 1, grammar.CACHED, 0, 2):
        llm.grammars.compile(SamplingParams(regex=f"kept{number}"))
    assert len(built) == grammar.CACHED + 1 + 1, "the one beyond, and the oldest again"


def test_unknown_rows_cost_as_little_as_known_ones():
    """A sparse vocabulary is built as fast as a full one: each unknown id once scanned the whole of it."""

    class Counting(dict):
        scans = 0

        def values(self):
            Counting.scans += 1
            return super().values()

    tokenizer = BPETokenizer({bytes([byte]): byte for byte in range(256)}, [], {"<|endoftext|>": 256}, "gpt4")
    tokenizer._vocab = Counting(tokenizer._vocab)
    grammar._vocabulary(tokenizer, tokenizer.vocab_size + 1000)
    assert Counting.scans < 10


def test_large_vocabulary_is_paid_once():
    """150,000 tokens: each is asked for its bytes once, and a later schema costs a small share of the first."""
    tokens = {bytes([byte]): byte for byte in range(256)}
    tokens |= {f" {number:x}w".encode(): 256 + number for number in range(150_000)}
    tokenizer, asked = BPETokenizer(tokens, [], {"<|endoftext|>": 160_000}, "gpt4"), []
    token_bytes = tokenizer.token_bytes
    tokenizer.token_bytes = lambda token: asked.append(token) or token_bytes(token)
    compiler, seconds = grammar.GrammarCompiler(tokenizer, 161_000), []
    for name in ("city", "country", "region", "street"):
        schema = {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}
        start = time.process_time()
        compiler.compile(SamplingParams(json_schema=schema))
        seconds.append(time.process_time() - start)
    assert len(asked) <= 161_000
    assert min(seconds[1:]) < seconds[0] / 5


@pytest.mark.parametrize("drafts", [0, 4])
def test_triggered_grammar_binds_behind_its_mark(llm, tiny_model, tokenizer, drafts):
    """Free text is untouched; drafts change nothing; what the mark begins is as the grammar says, to its end."""
    made = LLM(tiny_model(vocab_size=tokenizer.vocab_size + 5), tokenizer, ngram_draft_tokens=drafts)
    source = 'start: r0 /-[0-9]{3};/\nr0[suffix="e"]: /(?s:.*)/'
    make = made.grammars.compile(SamplingParams(grammar=source))
    marked = 0
    for seed in range(12):
        params = SamplingParams(
            max_tokens=60, seed=seed, temperature=0.7, ignore_eos=True, logit_bias={tokenizer.encode("e")[0]: 4.0}
        )
        bound = made.submit("ab ab ab", params, grammar=lambda: grammar.TriggeredGrammar(make, tokenizer, "e")).result()
        free = llm.generate("ab ab ab", params)
        head = free.text.partition("e")[0]
        assert bound.text.startswith(head) and (bound.text == free.text or "e" in free.text)
        marked += "e" in free.text
        assert not re.search(r"e(?!-?[0-9]{0,3}$)", re.sub(r"e-[0-9]{3};", "", bound.text)), bound.text
    assert marked > 3


def test_triggered_grammar_counts_where_it_may(llm, tokenizer):
    make = llm.grammars.compile(SamplingParams(grammar='start: "e" /[0-9]/'))
    often = {"quiet": ("<t>", "</t>"), "repeated": True}
    cases = [
        ("xe", {}, True), ("xe", {"first_only": True}, False), (" e", {"first_only": True}, True),
        ("e1;e", {"first_only": True}, True), ("e1xe", {"first_only": True}, False), ("e1xe", {}, True),
        ("e1", {}, False), ("<t>e", {"quiet": ("<t>", "</t>")}, False),
        ("<t>e</t>e", {"quiet": ("<t>", "</t>")}, True),
        ("e", {"quiet": ("<t>", "</t>")}, True), ("e</t>e", {"quiet": ("<t>", "</t>"), "inside": True}, True),
        ("e", {"quiet": ("<t>", "</t>"), "inside": True}, False), ("ex", {}, False),
        ("x<t>e", often, False), ("x<t>e</t>", often, False), ("</t><t>e", often, False),
        ("<t>e</t><t>e", often, False), ("<t>e</t><t>e</t>xe", often, True), ("xe", often, True),
    ]  # fmt: skip
    for text, options, active in cases:
        bound = grammar.TriggeredGrammar(make, tokenizer, "e", **options)
        for _ in range(2):
            bound.rewind(tokenizer.encode(text))
            assert bound.active == active, (text, options)
