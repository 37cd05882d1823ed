"""What a layout needs and takes before any GPU is there: memory to the byte, step time, the best layouts of a model."""
