"""Claims of papers on smaller weights."""
