"""Fuzzing: bytes that nobody meant, into everything that reads what strangers wrote. `make fuzz` runs it.

targets.py   what is called with the bytes, and the seeds to begin with
mutate.py    how bytes are changed: as JSON where they are JSON, else byte by byte
run.py       the loop, with a budget of time; guided by coverage where atheris is installed
crashes/     what once broke, one file each, run again by every `make test`
"""
