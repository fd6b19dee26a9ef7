"""Adapters: the papers' claims, re-run."""
