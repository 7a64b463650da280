"""Readers of checkpoints: Hugging Face folders, GGUF files, and the tokenizers in these."""
