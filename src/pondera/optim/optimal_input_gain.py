"""Two-stage training of a net with one hidden layer: output weights by least squares, input weights with optimal input gains."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pondera.errors import BadInput, require_finite

METHODS = ("bp", "oig-bp", "hwo", "oig-hwo")
WHO = "train_two_stage"
HALVINGS = 6  # of a step after which the error rose


@dataclass(frozen=True)
class OneHidden:
    """A net with one hidden layer of tanh units, linear outputs and direct connections: y = W_oi x + W_oh tanh(W x).

    Attributes:
        W: input weights, the last column for the constant input 1.
        W_oi: from the inputs (and 1) straight to the outputs.
        W_oh: from the hidden units to the outputs.
    """

    W: Float[Tensor, "hidden inputs+1"]
    W_oi: Float[Tensor, "outputs inputs+1"]
    W_oh: Float[Tensor, "outputs hidden"]

    def __call__(self, x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n outputs"]:
        X = with_constant(x)
        return X @ self.W_oi.T + (X @ self.W.T).tanh() @ self.W_oh.T


@dataclass(frozen=True)
class TwoStage:
    """What the training came to.

    Attributes:
        net: the trained net, a function of inputs.
        errors: mean squared error summed over outputs, at the start (after the first output weights) and after each
            iteration; it never rises.
        multiplications: how many were done by then, counted as `multiplications` does.
        converged: whether the last iteration lowered the error by less than `tol` of it.
    """

    net: OneHidden
    errors: list[float] = field(repr=False)
    multiplications: list[float] = field(repr=False)
    converged: bool

    @property
    def iterations(self) -> int:
        return len(self.errors) - 1


def train_two_stage(
    x: Float[Tensor, "n inputs"],
    y: Float[Tensor, "n outputs"],
    hidden: int | OneHidden = 20,
    *,
    method: str = "oig-hwo",
    iterations: int = 100,
    tol: float = 0.0,
    generator: Generator | None = None,
) -> TwoStage:
    r"""Train a net with one hidden layer on all data at once, with optimal input gains (OIG) or without.

    With X the inputs and a constant, net = X W^T, O = tanh(net), y = X W_oi^T + O W_oh^T and E the mean squared error
    summed over the outputs, an iteration has two stages:

    1. *Output weights* (OWO): [W_oi, W_oh] by linear least squares on Z = [X, O].
    2. *Input weights*, along the negative gradient G = -dE/dW:

    .. math::
        \text{bp:}\quad & W \leftarrow W + z\, G \\
        \text{hwo:}\quad & W \leftarrow W + z\, G R^{-1}, \qquad R = X^T X / N_v \\
        \text{oig-bp:}\quad & W \leftarrow W + G\, \mathrm{diag}(r) \\
        \text{oig-hwo:}\quad & W \leftarrow W + G A^T \mathrm{diag}(r)\, A, \qquad A R A^T = I

    z and r are optimal to second order (Gauss-Newton): with e the residuals and U the change of the outputs by each of z
    or r, they solve least squares of U r = e. Multiplying inputs by gains and mapping the step back to the net as it is
    multiplies the gradient by a diagonal matrix: r holds these gains, squared. So OIG does not care in which units the
    inputs come, one by one, and HWO, which is BP on whitened inputs, not in which linear mixture. A (the symmetric root of
    R^{-1}, by our choice) decides in which directions OIG-HWO may set gains. A step after which E, with the best output
    weights, would rise is halved.

    Args:
        x: inputs, float32 or float64. Standardise targets, not inputs: the methods differ in what scales do to them.
        y: targets; one-hot or +-1 columns for classes.
        hidden: number of hidden units, drawn Gaussian over standardised inputs so that each net input has mean 0.5 and
            deviation 1 over the data (the customary net control of these authors; recalled), or a net to go on from.
        method: "bp", "oig-bp", "hwo" or "oig-hwo".
        iterations: at most so many.
        tol: stop when an iteration lowers E by less than this share of it; 0 never does.
        generator: of the start.
    Returns: a `TwoStage` with the net, the errors, and the multiplications by iteration.
    Raises: BadInput: for inputs or targets that are not finite matrices of one length and dtype, an unknown method, a
        number out of range, or a net that does not fit.
    Paper: Rane, Tyagi, Malalur, Shinge, Manry 2023, arXiv 2303.17732. No code was found, and the equations are derived
        from the abstract's statements; its equivalences are tested. The number of multiplications is that of our
        formulas, by the same rules for every method, and not the paper's.

    >>> x = torch.linspace(-2, 2, 100, dtype=torch.float64)[:, None]
    >>> found = train_two_stage(x, x.sin(), 4, iterations=20, generator=torch.Generator().manual_seed(0))
    >>> found.errors[-1] < 1e-4 * x.sin().square().mean(), found.net(x).shape
    (tensor(True), torch.Size([100, 1]))
    """
    X, y = _checked(x, y, method, iterations, tol)
    net = hidden if isinstance(hidden, OneHidden) else start(x, y.shape[1], hidden, generator)
    if (net.W.shape[1], net.W_oi.shape, net.W_oh.shape) != (
        X.shape[1],
        (y.shape[1], X.shape[1]),
        (y.shape[1], len(net.W)),
    ):
        raise BadInput(
            f"{WHO} needs a net of {X.shape[1] - 1} inputs and {y.shape[1]} outputs, got one with weights "
            f"{tuple(net.W.shape)}, {tuple(net.W_oi.shape)} and {tuple(net.W_oh.shape)}"
        )
    metric = input_metric(X) if "hwo" in method else None
    once, each, again = multiplications(method, len(X), X.shape[1], len(net.W), y.shape[1])
    W = net.W.to(X.dtype)
    W_oi, W_oh, O, e = output_weights(X, W, y)
    errors, counts, converged = [mean_square(e)], [once + again], False
    for _ in range(iterations):
        step = input_step(X, O, e, W_oh, method, metric)
        count = counts[-1] + each
        for k in range(HALVINGS + 1):
            new = W + step / 2**k
            a, b, O_new, e_new = output_weights(X, new, y)
            count += again
            if mean_square(e_new) <= errors[-1]:
                W, W_oi, W_oh, O, e = new, a, b, O_new, e_new
                break
        errors.append(mean_square(e))
        counts.append(count)
        converged = tol > 0 and errors[-2] - errors[-1] < tol * errors[-2]
        if converged:
            break
    return TwoStage(OneHidden(W, W_oi, W_oh), errors, counts, converged)


def input_step(
    X: Float[Tensor, "n inputs"],
    O: Float[Tensor, "n hidden"],
    e: Float[Tensor, "n outputs"],
    W_oh: Float[Tensor, "outputs hidden"],
    method: str,
    metric: tuple[Tensor, Tensor] | None,
) -> Float[Tensor, "hidden inputs"]:
    """The change of the input weights; O are the hidden outputs and e the residuals."""
    slope = 1 - O.square()  # tanh'(net)
    G = 2 * ((e @ W_oh) * slope).T @ X / len(X)
    if method in ("bp", "hwo"):
        D = G if metric is None else G @ metric[1]
        u = (slope * (X @ D.T)) @ W_oh.T  # dy/dz
        z = (e * u).sum() / u.square().sum().clamp(min=torch.finfo(u.dtype).tiny)
        return z * D
    A = torch.eye(X.shape[1], dtype=X.dtype, device=X.device) if metric is None else metric[0]
    inputs, D = X @ A.T, G @ A.T
    # U[n, m, i] = sum_k W_oh[m, k] slope[n, k] D[k, i] inputs[n, i]: how output m changes with the gain of input i
    U = torch.stack([(slope * w) @ D * inputs for w in W_oh], 1).flatten(0, 1)
    r = least_squares(U, e.reshape(-1, 1))[:, 0]
    return (D * r) @ A


def output_weights(
    X: Float[Tensor, "n inputs"], W: Float[Tensor, "hidden inputs"], y: Float[Tensor, "n outputs"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_oi and W_oh by least squares, the hidden outputs, and the residuals."""
    O = (X @ W.T).tanh()
    Z = torch.cat([X, O], 1)
    V = least_squares(Z, y).T
    return V[:, : X.shape[1]], V[:, X.shape[1] :], O, y - Z @ V.T


def least_squares(U: Float[Tensor, "n k"], t: Float[Tensor, "n m"]) -> Float[Tensor, "k m"]:
    """The solution of least norm of the normal equations, columns scaled to unit length first; dead ones get 0."""
    size = U.norm(dim=0)
    scale = torch.where(size > 0, 1 / size.clamp(min=torch.finfo(U.dtype).tiny), 0.0)
    V = U * scale
    values, vectors = torch.linalg.eigh(V.T @ V)
    keep = values > values[-1] * len(values) * torch.finfo(U.dtype).eps * 10
    inverse = torch.where(keep, 1 / torch.where(keep, values, 1.0), 0.0)
    return scale[:, None] * (vectors @ (inverse[:, None] * (vectors.T @ (V.T @ t))))


def input_metric(X: Float[Tensor, "n inputs"]) -> tuple[Tensor, Tensor]:
    """A, the symmetric root of R^-1 (the pseudo-inverse where inputs depend on each other), and R^-1; R is uncentred."""
    values, vectors = torch.linalg.eigh(X.T @ X / len(X))
    keep = values > values[-1] * len(values) * torch.finfo(X.dtype).eps * 10
    root = torch.where(keep, torch.where(keep, values, 1.0).rsqrt(), 0.0)
    return (vectors * root) @ vectors.T, (vectors * root.square()) @ vectors.T


def start(x: Float[Tensor, "n inputs"], outputs: int, hidden: int, generator: Generator | None = None) -> OneHidden:
    """A net whose net inputs have mean 0.5 and deviation 1 over the data; output weights 0."""
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
        raise BadInput(f"{WHO} needs a whole number of at least 1 for hidden, or a OneHidden, got {hidden!r}")
    spread = x.std(0, correction=0)
    w = torch.randn(hidden, x.shape[1], generator=generator, dtype=torch.float64).to(x)
    w = w * torch.where(spread > 0, 1 / torch.where(spread > 0, spread, 1.0), 0.0)  # every input counts alike at first
    deviation = (x @ w.T).std(0, correction=0)
    w = w / torch.where(deviation > 0, deviation, 1.0)[:, None]
    bias = 0.5 - (x @ w.T).mean(0)
    W = torch.cat([w, bias[:, None]], 1)
    return OneHidden(W, W.new_zeros(outputs, W.shape[1]), W.new_zeros(outputs, hidden))


def multiplications(method: str, n: int, inputs: int, hidden: int, outputs: int) -> tuple[float, float, float]:
    """Multiplications of what is done once, of each iteration's step, and of each solution for the output weights.

    A product of a (a, b) and a (b, c) matrix counts abc, a symmetric one half of it, an eigendecomposition of order k with
    what follows 4/3 k^3 (that of Householder's tridiagonal form), a solution k^2 for each right-hand side.
    """
    k = inputs + hidden
    forward = n * inputs * hidden
    solve = n * k * (k + 1) / 2 + 4 / 3 * k**3 + n * k * outputs * 2 + k * k * outputs
    gradient = n * hidden * (outputs + 2) + n * hidden * inputs
    once = n * inputs * (inputs + 1) / 2 + 4 / 3 * inputs**3 if "hwo" in method else 0.0
    metric = hidden * inputs**2 if "hwo" in method else 0.0
    if method in ("bp", "hwo"):
        step = n * hidden * inputs + n * hidden * (outputs + 1) + 2 * n * outputs
        return once, gradient + metric + step, forward + solve
    columns = outputs * (n * hidden + n * hidden * inputs + n * inputs)
    system = n * outputs * inputs * (inputs + 3) / 2 + 4 / 3 * inputs**3
    return once + (n * inputs**2 if metric else 0.0), gradient + 2 * metric + columns + system, forward + solve


def with_constant(x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n inputs+1"]:
    """Inputs with a last column of ones."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def mean_square(e: Float[Tensor, "n outputs"]) -> float:
    return float(e.square().sum() / len(e))


def _checked(x: Tensor, y: Tensor, method: str, iterations: int, tol: float) -> tuple[Tensor, Tensor]:
    for what, t in (("inputs", x), ("targets", y)):
        require_finite(t, WHO, what)
        if t.ndim != 2 or 0 in t.shape:
            raise BadInput(f"{WHO} needs {what} as a matrix with a row an example, got shape {tuple(t.shape)}")
    if len(x) != len(y) or x.dtype != y.dtype or x.dtype not in (torch.float32, torch.float64):
        raise BadInput(
            f"{WHO} needs inputs and targets of one length and of one dtype, float32 or float64, got "
            f"{len(x)} {x.dtype} and {len(y)} {y.dtype}"
        )
    if method not in METHODS:
        raise BadInput(f"{WHO} knows the methods {', '.join(METHODS)}, got {method!r}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise BadInput(f"{WHO} needs a whole number of at least 0 for iterations, got {iterations!r}")
    if not 0 <= tol < 1:
        raise BadInput(f"{WHO} needs a tol of at least 0 and below 1, got {tol}")
    return with_constant(x), y
