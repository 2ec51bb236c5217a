"""llama.cpp through xllamacpp, a prebuilt binding: its own server, in this process."""

NEEDS = ("xllamacpp",)


def quantization(job, folder):
    """The GGUF file as it is, and its weights in Q8_0."""
    name = job.file.stem.rpartition(".")[2]
    return {
        f"llama.cpp {name}": lambda: serve(job, job.file),
        "llama.cpp Q8_0": lambda: serve(job, q8_0(job.file, folder)),
    }


def opening(job):
    """Open the file and generate one token."""
    return {f"llama.cpp {job.file.stem.rpartition('.')[2]}": lambda: serve(job, job.file)()}


def q8_0(file, folder):
    """Requantize the file's weights to Q8_0."""
    from ...engine.formats.gguf import save_gguf
    from ...engine.formats.model_directory import load_model

    (model, tokenizer), path = load_model(file, "cpu", "float32"), folder / "Q8_0.gguf"
    save_gguf(model, path, tokenizer, "q8_0")
    return path


def serve(job, file):
    import threading
    from itertools import count

    import torch
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.n_batch = 512 * job.batch, job.batch, 2048
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.warmup, settings.verbosity = False, -1
    server, turns = xllamacpp.Server(settings), count()

    def ask(prompt, counts):
        reply = server.handle_completions(
            {"prompt": prompt, "max_tokens": job.tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        )
        counts.append(reply["usage"]["completion_tokens"])

    def run():
        counts = []
        threads = [threading.Thread(target=ask, args=(prompt, counts)) for prompt in job.prompts(next(turns))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if counts != [job.tokens] * job.batch:
            raise RuntimeError(f"{counts} tokens came, not {job.tokens} each")

    return run
