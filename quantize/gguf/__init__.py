"""GGUF, the files of llama.cpp: a model whole, and what its own tools read beside one."""
