"""The neural tangent kernel: of a network as it is, of infinitely wide ones, and the training that it predicts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._activations import Activation, activation, derivative
from pondera.errors import BadInput, describe, require_extra, require_finite
from pondera.linalg import gaussian_mean, gaussian_pair_mean
from pondera.probe._tangent import TangentKernel, as_one, gram, look
from pondera.probe._untouched import require_model, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def ntk(model: nn.Module, batch: Batch, batch2: Batch | None = None, *, output: int | None = None) -> TangentKernel:
    r"""The empirical tangent kernel of `model`, as it is, between the examples of a batch (or of two).

    .. math:: \Theta_{cc'}(x, x') = \sum_p \frac{\partial f_c(x)}{\partial \theta_p}
              \frac{\partial f_{c'}(x')}{\partial \theta_p}                                    (Sec. 4)

    over the parameters theta that require a gradient. Under gradient flow on them the outputs move by
    df(x)/dt = -sum_i Theta(x, x_i) dL/df(x_i), whatever the loss L; `kernel_dynamics` solves that for the squared error.
    The gradient is that of the parameters as they are: for the paper's scaling, in which the kernel has a limit as the
    width grows, a layer must divide by the square root of its fan-in in its forward.

    The model runs in eval mode and is left as it was. Of a linear layer that reads one row an example the kernel is
    (g . g') (x . x' + 1), with x what it reads and g the gradient at its output, so that the gradient in its weight is
    never formed. Memory holds the result and what 2^25 numbers of gradients take. Where the gradients of all outputs of
    all examples are more, the examples run one at a time; of a linear layer, a convolution or an embedding what it reads
    and what comes back to it are kept instead of the gradient where that is less, in memory of two gradients (or of two
    times 2^25 numbers), and what finds no room there is computed again.

    Args:
        model: whose outputs depend on their own example alone (BatchNorm is, in eval mode).
        batch, batch2: what its forward takes: a tensor, a tuple or list (positional), or a mapping (by keyword); the
            first axis of each tensor is that of the examples. None: the kernel of `batch` with itself.
        output: one output alone, counted in the flattened outputs of an example. None: all C of them.
    Returns: a `TangentKernel`; its kernel is (N, N2, C, C), or (N, N2) for one output.
    Raises: BadInput: for a batch that is empty, holds NaN or does not fit; outputs that are not finite or depend on other
        examples; no trainable parameter, or one with NaN; an output that is not there; a model on the meta device.
    Paper: Jacot, Gabriel and Hongler 2018, arXiv 1806.07572 (its numbers of sections and theorems are recalled).

    >>> net = nn.Linear(2, 3)  # f_c(x) = w_c x + b_c: the kernel is x x' + 1 for equal outputs, 0 for others
    >>> found = ntk(net, torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> found.kernel[:, :, 0, 0]
    tensor([[2., 2.],
            [2., 6.]])
    >>> bool(found.kernel[:, :, 0, 1].any()), found.outputs.shape
    (False, torch.Size([2, 3]))
    """
    who = "ntk"
    require_model(model, who)
    with untouched(model, grad=True):
        first = look(model, batch, who)
        second = None if batch2 is None else look(model, batch2, who)
        count = first.out.shape[1]
        if second is not None and second.out.shape[1] != count:
            raise BadInput(f"{who} needs as many outputs in both batches, got {count} and {second.out.shape[1]}")
        if output is not None and not -count <= output < count:
            raise BadInput(f"{who} was asked for output {output}, but an example has {count}")
        unit = torch.eye(count, dtype=first.out.dtype, device=first.out.device)
        unit = unit if output is None else unit[output].unsqueeze(0)
        u, v = (unit.expand(len(s), *unit.shape) for s in (first, second or first))
        kernel = gram(model, first, u, second, v, who)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TangentKernel(kernel if output is None else kernel[:, :, 0, 0], first.out, size, second is None)


@dataclass(frozen=True)
class InfiniteKernels:
    """Kernels of a fully connected network in the limit of infinite width, float64.

    nngp: Sigma, the covariance of an output over the draw of the weights, between two inputs. ntk: Theta, the tangent
    kernel. Both are the same for each output, and zero between different ones.
    """

    nngp: Float[Tensor, "n n2"]
    ntk: Float[Tensor, "n n2"]


def infinite_ntk(
    x1: Float[Tensor, "n features"],
    x2: Float[Tensor, "n2 features"] | None = None,
    *,
    depth: int = 1,
    nonlinearity: str | Activation = "relu",
    sigma_w: float = 1.0,
    sigma_b: float = 0.1,
) -> InfiniteKernels:
    r"""The two kernels of infinitely wide fully connected networks, by the exact recursion over layers.

    With z^(l) = sigma_w / sqrt(n) W^(l) phi(z^(l-1)) + sigma_b b^(l), all entries of W and b drawn from N(0, 1), and
    u, v Gaussian with the variances and the covariance that Sigma^(l) gives for the two inputs,

    .. math:: \Sigma^{(1)} = \Theta^{(1)} = \frac{\sigma_w^2}{n_0} x^T x' + \sigma_b^2, \qquad
              \Sigma^{(l+1)} = \sigma_w^2 E[\phi(u) \phi(v)] + \sigma_b^2                          (Prop. 1)

    .. math:: \Theta^{(l+1)} = \Sigma^{(l+1)} + \sigma_w^2 \, \Theta^{(l)} \, E[\phi'(u) \phi'(v)]  (Thm. 1)

    The averages are closed forms for ReLU and erf, for others quadrature (about a millisecond a pair of inputs and
    layer): to nine digits and more where phi is smooth or has its kinks at zero (to six or more between inputs that
    nearly coincide), to about three where it has them elsewhere (hardtanh).

    Args:
        x1, x2: inputs; None: `x1` with itself.
        depth: hidden layers, at least 0; one linear layer follows them.
        nonlinearity: an activation's name or an elementwise callable.
        sigma_w, sigma_b: scales of weights and biases. The paper has sigma_w = 1 in its theorems and beta for sigma_b,
            0.1 in its experiments (recalled).
    Returns: `InfiniteKernels`.
    Raises: BadInput: for inputs that are not finite matrices of the same features, a negative depth, a sigma_w that is not
        above 0 or a sigma_b below 0, an unknown activation.
    Paper: Jacot, Gabriel and Hongler 2018, arXiv 1806.07572 (numbers recalled); sigma_w as in neural-tangents (stax.Dense
        with W_std and b_std, parameterization "ntk"), whose figures it reproduces.

    >>> k = infinite_ntk(torch.eye(2, dtype=torch.float64) * 2**0.5, depth=1, sigma_w=2**0.5, sigma_b=0.0)
    >>> k.nngp  # E[relu^2] is half the variance; 1 / pi of it remains between orthogonal inputs
    tensor([[2.0000, 0.6366],
            [0.6366, 2.0000]], dtype=torch.float64)
    """
    who = "infinite_ntk"
    phi = activation(nonlinearity, who)
    a, b = (_inputs(x, who) for x in (x1, x1 if x2 is None else x2))
    if a.shape[1] != b.shape[1]:
        raise BadInput(f"{who} needs inputs with the same features, got {a.shape[1]} and {b.shape[1]}")
    if depth < 0 or not (0 < sigma_w < math.inf and 0 <= sigma_b < math.inf):
        raise BadInput(
            f"{who} needs a depth of at least 0, sigma_w above 0 and sigma_b at least 0, got {depth}, {sigma_w}, {sigma_b}"
        )
    w2, b2 = sigma_w**2, sigma_b**2
    scale = w2 / a.shape[1]
    sigma = theta = scale * a @ b.mT + b2
    p, q = (scale * x.square().sum(1) + b2 for x in (a, b))
    for _ in range(depth):
        both, slopes = _averages(phi, p, q, sigma)
        sigma = w2 * both + b2
        theta = sigma + w2 * theta * slopes
        p, q = (w2 * gaussian_mean(lambda u: phi(u.clone()).square(), v.sqrt()) + b2 for v in (p, q))
        require_finite(sigma, who, "kernel")
    return InfiniteKernels(sigma, theta)


def _inputs(x: Tensor, who: str) -> Float[Tensor, "n features"]:
    require_finite(x, who, "inputs")
    if x.ndim != 2 or not x.numel():
        raise BadInput(f"{who} needs inputs as a matrix (examples, features), got a {describe(x)}")
    return x.double()


def _averages(
    phi: Activation, p: Float[Tensor, "n"], q: Float[Tensor, "n2"], k: Float[Tensor, "n n2"]
) -> tuple[Tensor, Tensor]:
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)] for u, v Gaussian with variances p, q and covariance k."""
    if phi is torch.erf:  # Williams 1997
        a, b = 1 + 2 * p.unsqueeze(1), 1 + 2 * q
        return 2 / math.pi * torch.arcsin(2 * k / (a * b).sqrt()), 4 / math.pi / (a * b - 4 * k.square()).sqrt()
    size = (p.unsqueeze(1) * q).sqrt()
    c = torch.where(size > 0, k / size.clamp_min(1e-300), 0.0).clamp(-1, 1)
    c = torch.where(c > 1 - 1e-13, 1.0, c)  # an input with itself: arccos would turn rounding into an angle
    if phi is torch.relu:  # Cho and Saul 2009
        angle = torch.arccos(c)
        both = size * ((1 - c.square()).sqrt() + (math.pi - angle) * c) / (2 * math.pi)
        return both, (math.pi - angle) / (2 * math.pi)
    both, slopes = (
        gaussian_pair_mean(f, c, p.sqrt().unsqueeze(1), q.sqrt()) for f in (phi, lambda x: derivative(phi, x))
    )
    return both, slopes


@dataclass(frozen=True)
class KernelDynamics:
    """Outputs over time under gradient flow with a constant tangent kernel and the squared error.

    Attributes:
        time: as asked.
        train: outputs on the training examples at each time; test: on the test examples, None without any.
        loss: squared error a training example, halved, at each time.
        rates: at which the residual's component along each eigenvector decays, rate eigenvalue / N, largest first.
        share: of the initial squared residual that lies in each component.
    """

    time: Float[Tensor, "times"]
    train: Float[Tensor, "times n outputs"]
    test: Float[Tensor, "times m outputs"] | None
    loss: Float[Tensor, "times"]
    rates: Float[Tensor, "components"]
    share: Float[Tensor, "components"]

    def summary(self) -> str:
        """The finding in plain words."""
        w, s = self.rates, self.share
        never = float(s[w <= 0].sum())
        gone = f"; {never:.1%} of it lies where the kernel is zero and is never learnt" if never > 1e-6 else ""
        half = (s.cumsum(0) >= 0.5).nonzero()[:1]
        where = f"the first {int(half) + 1} of {len(w)} components" if len(half) else f"none of {len(w)} components"
        return (
            f"Gradient flow with a constant kernel, {self.train.shape[1]} examples: the loss goes from {self.loss[0]:.3g} "
            f"at time {self.time[0]:g} to {self.loss[-1]:.3g} at {self.time[-1]:g}. Components decay at rates from "
            f"{w[0]:.3g} to {w[-1]:.3g}; half of the initial residual lies in {where}{gone}."
        )

    def plot(self) -> "Figure":
        """The loss over time, and the residual's share against the rate of each component (a matplotlib figure)."""
        require_extra("KernelDynamics.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = fig.subplots(1, 2)
        left.plot(self.time.tolist(), self.loss.tolist(), color="#4477aa")
        left.set(xlabel="time", ylabel="loss", yscale="log")
        right.plot(self.rates.tolist(), self.share.tolist(), "o", ms=3, color="#4477aa")
        right.set(xlabel="rate of decay", ylabel="share of the initial residual", xscale="log", yscale="log")
        return fig


def kernel_dynamics(
    kernel: Float[Tensor, "n n *c_c"],
    start: Float[Tensor, "n *outputs"],
    targets: Float[Tensor, "n *outputs"],
    time: Float[Tensor, "times"] | float,
    *,
    rate: float = 1.0,
    kernel_test: Float[Tensor, "m n *c_c"] | None = None,
    start_test: Float[Tensor, "m *outputs"] | None = None,
) -> KernelDynamics:
    r"""Outputs at given times under gradient flow on the squared error when the tangent kernel stays what it is.

    With the loss L = 1/(2N) sum_i \|f(x_i) - y_i\|^2 and the flow dtheta/dt = -eta dL/dtheta, outputs obey a linear
    equation, df(x)/dt = -eta/N sum_i Theta(x, x_i) (f(x_i) - y_i), so that (Sec. 5)

    .. math:: f_t(X) = y + e^{-\eta \Theta t / N} (f_0(X) - y)

    .. math:: f_t(x) = f_0(x) - \Theta(x, X) \, \Theta^{-1} (1 - e^{-\eta \Theta t / N}) (f_0(X) - y)

    each eigenvector of Theta decaying at its own rate, the leading ones first. A network with this kernel follows where
    the kernel holds still, as it does in wide networks; t = step for gradient descent with a small learning rate eta.
    The second line is evaluated without an inverse; components in which Theta is zero to rounding do not move.

    Args:
        kernel: of the training examples, (N, N, C, C), or (N, N) to apply to each output alone (the kernel of an
            infinitely wide network, or `pseudo_ntk`).
        start, targets: f_0 and y on the training examples, (N, C) or (N,).
        time: t, one or several, at least 0; infinity gives kernel regression.
        rate: eta.
        kernel_test, start_test: between test and training examples, and f_0 on the test examples; both or neither.
    Returns: a `KernelDynamics`, float64, its tensors on the kernel's device.
    Raises: BadInput: for shapes that do not fit each other, numbers that are not finite, a negative time or rate, a
        kernel that is not symmetric.
    Paper: Jacot, Gabriel and Hongler 2018, arXiv 1806.07572 (numbers recalled). The loss of
        `neural_tangents.predict.gradient_descent_mse` is averaged over outputs too: its time is C times this one's.

    >>> flow = kernel_dynamics(torch.diag(torch.tensor([2.0, 0.2])), torch.zeros(2), torch.ones(2), [0.0, 1.0, 1e9])
    >>> flow.train[:, :, 0]  # 1 - exp(-eigenvalue / 2)
    tensor([[0.0000, 0.0000],
            [0.6321, 0.0952],
            [1.0000, 1.0000]], dtype=torch.float64)
    """
    who = "kernel_dynamics"
    k, f, y = (_numbers(x, who, what) for x, what in ((kernel, "kernel"), (start, "start"), (targets, "targets")))
    t = torch.atleast_1d(torch.as_tensor(time, dtype=torch.float64)).to(k.device)
    if t.ndim > 1 or not t.numel() or not (t >= 0).all() or not 0 < rate < math.inf:
        raise BadInput(f"{who} needs times of at least 0 and a finite rate above 0, got {t.tolist()} and {rate}")
    f, y = (x.unsqueeze(1) if x.ndim == 1 else x for x in (f, y))
    n, c = f.shape if f.ndim == 2 else (0, 0)
    if f.ndim != 2 or f.shape != y.shape or k.shape not in ((n, n), (n, n, c, c)):
        raise BadInput(
            f"{who} needs a kernel (N, N) or (N, N, C, C) and start and targets (N, C), got {tuple(k.shape)}, "
            f"{tuple(start.shape)} and {tuple(targets.shape)}"
        )
    per_output = k.ndim == 2
    matrix = as_one(k)
    if not (matrix - matrix.mT).abs().max() <= 1e-4 * matrix.abs().max():
        raise BadInput(f"{who} needs a symmetric kernel, got one that differs from its transpose")
    w, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    w, vectors = w.flip(0), vectors.flip(1)
    w = torch.where(w > torch.finfo(torch.float64).eps * len(w) * w[0].clamp_min(0), w, 0.0)

    def flat(x: Tensor) -> Tensor:
        return x if per_output else x.reshape(-1, 1)

    residual = vectors.mT @ flat(f - y)  # one column an output, or one for all
    decay = torch.where(
        w > 0, -torch.expm1(-w * rate / n * t.unsqueeze(1).clamp_max(1e300)), 0.0
    )  # 1 - exp, (times, rows)
    train = f - (vectors @ (decay.unsqueeze(2) * residual)).view(len(t), n, c)
    test = None
    if kernel_test is not None or start_test is not None:
        if kernel_test is None or start_test is None:
            raise BadInput(f"{who} needs kernel_test and start_test together, got one of them")
        cross, g = _numbers(kernel_test, who, "kernel_test"), _numbers(start_test, who, "start_test")
        g = g.unsqueeze(1) if g.ndim == 1 else g
        m = len(g)
        if g.shape != (m, c) or cross.shape != (m, n, *k.shape[2:]):
            raise BadInput(
                f"{who} needs kernel_test (M, N, ...) like the kernel and start_test (M, C), got {tuple(cross.shape)} and "
                f"{tuple(start_test.shape)} beside a kernel {tuple(k.shape)}"
            )
        gain = decay / torch.where(w > 0, w, 1.0)
        test = g - (as_one(cross) @ (vectors @ (gain.unsqueeze(2) * residual))).view(len(t), m, c)
    loss = (train - y).square().sum((1, 2)) / (2 * n)
    energy = residual.square().sum(1)
    return KernelDynamics(t, train, test, loss, w * rate / n, energy / energy.sum().clamp_min(1e-300))


def _numbers(x: Tensor, who: str, what: str) -> Tensor:
    require_finite(x, who, what)
    if not x.numel() or not x.ndim:
        raise BadInput(f"{who} needs a {what} with entries on an axis of examples, got a {describe(x)}")
    return x.detach().double()
