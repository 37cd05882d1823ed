"""The embedded engine: transformers in this process."""
