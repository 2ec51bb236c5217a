"""OpenVINO GenAI: Intel's runtime for language models, with 8-bit weights read from a GGUF file."""

NEEDS = ("openvino_genai", "openvino_tokenizers")


def serve(job):
    """Batches in the order of arrival, each until its longest request is done."""
    return {"OpenVINO GenAI q8_0": lambda: static(job)} if job.quantize else {}


def static(job):
    import time

    import numpy as np
    import openvino
    import openvino_genai
    import torch

    from ...engine.gguf import save_gguf
    from ...engine.hub import load_model
    from ...tokenizer import BPETokenizer
    from ..serve import Reply
    from . import Unavailable

    if job.device != "cpu":
        raise Unavailable("measured on a CPU only")
    model = load_model(job.directory, "cpu", "float32")[0]
    letters = [bytes([i]) for i in range(256)]
    merges = [(a, b) for a in letters for b in letters][: model.config.vocab_size - 257]
    tokens = {token: index for index, token in enumerate([*letters, *(a + b for a, b in merges)])}
    tokenizer = BPETokenizer(tokens, merges, {"<|endoftext|>": len(tokens)}, "gpt2")  # a file without one is refused
    path = job.directory / "openvino.gguf"
    save_gguf(model, path, tokenizer, "q8_0")
    pipe = openvino_genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads())

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
