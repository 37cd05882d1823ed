"""Rollout engines: generation of responses, scoring of answers, weight syncs."""
