"""BPE, character and word tokenizers; their file formats; streaming decode. Knows no torch."""
