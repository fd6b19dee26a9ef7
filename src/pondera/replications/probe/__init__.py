"""How networks are looked at: the papers' claims, re-run."""
