"""KL-Shampoo: two-sided whitening by the Kronecker factors that minimise a Kullback-Leibler divergence."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput, describe, require_finite
from pondera.optim._base import Group, Rest, State, accurate, in_range, settings_of_the_rest, whole_number
from pondera.optim._factors import FactoredOptimizer, counted

MOST = 4000  # no inverse root of an eigenvalue grows beyond this (reference code)


class KLShampoo(FactoredOptimizer):
    r"""Whiten the momentum by two factors, each estimated from gradients whitened by the other one.

    Read as a covariance, S_a (x) S_b is closest to that of the gradients G (m x n, mean zero) in the Kullback-Leibler
    sense where

    .. math:: S_a = \tfrac1n E[G S_b^{-1} G^T], \qquad S_b = \tfrac1m E[G^T S_a^{-1} G]

    Shampoo's rule leaves the other side's inverse out. Kept as eigenbases Q and eigenvalues l (the moving-eigenbasis
    form), a step is

    .. math::
        D &= Q_a \bigl[ (Q_a^T M Q_b) \oslash (\sqrt{l_a l_b^T} + \epsilon) \bigr] Q_b^T,
            \qquad W \leftarrow (1 - \eta\lambda) W - \eta D \\
        S_a &\leftarrow \beta_2 S_a + \tfrac{1 - \beta_2}{n} G Q_b \,\mathrm{diag}(1 / l_b)\, Q_b^T G^T \text{, and } S_b
            \text{ alike} \\
        l_a &\leftarrow \beta_2 l_a + (1 - \beta_2)\,\mathrm{mean}_j\, (Q_a^T G Q_b)_{ij}^2 / l_{b,j}
            \text{, and } l_b \text{ alike}

    with, every T steps, Q the orthogonal factor of S Q (one step of orthogonal iteration). No second moment of every entry
    is kept, as SOAP does in the same eigenbases. Embeddings, norms, biases and the head go to AdamW: pass
    ``groups(model)``.

    Args:
        params: parameters, or groups as `groups` makes them. Weights of convolutions are flattened to (out, rest).
        lr: eta (0.01: chosen here; entries of D tend to about 1, as Adam's do. Reference code: 1e-4).
        momentum: of the gradient (0.9: reference code).
        beta2: decay of factors and eigenvalues (0.98: reference code).
        eps: epsilon, absolute (1e-8: reference code).
        start: the eigenvalues of both sides at first (0.1: reference code). The first steps are those of momentum SGD at
            lr / start, until about log(start / |G|) / (1 - beta2) steps have brought the eigenvalues down (derived).
        basis_every: T, steps from one update of the eigenbases to the next (10: reference code).
        weight_decay: decoupled decay lambda of matrices, multiplied by lr (0; the reference code has 0.01).
        vector_lr_ratio: AdamW's rate over lr for the rest.
        betas, vector_eps, vector_weight_decay: AdamW's own.
        rest: another optimizer than AdamW for the rest: the name of a class of torch.optim, or the class.
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient, a complex parameter, or a gradient that
        is not finite.
    Paper: Lin, Lowe, Dangel, Eschenhagen, Xu, Grosse 2025, arXiv 2509.03378. Code: github.com/yorkerlin/KL-Methods
        (read here; the paper's text was not). Authors' names are recalled.

    Where we differ from the code: it takes no step with the first gradient, ours is one of momentum SGD; it works in
    bfloat16, we keep factors in float32 (float64); it decays the weight after the step, we before; it does not take
    vectors, and treats kernels of three dimensions with a factor each, we as a matrix. An eigenvalue is kept at 1 / max(10,
    min(d, 4000))^2 at least, as the code's clamp has it: in narrow layers with tiny gradients that bounds the whitening.

    >>> w = torch.nn.Parameter(torch.zeros(2, 3))
    >>> optimizer = KLShampoo([w], lr=0.1)
    >>> w.grad = torch.ones(2, 3)
    >>> optimizer.step()
    >>> w.data[0].round(decimals=3)  # lr / start * (1 - momentum) * G
    tensor([-0.1000, -0.1000, -0.1000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        *,
        momentum: float = 0.9,
        beta2: float = 0.98,
        eps: float = 1e-8,
        start: float = 0.1,
        basis_every: int = 10,
        weight_decay: float = 0.0,
        vector_lr_ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        vector_eps: float = 1e-8,
        vector_weight_decay: float = 0.0,
        rest: Rest = None,
    ) -> None:
        own: Group = {"lr": lr, "momentum": momentum, "nesterov": False, "beta2": beta2, "eps": eps, "start": start}
        own |= {"basis_every": basis_every, "weight_decay": weight_decay}
        of_rest = settings_of_the_rest(vector_lr_ratio, betas, vector_eps, vector_weight_decay)
        super().__init__(params, own | of_rest, rest)

    def _check(self, group: Group) -> None:
        super()._check(group)
        in_range("KLShampoo", "beta2", group["beta2"], 0, 1)
        in_range("KLShampoo", "eps", group["eps"], 0)
        in_range("KLShampoo", "start", group["start"], 0, open_low=True)
        whole_number("KLShampoo", "basis_every", group["basis_every"])

    def _direction(self, update: Tensor, gradient: Tensor | None, state: State, group: Group) -> Tensor:
        assert gradient is not None
        t = int(state["step"]) if "step" in state else 0
        turn = t > 0 and t % int(group["basis_every"]) == 0
        counted(state)
        M, G = (x.to(accurate(update.dtype)) for x in (update, gradient))
        if t == 0:
            self._begin(G, state, group)
        Qa, Qb, la, lb = (state[name] for name in ("left_basis", "right_basis", "left_values", "right_values"))
        white = (Qa.mT @ M @ Qb) / ((la.unsqueeze(1) * lb).sqrt() + group["eps"])
        D = Qa @ white @ Qb.mT
        if t > 0:
            self._estimate(G, state, group)
        if turn:
            for side in ("left", "right"):
                state[f"{side}_basis"] = torch.linalg.qr(state[f"{side}_factor"] @ state[f"{side}_basis"])[0]
        return D

    def _begin(self, G: Tensor, state: State, group: Group) -> None:
        for side, X in (("left", G), ("right", G.mT)):
            S = X @ X.mT * ((1 - group["beta2"]) / X.shape[1])
            state[f"{side}_factor"] = S
            state[f"{side}_basis"] = torch.linalg.eigh(S)[1].flip(1)
            state[f"{side}_values"] = S.new_full((len(S),), group["start"])

    def _estimate(self, G: Tensor, state: State, group: Group) -> None:
        """Take the gradient into factors and eigenvalues, whitened by the other side as it was."""
        Qa, Qb, la, lb = (state[name] for name in ("left_basis", "right_basis", "left_values", "right_values"))
        half, new = Qa.mT @ G, 1 - group["beta2"]
        a, b = (G @ Qb) / lb.sqrt(), half.mT / la.sqrt()  # G S_b^-1/2 and G^T S_a^-1/2, each in the other's basis
        both = (half @ Qb).square()
        for side, X, values in (("left", a, (both / lb).mean(1)), ("right", b, (both / la.unsqueeze(1)).mean(0))):
            state[f"{side}_factor"].addmm_(X, X.mT, beta=group["beta2"], alpha=new / X.shape[1])
            least = 1 / max(10, min(len(values), MOST)) ** 2
            state[f"{side}_values"].lerp_(values, new).clamp_(min=least)


@dataclass(frozen=True)
class KLFit:
    """The Kronecker covariance left (x) right closest to the given gradients in the Kullback-Leibler sense.

    left, right: positive definite, of equal mean eigenvalue. objective: see `kl_objective`. converged: whether the factors
    stood still to the tolerance; iterations: rounds taken."""

    left: Float[Tensor, "m m"]
    right: Float[Tensor, "n n"]
    objective: float
    converged: bool
    iterations: int


def kl_objective(
    gradients: Float[Tensor, "samples m n"], left: Float[Tensor, "m m"], right: Float[Tensor, "n n"]
) -> Float[Tensor, ""]:
    r"""The divergence KL(N(0, E[vec(G) vec(G)^T]) || N(0, left (x) right)) up to what does not depend on the factors.

    .. math:: \tfrac12 \bigl( E\, \mathrm{tr}(S_a^{-1} G S_b^{-1} G^T) + n \log\det S_a + m \log\det S_b \bigr)

    Args:
        gradients: (samples, m, n). left, right: S_a (m x m) and S_b (n x n), positive definite.
    Returns: a scalar, differentiable.
    Raises: BadInput: for gradients that are not (samples, m, n) or not finite, or factors that are not positive definite.
    Paper: Lin et al. 2025, arXiv 2509.03378 (Sec. 3, recalled).

    >>> kl_objective(torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1))
    tensor(0.5000)
    """
    G = _samples(gradients, "kl_objective")
    roots = []
    for name, S, d in (("left", left, G.shape[1]), ("right", right, G.shape[2])):
        if tuple(S.shape) != (d, d):
            raise BadInput(f"kl_objective needs a {name} factor of shape ({d}, {d}), got a {describe(S)}")
        lower, failed = torch.linalg.cholesky_ex(S.to(G.dtype))
        if failed:
            raise BadInput(f"kl_objective needs a positive definite {name} factor, got one that is not")
        roots.append(lower)
    a, b = roots
    white = torch.linalg.solve_triangular(a, G, upper=False)
    white = torch.linalg.solve_triangular(b, white.mT, upper=False)
    logdet = G.shape[2] * a.diagonal().log().sum() + G.shape[1] * b.diagonal().log().sum()
    return white.square().sum() / (2 * len(G)) + logdet


@torch.no_grad()
def kl_fit(gradients: Float[Tensor, "samples m n"], *, iterations: int = 500, tol: float = 1e-10) -> KLFit:
    r"""The two-sided estimate that KL-Shampoo follows with moving averages, solved exactly on given gradients.

    Each side is computed with the inverse of the other until both stand still; every round lowers the divergence, as in
    the maximum-likelihood fit of a matrix normal law (Dutilleul 1999). A reference for small matrices: each round costs
    as much as all gradients.

    Args:
        gradients: (samples, m, n); at least about m/n + n/m samples, or no positive definite pair is the best.
        iterations: rounds at most.
        tol: relative change of a factor at which they end.
    Returns: `KLFit`.
    Raises: BadInput: if they are not (samples, m, n), not finite, or too few for a positive definite pair.
    Paper: Lin et al. 2025, arXiv 2509.03378.

    >>> G = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [2.0, 0.0]]])  # twice the size in the second row
    >>> fit = kl_fit(G)
    >>> fit.left / fit.left[0, 0]
    tensor([[1., 0.],
            [0., 4.]])
    """
    G = _samples(gradients, "kl_fit")
    N, m, n = G.shape
    A, B = torch.eye(m).to(G), torch.eye(n).to(G)
    converged, done = False, 0
    while done < iterations and not converged:
        done += 1
        old = A
        A = torch.tensordot(G @ _inverse(B), G, dims=([0, 2], [0, 2])) / (N * n)
        B = torch.tensordot(G.mT @ _inverse(A), G.mT, dims=([0, 2], [0, 2])) / (N * m)
        c = (B.trace() / n) ** 0.5 / (A.trace() / m) ** 0.5
        A, B = A * c, B / c
        converged = bool((A - old).norm() <= tol * A.norm())
    _inverse(B)  # or it says why there is none
    return KLFit(A, B, float(kl_objective(G, A, B)), converged, done)


def _samples(gradients: Tensor, who: str) -> Tensor:
    G = require_finite(gradients, who, "gradients")
    if G.ndim != 3 or G.numel() == 0:
        raise BadInput(f"{who} needs gradients of shape (samples, m, n), got a {describe(G)}")
    return G.to(accurate(G.dtype))


def _inverse(S: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(S)
    d = lower.diagonal()
    if failed or d.min() <= d.max() * (len(S) * torch.finfo(S.dtype).eps) ** 0.5:
        raise BadInput(
            "kl_fit needs gradients that span every direction of both sides, got a factor that is singular; give more"
        )
    return torch.cholesky_inverse(lower)
