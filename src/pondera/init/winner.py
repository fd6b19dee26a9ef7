"""WINNER: a SIREN start with Gaussian noise on its first two weights, as strong as the target's spectrum asks for."""

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera._weights import Owned, require_owned
from pondera.errors import BadInput, describe, require_finite

# (s_max, a, b) by the number of coordinates: sound and images
RULES = {1: (3500.0, 7.0, 3.0), 2: (50.0, 5.0, 0.4)}


@torch.no_grad()
def winner_(
    model: nn.Module,
    signal: Float[Tensor, "*grid channels"],
    *,
    omega: float = 30.0,
    scales: tuple[float, float] | None = None,
    generator: Generator | None = None,
) -> nn.Module:
    r"""Start a sine network for one target signal, in place.

    Every weight first gets the start of SIREN, with n its inputs and omega the factor in the hidden sines,

    .. math::
        W_0 \sim U(-1/n, 1/n), \qquad W_l \sim U\bigl(-\sqrt{6/n}/\omega, \sqrt{6/n}/\omega\bigr) \quad (l \ge 1);

    then the first two get noise, with scales S from the target (`noise_scales` of its `spectral_centroid`):

    .. math::
        W_0 \mathrel{+}= (S_0/\omega)\, N(0, 1), \qquad W_1 \mathrel{+}= (S_1/\omega)\, N(0, 1).

    The first layer thus holds frequencies of about S_0 times (its own sine's factor / omega) radians per unit of the
    coordinate. The rule presumes coordinates in [-1, 1] and knows nothing of the number of samples: a short clip gets
    the frequencies of a long one. Biases are drawn from U(-1/sqrt n, 1/sqrt n), torch's default.

    Args:
        model: linear layers that feed each other in the order they are registered, at least two of them hidden, with
            sin(omega x) between: `coordinates -> channels`.
        signal: the target on its grid, channels last: (samples, channels), (rows, columns, channels), ... An image may
            also come as (pixels, channels), row after row, which is what the authors' script does.
        omega: the factor in the hidden sines; it divides both noise scales. The first sine may have another one.
        scales: (S_0, S_1) instead of the rule; needed when the model has neither one nor two coordinates.
        generator: source of the draw, on the weights' device; None takes torch's default one.
    Returns: `model`.
    Raises: BadInput: for a model that is no such chain of linear layers, a signal that is empty, not finite or of
        other channels or coordinates than the model, coordinates without a rule and without `scales`, a parametrization
        that cannot hold the weight. The model is then what it was.
    Paper: Chandravamsi et al. 2025, arXiv 2509.09719. The text was not at hand beyond its abstract; formulas and
        constants are those of the authors' code (class `SIREN_square`), which has a = 7 for sound where the paper is
        said to have 5. In their scripts the plain SIREN that is compared has the factor 3000 in its first sine for
        sound, 30 for images.

    >>> class Sine(nn.Module):
    ...     def forward(self, x):
    ...         return torch.sin(30 * x)
    >>> net = nn.Sequential(nn.Linear(1, 64), Sine(), nn.Linear(64, 64), Sine(), nn.Linear(64, 1))
    >>> sound = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    >>> net = winner_(net, sound, generator=torch.Generator().manual_seed(1))
    >>> s_0, s_1 = noise_scales(spectral_centroid(sound), coordinates=1)
    >>> round(s_0), round(net[0].weight.std().item() * 30)
    (3396, 3313)
    """
    layers = _chain(model)
    coordinates, channels = layers[0].read().shape[1], layers[-1].read().shape[0]
    if not (isinstance(omega, (int, float)) and 0 < omega < math.inf):
        raise BadInput(f"winner_ needs omega, the factor in the hidden sines, above 0, got {omega}")
    centroid = spectral_centroid(signal)
    if signal.shape[-1] != channels or signal.ndim - 1 not in (1, coordinates):
        raise BadInput(
            f"winner_ needs a signal that fits the model, which maps {coordinates} coordinates to {channels} channels "
            f"(grid of {coordinates} axes, channels last), got a {describe(signal)}"
        )
    noise = noise_scales(centroid, coordinates=coordinates, channels=channels) if scales is None else _given(scales)
    saved = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        for i, one in enumerate(layers):
            like = one.read()
            w = torch.empty(like.shape, dtype=_work(like), device=like.device)
            n = w.shape[1]
            bound = 1 / n if i == 0 else math.sqrt(6 / n) / omega
            w.uniform_(-bound, bound, generator=generator)
            if i < 2:
                w += torch.empty_like(w).normal_(0, noise[i] / omega, generator=generator)
            one.write(w.to(like.dtype))
            if not torch.allclose(one.read(), w.to(like.dtype), rtol=torch.finfo(like.dtype).eps ** 0.5):
                raise BadInput(
                    f"winner_ cannot start {one.name}: its parametrization cannot hold the weight it is given"
                )
            one.fill_bias(0.0)  # refuses a parametrized one
            if one.bias is not None:
                b = torch.empty(one.bias.shape, dtype=w.dtype, device=w.device)
                one.bias.copy_(b.uniform_(-(n**-0.5), n**-0.5, generator=generator))
    except BaseException:
        model.load_state_dict(saved)
        raise
    return model


def spectral_centroid(signal: Float[Tensor, "*grid channels"]) -> float:
    r"""How high a signal's frequencies lie: 0 for a constant, up to 1 at half the sampling rate.

    .. math:: \psi = \frac{2}{C} \; \underset{\text{lines, channels}}{\mathrm{mean}} \;
        \frac{\sum_k f_k |Y_k|}{\sum_k |Y_k|}, \qquad f_k \in [0, 1/2],

    with Y the real Fourier transform of a line along the last grid axis (of an image: a row), constant part included,
    and C the number of channels. A line of zeros counts 0. An image that changes down its columns only has centroid 0.

    Args:
        signal: real numbers on a grid of one to three axes, channels last.
    Returns: the centroid.
    Raises: BadInput: for a tensor that is not floating-point, empty, not finite, or has no or more than three grid axes.
    Paper: arXiv 2509.09719, as in the authors' function of this name. C divides once more in `noise_scales`, so that
        equal channels of an RGB image give a ninth of what one of them gives.

    >>> spectral_centroid(torch.ones(8, 1)), spectral_centroid(torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None])
    (0.0, 1.0)
    """
    require_finite(signal, "winner_", "signal")
    if not 2 <= signal.ndim <= 4 or signal.numel() == 0:
        raise BadInput(
            "winner_ needs a signal with numbers on a grid of one to three axes, channels last, such as "
            f"(samples, channels) or (rows, columns, channels), got a {describe(signal)}"
        )
    lines = signal.movedim(-1, 0).double()
    y = torch.fft.rfft(lines).abs()
    f = torch.fft.rfftfreq(lines.shape[-1], dtype=y.dtype, device=y.device)
    centroids = ((y * f).sum(-1) / y.sum(-1)).nan_to_num(0.0)  # 0 / 0: a line of zeros
    return 2 * centroids.mean().item() / len(lines)


def noise_scales(centroid: float, *, coordinates: int, channels: int = 1) -> tuple[float, float]:
    r"""The noise scales of the first two weights, with u = centroid / channels:

    .. math:: S_0 = s_{\max} (1 - e^{-a u}), \quad S_1 = b u; \qquad
        (s_{\max}, a, b) = (3500, 7, 3) \text{ for sound}, \; (50, 5, 0.4) \text{ for images.}

    Args:
        centroid: of `spectral_centroid`.
        coordinates: inputs of the network, 1 (sound) or 2 (images).
        channels: outputs of the network.
    Returns: (S_0, S_1).
    Raises: BadInput: for another number of coordinates, where the authors set the scales by hand.
    Paper: arXiv 2509.09719, as in the authors' code.

    >>> [round(s, 4) for s in noise_scales(0.5, coordinates=1)]
    [3394.3092, 1.5]
    """
    if coordinates not in RULES:
        raise BadInput(
            f"winner_ has a rule for 1 and 2 coordinates, the model takes {coordinates}; give scales=(S_0, S_1)"
        )
    s_max, a, b = RULES[coordinates]
    u = centroid / channels
    return s_max * (1 - math.exp(-a * u)), b * u


def _chain(model: nn.Module) -> list[Owned]:
    """The model's weights, checked to be linear layers that feed each other in the order they are registered."""
    layers = require_owned(model, "winner_")
    shapes = [tuple(one.read().shape) for one in layers]
    for one in layers:
        if one.kind != "linear":
            raise BadInput(
                f"winner_ starts sine networks of linear layers only, and {one.name} belongs to another kind"
            )
    if len(layers) < 3:
        raise BadInput(
            f"winner_ needs at least two hidden layers and the output layer, got {len(layers)} linear layers"
        )
    for one, (n, _), (_, m) in zip(layers, shapes, shapes[1:], strict=False):
        if n != m:
            raise BadInput(
                "winner_ needs layers that feed each other in the order they are registered; the one after "
                f"{one.name}, which has {n} outputs, takes {m} inputs"
            )
    return layers


def _given(scales: tuple[float, float]) -> tuple[float, float]:
    s_0, s_1 = (float(s) for s in scales) if len(scales) == 2 else (math.nan, math.nan)
    if not (0 <= s_0 < math.inf and 0 <= s_1 < math.inf):
        raise BadInput(f"winner_ needs two noise scales (S_0, S_1) of at least 0, got {scales}")
    return s_0, s_1


def _work(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
