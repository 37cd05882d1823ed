"""Several hosts as one machine: which there are, and what they are for."""
