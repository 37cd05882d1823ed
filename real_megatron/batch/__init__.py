"""Trajectories, groups and their packing into micro-batches. Torch only."""
