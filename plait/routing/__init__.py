"""Routed models: experts that stay apart in one model, mixed for every sample."""
