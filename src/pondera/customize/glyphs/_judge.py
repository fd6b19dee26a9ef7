"""Judges of images: which glyph, which background, which position. One small CNN with three heads."""

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.customize.glyphs._images import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    GLYPHS,
    PAIRS,
    POSITIONS,
    SIDE,
    Scene,
    background,
    draw,
)
from pondera.errors import BadInput, describe, nearest

WEIGHTS = Path(__file__).with_name("judge.safetensors")
OTHER = "other"  # no glyph, or a concept's shape in colours that are not its own
QUESTIONS: dict[str, tuple[str, ...]] = {
    "glyph": (*GLYPHS, *CONCEPTS, OTHER),
    "background": BACKGROUNDS,
    "position": tuple(POSITIONS),
}


class Judge(nn.Module):
    """Answers "glyph", "background" and "position" for images in [0, 1].

    A concept is its shape and its two colours: its shape in others is "other". Trained on drawn images with noise, blur
    and shifted contrast, never on generated ones.

    >>> from pondera.customize.glyphs import concept_image
    >>> judges().name(concept_image("knight", "blue", "top left")[None], "glyph")
    ['knight']
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 48, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * (SIDE // 4) ** 2, 128),
        )
        self.heads = nn.ModuleDict({what: nn.Linear(128, len(names)) for what, names in QUESTIONS.items()})

    def forward(self, images: Float[Tensor, "n 3 16 16"]) -> dict[str, Float[Tensor, "n answers"]]:
        """Log-probabilities of the answers to every question, in the order of `QUESTIONS`."""
        h = F.gelu(self.features(images))
        return {what: head(h).log_softmax(-1) for what, head in self.heads.items()}

    def features(self, images: Float[Tensor, "n 3 16 16"]) -> Float[Tensor, "n 128"]:
        """What the heads read; a cosine between two of them says how alike two images are."""
        if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
            raise BadInput(f"Judge needs images of shape (n, 3, {SIDE}, {SIDE}) in [0, 1], got a {describe(images)}")
        return self.body(2 * images - 1)

    @torch.no_grad()
    def name(self, images: Float[Tensor, "n 3 16 16"], question: str) -> list[str]:
        """The likeliest answer to one question, for every image."""
        answers = _answers(question)
        return [answers[i] for i in self(images)[question].argmax(1).tolist()]

    @torch.no_grad()
    def agrees(self, images: Float[Tensor, "n 3 16 16"], **asked: str) -> dict[str, Tensor]:
        """For each question, whether the likeliest answer is the one `asked` for: agrees(images, glyph="star", ...)."""
        wanted = {what: _index(what, answer) for what, answer in asked.items()}
        said = self(images)
        return {what: said[what].argmax(1) == i for what, i in wanted.items()}

    @torch.no_grad()
    def probability(self, images: Float[Tensor, "n 3 16 16"], **asked: str) -> dict[str, Float[Tensor, "n"]]:
        """For each question, the probability of the answer `asked` for."""
        wanted = {what: _index(what, answer) for what, answer in asked.items()}
        said = self(images)
        return {what: said[what][:, i].exp() for what, i in wanted.items()}


@cache
def judges() -> Judge:
    """The trained judge: one a process, frozen, on the CPU."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return judge.eval().requires_grad_(False)


def judged_images(n: int, *, generator: Generator) -> tuple[Float[Tensor, "n 3 16 16"], dict[str, Tensor]]:
    """Drawn images with the right answers: half known glyphs, three in ten concepts, the rest "other"."""
    images, answers = [], {what: torch.empty(n, dtype=torch.long) for what in QUESTIONS}
    for i in range(n):
        image, said = _one(generator)
        images.append(image)
        for what, answer in said.items():
            answers[what][i] = QUESTIONS[what].index(answer)
    return torch.stack(images), answers


def spoil(images: Float[Tensor, "n 3 16 16"], *, generator: Generator) -> Float[Tensor, "n 3 16 16"]:
    """Blur, contrast and noise of random strength, so that a judge also reads images that were generated."""
    strength = torch.rand(4, len(images), 1, 1, 1, generator=generator)
    kernel = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])).expand(3, 1, 3, 3) / 16
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    images = images.lerp(blurred, 0.7 * strength[0])
    images = (images - 0.5) * (0.8 + 0.3 * strength[1]) + 0.5 + 0.1 * (strength[2] - 0.5)
    return (images + 0.12 * strength[3] * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _one(generator: Generator) -> tuple[Tensor, dict[str, str]]:
    kind, alone = torch.rand(2, generator=generator).tolist()
    ground = BACKGROUNDS[_below(len(BACKGROUNDS), generator)]
    place = tuple(POSITIONS)[_below(len(POSITIONS), generator)]
    if kind < 0.5:
        name = said = tuple(GLYPHS)[_below(len(GLYPHS), generator)]
        colours = _colours(ground, generator, None)
    elif kind < 0.8:
        name = said = tuple(CONCEPTS)[_below(len(CONCEPTS), generator)]
        colours = CONCEPTS[name].tones
    elif alone < 0.8:
        name, said = tuple(CONCEPTS)[_below(len(CONCEPTS), generator)], OTHER
        colours = _colours(ground, generator, CONCEPTS[name].tones)
    else:  # a bare background: its position means nothing, and any answer will do
        return background(ground), {"glyph": OTHER, "background": ground, "position": place}
    return draw(Scene(name, colours, ground, place), generator=generator), {
        "glyph": said,
        "background": ground,
        "position": place,
    }


def _colours(ground: str, generator: Generator, never: tuple[str, ...] | None) -> tuple[str, ...]:
    """One colour, or in four of ten a pair; for known glyphs also the concepts' pairs."""
    single = [(name,) for name in COLOURS if name != ground]
    pairs = {*PAIRS, *(c.tones for c in CONCEPTS.values())}
    double = [pair for pair in sorted(pairs) if ground not in pair and pair != never]
    options = double if float(torch.rand((), generator=generator)) < 0.4 else single
    return options[_below(len(options), generator)]


def _answers(question: str) -> tuple[str, ...]:
    if question not in QUESTIONS:
        raise BadInput(f"a judge answers {', '.join(QUESTIONS)}, not {question!r}{nearest(question, QUESTIONS)}")
    return QUESTIONS[question]


def _index(question: str, answer: str) -> int:
    answers = _answers(question)
    if answer not in answers:
        raise BadInput(f"no {question} {answer!r}{nearest(answer, answers)}; there are {', '.join(answers)}")
    return answers.index(answer)


def _below(n: int, generator: Generator) -> int:
    return int(torch.randint(n, (), generator=generator))
