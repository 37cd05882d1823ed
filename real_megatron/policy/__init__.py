"""The trained model on Megatron-Core: runtime, model, attention, training step, checkpoint."""
