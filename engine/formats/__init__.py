"""Model file formats: model directories, `transformers` families, GGUF, quantized checkpoints, LoRA adapters."""
