"""Who may enter and how much they may carry; what the log and the metrics tell afterwards."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import serving

httpx = pytest.importorskip("httpx", reason="these tests need httpx")
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded():
    with serving(keys=KEYS, max_body_bytes=2000, max_tokens=50) as server:
        yield server


@pytest.fixture
def stranger(guarded):
    with httpx.Client(base_url=guarded.url, timeout=60) as client:
        yield client


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_every_route_but_health_asks_for_a_key(guarded, stranger):
    paths = guarded.app.openapi()["paths"]
    for path in [*paths, "/", "/docs", "/openapi.json", "/nothing/here"]:
        method = next(iter(paths.get(path, {"get": 0})))
        answer = stranger.request(method, path.replace("{model}", "tiny"))
        if path == "/health":
            assert answer.status_code == 200
            continue
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
    for wrong in ("-", "first-ke", "first-key2", "First-key"):
        assert stranger.get("/v1/models", headers=bearer(wrong)).status_code == 401


def test_api_key_opens_also_as_password(stranger):
    """Each key opens and browsers may send it as a password."""
    for key in KEYS:
        assert stranger.get("/v1/models", headers=bearer(key)).status_code == 200
        assert stranger.get("/docs", auth=("anybody", key)).status_code == 200
    assert stranger.get("/docs", headers={"authorization": "Basic !!!"}).status_code == 401


def test_keys_do_not_share_cached_prefixes(guarded, stranger):
    def cached(key):
        body = {"prompt": "the same long prompt, page after page, again", "max_tokens": 1}
        answer = stranger.post("/v1/completions", json=body, headers=bearer(key))
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(KEYS[0]), cached(KEYS[1]), cached(KEYS[0])] == [0, 0, 32]


def test_body_too_large_refused(stranger):
    """A body that is too large is refused announced or not."""
    huge = json.dumps({"prompt": "x" * 5000}).encode()
    headers = {**bearer(KEYS[0]), "content-type": "application/json"}
    announced = stranger.post("/v1/completions", content=huge, headers=headers)
    chunked = stranger.post("/v1/completions", content=iter([huge[:1500], huge[1500:]]), headers=headers)
    for answer in (announced, chunked):
        assert answer.status_code == 413 and "2000 bytes" in answer.json()["error"]["message"]


def test_the_servers_own_limit_of_tokens_holds(stranger):
    def ask(**body):
        return stranger.post("/v1/completions", json={"prompt": "x", **body}, headers=bearer(KEYS[0]))

    assert "at most 50" in ask(max_tokens=51).json()["error"]["message"]
    message = {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
    answer = stranger.post("/v1/chat/completions", json=message, headers=bearer(KEYS[0]))
    assert answer.json()["usage"]["completion_tokens"] == 50


def test_no_other_web_page_may_call_it_unless_it_is_named(client):
    ask = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    answer = client.options("/v1/completions", headers=ask)
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
    with serving(cors_origins=("https://elsewhere.example",)) as server:
        allowed = httpx.options(f"{server.url}/v1/completions", headers=ask, timeout=60)
        assert allowed.headers["access-control-allow-origin"] == "https://elsewhere.example"
        other = httpx.options(
            f"{server.url}/v1/completions", headers={**ask, "origin": "https://other.example"}, timeout=60
        )
        assert "access-control-allow-origin" not in other.headers


def test_malformed_bodies_are_400_in_openais_shape(client):
    def answer(content, kind="application/json"):
        return client.post("/v1/chat/completions", content=content, headers={"content-type": kind})

    depth = b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": []}', b'{"messages": NaN}', depth):
        refused = answer(content)
        assert refused.status_code == 400, content[:30]
        assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    assert answer(b'{"messages":[{"role":"user","content":"x"}]}', "text/plain").status_code == 400
    lone = client.post("/v1/completions", content=rb'{"prompt":"\ud800"}', headers={"content-type": "application/json"})
    assert lone.status_code == 400


def test_mistake_names_field_value_and_what_is_valid(client):
    """One sentence without Python's words; another field's mistake is not told with it."""
    turn = {"role": "user", "content": "x"}
    for body, says in (
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2, got 3"),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer, got '5'"),
        ({"logit_bias": {"5": 200}}, "logit_bias.5: Input should be less than or equal to 100, got 200"),
        ({"response_format": "json"}, "response_format: Input should be an object, got 'json'"),
        ({"messages": [{**turn, "content": 5}]}, "messages.0.content: Input should be a valid string; or "),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type: Input should be 'function', got 'custom'"),
        ({"tool_choice": "any"}, "tool_choice: Input should be 'none', 'auto' or 'required', got 'any'"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
    ):
        refused = client.post("/v1/chat/completions", json={"messages": [turn], **body})
        assert refused.status_code == 400 and refused.json()["error"]["message"].startswith(says), refused.text


def test_wrong_route_or_method_is_told_the_right_one(client):
    for method, path, status, says in (
        ("GET", "/v1/completion", 404, "there is no /v1/completion here: did you mean /v1/completions?"),
        ("POST", "/chat/completions", 404, "did you mean /v1/chat/completions? /docs lists the routes"),
        ("POST", "/v1/nowhere", 404, "there is no /v1/nowhere here; /docs lists the routes"),
        ("GET", "/v1/completions", 405, "/v1/completions takes POST, not GET"),
    ):
        refused = client.request(method, path)
        assert refused.status_code == status and says in refused.json()["error"]["message"]


def test_request_id_from_client_or_new(client):
    """Requests carry an id from the client or a new one."""
    assert client.get("/health", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    forged = client.get("/health", headers={"x-request-id": 'bad"id'}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{24}", forged)
    answer = client.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "abc"})
    assert answer.json()["id"] == "cmpl-abc"


def test_access_log_is_json_without_prompt(capfd):
    """The log has a line of json for each request and no prompt."""
    with serving(log=True) as server:
        body = {"prompt": "very private words", "max_tokens": 3, "user": "ann"}
        httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-request-id": "r1"}, timeout=60)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["request_id"] == "r1"]
    assert line["status"] == 200 and line["prompt_tokens"] == 18 and line["user"] == "ann" and line["seconds"] > 0
    assert "private" not in json.dumps(lines)


def test_metrics_are_prometheus_and_count_what_happened(client):
    parser = pytest.importorskip("prometheus_client.parser", reason="needs prometheus-client")

    def scrape():
        families = parser.text_string_to_metric_families(client.get("/metrics").text)
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    before = scrape()
    body = {"prompt": "measure me, a prompt of some pages in length", "max_tokens": 10, "ignore_eos": True}
    client.post("/v1/completions", json=body)
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        answer.read()
    finished = ("warploom:http_requests_total", "POST", "/v1/completions", "200")
    for _ in range(3000):  # a stream is counted when its connection is done with it, after the last byte
        after = scrape()
        if after.get(finished, 0) - before.get(finished, 0) == 2:
            break
        time.sleep(0.02)

    def grown(name, *labels):
        key = (f"warploom:{name}", *labels)
        return after.get(key, 0) - before.get(key, 0)

    assert grown("generation_tokens_total", "tiny") == 20
    assert grown("prompt_tokens_total") == 2 * 44 and grown("prefix_cache_hits_total") == 32
    assert grown("time_to_first_token_seconds_count") == 2 and grown("e2e_request_latency_seconds_count") == 2
    assert 0 < grown("inter_token_latency_seconds_count") <= 9
    assert grown("request_success_total", "length") == 2
    assert grown("http_requests_total", "POST", "/v1/completions", "200") == 2
    assert after["warploom:num_requests_running", "tiny"] == 0 and after["warploom:kv_cache_usage_perc", "tiny"] == 0


def test_the_pages_load_nothing_from_elsewhere(client):
    for path in ("/docs", "/"):
        page = client.get(path)
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert not re.findall(r"""(?:src|href)=['"]?(?:https?:)?//""", page.text)
    assert "chat/completions" in client.get("/docs").text


def test_ids_in_ids_out(client):
    answer = client.post("/generate/", json={"idx": [[0]], "max_new_tokens": 5, "seed": 1}).json()
    assert len(answer["idx"]) == 1 and answer["idx"][0][0] == 0 and 1 < len(answer["idx"][0]) <= 6
    texts = client.post("/generate/", json={"prompt": "hi", "max_new_tokens": 5}).json()
    assert texts["idx"][0][:2] == [104, 105] and isinstance(texts["text"][0], str)
    assert client.post("/generate/", json={}).status_code == 400
    assert client.post("/generate", json={"idx": [[0]]}, follow_redirects=True).status_code == 200


def test_proxys_path_is_no_part_of_a_route():
    """A proxy that shows the server under /llm takes that away before it asks."""
    import httpx

    options = {"root_path": "/llm"}
    with serving(keys=("k",), options=options) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/health").status_code == 200 and client.get("/v1/models").status_code == 401
        key = {"authorization": "Bearer k"}
        assert client.get("/v1/models", headers=key).json()["data"][0]["id"] == "tiny"
        body = {"prompt": "x", "max_tokens": 1}
        assert client.post("/v1/completions", json=body, headers=key).status_code == 200
        assert 'route="/v1/completions"' in client.get("/metrics", headers=key).text
        assert client.get("/llm/health").status_code == 401, "not the open route"


def test_dashboard_names_existing_metrics(client):
    """The dashboard and the docs name only metrics that exist."""
    docs = Path(__file__).parents[3] / "docs"
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
    there = set(re.findall(r"^warploom:\w+", client.get("/metrics").text, re.MULTILINE))
    there |= {name.removesuffix("_bucket") for name in there}
    for file in ("grafana.json", "deploy.md"):
        named = set(re.findall(r"warploom:[a-z]\w+", (docs / file).read_text()))
        assert named and named <= there, named - there


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_docs_curl_command_works_and_streams_too(server):
    docs = (Path(__file__).parents[3] / "docs" / "deploy.md").read_text()
    (command,) = re.findall(r"^curl (?:.*\\\n)*.*$", docs, re.MULTILINE)
    here = command.replace("http://127.0.0.1:8000", server.url)

    def curl(command):
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=60).stdout

    answer = json.loads(curl(here))
    text = answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] <= 40 and text
    lines = curl(here.replace('"seed": 1', '"seed": 1, "stream": true')).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2]) == text
