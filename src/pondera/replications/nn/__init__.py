"""Layers of structured weights: the papers' claims, re-run."""
