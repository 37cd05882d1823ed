"""REAL: regression-aware reinforcement learning for LLM judges on Megatron-Core (arXiv 2603.17145)."""

__version__ = "0.1.0"
