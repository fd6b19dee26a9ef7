from pathlib import Path

import pytest


@pytest.fixture
def tiny():
    """The path of the smallest task there is."""
    return str(Path(__file__).parent / "lab" / "tiny.py")
