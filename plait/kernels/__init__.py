"""Compiled inner loops: what merging does to every entry, in one pass from the stored bytes to the output."""
