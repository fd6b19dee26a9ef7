"""A small world for text-conditioned diffusion: glyphs of 16 by 16 pixels, a trained base, and judges of its images.

The base knows the glyphs in `GLYPHS`. It has never seen those in `CONCEPTS`: customise it on one image of one,
``concept_image(name)``, under the prompt "a sks glyph", and let the judges say what it then draws.

How far the base follows a prompt, by the judges on 240 full prompts (12 steps, guidance 2): glyph 0.85, background and
position above 0.99; guidance of 3 and 4 or 25 steps give the same.

>>> prompt("sks glyph", background="blue", position="top left")
'a sks glyph on a blue background at the top left'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pondera.customize.glyphs._images import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    GLYPHS,
    POSITIONS,
    Concept,
    Scene,
    concept_image,
    draw,
    prompt,
    sample_prompt,
    sample_scene,
)

if TYPE_CHECKING:
    from pondera.customize.glyphs._judge import Judge, judges
    from pondera.customize.glyphs._pipeline import GlyphPipeline, base

_LATER = {"Judge": "_judge", "judges": "_judge", "GlyphPipeline": "_pipeline", "base": "_pipeline"}  # when used
__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "CONCEPTS",
    "GLYPHS",
    "POSITIONS",
    "Concept",
    "GlyphPipeline",
    "Judge",
    "Scene",
    "base",
    "concept_image",
    "draw",
    "judges",
    "prompt",
    "sample_prompt",
    "sample_scene",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"pondera.customize.glyphs.{_LATER[name]}"), name)
    raise AttributeError(f"module 'pondera.customize.glyphs' has no attribute {name!r}")
