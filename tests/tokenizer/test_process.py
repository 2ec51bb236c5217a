"""The C++ extension as a guest in a process: threads, forks, signals, errors, little memory, or not there at all."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from warploom.tokenizer import BPETokenizer
from warploom.tokenizer.native import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="the extension is not built, or WARPLOOM_NATIVE=0")


def test_eight_threads_share_one_tokenizer(tok, texts):
    everything = "".join(texts) * 5
    expected = tok.encode(everything)
    with ThreadPoolExecutor(8) as pool:
        for ids in pool.map(lambda _: tok.encode_array(everything, threads=2), range(32)):
            assert ids.tolist() == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.unsanitized("its locks do not survive a fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_encodes_while_its_parent_does(tok, texts):
    text = "".join(texts) * 10
    expected, stop = tok.encode(text), threading.Event()
    busy = threading.Thread(target=lambda: [tok.encode_array(text, threads=2) for _ in iter(stop.is_set, True)])
    busy.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                os._exit(0 if tok.encode_array(text, threads=2).tolist() == expected else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        busy.join()


def test_training_stops_at_a_signal(texts):
    def interrupt(done, total):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        BPETokenizer.train(texts, 700, progress=interrupt)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer signals")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("line", ["It was the best of times, it was the worst of times.\n", "a"])
def test_encoding_stops_at_a_signal(tok, line, threads):
    text = line * ((60_000_000 if len(line) > 1 else 12_000_000) // len(line))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            tok.encode_array(text, threads=threads)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert tok.decode(tok.encode_array(line * 100, threads=threads)) == line * 100


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer signals")
def test_counting_a_corpus_stops_at_a_signal():
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    text = "It was the best of times, it was the worst of times.\n" * 4_000_000
    before = signal.signal(signal.SIGALRM, stop)
    merges = []
    try:
        with pytest.raises(Stop):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            BPETokenizer.train([text], 300, threads=2, progress=lambda done, total: merges.append(done))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not merges


def test_what_a_progress_callback_raises_comes_out(texts):
    def fail(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        BPETokenizer.train(texts, 700, progress=fail)


def run_alone(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own, where the package is importable as here."""
    import warploom.tokenizer

    path = os.pathsep.join([str(Path(next(iter(warploom.tokenizer.__path__))).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_selects_the_twin():
    code = (
        "from warploom.tokenizer import BPETokenizer as B; t = B.train(['aa aa'], 258); print(type(t._engine).__name__)"
    )
    assert run_alone(code, WARPLOOM_NATIVE="0").stdout == "PythonBPE\n"
    assert run_alone(code, WARPLOOM_NATIVE="1").stdout == "BPE16\n"


def test_importing_the_tokenizer_imports_no_torch():
    code = "import sys, warploom.tokenizer; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    assert run_alone(code).stdout == "[]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.unsanitized("it keeps freed memory")
def test_a_stream_of_any_length_takes_little_memory():
    code = """
import os
from warploom.tokenizer import BPETokenizer
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
line = "It was the best of times, it was the worst of times, naïve 你好 words.\\n" * 100
tok = BPETokenizer.train([line], 400)
def pieces(size):
    for _ in range(size // len(line.encode())): yield line
for _ in tok.encode_iterable(pieces(2_000_000)): pass
growth = []
for _ in range(3):
    before = resident()
    for _ in tok.encode_iterable(pieces(20_000_000)): pass
    growth.append(resident() - before)
print(min(growth))  # what the allocator keeps once is no leak
"""
    done = run_alone(code)
    assert int(done.stdout) < 1 << 20, done


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.unsanitized("it keeps freed memory")
def test_errors_leak_nothing():
    code = """
import os
from warploom.tokenizer import BPETokenizer
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
text = "It was the best of times, naïve 你好 words.\\n" * 5000
tok = BPETokenizer.train([text], 300)
def stop(done, total): raise KeyboardInterrupt
def fail(times):
    for _ in range(times):
        for call in (
            lambda: BPETokenizer.train([text, "x " * 100_000], 340, progress=stop),
            lambda: tok.decode([1, 2, 10**6] * 10_000),
            lambda: tok.encode(text + "\\ud800"),
            lambda: tok.encode_batch_array([text, 3]),
            lambda: BPETokenizer(tok.vocab, tok.merges, tok.special_tokens).encode_array(text),
        ):
            try: call()
            except (KeyboardInterrupt, ValueError, TypeError): pass
fail(20)
growth = []
for _ in range(3):
    before = resident()
    fail(20)
    growth.append(resident() - before)
print(min(growth))  # what the allocator keeps once is no leak
"""
    done = run_alone(code)
    assert int(done.stdout) < 1 << 20, done


@pytest.mark.skipif(sys.platform != "linux", reason="sets RLIMIT_AS")
@pytest.mark.unsanitized("it reserves memory of its own")
def test_too_little_memory_is_a_memory_error():
    code = """
import resource
from warploom.tokenizer import BPETokenizer
tok = BPETokenizer.train(["a"], 257)
text = "ab " * 30_000_000
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), used + (40 << 20)))
try: tok.encode_array(text, threads=1)
except MemoryError: print("MemoryError")
"""
    assert run_alone(code).stdout == "MemoryError\n"
