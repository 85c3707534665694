"""The hostile corpus: files that a stranger could hand over, made by scripts, and what each must lead to.

checkpoints.py   weights, indexes, adapters: what the sources read
asked.py         recipes, suites, states, results: what a user is given to run
models.py        configs, tokenizers, heads, routed models, suites, data: what evaluation reads
images.py        pictures and image processors
corpus.py        the cases in one list, and the real verb that each is handed to
attack.py        `make hostile`: every case in a process of its own, its time and memory measured
"""

from hostile.checkpoints import *  # noqa: F403
from hostile.checkpoints import BUILDERS, LORA, MARKER

__all__ = ["BUILDERS", "LORA", "MARKER"]
