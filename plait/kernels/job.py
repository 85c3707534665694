"""A piece of work as numbers in memory: what compiled loops and Python both read. No torch, no numba.

A job is [HEAD + SIDE·K] integers (what the piece is, then what is said of each expert) beside [3K + 4] float32 numbers.
"""

from __future__ import annotations

F32, BF16, F16 = 0, 1, 2
CODES = {"F32": F32, "BF16": BF16, "F16": F16}
"""Storage types that the loops read and write; others go the way of torch."""
WIDTHS = {F32: 4, BF16: 2, F16: 2}
"""Bytes of an entry."""

NOT_FINITE, TOO_LARGE = 1, 2
"""What is wrong with a piece, in the bits of what an entry returns: an input, or an output that float16 cannot hold."""

MODELS, DELTAS = 0, 1
"""What is merged: weights, or task vectors."""
NOTHING, CUT, DROP, MASKED, CONSENSUS, SPREAD, AGREE = range(7)
"""What is done to each task vector."""
SUM, ELECT, SCE = range(3)
"""How they are combined."""

ENTRIES, EXPERTS, SOURCE, BASE_CODE, BASE_ADDRESS, OUT_CODE, OUT_ADDRESS, SCRATCH = range(8)
SPARSIFY, COMBINE, WEIGH, NORMALIZE, ZERO_IS_POSITIVE, SCALE, ON_BASE, POSITION = range(8, 16)
DIVIDE, RESCALE, VOTES, WIDTH, DOUBLES = range(16, 21)
PLACES, LISTED_BASE, LISTED, LIST_ROOM = range(21, 25)
"""Of entries that are put aside (`guess`): where their places in the piece and their stored base go, how many there are
and how many fit."""
HEAD = 26

CODE, ADDRESS, LOW, HIGH, EQUAL, QUOTA, EQUAL_TOP, QUOTA_TOP, KEY = range(9)
BITS, FOUND_AT, ROOM, FOUND, ABOVE = range(11, 16)
LOW_TOP, HIGH_TOP, ABOVE_TOP = range(16, 19)
OWN = 19
SIDE = 20
"""Per expert: its type and address; the cut kept and the one dropped at the top; the key of its draws (3 places);
packed bits; where candidates go, how many fit, how many there are, and how many lie above; the bounds of an upper cut
that is still looked for, and how many lie above them; whether what is read is the task vector itself (an adapter's)."""

FIRST, LEFT, RIGHT, RANK, ROWS, COLUMNS, UNDER_CODE, UNDER_ADDRESS, TARGET, SPARE = range(1, 11)
PRODUCT = 11
"""A job of its own, to multiply out an adapter's update: the first entry, its factors [rank, rows] and [rank, columns],
what it is added to, where it goes, and memory for a chunk."""

WEIGHTS, DENSITIES, FACTORS, SCALARS = range(4)
"""Numbers: a row of K each for the first three, then DIVISOR, LAMBDA, LEAST, MU."""
DIVISOR, LAMBDA, LEAST, MU = range(4)

TOP = (1 << 31) - 1
"""Above the bits of every float: an upper cut that drops nothing."""

ABSOLUTE, SQUARE = 0, 1
"""What `norms` adds up (in VOTES)."""

CHUNK = 2048
"""Entries that are worked on at once: with 8 experts 80 KB, inside the second cache."""


def scratch_bytes(experts: int) -> int:
    """Memory the loops work in: the base's chunk, one for each expert, four to spare."""
    return 4 * CHUNK * (experts + 5)


PICK_BYTES = 16 * 1024
"""Memory that `pick` counts in."""


BINS = 4096
"""Into how many ranges a row's magnitudes are sorted at most."""
EXACTLY = 96
"""Entries whose rank is counted, each over the whole row; were there more, sorting the row is quicker."""


def prune_bytes(width: int, entries: int, experts: int) -> int:
    """Memory that `prune` works in: two rows, draws and places, a table of chances and a byte an entry per expert."""
    return (24 + 4 * experts) * width + experts * (entries + 16) + 20 * BINS + 256
