"""Orthogonal activations (arXiv 2502.01247): gains, depth, a small GPT, and GELU replaced in a trained encoder."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.nn.orthogonal_activations import FourierActivation, HermiteActivation, TropicalActivation
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Make = Callable[..., nn.Module]


def three() -> dict[str, nn.Module]:
    """The three kinds at the degrees of the paper's experiments."""
    return {"Hermite 3": HermiteActivation(3), "Fourier 6": FourierActivation(6), "tropical 6": TropicalActivation(6)}


def unscaled() -> dict[str, nn.Module]:
    """The same bases with all their functions at weight 1: no factorials, no constants."""
    hermite, fourier, tropical = HermiteActivation(3), FourierActivation(6), TropicalActivation(6)
    with torch.no_grad():
        hermite.coefficients.copy_(torch.tensor([1.0, 1.0, 2.0, 6.0]))
        fourier.coefficients.copy_(torch.tensor([math.factorial(k) for k in range(7)]))
        tropical.coefficients.fill_(6 / math.sqrt(2))
    return {"Hermite 3": hermite, "Fourier 6": fourier, "tropical 6": _Scaled(tropical)}


class _Scaled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 6 / math.sqrt(2)  # type: ignore[no-any-return]


UNSCALED = Sham("the same bases, all functions at weight 1", unscaled)

# -- gains -------------------------------------------------------------------------------------------------------------


def _gains(f: nn.Module) -> tuple[float, float]:
    """E f(z)^2 and E f'(z)^2 for z ~ N(0, 1)."""
    z = torch.linspace(-9, 9, 20001, dtype=torch.float64, requires_grad=True)
    weight = (-z.detach().square() / 2).exp()
    y = f.double()(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    return tuple(float((v.detach().square() * weight).sum() / weight.sum()) for v in (y, slope))  # type: ignore[return-value]


@claim(
    "The starts keep the second moments of a Gaussian's image and of the slope near 1",
    source="abstract; Theorems on the Hermite, Fourier and tropical gains",
    criterion="z ~ N(0, 1), degrees 3, 6 and 6: E f(z)^2 and E f'(z)^2 between 0.7 and 1.4, by quadrature; for Hermite "
    "both equal (1/e) "
    "sum_{k<d} 1/k! to 1e-6",
    method=three,
    sham=UNSCALED,
)
def gains_near_one(lab: Lab, make: Callable[[], dict[str, nn.Module]]) -> Finding:
    gains = {name: _gains(f) for name, f in make().items()}
    want = sum(1 / math.factorial(k) for k in range(3)) / math.e
    parts = {name: met(all(0.7 < v < 1.4 for v in g), f"{g[0]:.3f} and {g[1]:.3f}") for name, g in gains.items()}
    parts["Hermite's by formula"] = met(max(abs(v - want) for v in gains["Hermite 3"]) < 1e-6)
    return conclude(parts, gains=gains)


# -- depth -------------------------------------------------------------------------------------------------------------

DEPTH, WIDTH = 24, 128


def _through(f: nn.Module, seed: int, norms: bool) -> tuple[float, float]:
    """Mean squares of the output of a stack, weights of variance 1/width, and of a unit gradient brought back."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(256, WIDTH, generator=g).requires_grad_()
    h = x
    for _ in range(DEPTH):
        w = torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5
        h = h + f(F.layer_norm(h, (WIDTH,))) @ w if norms else f(h) @ w
    (grad,) = torch.autograd.grad(h, x, torch.randn(h.shape, generator=g))
    return float(h.detach().square().mean()), float(grad.square().mean())


def _depth(lab: Lab, make: Callable[[], dict[str, nn.Module]], norms: bool) -> Finding:
    found = {name: [_through(f, seed, norms) for seed in lab.seeds] for name, f in make().items()}
    parts = {
        name: met(all(0.01 < v < 100 for pair in runs for v in pair), f"{sum(map(math.isfinite, sum(runs, ())))} of 10 finite")
        for name, runs in found.items()
    }  # fmt: skip
    return conclude(parts, output_and_gradient=found)


DEEP = (
    f"{DEPTH} layers of {WIDTH}, weights of variance 1/width, nothing clamped, 5 seeds: mean squares of the "
    f"output and of a unit "
    "gradient brought back to the input within a factor 100 of 1, for each kind"
)


@claim(
    "Deep residual nets with norm layers keep signal and gradient without clamping",
    source="abstract (as it trains GPT-2 and ConvNeXt, which are residual and have norm layers)",
    criterion=f"a layer norm before each activation, added to what came in; {DEEP}",
    method=three,
    sham=UNSCALED,
)
def deep_with_norms(lab: Lab, make: Callable[[], dict[str, nn.Module]]) -> Finding:
    return _depth(lab, make, True)


@claim(
    "The start alone keeps them, without norm layers",
    source="abstract: through simple variance-preserving initialization and without additional clamping mechanisms",
    criterion=f"no norms, no residuals; {DEEP}",
    method=three,
    sham=UNSCALED,
)
def deep_without_norms(lab: Lab, make: Callable[[], dict[str, nn.Module]]) -> Finding:
    return _depth(lab, make, False)


# -- a small GPT -------------------------------------------------------------------------------------------------------

STEPS, BATCH, RATES = 200, 8, (3e-3, 1e-2, 3e-2)


@cache
def _text() -> tuple[Any, Any]:
    from pondera.lab.tasks import code

    return code.data()


def _gpt(activation: Callable[[], nn.Module]) -> nn.Module:
    """The lab's small GPT (2 blocks, 64 wide, norms before each half) with another activation in the place of GELU."""
    from pondera.lab.tasks import code

    class Block(code.Block):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.activation = activation()

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm1(x)
            q, k, v = (f(n).unflatten(-1, (code.HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.down(self.activation(self.up(self.norm2(x))))  # type: ignore[no-any-return]

    net = code.build()
    net.blocks = nn.Sequential(*(Block() for _ in range(code.BLOCKS)))
    for block in net.blocks:
        nn.init.normal_(block.up.weight, std=code.WIDTH**-0.5)  # what the activation's start presumes
        nn.init.zeros_(block.up.bias)
    return net  # type: ignore[no-any-return]


@cache
def _gpt_loss(make: Callable[[], dict[str, nn.Module]], name: str, seed: int, rate: float) -> float:
    """Test loss in nats a character; 10 where a loss was not finite."""
    (x, y), (x_test, y_test) = _text()
    torch.manual_seed(seed)
    net = _gpt(lambda: nn.GELU() if name == "GELU" else make()[name])
    adam = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0)
    course = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,))
        loss = F.cross_entropy(net(x[rows]).flatten(0, 1), y[rows].flatten())
        if not loss.isfinite():
            return 10.0
        adam.zero_grad()
        loss.backward()
        adam.step()
        course.step()
    with torch.no_grad():
        pick = torch.arange(0, len(x_test), max(1, len(x_test) // 128))
        loss = F.cross_entropy(net(x_test[pick]).flatten(0, 1), y_test[pick].flatten())
    return min(10.0, float(loss.nan_to_num(10.0)))


@cache
def _gpt_rate(make: Callable[[], dict[str, nn.Module]], name: str) -> float:
    """The best rate on a seed of its own; a best at the grid's end is gone beyond."""
    tried: dict[float, float] = {}
    rates = list(RATES)
    while rates:
        tried |= {r: _gpt_loss(make, name, 1000, r) for r in rates}
        best = min(tried, key=lambda r: tried[r])
        further = {min(tried): best / 3, max(tried): best * 3}.get(best)
        rates = [further] if further is not None and 1e-4 < further < 0.3 else []
    return best


@claim(
    "A small GPT trains with them, unclamped, as well as with GELU",
    source="abstract (there GPT-2 on OpenWebText)",
    criterion="2 blocks, 64 wide, on the standard library's source, 200 AdamW steps of 8 windows of 64 characters, rate "
    "of each tuned alike, 5 "
    "seeds: all losses finite, and the test loss minus GELU's below 0.05 nats (interval), for each kind",
    budget="full",
    method=three,
    sham=UNSCALED,
)
def gpt_trains(lab: Lab, make: Callable[[], dict[str, nn.Module]]) -> Finding:
    base = [_gpt_loss(three, "GELU", seed, _gpt_rate(three, "GELU")) for seed in lab.seeds]
    losses = {name: [_gpt_loss(make, name, seed, _gpt_rate(make, name)) for seed in lab.seeds] for name in three()}
    parts = {f"{name}: finite": met(max(of) < 10) for name, of in losses.items()}
    parts |= {f"{name}: as good as GELU": weigh(lab.effect(of, base), below=0.05) for name, of in losses.items()}
    return conclude(
        parts,
        losses=losses | {"GELU": base},
        rates={name: _gpt_rate(make, name) for name in losses} | {"GELU": _gpt_rate(three, "GELU")},
    )


# -- in the place of GELU ----------------------------------------------------------------------------------------------


def not_fitted(degree: int, like: str, bound: float) -> HermiteActivation:
    return HermiteActivation(degree)


@claim(
    "By Hermite interpolation it matches a function and its derivative, and so can replace GELU in a trained model",
    source="abstract: closely approximate classical ones in pre-trained models by matching both the function and its "
    "derivative",
    criterion="GELU by degree 8 within sqrt(8) of 0: value within 0.01, slope within 0.05; in all layers of the lab's "
    "all-MiniLM-L6-v2, degree 16, each "
    "over the range its inputs have on 24 sentences of docstrings: mean cosine between old and new embeddings "
    "of 48 others above 0.95",
    method=HermiteActivation,
    sham=Sham("the ordinary start, not fitted", not_fitted),
)
def replaces_gelu(lab: Lab, make: Callable[..., HermiteActivation]) -> Finding:
    x = torch.linspace(-(8**0.5), 8**0.5, 1001, dtype=torch.float64, requires_grad=True)
    y, there = make(8, like="gelu", bound=8**0.5).double()(x), F.gelu(x)
    value = float((y - there).detach().abs().max())
    slope = float(torch.autograd.grad(y.sum() - there.sum(), x)[0].abs().max())
    cosines = {degree: _swapped(make, degree) for degree in (3, 8, 16, 32)}
    return conclude(
        {
            "value and slope": met(value < 0.01 and slope < 0.05, f"{value:.4f} and {slope:.3f}"),
            "embeddings of an encoder": met(cosines[16]["own range"] > 0.95, f"{cosines[16]['own range']:.3f}"),
        },
        value=value,
        slope=slope,
        cosine_by_degree=cosines,
        largest_inputs=_ranges(),
        note=f"inputs of the encoder's activations reach {max(_ranges()):.0f}; sqrt(d), the paper's range, is far inside",
    )


@cache
def _encoder() -> tuple[nn.Module, Tensor]:
    from pondera.lab.tasks.minilm import build, data

    return build().encoder.eval(), data()[0][0][:72]


@torch.no_grad()
def _embedded(ids: Tensor) -> Tensor:
    encoder, mask = _encoder()[0], (ids != 0).long()
    h = encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
    return F.normalize(h.sum(1), dim=1)


@cache
def _ranges() -> tuple[float, ...]:
    """The largest input, in size, of each layer's activation over the first 24 sentences."""
    encoder, ids = _encoder()
    seen: list[float] = []
    real = (ids[:24] != 0).unsqueeze(-1)
    hooks = [
        layer.intermediate.dense.register_forward_hook(lambda m, i, o: seen.append(float((o * real).abs().max())))
        for layer in encoder.encoder.layer  # type: ignore[union-attr]
    ]
    _embedded(ids[:24])
    for hook in hooks:
        hook.remove()
    return tuple(seen)


def _swapped(make: Callable[..., HermiteActivation], degree: int) -> dict[str, float]:
    """Mean cosine between the old and the new embeddings of 48 sentences, with the range measured and with the paper's."""
    encoder, ids = _encoder()
    layers = encoder.encoder.layer  # type: ignore[union-attr]
    before, gelu, found = _embedded(ids[24:]), layers[0].intermediate.intermediate_act_fn, {}
    for name, bounds in (("own range", _ranges()), ("sqrt(d)", (degree**0.5,) * len(layers))):
        for layer, bound in zip(layers, bounds, strict=True):
            layer.intermediate.intermediate_act_fn = make(degree, like="gelu", bound=bound)
        found[name] = float((_embedded(ids[24:]) * before).sum(1).mean().nan_to_num(-1))
    for layer in layers:
        layer.intermediate.intermediate_act_fn = gelu
    return found
