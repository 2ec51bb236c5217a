"""Model files of the world: model directories, published families, GGUF."""
