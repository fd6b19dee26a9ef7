"""How weights are held: the papers' claims, re-run."""
