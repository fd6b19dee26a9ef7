"""Where weights start: the papers' claims, re-run."""
