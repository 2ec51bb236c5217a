"""What requests may ask for beyond OpenAI's fields: where to begin, when to end, whom to share with."""

import json

import pytest

from warploom.engine.formats.model_writer import save_model
from warploom.engine.serving import LLM

from .conftest import HeldLLM, make_model, make_tokenizer, serving

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="these tests need httpx")

HI = {"role": "user", "content": "hi"}


def text_of(answer):
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_min_tokens_keep_the_end_away(client, server):
    eos = server.bridge.llm.tokenizer.eos_id
    body = {"prompt": "x", "max_tokens": 20, "seed": 1, "logit_bias": {str(eos): 100}}
    for least in (0, 7):
        answer = client.post("/v1/completions", json={**body, "min_tokens": least}).json()
        assert answer["usage"]["completion_tokens"] == least + 1 and answer["choices"][0]["finish_reason"] == "stop"
    refused = client.post("/v1/completions", json={**body, "min_tokens": 21})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "min_tokens"
    both = client.post("/v1/completions", json={**body, "min_tokens": 5, "regex": "a+"})
    assert both.status_code == 400 and "grammar" in both.json()["error"]["message"]


def test_final_message_is_continued_where_it_ends(client):
    """Its prompt is the template's up to the content's last character, special tokens in it fenced."""
    said = "I say <|im_end|> and "
    turns = [HI, {"role": "assistant", "content": said}]
    body = {"max_tokens": 12, "seed": 4, "temperature": 0}
    chat = client.post("/v1/chat/completions", json={"messages": turns, "continue_final_message": True, **body})
    opened = client.post("/tokenize", json={"messages": [HI]}).json()["tokens"]
    prompt = opened + list(said.encode())
    assert chat.json()["usage"]["prompt_tokens"] == len(prompt)
    assert text_of(chat) == text_of(client.post("/v1/completions", json={"prompt": prompt, **body}))
    refused = client.post("/v1/chat/completions", json={"messages": [HI], "continue_final_message": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "continue_final_message"
    prefilled = client.post(
        "/v1/messages", json={"messages": turns, **{k: body[k] for k in ("max_tokens", "temperature")}}
    )
    assert prefilled.json()["content"][0]["text"] == text_of(chat)


def test_fields_that_change_nothing_are_taken(client):
    """Default fields of OpenAI's, vLLM's and llama.cpp's clients are accepted: they ask for what happens anyway."""
    body = {"messages": [HI], "max_tokens": 4, "seed": 1}
    idle = {"safety_identifier": "a", "prompt_cache_key": "b", "prompt_cache_retention": "24h", "cache_prompt": True}
    idle |= {"skip_special_tokens": True, "include_stop_str_in_output": False, "length_penalty": 1.0}
    idle["add_special_tokens"] = False
    idle |= {"stream_options": {"include_usage": True, "continuous_usage_stats": False}, "use_beam_search": False}
    plain = text_of(client.post("/v1/chat/completions", json=body))
    answer = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None}
    replayed = client.post("/v1/chat/completions", json={**body, "messages": [HI, answer, HI]})
    assert replayed.status_code == 200, replayed.text
    options = idle.pop("stream_options")
    assert text_of(client.post("/v1/chat/completions", json={**body, **idle})) == plain
    streamed = client.post("/v1/chat/completions", json={**body, "stream": True, "stream_options": options})
    assert streamed.status_code == 200 and streamed.text.endswith("data: [DONE]\n\n")
    asked = {"prompt": "x", "add_special_tokens": True, "return_token_strs": False}
    assert client.post("/tokenize", json=asked).json()["count"] == 1
    for name, value in {"skip_special_tokens": False, "use_beam_search": True, "add_special_tokens": True}.items():
        refused = client.post("/v1/chat/completions", json={**body, name: value})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == name


def test_store_is_taken_and_named_as_ignored(client):
    """OpenAI's own examples send it; nothing is stored, which the header says, and Responses in their body."""
    for path, body in (("chat/completions", {"messages": [HI]}), ("responses", {"input": "hi"})):
        for store in (True, False):
            answer = client.post(f"/v1/{path}", json={**body, "store": store})
            assert answer.status_code == 200 and answer.json().get("store", False) is False
            assert ("store" in answer.headers.get("x-warploom-ignored", "")) == store


def test_limit_has_several_names_and_may_be_none(client):
    """llama.cpp's n_predict, and -1 for no limit, as its clients and LM Studio's send it."""
    plain = {"prompt": "x", "seed": 1, "ignore_eos": True}
    chat = {"messages": [HI], "seed": 1, "ignore_eos": True}
    for path, body in (("completions", plain), ("chat/completions", chat)):
        for limit in ({"n_predict": 5}, {"max_tokens": 5, "n_predict": 5}):
            answer = client.post(f"/v1/{path}", json={**body, **limit})
            assert answer.json()["usage"]["completion_tokens"] == 5
        for limit in ({"n_predict": -1}, {"max_tokens": -1}):
            assert client.post(f"/v1/{path}", json={**body, **limit}).json()["usage"]["total_tokens"] == 320
        refused = client.post(f"/v1/{path}", json={**body, "max_tokens": 4, "n_predict": 5})
        assert refused.status_code == 400 and "contradicts" in refused.json()["error"]["message"]
        assert client.post(f"/v1/{path}", json={**body, "max_tokens": -2}).status_code == 400


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_schema_beside_the_type_holds(kind, client):
    """llama.cpp's spelling of response_format; it was refused."""
    pytest.importorskip("llguidance", reason="formats need llguidance")
    given = {"type": kind, "schema": {"enum": ["yes", "no"]}}
    body = {"prompt": "x", "max_tokens": 9, "response_format": given}
    assert json.loads(text_of(client.post("/v1/completions", json=body))) in ("yes", "no")


def test_messages_answer_in_a_format(client):
    """`output_config.format` was passed over."""
    pytest.importorskip("llguidance", reason="formats need llguidance")
    given = {"format": {"type": "json_schema", "schema": {"enum": ["yes", "no"]}}, "effort": "low"}
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "output_config": given}
    answer = client.post("/v1/messages", json=body)
    assert answer.status_code == 200 and "x-warploom-ignored" not in answer.headers
    assert json.loads(answer.json()["content"][0]["text"]) in ("yes", "no")


def test_salt_separates_cached_prefixes(client):
    body = {"prompt": "a prompt of more than one page, shared or not", "max_tokens": 1}

    def cached(salt):
        answer = client.post("/v1/completions", json={**body, "cache_salt": salt})
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached("a"), cached("b"), cached("a") > 0] == [0, 0, True]


def test_prompt_is_truncated_from_its_beginning(client):
    body = {"max_tokens": 8, "seed": 2}
    whole = client.post("/v1/completions", json={"prompt": "the end", **body})
    cut = client.post("/v1/completions", json={"prompt": "x" * 5000 + "the end", "truncate_prompt_tokens": 7, **body})
    assert text_of(cut) == text_of(whole) and cut.json()["usage"]["prompt_tokens"] == 7
    fitted = client.post("/v1/completions", json={"prompt": "x" * 5000, "truncate_prompt_tokens": -1, **body})
    assert fitted.json()["usage"]["prompt_tokens"] == 320 - 8
    assert client.post("/v1/completions", json={"prompt": "x", "truncate_prompt_tokens": 0}).status_code == 400


def test_priority_lets_others_go_first():
    from concurrent.futures import ThreadPoolExecutor

    with serving(lambda: HeldLLM(max_batch=1)) as server, ThreadPoolExecutor(3) as pool:

        def ask(name, priority):
            body = {"prompt": name, "max_tokens": 2, "priority": priority}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200

        asked, flows = [], {}

        def new():
            return [flow for flow in server.bridge.flows if flow not in flows and flow.generations]

        for name, priority in (("first", 0), ("patient", 5), ("next", 0)):
            asked.append(pool.submit(ask, name, priority))
            server.wait(new)
            flows.update(dict.fromkeys(new(), name))
        server.bridge.llm.free()
        for each in asked:
            each.result()
        ended = sorted(flows, key=lambda flow: flow.streams[0].metrics.finished)
        assert [flows[flow] for flow in ended] == ["first", "next", "patient"]


def test_model_says_how_it_wants_to_be_sampled(tmp_path):
    directory = save_model(make_model(), tmp_path / "model", make_tokenizer())
    (directory / "generation_config.json").write_text(
        json.dumps({"temperature": 0.01, "top_k": 1, "eos_token_id": 256})
    )
    body = {"prompt": "x", "max_tokens": 20}
    for model_defaults in (True, False):
        with serving(lambda: LLM(directory), model_defaults=model_defaults) as server:
            texts = {text_of(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)) for _ in range(3)}
            assert (len(texts) == 1) == model_defaults
            own = {**body, "temperature": 2.0, "top_k": 0, "ignore_eos": True}
            texts = {text_of(httpx.post(f"{server.url}/v1/completions", json=own, timeout=60)) for _ in range(3)}
            assert len(texts) == 3


def test_lenient_server_ignores_and_names_what_it_does_not_know():
    body = {"prompt": "x", "max_tokens": 2, "tempreture": 1, "suffix": "y", "best_of": 1}
    with serving(lenient=True) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200 and answer.headers["x-warploom-ignored"] == "suffix, tempreture"
        assert client.post("/v1/completions", json={**body, "temperature": 9}).status_code == 400
        assert "x-warploom-ignored" not in client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).headers


def test_prompts_are_cached_over_a_restart(tmp_path):
    body = {"prompt": "a prompt of more than one page, to be asked again", "max_tokens": 8, "temperature": 0}
    answers = []
    for _ in range(2):
        with serving(prompt_cache=tmp_path / "cache") as server:
            answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json())
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 48]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert [each.name for each in (tmp_path / "cache").iterdir()] == ["tiny.pages"]


def test_part_that_is_no_text_is_named(client):
    """It was told what a text part may have, and nothing of images."""
    for kind in ("image_url", "input_audio", "file"):
        content = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:,"}}]
        refused = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["param"] == "messages.0.content"
        assert error["message"] == f"messages.0.content: this model reads text, not parts of type {kind!r}"
