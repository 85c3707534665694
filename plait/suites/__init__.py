"""Suites: real tasks with real experts. What one is, its data, and how ours are built."""
