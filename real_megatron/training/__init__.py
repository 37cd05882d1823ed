"""The RL and SFT loops, and what surrounds them: sampling order, metrics, checkpoints, evaluation, resume."""
