"""Models as evaluation and learning see them: what an architecture's inputs, features, heads and MLPs are."""
