"""Agreement with the labels, with confidence intervals; results as files; reports with plots. Runs no model."""
