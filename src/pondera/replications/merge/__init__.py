"""Several models made one: the papers' claims, re-run."""
