"""Learning: unlabeled inputs in, a State out. Nothing here writes a model; `plait.run` applies a state."""
