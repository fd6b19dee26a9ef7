"""Shampoo whose factors are kept as eigenvectors of four bits an entry."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput
from pondera.linalg.matrix_roots import raised
from pondera.optim._base import Group, Rest, State, accurate, in_range, settings_of_the_rest, whole_number
from pondera.optim._factors import FactoredOptimizer, blocks, counted

MAPS = ("linear-2", "linear", "dynamic")
ENTRIES = 64  # quantised with one scale, along a row (reference code)


class Shampoo4bit(FactoredOptimizer):
    r"""Shampoo (power 1/4, grafted onto SGD) that keeps eigenvectors and inverse roots in four bits.

    Of each factor A (L = average of G G^T on the left, R of G^T G on the right) the eigenvectors V are kept in 4 bits and
    the eigenvalues s in full. Every T_1 steps (Algorithm 1)

    .. math::
        V &\leftarrow \tfrac32 V - \tfrac12 V V^T V \text{ ($t_1$ times: Bjorck's rectification)} \\
        A &\leftarrow \beta V \,\mathrm{diag}(s)\, V^T + (1 - \beta) G G^T, \qquad V \leftarrow \mathrm{qr}(A V), \qquad s
            \leftarrow \mathrm{diag}(V^T A V)

    and every T_2 steps (Algorithm 2), after t_2 rectifications,

    .. math:: A^{-1/4} = V \,\mathrm{diag}(s + \epsilon \max s)^{-1/4}\, V^T

    of which the diagonal is kept in full and the rest in 4 bits. With momentum M the step is (Algorithm 3, F = SGD)

    .. math:: D = L^{-1/4} M R^{-1/4}, \qquad W \leftarrow (1 - \eta\lambda) W - \eta \, D \,\lVert M \rVert_F / \lVert D
        \rVert_F

    Quantising A itself is no less exact for A, but leaves eigenvalues at or below zero, which an inverse root turns into
    the largest. Until the first T_2 steps are over, the roots are I and the method is SGD with momentum.

    Args:
        params: parameters, or groups as `groups` makes them. Weights of convolutions are flattened to (out, rest).
        lr: eta, of SGD with momentum as a moving average (1.0; the code's 0.1 at momentum 0.9 without dampening).
        momentum: of the gradient (0.9: reference code).
        beta: decay of the factors, a step in T_1 (0.95: reference code).
        eps: added to eigenvalues relative to the largest, and the eigenvalues at the start (1e-6: reference code).
        factor_every: T_1 (100: reference code). root_every: T_2 (500: reference code); also see `Shampoo`.
        rectify: t_1 and t_2 ((1, 4): reference code).
        quantizer: the sixteen values: "linear-2" (the paper's: sign(v) v^2 of even steps), "linear" or "dynamic".
        block_size: larger matrices are cut into blocks of at most this a side (1200: reference code); None: never.
        least: factors of fewer entries than this stay in 32 bits (4096: reference code).
        weight_decay: decoupled decay lambda of matrices, multiplied by lr (0).
        vector_lr_ratio: AdamW's rate over lr for the rest (0.001: chosen here, AdamW at 1e-3 beside SGD at 1).
        betas, vector_eps, vector_weight_decay: AdamW's own.
        rest: another optimizer than AdamW for the rest: the name of a class of torch.optim, or the class.
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient, a complex parameter, or a gradient that
        is not finite.
    Paper: Wang, Zhou, Li, Huang 2024, arXiv 2405.18144. Code: github.com/Sike-Wang/low-bit-Shampoo, which runs on CUDA
        alone; its arithmetic was followed from the source, not run.

    Where we differ from the code: momentum comes before the preconditioner (theirs after, with the graft onto the raw
    gradient) and decay is decoupled; rows of odd length are padded (there the last entry of a row shares a byte with the
    next row). F = AdamW is not offered. Its state beside momentum, 4-bit codes two a byte, scales, eigenvalues and
    diagonals, is a seventh of what the same takes in 32 bits.

    >>> w = torch.nn.Parameter(torch.zeros(64, 64))
    >>> w.grad = torch.eye(64)
    >>> optimizer = Shampoo4bit([w], factor_every=1, root_every=1)
    >>> optimizer.step()
    >>> {k: (tuple(v.shape), v.dtype) for k, v in optimizer.state[w].items() if k.startswith("left_0_vectors")}
    {'left_0_vectors': ((64, 32), torch.uint8), 'left_0_vectors_scale': ((64, 1), torch.float32)}
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        momentum: float = 0.9,
        beta: float = 0.95,
        eps: float = 1e-6,
        factor_every: int = 100,
        root_every: int = 500,
        rectify: tuple[int, int] = (1, 4),
        quantizer: str = "linear-2",
        block_size: int | None = 1200,
        least: int = 4096,
        weight_decay: float = 0.0,
        vector_lr_ratio: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        vector_eps: float = 1e-8,
        vector_weight_decay: float = 0.0,
        rest: Rest = None,
    ) -> None:
        own: Group = {"lr": lr, "momentum": momentum, "nesterov": False, "beta": beta, "eps": eps}
        own |= {"factor_every": factor_every, "root_every": root_every, "rectify": rectify, "quantizer": quantizer}
        own |= {"block_size": block_size, "least": least, "weight_decay": weight_decay}
        of_rest = settings_of_the_rest(vector_lr_ratio, betas, vector_eps, vector_weight_decay)
        super().__init__(params, own | of_rest, rest)

    def _check(self, group: Group) -> None:
        super()._check(group)
        who = type(self).__name__
        in_range(who, "beta", group["beta"], 0, 1)
        in_range(who, "eps", group["eps"], 0, open_low=True)
        in_range(who, "least", group["least"], 0)
        for name in ("factor_every", "root_every"):
            whole_number(who, name, group[name])
        if group["block_size"] is not None:
            whole_number(who, "block_size", group["block_size"])
        turns = group["rectify"]
        if not (isinstance(turns, (tuple, list)) and len(turns) == 2 and all(type(k) is int and k >= 0 for k in turns)):
            raise BadInput(f"{who} needs two whole numbers of at least 0 for rectify, got {turns!r}")
        if group["quantizer"] not in MAPS:
            raise BadInput(f"{who} knows the quantizers {', '.join(MAPS)}, got {group['quantizer']!r}")

    def _direction(self, update: Tensor, gradient: Tensor | None, state: State, group: Group) -> Tensor:
        assert gradient is not None
        t = int(state.get("step", 0)) + 1
        factors, roots = t % group["factor_every"] == 0, t % group["root_every"] == 0
        counted(state)
        M, G = (x.to(accurate(update.dtype)) for x in (update, gradient))
        D = torch.empty_like(M)
        for i, at in enumerate(blocks(M.shape, group["block_size"])):
            sides = []
            for side, X in (("left", G[at]), ("right", G[at].mT)):
                name = f"{side}_{i}"
                if factors:
                    self._take_in(X, state, name, group)
                if roots and f"{name}_values" in state:
                    self._take_root(state, name, group)
                sides.append(self._root(state, name, group, X))
            left, right = sides
            part = M[at] if left is None else left @ M[at]
            D[at] = part if right is None else part @ right
        return D * (M.norm() / (D.norm() + 1e-12))

    def _take_in(self, X: Tensor, state: State, name: str, group: Group) -> None:
        """A <- beta A + (1 - beta) X X^T, and one step of orthogonal iteration for its eigenvectors."""
        d = len(X)
        if f"{name}_values" in state:
            V, s = kept(state, f"{name}_vectors", d, group).mT, state[f"{name}_values"]
            V = rectified(V, group["rectify"][0] if is_packed(state, f"{name}_vectors") else 0)
            A = (V * s) @ V.mT * group["beta"]
        else:
            V = torch.eye(d).to(X)
            A = V * (group["eps"] * group["beta"])
        A.addmm_(X, X.mT, alpha=1 - group["beta"])
        V = torch.linalg.qr(A @ V)[0]
        state[f"{name}_values"] = (V * (A @ V)).sum(0)
        keep(state, f"{name}_vectors", V.mT, group)  # a row an eigenvector

    def _take_root(self, state: State, name: str, group: Group) -> None:
        """A^-1/4 from eigenvectors that are rectified once more."""
        s = state[f"{name}_values"]
        packed = is_packed(state, f"{name}_vectors")
        V = rectified(kept(state, f"{name}_vectors", len(s), group).mT, group["rectify"][1] if packed else 0)
        root = (V * raised(s, -0.25, group["eps"])) @ V.mT
        if packed:
            state[f"{name}_diagonal"] = root.diagonal().clone()
            root.fill_diagonal_(0)
        keep(state, f"{name}_root", root, group)

    def _root(self, state: State, name: str, group: Group, X: Tensor) -> Tensor | None:
        """A^-1/4 as it is kept, None for I."""
        if f"{name}_root" not in state:
            return None
        root = kept(state, f"{name}_root", len(X), group)
        return root + torch.diag(state[f"{name}_diagonal"]) if f"{name}_diagonal" in state else root


# -- four bits --------------------------------------------------------------------------------------------------------


def values_of(quantizer: str) -> Float[Tensor, "16"]:
    """The sixteen values from -1 to 1 that a code of 4 bits stands for, in rising order."""
    if quantizer == "dynamic":  # a tree: the leading bits tell the power of ten
        means = []
        for power in range(3):
            edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float64)
            means += (10.0 ** (power - 2) * (edges[:-1] + edges[1:]) / 2).tolist()
        return torch.tensor(sorted([0.0, 1.0, *means, *(-x for x in means)]))
    v = torch.linspace(-1, 1, 16, dtype=torch.float64)
    v[7] = 0
    return (v.sign() * v.abs() ** (2 if quantizer == "linear-2" else 1)).float()


def quantised(
    x: Float[Tensor, "rows n"], quantizer: str = "linear-2"
) -> tuple[UInt8[Tensor, "rows half"], Float[Tensor, "rows scales"]]:
    """Codes of 4 bits, two a byte (the first in the higher half), and the largest size of each 64 entries of a row."""
    rows, n = x.shape
    wide = F.pad(x, (0, -n % ENTRIES)).reshape(rows, -1, ENTRIES)
    scale = wide.abs().amax(-1)
    at = values_of(quantizer).to(x)
    unit = wide / torch.where(scale > 0, scale, 1).unsqueeze(-1)
    codes = torch.bucketize(unit, (at[1:] + at[:-1]) / 2).flatten(1)[:, : n + n % 2].to(torch.uint8)
    return (codes[:, ::2] << 4) | codes[:, 1::2], scale


def restored(
    codes: UInt8[Tensor, "rows half"], scale: Float[Tensor, "rows scales"], n: int, quantizer: str = "linear-2"
) -> Float[Tensor, "rows n"]:
    """What `quantised` made codes of, to the nearest of the sixteen values."""
    both = torch.stack([codes >> 4, codes & 15], -1).flatten(1)[:, :n]
    unit = values_of(quantizer).to(scale)[both.int()]
    return unit * scale.repeat_interleave(ENTRIES, 1)[:, :n]


def rectified(V: Float[Tensor, "d d"], turns: int) -> Float[Tensor, "d d"]:
    """Bjorck's iteration toward the nearest orthogonal matrix; needs singular values below sqrt(3)."""
    for _ in range(turns):
        V = torch.addmm(V, V, V.mT @ V, beta=1.5, alpha=-0.5)
    return V


def is_packed(state: State, name: str) -> bool:
    return f"{name}_scale" in state


def keep(state: State, name: str, x: Float[Tensor, "d d"], group: Group) -> None:
    """Into the state, in 4 bits unless it is small."""
    if x.numel() < group["least"]:
        state[name] = x.contiguous()
    else:
        state[name], state[f"{name}_scale"] = quantised(x, group["quantizer"])


def kept(state: State, name: str, d: int, group: Group) -> Float[Tensor, "d d"]:
    held: Tensor = state[name]
    return restored(held, state[f"{name}_scale"], d, group["quantizer"]) if is_packed(state, name) else held
