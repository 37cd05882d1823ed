"""Asking a judge: one checkpoint behind an engine that scores prompts and files, is evaluated, and writes critiques.

Needs no policy and no Megatron-Core.
"""
