"""OpenVINO GenAI: Intel's runtime for language models, with weights of 4 and 8 bits read from GGUF files."""

NEEDS = ("openvino_genai", "openvino_tokenizers")


def serve(job):
    """Static batches in the order of arrival, each until its longest request is done."""
    return {"OpenVINO GenAI q8_0": lambda: static(job)} if job.quantize else {}


def quantization(job, folder):
    """The GGUF file as it is, and its weights in Q8_0."""
    from .xllamacpp import q8_0

    name = job.file.stem.rpartition(".")[2]
    return {
        f"OpenVINO {name}": lambda: together(job, job.file),
        "OpenVINO Q8_0": lambda: together(job, q8_0(job.file, folder)),
    }


def opening(job):
    """Open the file and generate one token."""
    return {f"OpenVINO {job.file.stem.rpartition('.')[2]}": lambda: together(job, job.file)()}


def cold_start(start):
    """Load a GGUF file and generate one token by its pipeline."""
    if not start.quantize:
        return {}
    program = f"""
import numpy as np, openvino, openvino_genai
begin = clock()
pipe = openvino_genai.LLMPipeline({str(gguf(start.directory))!r}, "CPU")
ids = np.array([prompt], dtype=np.int64)
inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
pipe.generate(inputs, max_new_tokens=1, ignore_eos=True, do_sample=False)
"""
    return {"OpenVINO GenAI q8_0": program}


def gguf(directory):
    """Export the model to GGUF; one without a tokenizer is refused."""
    from ...engine.formats.gguf import save_gguf
    from ...engine.formats.model_directory import load_model
    from ...tokenizer import BPETokenizer

    model = load_model(directory, "cpu", "float32")[0]
    letters = [bytes([i]) for i in range(256)]
    merges = [(a, b) for a in letters for b in letters][: model.config.vocab_size - 257]
    tokens = {token: index for index, token in enumerate([*letters, *(a + b for a, b in merges)])}
    path = directory / "openvino.gguf"
    save_gguf(model, path, BPETokenizer(tokens, merges, {"<|endoftext|>": len(tokens)}, "gpt2"), "q8_0")
    return path


def pipeline(path):
    """Generate function by OpenVINO's pipeline, with as many threads as torch has."""
    import numpy as np
    import openvino
    import openvino_genai
    import torch

    pipe = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads())

    def generate(prompts, tokens):
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        return pipe.generate(inputs, config)

    return generate


def together(job, path):
    """Run a job's prompts as one batch, new ones at each call."""
    from itertools import count

    generate, turns = pipeline(path), count()

    def run():
        counts = [len(tokens) for tokens in generate(job.prompts(next(turns)), job.tokens).tokens]
        if counts != [job.tokens] * job.batch:
            raise RuntimeError(f"{counts} tokens came, not {job.tokens} each")

    return run


def static(job):
    import time

    from ..serve import Reply
    from . import Unavailable

    if job.device != "cpu":
        raise Unavailable("measured on a CPU only")
    generate = pipeline(gguf(job.directory))

    def answer(requests, begin):
        out = generate([request.prompt for request in requests], max(request.tokens for request in requests))
        end = time.perf_counter() - begin
        metrics = out.perf_metrics
        decoding = (metrics.get_generate_duration().mean - metrics.get_ttft().mean) / 1000
        return [Reply(list(ids[: r.tokens]), [end - decoding, end]) for ids, r in zip(out.tokens, requests)]

    def run(requests):
        begin = time.perf_counter()
        groups = [requests[i : i + job.batch] for i in range(0, len(requests), job.batch)]
        return [reply for group in groups for reply in answer(group, begin)]

    return run
