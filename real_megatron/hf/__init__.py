"""Hugging Face checkpoints as directories of files: found locally or on the hub, read, and written atomically."""
