"""How weights move: the papers' claims, re-run."""
