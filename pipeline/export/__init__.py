"""The built model in the forms that other programs run: GGUF for llama.cpp, folders for transformers."""
