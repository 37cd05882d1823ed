"""`real-megatron doctor`: what is installed, which fast paths are active, and what is missing."""
