"""Measuring models: metrics, intervals, comparisons, sweeps."""
