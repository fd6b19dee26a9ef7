"""Latent networks (SWAT-NN): weights and architecture of small networks as one point, moved by gradient descent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe, require_finite
from pondera.weightspace._states import count

ACTIVATIONS = ("sigmoid", "tanh", "leaky_relu")
Networks = Mapping[str, Tensor]


def random_networks(
    n: int, depth: int, *, inputs: int = 2, width: int = 7, sparsity: float = 0.0, generator: Generator
) -> dict[str, Tensor]:
    """Small networks with an activation and a switch for every neuron, drawn at random: what the autoencoder learns from.

    Weights are uniform in [-5, 5], a share `sparsity` of them 0; biases in [-1, 1]; activations (sigmoid, tanh, leaky ReLU) and
    switches at random.

    Args:
        n: how many.
        depth: of hidden layers, each of `width` neurons; one output.
        inputs, width, sparsity: 2, 7 and (0, 0.2, 0.4 in turn) in the authors' code.
        generator: draws them.
    Returns: for layer i "i.weight" (n, out, in), "i.bias" (n, out), and for hidden layers "i.activation" (n, width, 3), one-hot,
        and "i.mask" (n, width).
    Paper: Huang, Montazerin and Srivastava 2025, arXiv 2506.08270.

    >>> nets = random_networks(4, 1, generator=torch.Generator().manual_seed(0))
    >>> {name: tuple(x.shape) for name, x in nets.items()}["0.activation"]
    (4, 7, 3)
    """
    if min(n, depth, inputs, width) < 1 or not 0 <= sparsity < 1:
        given = f"{n=}, {depth=}, {inputs=}, {width=}, {sparsity=}"
        raise BadInput(f"random_networks needs sizes of at least 1 and a sparsity in [0, 1), got {given}")
    g, sizes = generator, [inputs, *[width] * depth, 1]
    states: dict[str, Tensor] = {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        w = 10 * torch.rand(n, b, a, generator=g) - 5
        states[f"{i}.weight"] = w * (torch.rand(n, b, a, generator=g) >= sparsity)
        states[f"{i}.bias"] = 2 * torch.rand(n, b, generator=g) - 1
        if i < depth:
            states[f"{i}.activation"] = F.one_hot(torch.randint(3, (n, b), generator=g), 3).float()
            states[f"{i}.mask"] = torch.randint(2, (n, b), generator=g).float()
    return states


def run_networks(states: Networks, x: Float[Tensor, "points inputs"]) -> Float[Tensor, "nets points"]:
    r"""What such networks give: every neuron a mixture of activations, times its switch.

    .. math:: h_i = m_i \odot \sum_k a_{i,k} \, \sigma_k(W_i h_{i-1} + b_i)

    Args:
        states: as of `random_networks`; mixtures (nets, width, 3) and switches may be soft.
        x: the inputs of all networks.
    Raises: BadInput: for states without such layers, other inputs.

    >>> nets = random_networks(2, 1, generator=torch.Generator().manual_seed(0))
    >>> off = nets | {"0.mask": torch.zeros(2, 7)}
    >>> bool(torch.allclose(run_networks(off, torch.randn(5, 2)), nets["1.bias"].expand(2, 5)))  # nothing but the last bias
    True
    """
    depth = _depth(states, "run_networks")
    if x.ndim != 2 or x.shape[1] != states["0.weight"].shape[2]:
        raise BadInput(f"run_networks needs inputs (points, {states['0.weight'].shape[2]}), got a {describe(x)}")
    h: Tensor = x.expand(len(states["0.weight"]), *x.shape)
    for i in range(depth + 1):
        z = h @ states[f"{i}.weight"].mT + states[f"{i}.bias"].unsqueeze(1)
        if i == depth:
            return z.squeeze(-1)
        a = states[f"{i}.activation"].unsqueeze(1)
        mixed = a[..., 0] * z.sigmoid() + a[..., 1] * z.tanh() + a[..., 2] * F.leaky_relu(z, 0.01)
        h = mixed * states[f"{i}.mask"].unsqueeze(1)
    raise AssertionError


def columns_of(depth: int, width: int) -> int:
    """Columns of the matrix that a network of so many hidden layers is: for each of these weights, bias, activations and switch,
    and weights and bias of the output.

    >>> [columns_of(depth, 7) for depth in (1, 2, 3, 4)]
    [20, 32, 44, 56]
    """
    return depth * (width + 5) + width + 1


def pack_networks(
    states: Networks, columns: int | None = None
) -> tuple[Float[Tensor, "nets width columns"], Float[Tensor, "nets width columns"]]:
    """Networks as matrices with a row a neuron, and where these hold true entries.

    Column by column: for each hidden layer its weights (row: where from, column: where to), the bias, three activations; the
    output's weights and bias; then a switch a hidden layer. What is missing is 0.

    Args:
        states: as of `random_networks`.
        columns: of the matrix; as many as it takes by default, more are filled with 0 on the right.
    Returns: the matrices and the places of true entries (1 or 0), as the authors' code has them.
    Raises: BadInput: for too few columns.
    Paper: Huang et al. 2025, arXiv 2506.08270.

    >>> matrix, valid = pack_networks(random_networks(3, 2, generator=torch.Generator().manual_seed(0)), 56)
    >>> matrix.shape
    torch.Size([3, 7, 56])
    """
    depth = _depth(states, "pack_networks")
    width = states["0.weight"].shape[1]
    needed = columns_of(depth, width)
    columns = needed if columns is None else columns
    if columns < needed:
        raise BadInput(
            f"pack_networks needs at least {needed} columns for {depth} hidden layers of {width}, got {columns}"
        )

    def filled(x: Tensor, across: int) -> Tensor:
        return F.pad(x, (0, across - x.shape[2], 0, width - x.shape[1]))

    parts: list[Tensor] = []
    marks: list[Tensor] = []
    for i in range(depth + 1):
        w, b = states[f"{i}.weight"].mT, states[f"{i}.bias"].unsqueeze(2)
        parts += [filled(w, width), filled(b, 1)]
        marks += [
            filled(torch.ones_like(w), width),
            torch.ones_like(parts[-1]),
        ]  # all rows of a bias count, as in their code
        if i < depth:
            parts.append(states[f"{i}.activation"])
            marks.append(torch.ones_like(parts[-1]))
    switches = torch.stack([states[f"{i}.mask"] for i in range(depth)], 2)
    parts.append(switches)
    marks.append(torch.ones_like(switches))
    matrix, valid = (F.pad(torch.cat(some, 2), (0, columns - needed)) for some in (parts, marks))
    return matrix, valid


def unpack_networks(matrix: Float[Tensor, "nets width columns"], depth: int, *, inputs: int = 2) -> dict[str, Tensor]:
    """The networks that `pack_networks` made matrices of.

    >>> nets = random_networks(3, 2, generator=torch.Generator().manual_seed(0))
    >>> back = unpack_networks(pack_networks(nets)[0], 2)
    >>> all(torch.equal(back[name], x) for name, x in nets.items())
    True
    """
    if matrix.ndim != 3 or matrix.shape[2] < columns_of(depth, matrix.shape[1]):
        raise BadInput(
            f"unpack_networks needs (nets, width, at least columns_of(depth, width)), got a {describe(matrix)}"
        )
    width, states, at = matrix.shape[1], {}, 0
    for i in range(depth + 1):
        rows, across = (inputs if i == 0 else width), (width if i < depth else 1)
        states[f"{i}.weight"] = matrix[:, :rows, at : at + across].mT
        states[f"{i}.bias"] = matrix[:, :across, at + width]
        if i < depth:
            states[f"{i}.activation"] = matrix[:, :, at + width + 1 : at + width + 4]
        at += width + 4 if i < depth else width + 1
    for i in range(depth):
        states[f"{i}.mask"] = matrix[:, :, at + i]
    return states


class NetworkAutoencoder(nn.Module):
    r"""Small networks to points and back: an encoder for all depths, and a decoder for each.

    A network's matrix and its places (`pack_networks`) are `width` tokens, one a neuron. The encoder gives each a vector, z of
    (width, latent). Decoder d gives the matrix of a network with d hidden layers: activations by softmax, switches by
    sigmoid. It is trained on what networks do, not on their weights:

    .. math:: \mathcal L = \mathbb E \, \min_d \; \tfrac 1 n \sum_x (f_{D_d(E(\theta))}(x) - f_\theta(x))^2

    Args:
        inputs, width: of the networks; 2 and 7 in the authors' code.
        depths: of hidden layers; 1 to 4 in theirs.
        latent: numbers a neuron; 768 in theirs, more than the network has.
        hidden, layers, heads: of the transformers. Theirs are GPT-2 with its trained weights, whose row i sees rows up to i alone;
            ours see all rows, and are small.
    Raises: BadInput: for sizes below 1, networks that do not fit.
    Paper: Huang, Montazerin and Srivastava 2025, arXiv 2506.08270. Ours in training: true activations are pure (their code puts
        the one-hot through a softmax, which makes mixtures of them).

    >>> model = NetworkAutoencoder(width=5, depths=(1, 2), latent=8, hidden=16, layers=1, heads=2)
    >>> nets = random_networks(4, 2, width=5, generator=torch.Generator().manual_seed(0))
    >>> z = model.encode(nets)
    >>> z.shape, model.decode(z, 1)["0.mask"].shape, model.loss(nets, torch.randn(9, 2)).ndim
    (torch.Size([4, 5, 8]), torch.Size([4, 5]), 0)
    """

    def __init__(
        self,
        *,
        inputs: int = 2,
        width: int = 7,
        depths: Sequence[int] = (1, 2, 3, 4),
        latent: int = 64,
        hidden: int = 64,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if min(inputs, width, latent, hidden, layers, heads, *depths) < 1 or hidden % heads or inputs > width:
            raise BadInput(
                "NetworkAutoencoder needs sizes of at least 1, hidden a multiple of heads and no more inputs than width, got "
                f"{inputs=}, {width=}, depths={tuple(depths)}, {latent=}, {hidden=}, {layers=}, {heads=}"
            )
        self.inputs, self.width, self.depths, self.latent = inputs, width, tuple(depths), latent
        self.columns = columns_of(max(depths), width)

        def body(start: int, end: int) -> nn.Sequential:
            layer = nn.TransformerEncoderLayer(
                hidden, heads, 2 * hidden, 0.0, "gelu", batch_first=True, norm_first=True
            )
            inner = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            return nn.Sequential(nn.Linear(start, hidden), Places(width, hidden), inner, nn.Linear(hidden, end))

        self.encoder = body(2 * self.columns, latent)
        self.decoders = nn.ModuleDict({str(d): body(latent, columns_of(d, width)) for d in self.depths})

    def encode(self, states: Networks) -> Float[Tensor, "nets width latent"]:
        """The points of networks."""
        z: Tensor = self.encoder(torch.cat(pack_networks(states, self.columns), 2))
        return z

    def raw(self, z: Float[Tensor, "nets width latent"], depth: int) -> dict[str, Tensor]:
        """What a decoder says before softmax and sigmoid."""
        if str(depth) not in self.decoders:
            raise BadInput(
                f"NetworkAutoencoder decodes to {', '.join(map(str, self.depths))} hidden layers, got {depth}"
            )
        return unpack_networks(self.decoders[str(depth)](z), depth, inputs=self.inputs)

    def decode(self, z: Float[Tensor, "nets width latent"], depth: int) -> dict[str, Tensor]:
        """Networks with so many hidden layers at the points."""
        return {name: _soft(name, x) for name, x in self.raw(z, depth).items()}

    def loss(self, states: Networks, x: Float[Tensor, "points inputs"]) -> Float[Tensor, ""]:
        """The mean over networks of the squared error of outputs, at each network's best depth."""
        y, z = run_networks(states, x), self.encode(states)
        errors = [(run_networks(self.decode(z, d), x) - y).square().mean(1) for d in self.depths]
        return torch.stack(errors).amin(0).mean()


class Places(nn.Module):
    """A learned vector a token."""

    def __init__(self, tokens: int, size: int) -> None:
        super().__init__()
        self.at = nn.Parameter(0.02 * torch.randn(tokens, size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.at


@dataclass(frozen=True)
class FoundNetworks:
    """What a search found: networks with hard switches, activations and zeros; error: mean squared, a network each; nonzero: weights
    of neurons that are on, not zero, biases of these counted; neurons: how many are on."""

    states: dict[str, Tensor]
    error: Float[Tensor, "problems"]
    nonzero: Tensor
    neurons: Tensor


def latent_search(
    model: NetworkAutoencoder,
    x: Float[Tensor, "points inputs"],
    y: Float[Tensor, "problems points"],
    depth: int,
    generator: Generator,
    *,
    steps: int = 3000,
    rate: float | Float[Tensor, "problems"] = 0.1,
    start: str = "encoded",
) -> FoundNetworks:
    r"""Networks for data by gradient descent on their point: weights and architecture at once; all problems side by side.

    .. math:: {\rm MSE} + 10^{-4} \sum_w (0.01 \, \sigma(20 (|w| - t)) + 0.1 |w|) - 0.4 \, \overline{{\rm std}(m)} + 10^{-3} \overline m

    with weights times :math:`\sigma(200(|w| - t))` for a threshold t, switches :math:`\sigma(200(m - 0.5))`, and activations by a
    softmax whose temperature falls from 1 to 0.01 over the first 3/8 of the steps. Then all is made hard: |w| < t to 0, m >= 0.5,
    the largest activation. The best loss after the temperature has fallen is kept. Run every depth and take the one you like.

    Args:
        model: a trained autoencoder; it does not change.
        x, y: data, one row of targets a problem.
        depth: hidden layers.
        generator: draws the starts.
        steps: of Adam; 8001 in the authors' code.
        rate: of z (0.1 in theirs), of all problems or one each; t has 0.001 and starts at 0.
        start: "encoded", from the code of a random network, or "normal", as in their code, which is off what the encoder gives.
    Returns: the networks, made hard, with errors and sizes.
    Raises: BadInput: for data that do not fit, NaN, another start.
    Paper: Huang et al. 2025, arXiv 2506.08270.

    >>> model = NetworkAutoencoder(width=3, depths=(1,), latent=4, hidden=8, layers=1, heads=2)
    >>> x = torch.rand(20, 2)
    >>> found = latent_search(model, x, (x[:, 0] * x[:, 1]).unsqueeze(0), 1, torch.Generator().manual_seed(0), steps=20)
    >>> found.error.shape, found.states["0.weight"].shape
    (torch.Size([1]), torch.Size([1, 3, 2]))
    """
    if y.ndim != 2 or x.ndim != 2 or y.shape[1] != len(x) or x.shape[1] != model.inputs:
        raise BadInput(
            f"latent_search needs x (points, {model.inputs}) and y (problems, points), got a {describe(x)} and a {describe(y)}"
        )
    for what, v in (("inputs", x), ("targets", y)):
        require_finite(v, "latent_search", what)
    if start == "encoded":
        nets = random_networks(len(y), depth, inputs=model.inputs, width=model.width, generator=generator)
        with torch.no_grad():
            z = model.encode({name: v.to(x) for name, v in nets.items()})
    elif start == "normal":
        z = torch.randn(len(y), model.width, model.latent, generator=generator).to(x)
    else:
        raise BadInput(f"latent_search starts encoded or normal, got {start!r}")
    return search(lambda p: model.raw(p["z"], depth), {"z": z}, x, y, steps=steps, rate=rate)


def search(
    decode: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    start: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    rate: float | Tensor,
) -> FoundNetworks:
    """The search in whatever is decoded to weights, biases, and activations and switches before softmax and sigmoid."""
    n = len(y)
    p = {name: v.detach().clone().requires_grad_() for name, v in start.items()} | {
        "t": torch.zeros(n, 1, 1).to(x).requires_grad_()
    }
    rates = torch.as_tensor(rate).to(x).expand(n)
    first, second = ({name: torch.zeros_like(v) for name, v in p.items()} for _ in range(2))
    falling = max(1, 3 * steps // 8)
    best = torch.full((n,), torch.inf).to(x)
    kept: dict[str, Tensor] = {}
    for step in range(steps):
        raw = decode(p)
        soft = _softened(raw, p["t"], max(0.01, 1 - step / falling))
        loss = (run_networks(soft, x) - y).square().mean(1) + _penalty(raw, soft, p["t"])
        if step >= falling or step == steps - 1:
            with torch.no_grad():
                better = loss < best
                best = torch.where(better, loss, best)
                now = {**raw, "t": p["t"]}
                kept = {
                    name: torch.where(better.view(-1, *[1] * (v.ndim - 1)), v, kept[name] if kept else v).detach()
                    for name, v in now.items()
                }
        grads = torch.autograd.grad(loss.sum(), list(p.values()), allow_unused=True)
        with torch.no_grad():
            for (name, v), g in zip(p.items(), grads, strict=True):
                g = torch.zeros_like(v) if g is None else g.nan_to_num(0, 0, 0)
                first[name].lerp_(g, 0.1)
                second[name].lerp_(g * g, 0.001)
                size = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                r = 0.001 if name == "t" else rates.view(-1, *[1] * (v.ndim - 1))
                v.sub_(r * first[name] / (1 - 0.9 ** (step + 1)) / size)
    return _hard(kept, x, y)


def _soft(name: str, x: Tensor, temperature: float = 1.0) -> Tensor:
    kind = name.rpartition(".")[2]
    return (x / temperature).softmax(-1) if kind == "activation" else x.sigmoid() if kind == "mask" else x


def _softened(raw: Networks, t: Tensor, temperature: float) -> dict[str, Tensor]:
    soft = {name: _soft(name, x, temperature) for name, x in raw.items()}
    for name, x in raw.items():
        if name.endswith("weight"):
            soft[name] = x * torch.sigmoid(200 * (x.abs() - t))
        elif name.endswith("mask"):
            soft[name] = torch.sigmoid(200 * (soft[name] - 0.5))
    return soft


def _penalty(raw: Networks, soft: Networks, t: Tensor) -> Float[Tensor, "problems"]:
    weights = [soft[name] for name in raw if name.endswith("weight")]
    sparse = sum((0.01 * torch.sigmoid(20 * (w.abs() - t)) + 0.1 * w.abs()).sum((1, 2)) for w in weights)
    masks = torch.stack([raw[name].sigmoid() for name in raw if name.endswith("mask")])
    penalty: Tensor = 1e-4 * sparse - 0.4 * masks.std(-1).mean(0) + 0.001 * masks.mean((0, 2))
    return penalty


@torch.no_grad()
def _hard(raw: dict[str, Tensor], x: Tensor, y: Tensor) -> FoundNetworks:
    t = raw.pop("t")
    states = dict(raw)
    for name, v in raw.items():
        if name.endswith("weight"):
            states[name] = v.masked_fill(v.abs() < t, 0)
        elif name.endswith("mask"):
            states[name] = (v >= 0).to(v.dtype)
        elif name.endswith("activation"):
            states[name] = F.one_hot(v.argmax(-1), 3).to(v.dtype)
    nonzero, on = torch.zeros(len(y)), torch.zeros(len(y))
    depth = _depth(states, "latent_search")
    before: Tensor | None = None
    for i in range(depth + 1):
        w = states[f"{i}.weight"] != 0
        w = w if before is None else w & before.bool().unsqueeze(1)
        if i < depth:
            before = states[f"{i}.mask"]
            w = w & before.bool().unsqueeze(2)
            on = on + before.sum(1).cpu()
            nonzero = nonzero + before.sum(1).cpu()
        nonzero = nonzero + w.sum((1, 2)).cpu() + (i == depth)
    return FoundNetworks(states, (run_networks(states, x) - y).square().mean(1), nonzero.long(), on.long())


def _depth(states: Networks, who: str) -> int:
    count(states, who)
    depth = sum(name.endswith(".mask") for name in states)
    names = {f"{i}.{kind}" for i in range(depth + 1) for kind in ("weight", "bias")}
    names |= {f"{i}.{kind}" for i in range(depth) for kind in ("activation", "mask")}
    if not depth or set(states) != names:
        odd = sorted(names ^ set(states)) or ["0.mask"]
        what = "is missing" if odd[0] in names else "has no place in them"
        raise BadInput(f"{who} needs networks as random_networks gives them; {odd[0]} {what}")
    return depth
