"""The page, as a person uses it: a real browser types, watches, presses Stop, moves a slider."""

import json
import shutil
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import torch

from ..conftest import HeldLLM, make_model, serving

pytest.importorskip("fastapi", reason="the server needs the extra `serve`")


@pytest.fixture(scope="module")
def page_server():
    """A page whose every answer goes on to its limit: where a random model ends by itself is chance."""
    pytest.importorskip("gradio", reason="the playground needs gradio")
    from warploom.engine.server.ui import playground

    params = playground._params
    with serving(HeldLLM, ui=True) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(playground, "_params", lambda chosen: replace(params(chosen), ignore_eos=True))
        server.bridge.llm.free()
        yield server


def test_api_clients_never_reach_the_page(page_server):
    """A wrong route is told in the API's words at once; gradio once took seconds to build itself for its own 404."""
    httpx = pytest.importorskip("httpx", reason="this test needs httpx")
    for method, path in (("POST", "/chat/completions"), ("GET", "/props"), ("GET", "/v1"), ("POST", "/api/chat")):
        refused = httpx.request(method, page_server.url + path, timeout=60)
        assert refused.status_code == 404 and refused.json()["error"]["message"].startswith(f"there is no {path} here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    switches += " disable-component-update disable-sync disable-dev-shm-usage window-size=1280,1000"
    for switch in switches.split():
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.implicitly_wait(60)
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, page_server):
    browser.get(page_server.url)
    assert find(browser, "#message textarea, #message input").is_displayed()
    return browser


def find(browser, selector):
    return browser.find_element("css selector", selector)


def set_length(browser, server, count):
    """In the box beside the slider, until the slider follows: what happens before the page listens is lost."""
    script = (
        "const input = type => document.querySelector(`#max-tokens input[type=${type}]`);"
        "const [box, slider] = ['number', 'range'].map(input);"
        "if (!box || !slider) return false;"
        "box.value = arguments[0];"
        "for (const each of ['input', 'change']) box.dispatchEvent(new Event(each, {bubbles: true}));"
        "return new Promise(then => setTimeout(() => then(slider.value === String(arguments[0])), 50))"
    )
    server.wait(lambda: browser.execute_script(script, count))


def answers(browser, server):
    """The chat's answers, once the last has come to its end."""
    script = (
        "return [document.querySelector('#chat-speed')?.textContent ?? '',"
        "[...document.querySelectorAll('#chat [data-testid=bot]')].map(each => each.ariaLabel)]"
    )
    speed, said = browser.execute_script(script)
    return said if "limit" in speed and not server.bridge.open else []


def open_tab(browser, name):
    browser.find_element("xpath", f"//button[@role='tab'][contains(., '{name}')]").click()


def test_a_prompt_streams_tokens_and_stop_ends_them(page, page_server):
    llm = page_server.bridge.llm

    def shown_after(steps):
        llm.let(steps)
        return len(page.find_elements("css selector", "#tokens .loom-tokens > span"))

    llm.hold()
    open_tab(page, "Complete")
    find(page, "#prompt textarea").send_keys(" and on")
    find(page, "#start").click()
    few = shown_after(10)
    page_server.wait(lambda: shown_after(1) > few)
    assert "tokens/s" in find(page, "#speed").text
    assert not page.execute_script("return document.querySelector('#start')"), "one button"
    find(page, "#stop").click()
    page_server.wait(lambda: not page_server.bridge.open)
    assert find(page, "#start").is_displayed() and not page.execute_script("return document.querySelector('#stop')")
    llm.free()
    page_server.assert_nothing_left()
    shown = find(page, "#tokens .loom-tokens")
    assert shown.text.startswith("Once upon a time and on")
    assert len(shown.find_elements("css selector", "span > b > u")) >= 5, "each token has its alternatives"


def test_playground_chat_keeps_slider_length(page, page_server):
    """A chat answers with the length that the slider says."""
    set_length(page, page_server, 7)
    slider = find(page, "#temperature input[type=range]")
    before = slider.get_attribute("value")
    slider.send_keys("\ue014\ue014")  # two presses of the right arrow
    assert slider.get_attribute("value") != before
    find(page, "#message textarea, #message input").send_keys("hello")
    find(page, "#message .submit-button").click()
    page_server.wait(lambda: answers(page, page_server))
    assert find(page, "#chat-speed").text.split()[0] == "7"
    assert "hello" in find(page, "#chat").text
    page_server.assert_nothing_left()


def test_attention_map_has_a_cell_a_pair(page):
    """The attention map has a cell for each pair of tokens."""
    open_tab(page, "Attention")
    text = find(page, "#attention-text textarea, #attention-text input")
    text.clear()
    text.send_keys("abcde")
    find(page, "#draw").click()
    find(page, "#heat svg rect")
    assert len(page.find_elements("css selector", "#heat svg rect.cell")) == 5 * 6 // 2


def test_the_page_asks_nobody_but_its_own_server(page, page_server):
    hosts = set()
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = urlsplit(message["params"]["request"]["url"])
            hosts |= {url.netloc} if url.scheme in ("http", "https", "ws", "wss") else set()
    assert hosts == {urlsplit(page_server.url).netloc}
    assert not [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]


def look_through(browser, width, height):
    """A window of another size, phones included: Chromium's own has at least 500 pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.refresh()
    assert find(browser, "#message textarea, #message input").is_displayed()


def say(browser, text):
    find(browser, "#message textarea, #message input").send_keys(text)
    find(browser, "#message .submit-button").click()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_chat_fits_and_keeps_its_box_in_view(page, page_server, width, height):
    try:
        look_through(page, width, height)
        fits = "return document.documentElement.scrollWidth <= window.innerWidth"
        page_server.wait(lambda: page.execute_script(fits))
        box = "document.querySelector('#message').getBoundingClientRect()"
        seen = f"return {box}.bottom > 0 && {box}.bottom <= {height}"
        set_length(page, page_server, 20)
        for count in (1, 2):
            page_server.wait(lambda: page.execute_script(seen))
            say(page, "hi")
            page_server.wait(lambda count=count: len(answers(page, page_server)) == count)
            page.execute_script("window.scrollTo(0, 0)")
        log = "const log = document.querySelector('#chat [role=log]'); return log.scrollHeight > 0"
        assert page.execute_script(log)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_one_button_sends_and_stops(page, page_server):
    page_server.bridge.llm.hold()
    say(page, "and on")
    page_server.wait(lambda: page.find_elements("css selector", "#message .stop-button"))
    assert not page.execute_script("return document.querySelector('#message .submit-button')")  # without a wait for it
    find(page, "#message .stop-button").click()
    page_server.wait(lambda: not page_server.bridge.open)
    page_server.bridge.llm.free()
    assert find(page, "#message .submit-button").is_displayed()
    page_server.assert_nothing_left()


def test_answer_can_be_continued_and_tried_again(page, page_server):
    set_length(page, page_server, 5)

    def other_than(before):
        page_server.wait(lambda: answers(page, page_server) not in ([], before))
        return answers(page, page_server)

    say(page, "count")
    (first,) = other_than([])
    page.execute_script("arguments[0].click()", find(page, "#continue-chat"))
    (longer,) = other_than([first])
    assert len(longer) > len(first)
    page.execute_script("arguments[0].click()", find(page, "#chat [aria-label=Retry]"))
    assert len(other_than([longer])) == 1, "one answer, in place of the other"
    page_server.assert_nothing_left()


def test_page_loads_no_image_from_elsewhere(page, page_server):
    """An answer's markdown may name one: what it says would leave with the request."""
    violated = (
        "const done = arguments[0]; document.addEventListener('securitypolicyviolation', e => done(e.blockedURI));"
        "const image = new Image(); image.src = 'http://127.0.0.1:9/leak.png'; document.body.append(image);"
    )
    page.set_script_timeout(30)
    assert "127.0.0.1:9" in page.execute_async_script(violated)
    page.get_log("browser"), page.get_log("performance")


def test_sampling_settings_leave_with_the_attention_tab(page, page_server):
    assert find(page, "#temperature").is_displayed()
    assert find(page, "#temperature input[type=range]").get_attribute("min") == "0"
    open_tab(page, "Attention")
    hidden = "return [...document.querySelectorAll('#temperature')].every(each => each.offsetParent === null)"
    page_server.wait(lambda: page.execute_script(hidden))


def test_attention_maps_are_what_the_model_attends_with():
    """Against attention weights in float64, through the model's own logits: same maps, same output."""
    from warploom.engine.attention_maps import attention_maps

    model = make_model()
    tokens = list(b"attention")
    maps = attention_maps(model, tokens)
    assert len(maps) == model.config.n_layers
    for weights_HTS in maps:
        assert torch.allclose(weights_HTS.sum(-1), torch.ones(()))
        assert not weights_HTS.triu(1).any()

    def attend(q, k, v, layer):
        return torch.einsum("hts,bshd->bthd", maps[layer.index], v)

    ids = torch.tensor([tokens])
    with torch.no_grad():
        assert torch.allclose(model(ids, attend=attend), model(ids), atol=1e-4)


def test_no_gradio_server_runs_says_how(monkeypatch):
    """Without gradio the server runs and says how to get the page."""
    httpx = pytest.importorskip("httpx", reason="needs httpx")
    import warploom.engine.server.app as app

    monkeypatch.setattr(app, "available", lambda: False)
    with serving(ui=True) as server:
        assert "pip install gradio" in httpx.get(server.url, timeout=60).text
    with serving(ui=False) as server:
        page = httpx.get(server.url, timeout=60).text
        assert "--no-ui" in page and "pip install" not in page


def test_unknown_v1_route_openai_error(page_server):
    """Unknown routes under v1 are openais errors even with the page."""
    httpx = pytest.importorskip("httpx", reason="needs httpx")
    unknown = httpx.post(f"{page_server.url}/v1/rerank", json={}, timeout=60)
    assert unknown.status_code == 404 and unknown.json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{page_server.url}/v1/completions", timeout=60).status_code == 405
    assert httpx.get(f"{page_server.url}/health", timeout=60).status_code == 200
