"""ReQuant (arXiv 2503.01901): is the cost of rounding told by the integral alone, and are the weights it keeps the right ones?

On nets of 64-64-64-10 for the digits, and on the small pre-trained GPT of the task "gpt"; always all weights of linear layers
rounded to nearest, a scale a row, all at once (the paper's table 1 rounds one layer at a time).
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.compress.grid import SCALE_BITS, quantize, quantize_tensor
from pondera.compress.requant import INDEX_BITS, post_quantization_integral, requant
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]
BITS = (4, 3, 2)


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def _mean(model: nn.Module, batches: list[Batch]) -> float:
    with torch.no_grad():
        return sum(float(_cross_entropy(model, b)) for b in batches) / len(batches)


def _weights(model: nn.Module) -> Weights:
    return {f"{n}.weight": m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def _rounded(model: nn.Module, bits: int) -> Weights:
    return {name: quantize_tensor(w, bits).dequantize() for name, w in _weights(model).items()}


# -- predicting the cost -----------------------------------------------------------------------------------------------


@cache
def _digits() -> tuple[Batch, Batch]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor((x - x.mean()) / x.std()).float()[order], torch.tensor(y)[order]
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


@cache
def _net(seed: int) -> nn.Module:
    (x, y), g = _digits()[0], torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    adam = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
    for _ in range(400):
        i = torch.randint(len(x), (64,), generator=g)
        adam.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        adam.step()
    return net


Predict = Callable[[nn.Module, list[Batch], Weights], float]


def integral(model: nn.Module, batches: list[Batch], q: Weights) -> float:
    """The shares' sum at 8 midpoints."""
    shares = post_quantization_integral(model, batches, q, loss=_cross_entropy)
    return sum(float(s.double().sum()) for s in shares.values())


def integral_as_the_paper(model: nn.Module, batches: list[Batch], q: Weights) -> float:
    """The shares' sum at 32 left ends."""
    shares = post_quantization_integral(model, batches, q, loss=_cross_entropy, steps=32, rule="left")
    return sum(float(s.double().sum()) for s in shares.values())


def gradient(model: nn.Module, batches: list[Batch], q: Weights) -> float:
    """The first term of Taylor's formula at w."""
    shares = post_quantization_integral(model, batches, q, loss=_cross_entropy, steps=1, rule="left")
    return sum(float(s.double().sum()) for s in shares.values())


def gradient_and_hessian(model: nn.Module, batches: list[Batch], q: Weights) -> float:
    """The first two terms, the Hessian exact: d'Hd by a product."""
    d = {name: q[name] - w for name, w in _weights(model).items()}
    state = {n: p.detach() for n, p in model.named_parameters()}

    def at(weights: Weights) -> Tensor:
        out = [torch.func.functional_call(model, {**state, **weights}, (x,)) for x, _ in batches]
        losses = [F.cross_entropy(o.flatten(0, -2), y.flatten()) for o, (_, y) in zip(out, batches)]
        return torch.stack(losses).mean()

    w = _weights(model)
    first, second = torch.func.jvp(torch.func.grad(at), (w,), (d,))
    return float(sum((first[n].double() * d[n]).sum() + (second[n].double() * d[n]).sum() / 2 for n in d))


@cache
def _actual(seed: int, bits: int) -> float:
    batches = [_digits()[0]]
    model = copy.deepcopy(_net(seed))
    quantize(model, bits)
    return _mean(model, batches) - _mean(_net(seed), batches)


@cache
def _ratio(predict: Predict, seed: int, bits: int) -> float:
    return predict(_net(seed), [_digits()[0]], _rounded(_net(seed), bits)) / _actual(seed, bits)


ON_DIGITS = (
    "five nets of 64-64-64-10 trained on 1,000 digits, all three weights rounded at once to 4, 3 and 2 bits; predicted over "
    "actual change of the training loss "
)


@claim(
    "The integral predicts what rounding adds to the loss, from 4 bits down to 2",
    source="abstract; tables (as a third party gives them), there within a small factor on Llama",
    criterion=ON_DIGITS + "within 0.8 and 1.25 for every net and number of bits",
    method=integral,
    sham=Sham("the gradient at the weights alone", gradient),
)
def integral_predicts_the_cost(lab: Lab, predict: Predict) -> Finding:
    rows = {bits: [_ratio(predict, seed, bits) for seed in lab.seeds] for bits in BITS}
    papers = {bits: [_ratio(integral_as_the_paper, seed, bits) for seed in lab.seeds] for bits in BITS}
    return conclude(
        {f"{bits} bits": met(all(0.8 <= r <= 1.25 for r in row)) for bits, row in rows.items()},
        predicted_over_actual=rows,
        at_32_left_ends=papers,
        actual={bits: [_actual(seed, bits) for seed in lab.seeds] for bits in BITS},
        note="8 backward passes at midpoints are off by at most "
        f"{max(abs(r - 1) for row in rows.values() for r in row):.1%}, 32 at left ends by "
        f"{max(abs(r - 1) for row in papers.values() for r in row):.1%}",
    )


def _underestimates(lab: Lab, predict: Predict, most: float) -> Finding:
    rows = {bits: [_ratio(predict, seed, bits) for seed in lab.seeds] for bits in BITS}
    return conclude(
        {f"{bits} bits": met(all(r < most for r in row)) for bits, row in rows.items()},
        predicted_over_actual=rows,
        note="predicted over actual: "
        + ", ".join(f"{min(r):.2g} to {max(r):.2g} at {bits} bits" for bits, r in rows.items()),
    )


@claim(
    "The gradient at the weights underestimates the cost by an order of magnitude or more",
    source="abstract; table 1 (as a third party gives it)",
    criterion=ON_DIGITS + "below 0.1 for every net and number of bits",
    method=gradient,
    sham=Sham("the integral in its place", integral),
)
def gradient_underestimates(lab: Lab, predict: Predict) -> Finding:
    return _underestimates(lab, predict, 0.1)


@claim(
    "So it does with the Hessian's term added, the Hessian being exact",
    source="abstract; table 1, whose own second-order column is negative and can hardly be an exact one",
    criterion=ON_DIGITS + "below 0.1 for every net and number of bits",
    method=gradient_and_hessian,
    sham=Sham("the integral in its place", integral),
)
def hessian_underestimates(lab: Lab, predict: Predict) -> Finding:
    return _underestimates(lab, predict, 0.1)


# -- keeping the right ones --------------------------------------------------------------------------------------------

KEEP = 0.005
Method = Callable[..., Any]


@cache
def _gpt() -> nn.Module:
    from pondera.lab.tasks.gpt import build

    return build()


@cache
def _text() -> tuple[Batch, Batch]:
    """Windows of the standard library's source: pre-trained on, and of held-out modules."""
    import sysconfig
    from pathlib import Path

    from pondera.lab.tasks.gpt import windows

    def of(*names: str) -> Batch:
        text = "\n".join((Path(sysconfig.get_path("stdlib")) / f"{n}.py").read_text(encoding="utf-8") for n in names)
        return windows(text, 128)

    test = of("textwrap", "statistics")
    return of("argparse", "ast", "inspect", "mailbox", "doctest"), (test[0][:64], test[1][:64])


def _setting(where: str, seed: int) -> tuple[nn.Module, list[Batch], Batch]:
    if where == "digits":
        (x, y), test = _digits()
        return _net(seed), [(x, y)], test
    (x, y), test = _text()
    i = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:32]
    return _gpt(), [(x[i, :64], y[i, :64])], test


def _kept(model: nn.Module, scores: Weights, bits: int) -> nn.Module:
    """Half of the share the largest of each layer, the rest rounded again; half those of the highest scores of all."""
    model, w = copy.deepcopy(model), _weights(model)
    exact = {}
    for name, x in w.items():
        n = round(KEEP / 2 * x.numel())
        exact[name] = x.abs() > x.abs().flatten().sort(descending=True).values[n]
    q = {name: quantize_tensor(x.masked_fill(exact[name], 0), bits).dequantize() for name, x in w.items()}
    flat = torch.cat([scores[name].masked_fill(exact[name], -1).flatten() for name in w])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(round(KEEP / 2 * len(flat))).indices] = True
    for part, (name, x) in zip(chosen.split([x.numel() for x in w.values()]), w.items()):
        model.get_parameter(name).data = x.where(exact[name] | part.view(x.shape), q[name])
    return model


def _squares(model: nn.Module, batches: list[Batch]) -> Weights:
    """Mean squared gradients, sample by sample on the digits, window by window on text."""
    w, state = _weights(model), {n: p.detach() for n, p in model.named_parameters()}

    def at(weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {**state, **weights}, (x[None],))
        return F.cross_entropy(out.flatten(0, -2), y.flatten())

    one = torch.func.grad(at)
    total = {name: torch.zeros_like(x) for name, x in w.items()}
    for xs, ys in batches:
        if len(xs) > 100:
            parts = (torch.func.vmap(one, in_dims=(None, 0, 0))(w, x, y) for x, y in zip(xs.split(50), ys.split(50)))
        else:  # attention has no batching rule on the CPU
            parts = ({name: g[None] for name, g in one(w, x, y).items()} for x, y in zip(xs, ys))
        for grads in parts:
            for name, g in grads.items():
                total[name] += g.square().sum(0)
    return total


def _by_magnitude(model: nn.Module, batches: list[Batch], bits: int) -> nn.Module:
    """All of the share the largest of each layer, and the rest rounded again."""
    model, w = copy.deepcopy(model), _weights(model)
    for name, x in w.items():
        exact = x.abs() > x.abs().flatten().sort(descending=True).values[round(KEEP * x.numel())]
        q = quantize_tensor(x.masked_fill(exact, 0), bits).dequantize()
        model.get_parameter(name).data = x.where(exact, q)
    return model


def _by_gradient(model: nn.Module, batches: list[Batch], bits: int) -> nn.Module:
    """Half the largest, half those of the largest |g d| at w."""
    q = _rounded(model, bits)
    shares = post_quantization_integral(model, batches, q, loss=_cross_entropy, steps=1, rule="left")
    return _kept(model, {name: s.abs() for name, s in shares.items()}, bits)


def _by_fisher(model: nn.Module, batches: list[Batch], bits: int) -> nn.Module:
    """Half the largest, half those of the largest g^2 d^2 (SqueezeLLM's)."""
    q, w = _rounded(model, bits), _weights(model)
    return _kept(model, {n: g * (q[n] - w[n]).square() for n, g in _squares(model, batches).items()}, bits)


def _finer(model: nn.Module, batches: list[Batch], bits: int) -> nn.Module:
    """Nothing exact; at least the same bits spent on a scale for each group of a row's entries."""
    model, w = copy.deepcopy(model), _weights(model)
    scales = SCALE_BITS * sum(len(x) for x in w.values()) / sum(x.numel() for x in w.values())
    quantize(model, bits, group=int(SCALE_BITS / (scales + KEEP * (32 + INDEX_BITS))))
    return model


RIVALS = {"largest |w|": _by_magnitude, "|g d|": _by_gradient, "g^2 d^2": _by_fisher, "finer groups": _finer}


@cache
def _loss_by(where: str, seed: int, rival: str) -> float:
    net, batches, test = _setting(where, seed)
    return _mean(RIVALS[rival](net, batches, 3), [test])


@cache
def _loss_of(where: str, seed: int, method: Method, signed: bool = False) -> tuple[float, float]:
    """Test loss, and bits a weight."""
    net, batches, test = _setting(where, seed)
    model = copy.deepcopy(net)
    given = {"signed": True} if signed else {}
    report = method(model, batches, 3, loss=_cross_entropy, keep=KEEP, steps=4, **given)
    size = sum(w.numel() for w in _weights(net).values())
    return _mean(model, [test]), sum(row.bits for row in report.layers) / size


def plain_rounding(model: nn.Module, batches: list[Batch], bits: int, **settings: Any) -> Any:
    """Nothing kept."""
    return quantize(model, bits)


def _ahead(lab: Lab, method: Method, where: str, seeds: range) -> Finding:
    found = [_loss_of(where, seed, method) for seed in seeds]
    losses = {"method": [loss for loss, _ in found]}
    losses |= {rival: [_loss_by(where, seed, rival) for seed in seeds] for rival in RIVALS}
    losses["nothing kept"] = [_loss_of(where, seed, plain_rounding)[0] for seed in seeds]
    losses["by signed shares"] = [_loss_of(where, seed, method, True)[0] for seed in seeds]
    mean = {name: sum(row) / len(row) for name, row in losses.items()}
    dense = sum(_mean(net, [test]) for net, _, test in (_setting(where, s) for s in seeds)) / len(seeds)
    order = ", ".join(f"{name} {mean[name]:.3f}" for name in sorted(mean, key=lambda name: mean[name]))
    return conclude(
        {f"below {rival}": weigh(lab.effect(losses["method"], losses[rival]), below=0) for rival in RIVALS},
        mean_test_loss=mean,
        dense=dense,
        bits_a_weight=found[0][1],
        test_loss=losses,
        note=f"mean test loss: dense {dense:.3f}, {order}",
    )


AT_3_BITS = (
    "3 bits to nearest with a scale a row, 0.5% of the weights exact in all that keep any, shares at 4 midpoints: test loss of ReQuant "
    "minus that of keeping the largest |w|, half these and half by |g d|, half these and half by g^2 d^2, and minus that of keeping "
    "none and spending at least the same bits on groups of entries with a scale each: 95% intervals below 0; "
)


@claim(
    "Keeping the weights that the integral names loses less than keeping others at the same number of bits: digits",
    source="abstract; tables of ablations (as a third party gives them)",
    criterion=AT_3_BITS + "nets of 64-64-64-10 on digits, 30 nets",
    method=requant,
    sham=Sham("plain rounding, nothing kept", plain_rounding),
)
def keeps_the_right_ones_on_digits(lab: Lab, method: Method) -> Finding:
    return _ahead(lab, method, "digits", lab.draws(30))


@claim(
    "So it is in a small language model",
    source="abstract; main tables (there Llama 3.2 1B and 3B behind QTIP, AWQ and SqueezeLLM)",
    criterion=AT_3_BITS
    + "pre-trained GPT of 0.8 million weights, 32 windows of 64 characters to calibrate, 64 held-out windows, 5 draws "
    "of the calibration windows",
    budget="full",
    method=requant,
    sham=Sham("plain rounding, nothing kept", plain_rounding),
)
def keeps_the_right_ones_on_text(lab: Lab, method: Method) -> Finding:
    return _ahead(lab, method, "text", lab.seeds)
