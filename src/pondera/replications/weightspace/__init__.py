"""Networks that read or write weights: the papers' claims, re-run."""
