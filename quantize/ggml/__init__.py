"""ggml itself, the library under llama.cpp: its block types round weights and decode them."""
