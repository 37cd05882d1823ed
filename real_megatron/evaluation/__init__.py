"""Correlation with the labels, with confidence intervals; judging of files; reports with plots."""
