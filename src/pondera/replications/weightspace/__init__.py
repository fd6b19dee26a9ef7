"""Claims of papers on networks that read or write weights, re-run."""
