"""Shampoo with the exponent its reading as a Kronecker approximation asks for, and a check of that approximation."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput, describe, require_finite
from pondera.linalg import matrix_power
from pondera.optim._base import Group, Rest, State, accurate, in_range, settings_of_the_rest, whole_number
from pondera.optim._factors import FactoredOptimizer, blocks, counted

GRAFTS = (None, "sgd", "adam")


class Shampoo(FactoredOptimizer):
    r"""Whiten a matrix's momentum from both sides by powers of two running averages of its gradients.

    For a weight W (m x n) with gradient G and momentum M:

    .. math::
        L &\leftarrow \beta_2 L + (1 - \beta_2) G G^T, \qquad R \leftarrow \beta_2 R + (1 - \beta_2) G^T G \\
        D &= \mathrm{tr}(L)^{2p - 1/2} \; L^{-p} M R^{-p}, \qquad W \leftarrow (1 - \eta\lambda) W - \eta D

    With H = E[vec(G) vec(G)^T], the matrix whose inverse root Adagrad and Gauss-Newton methods take, L (x) R / tr(L) is
    one step of power iteration, from the identity, toward H's best Kronecker approximation (Prop. 1 in our words;
    `kronecker_fit` puts it to the test on given gradients). That reading makes the power 1/2, "Shampoo squared": D =
    tr(L)^{1/2} L^{-1/2} M R^{-1/2} approximates H^{-1/2} vec(M), and has entries of about 1, as Adam's. The classical
    power 1/4 takes L^{1/2} (x) R^{1/2} for H. The trace's exponent is what makes D free of the gradient's scale (derived;
    1/2 at p = 1/2, 0 at p = 1/4). Averages are taken free of their bias: L / (1 - beta_2^t).

    Args:
        params: parameters, or groups as `groups` makes them. Weights of convolutions are flattened to (out, rest).
        lr: eta (0.01: chosen here, between what suits Adam and Muon).
        power: p on each side, 1/2 (the paper's reading) or 1/4 (Gupta et al. 2018), or another above 0.
        momentum: of the gradient, before it is whitened (0.9: usual).
        beta2: decay of L and R (0.95: SOAP's code, by the same authors). 1 sums them up, as Gupta et al. do.
        eps: added to the eigenvalues of L and R, relative to the largest (1e-3: chosen here). At power 1/2 a direction
            without gradients so far, rounding included, is amplified by up to 1 / eps.
        trace: whether the factor of the trace is applied. Without it and at power 1/2 the step shrinks as gradients grow.
        graft: None; "sgd": D takes the norm of M; "adam": that of Adam's step, at the memory of its second moment.
        root_every: steps from one computation of the roots to the next (10: SOAP's code), after as many with one each.
            Above 1 the roots are kept.
        block_size: larger matrices are cut into blocks of at most this a side, each with its own factors; None: never.
        weight_decay: decoupled decay lambda of matrices, multiplied by lr.
        vector_lr_ratio: AdamW's rate over lr for the rest.
        betas, vector_eps, vector_weight_decay: AdamW's own; betas[1] and vector_eps also serve graft="adam".
        rest: another optimizer than AdamW for the rest: the name of a class of torch.optim, or the class.
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient, a complex parameter, or a gradient that
        is not finite.
    Paper: Morwani, Shapira, Vyas, Malach, Kakade, Janson 2024, arXiv 2406.17748; no repository of its own was found. The
        paper is an analysis: it does not claim that the power 1/2 trains faster.

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    >>> Shampoo([w], lr=1.0, power=1 / 4, eps=0.0).step()  # one gradient: singular values are evened
    >>> w.data.round(decimals=3)
    tensor([[-0.1000,  0.0000],
            [ 0.0000, -0.1000]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        *,
        power: float = 1 / 2,
        momentum: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-3,
        trace: bool = True,
        graft: str | None = None,
        root_every: int = 10,
        block_size: int | None = 1024,
        weight_decay: float = 0.0,
        vector_lr_ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        vector_eps: float = 1e-8,
        vector_weight_decay: float = 0.0,
        rest: Rest = None,
    ) -> None:
        own: Group = {"lr": lr, "power": power, "momentum": momentum, "nesterov": False, "beta2": beta2, "eps": eps}
        own |= {"trace": trace, "graft": graft, "root_every": root_every, "block_size": block_size}
        of_rest = settings_of_the_rest(vector_lr_ratio, betas, vector_eps, vector_weight_decay)
        super().__init__(params, own | of_rest | {"weight_decay": weight_decay}, rest)

    def _check(self, group: Group) -> None:
        super()._check(group)
        in_range("Shampoo", "power", group["power"], 0, open_low=True)
        if group["beta2"] != 1:
            in_range("Shampoo", "beta2", group["beta2"], 0, 1)
        in_range("Shampoo", "eps", group["eps"], 0)
        whole_number("Shampoo", "root_every", group["root_every"])
        if group["block_size"] is not None:
            whole_number("Shampoo", "block_size", group["block_size"])
        if group["graft"] not in GRAFTS:
            raise BadInput(f"Shampoo knows the grafts None, 'sgd' and 'adam', got {group['graft']!r}")

    def _direction(self, update: Tensor, gradient: Tensor | None, state: State, group: Group) -> Tensor:
        assert gradient is not None
        now = self._roots_now(state, group)
        M, G = (x.to(accurate(update.dtype)) for x in (update, gradient))
        t = counted(state)
        D = torch.empty_like(M)
        for i, at in enumerate(blocks(M.shape, group["block_size"])):
            left, right = self._roots(G[at], state, i, t, now, group)
            D[at] = left @ M[at] @ right
        return grafted(D, M, G, state, t, group)

    def _roots_now(self, state: State, group: Group) -> bool:
        every = int(group["root_every"])
        t = int(state["step"]) if every > 1 and "step" in state else 0
        return t < every or t % every == 0  # in every one of the first steps: a few gradients span little

    def _roots(self, G: Tensor, state: State, i: int, t: int, now: bool, group: Group) -> tuple[Tensor, Tensor]:
        """L^-p times the trace's factor, and R^-p, of one block, after its factors took in G."""
        beta2, p, roots = group["beta2"], group["power"], (f"left_root_{i}", f"right_root_{i}")
        factors = []
        for name, X in (("left", G), ("right", G.mT)):
            if f"{name}_{i}" not in state:
                state[f"{name}_{i}"] = X.new_zeros(len(X), len(X))
            F = state[f"{name}_{i}"]
            factors.append(F.addmm_(X, X.mT, beta=beta2, alpha=1 if beta2 == 1 else 1 - beta2))
        if not now and roots[0] in state:
            return state[roots[0]], state[roots[1]]
        debias = 1.0 if beta2 == 1 else 1 - beta2 ** (t + 1)
        L, R = (F / debias for F in factors)
        left, right = (matrix_power(F, -p, eps=group["eps"], who="Shampoo") for F in (L, R))
        if group["trace"]:
            left = left * L.trace() ** (2 * p - 0.5)
        if group["root_every"] > 1:
            state[roots[0]], state[roots[1]] = left, right
        return left, right


def grafted(D: Tensor, M: Tensor, G: Tensor, state: State, t: int, group: Group) -> Tensor:
    """D with the norm that the grafted method's own step from M would have."""
    if group["graft"] is None:
        return D
    size = M
    if group["graft"] == "adam":
        beta = group["betas"][1]
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(G)
        v = state["exp_avg_sq"].mul_(beta).addcmul_(G, G, value=1 - beta)
        size = M / ((v / (1 - beta ** (t + 1))).sqrt() + group["vector_eps"])
    return D * (size.norm() / (D.norm() + 1e-12))


@dataclass(frozen=True)
class KroneckerFit:
    """How well Kronecker products stand for H = E[vec(G) vec(G)^T]: the best one, Shampoo's square, Shampoo's own.

    left, right: the best pair, ||H - left (x) right||_F smallest; positive semidefinite, of equal norm. L, R: E[G G^T]
    and E[G^T G]. cosine: with H, by name: "optimum", "shampoo_squared" (L (x) R), "shampoo" (L^1/2 (x) R^1/2). error:
    ||H - K|| / ||H||, of L (x) R / tr(L) and of L^1/2 (x) R^1/2 as they are. by_step: the cosine after 0, 1, 2, ...
    steps of power iteration from the identity; the second is Shampoo squared's.
    """

    left: Float[Tensor, "m m"]
    right: Float[Tensor, "n n"]
    L: Float[Tensor, "m m"]
    R: Float[Tensor, "n n"]
    cosine: dict[str, float]
    error: dict[str, float]
    by_step: list[float]

    def summary(self) -> str:
        """One line a candidate."""
        return "\n".join(f"{name:16s} cosine {c:.4f}, error {self.error[name]:.4f}" for name, c in self.cosine.items())


@torch.no_grad()
def kronecker_fit(gradients: Float[Tensor, "samples m n"], *, steps: int = 50, tol: float = 1e-12) -> KroneckerFit:
    r"""Put Shampoo's approximation to the test: the best Kronecker product for given gradients beside Shampoo's.

    With vec taken row by row, H = E[vec(G) vec(G)^T] is rearranged to \hat H of (m^2, n^2), whose best rank-one
    approximation is the best Kronecker product (Van Loan and Pitsianis 1993). Power iteration for it never needs H:

    .. math:: \hat H \,\mathrm{vec}(B) = \mathrm{vec}(E[G B G^T]), \qquad \hat H^T \mathrm{vec}(A) = \mathrm{vec}(E[G^T A G])

    From B = I and A = I these are L and R: Shampoo's pair is one step, each side from the identity.

    Args:
        gradients: one a sample, (samples, m, n). Of single examples with labels drawn from the model, H is the
            Gauss-Newton matrix; of batches over time, Adagrad's. A batch's mean gradient is not a sample's: with the real
            labels it tells more of the mean than of the spread.
        steps: power iterations at most.
        tol: they end when the cosine grows by less.
    Returns: `KroneckerFit`, in float32 or float64 as the gradients are.
    Raises: BadInput: if they are not (samples, m, n), not finite, or all zero.
    Paper: Morwani et al. 2024, arXiv 2406.17748 (Sec. 2 and 3).

    >>> a, b = torch.randn(2, 200, 3, 1, generator=torch.Generator().manual_seed(0)).double()
    >>> fit = kronecker_fit(a @ b.mT)  # columns and rows are independent
    >>> fit.cosine["optimum"] >= fit.cosine["shampoo_squared"] > fit.cosine["shampoo"]
    True
    """
    G = require_finite(gradients, "kronecker_fit", "gradients")
    if G.ndim != 3 or G.numel() == 0:
        raise BadInput(f"kronecker_fit needs gradients of shape (samples, m, n), got a {describe(G)}")
    G = G.to(accurate(G.dtype))
    largest = float(G.abs().max())
    if not largest:
        raise BadInput("kronecker_fit needs a gradient that is not zero, got none")
    G = G / largest  # squares of squares are taken below
    N, m, n = G.shape
    flat = G.reshape(N, m * n)
    gram = flat @ flat.mT if m * n >= N else flat.mT @ flat
    size = float(gram.norm()) / N  # ||H||

    def rows(B: Tensor) -> Tensor:  # E[G B G^T]
        return torch.tensordot(G @ B, G, dims=([0, 2], [0, 2])) / N

    def columns(A: Tensor) -> Tensor:  # E[G^T A G]
        return torch.tensordot(G.mT @ A, G.mT, dims=([0, 2], [0, 2])) / N

    def against(A: Tensor, B: Tensor) -> tuple[float, float]:
        """Cosine with H, and the relative error."""
        inner, norm = float((A * rows(B)).sum()), float(A.norm() * B.norm())
        return inner / (size * norm), max(0.0, size**2 - 2 * inner + norm**2) ** 0.5 / size

    A, B = torch.eye(m).to(G), torch.eye(n).to(G)
    by_step = [against(A, B)[0]]
    for _ in range(steps):
        A, B = rows(B), columns(A)
        A, B = A / A.norm(), B / B.norm()
        by_step.append(against(A, B)[0])
        if len(by_step) > 2 and abs(by_step[-1] - by_step[-2]) < tol:
            break
    scale = float((A * rows(B)).sum()) ** 0.5  # of each side: together the least error
    A, B = A * scale, B * scale
    L, R = rows(torch.eye(n).to(G)), columns(torch.eye(m).to(G))
    candidates = {
        "optimum": (A, B),
        "shampoo_squared": (L / L.trace(), R),
        "shampoo": (matrix_power(L, 0.5), matrix_power(R, 0.5)),
    }
    found = {name: against(*pair) for name, pair in candidates.items()}
    cosine, error = ({name: two[k] for name, two in found.items()} for k in (0, 1))
    back = (A * largest, B * largest, L * largest**2, R * largest**2)
    return KroneckerFit(*back, cosine, error, by_step)
