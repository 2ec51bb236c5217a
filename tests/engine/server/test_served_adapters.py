"""Adapters over HTTP: each is a model of its own name."""

import shutil
import threading

import pytest

from tests.engine.serving.test_adapters import write
from warploom.engine.cli.model_argument import ModelOptions
from warploom.engine.cli.serve import Flags, Loader, adapters, open_early
from warploom.engine.errors import InputError
from warploom.engine.formats.model_writer import save_model
from warploom.engine.server.config import ServerConfig
from warploom.engine.serving import LLM, SamplingParams
from warploom.engine.serving.options import LLMOptions

from .conftest import Server, make_model, make_tokenizer

openai = pytest.importorskip("openai", reason="needs the openai client")
pytest.importorskip("fastapi", reason="the server needs the extra `serve`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("adapters"), make_model()
    save_model(model, folder / "base", make_tokenizer())
    for seed, name in enumerate(("red", "blue")):
        write(folder / name, folder / "base", model.config, 4, seed)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    options = LLMOptions(str(folder / "base"), max_batch=8)
    started = Server(lambda: options.open({name: str(folder / name) for name in ("red", "blue")}), ServerConfig("tiny"))
    yield started.start().wait_ready()
    started.stop()


def test_adapters_are_models_of_their_own(server, folder):
    llm = LLM(folder / "base", adapters={name: folder / name for name in ("red", "blue")})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
        assert [model.id for model in api.models.list()] == ["tiny", "red", "blue"]
        assert api.models.retrieve("blue").id == "blue"
        answers = {}

        def ask(name):
            answers[name] = api.completions.create(model=name, prompt="hello", max_tokens=24, temperature=0)

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("tiny", "red", "blue")]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        params = SamplingParams(max_tokens=24, temperature=0)
        for name, answer in answers.items():
            wanted = llm.generate("hello", params, adapter=None if name == "tiny" else name)
            assert answer.choices[0].text == wanted.text and answer.model == name
        assert len({answer.choices[0].text for answer in answers.values()}) == 3
        said = api.chat.completions.create(model="red", messages=[{"role": "user", "content": "hi"}], max_tokens=4)
        assert said.model == "red"
        with pytest.raises(openai.NotFoundError, match="'green' is not served here; there is 'tiny', 'red', 'blue'"):
            api.completions.create(model="green", prompt="hello")


def test_adapter_flag_names_a_directory():
    flags = Flags(ModelOptions("base"), adapter=("red=runs/a=b", "blue=c"))
    assert adapters(flags) == {"red": "runs/a=b", "blue": "c"}
    with pytest.raises(InputError, match="adapter must be NAME=DIR, got 'runs/a'"):
        adapters(Flags(ModelOptions("base"), adapter=("runs/a",)))


def test_adapter_is_read_once_and_before_the_server_listens(folder, tmp_path):
    red = shutil.copytree(folder / "red", tmp_path / "red")
    flags = Flags(ModelOptions(str(folder / "base"), max_batch=2), adapter=(f"red={red}",))
    tuned = open_early(flags)
    shutil.rmtree(red)
    llm = Loader(flags, ServerConfig("tiny"), 0, tuned)()
    assert llm.generate("hello", SamplingParams(max_tokens=2), adapter="red").token_ids
