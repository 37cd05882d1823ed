"""What a layout needs and takes before any GPU is there: memory, step time, the best layouts of a model."""
