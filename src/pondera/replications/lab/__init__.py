"""The lab put to its own test."""
