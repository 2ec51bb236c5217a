"""llama.cpp through its Python binding."""

NEEDS = ("llama_cpp",)
STEP = 2048  # tokens of one call, at most


def serve(job):
    """Continuous batching as llama.cpp's server does it."""
    return {f"llama.cpp {'q8_0' if job.quantize else job.dtype}": lambda: batching(job)}


def cold_start(start):
    """Load a GGUF file and generate one token by the high-level class."""
    from ...engine.formats.gguf import save_gguf
    from ...engine.formats.model_directory import load_model

    form = "q8_0" if start.quantize else start.dtype
    path = start.directory / f"{form}.gguf"
    save_gguf(load_model(start.directory, "cpu", "float32")[0], path, None, form)
    program = f"""
import llama_cpp
begin = clock()
model = llama_cpp.Llama({str(path)!r}, n_ctx=512, logits_all=False, verbose=False)
model.eval(prompt)
model.scores[len(prompt) - 1].argmax()
"""
    return {f"llama.cpp {form}": program}


def batching(job):
    import ctypes
    import time

    import llama_cpp
    import numpy as np
    import torch

    from ...engine.formats.gguf import save_gguf
    from ...engine.formats.model_directory import load_model
    from ..serve import Reply
    from . import Unavailable

    if job.device != "cpu":
        raise Unavailable("measured on a CPU only")
    path = job.directory / f"{'q8_0' if job.quantize else job.dtype}.gguf"
    save_gguf(load_model(job.directory, "cpu", "float32")[0], path, None, "q8_0" if job.quantize else job.dtype)

    @llama_cpp.llama_log_callback
    def silence(level, text, data):
        pass

    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = job.batch * -(-max(job.lengths) // 256) * 256
    settings.n_seq_max = job.batch
    settings.n_batch = STEP
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise Unavailable("it refused the model")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    memory = llama_cpp.llama_get_memory(context)
    batch = llama_cpp.llama_batch_init(STEP, 0, 1)

    def step(pieces):
        """Decode (row, position, tokens) pieces; return the most likely next token of each."""
        batch.n_tokens = 0
        for row, position, tokens in pieces:
            for offset, token in enumerate(tokens, 1):
                at = batch.n_tokens
                batch.token[at], batch.pos[at] = token, position + offset - 1
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = offset == len(tokens)
                batch.n_tokens += 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(pieces), vocabulary))
        return logits.argmax(-1).tolist()

    def run(requests):
        begin = time.perf_counter()
        llama_cpp.llama_memory_clear(memory, False)
        replies = [Reply([], []) for _ in requests]
        waiting, rows, running = list(range(len(requests))), list(range(job.batch)), {}
        while waiting or running:
            pieces = [(row, len(requests[i].prompt) + len(replies[i].tokens) - 1, replies[i].tokens[-1:])
                      for i, row in running.items()]  # fmt: skip
            room = STEP - len(pieces)
            while waiting and rows and len(requests[waiting[0]].prompt) <= room:
                index, row = waiting.pop(0), rows.pop()
                running[index] = row
                pieces.append((row, 0, requests[index].prompt))
                room -= len(requests[index].prompt)
            tokens = step(pieces)
            for index, token in zip(list(running), tokens):
                replies[index].tokens.append(token)
                replies[index].times.append(time.perf_counter() - begin)
                if len(replies[index].tokens) == requests[index].tokens:
                    row = running.pop(index)
                    llama_cpp.llama_memory_seq_rm(memory, row, -1, -1)
                    rows.append(row)
        return replies

    def close():
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)

    run.close, run.silence = close, silence  # it logs as long as it lives
    return run
