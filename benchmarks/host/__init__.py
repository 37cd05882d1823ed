"""Host work of a step and of a start, before and after: bytes and seconds per rank by the number of ranks."""
