"""Versions a recorded result may depend on."""

import platform

import torch


def versions() -> dict[str, str]:
    """Versions of pondera, torch and Python, by name.

    >>> list(versions())
    ['pondera', 'torch', 'python']
    """
    from pondera import __version__

    return {"pondera": __version__, "torch": torch.__version__, "python": platform.python_version()}
