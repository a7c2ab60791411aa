"""The surface of openai/sparse_attention and openai/blocksparse."""
