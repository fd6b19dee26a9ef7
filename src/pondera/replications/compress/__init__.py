"""Smaller weights: the papers' claims, re-run."""
