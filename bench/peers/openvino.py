"""OpenVINO GenAI: Intel's runtime for language models, with 8-bit weights read from a GGUF file."""

NEEDS = ("openvino_genai", "openvino_tokenizers")


def serve(job):
    """Batches in the order of arrival, each until its longest request is done."""
    return {"OpenVINO GenAI q8_0": lambda: static(job)} if job.quantize else {}


def cold_start(start):
    """From nothing to a token by its pipeline, from a GGUF file that is there already."""
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
    """The model as the file that it reads; one without a vocabulary is refused."""
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


def static(job):
    import time

    import numpy as np
    import openvino
    import openvino_genai
    import torch

    from ..serve import Reply
    from . import Unavailable

    if job.device != "cpu":
        raise Unavailable("measured on a CPU only")
    path = str(gguf(job.directory))
    pipe = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads())

    def answer(requests, begin):
        longest = max(len(request.prompt) for request in requests)
        ids = np.zeros((len(requests), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt) :] = request.prompt
            mask[row, longest - len(request.prompt) :] = 1
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = max(r.tokens for r in requests), True, False
        out = pipe.generate(inputs, config)
        end = time.perf_counter() - begin
        metrics = out.perf_metrics
        decoding = (metrics.get_generate_duration().mean - metrics.get_ttft().mean) / 1000
        return [Reply(list(ids[: r.tokens]), [end - decoding, end]) for ids, r in zip(out.tokens, requests)]

    def run(requests):
        begin = time.perf_counter()
        groups = [requests[i : i + job.batch] for i in range(0, len(requests), job.batch)]
        return [reply for group in groups for reply in answer(group, begin)]

    return run
