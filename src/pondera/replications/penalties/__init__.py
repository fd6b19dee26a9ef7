"""What pulls on weights: the papers' claims, re-run."""
