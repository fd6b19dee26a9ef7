"""Steepest descent under a norm chosen for each layer by its role."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput
from pondera.optim._base import Group, Rest, Scaled, settings_of_the_rest
from pondera.optim._groups import VECTOR_RATE_RATIO, groups
from pondera.optim._norms import WHOLE, NormOptimizer, at_least_float32, here

FACTORS = (None, "layer", "network")
SCALES = (None, "rms")


class SteepestDescent(NormOptimizer):
    r"""Move against the gradient in the sense of a norm: by the `dual_map` of each layer's gradient, not the gradient.

    The step that minimises the linear model with a penalty on its size in the norm, sharpness s = 1 / eta (Prop. 1):

    .. math::
        \arg\min_D\; \langle G, D \rangle + \tfrac{1}{2\eta} \lVert D \rVert^2
        = -\eta\, \lVert G \rVert_*\; \mathrm{dualmap}(G)

    Three optimizers are this without the dual norm in front, once their averages are off: Adam is "max" (the sign of each
    entry), Shampoo "spectral" (the polar factor), Prodigy "max" with a rate that grows from a tiny one.

    The norm of a network is the largest of its layers' norms, and its steepest step is that of each layer times one factor
    common to all, the sum of the layers' dual norms (``factor="network"``). With the norms' squares added each layer has a
    factor of its own (``factor="layer"``). Without one (None) each layer moves by eta in its norm, whatever the gradient.

    The matrix norms leave what is no matrix, and groups marked ``matrix=False``, to AdamW; "max" and "frobenius" move all
    of their groups, "frobenius" as one vector. ``roles(model)`` gives every parameter the norm of its role.

    Args:
        params: parameters, or groups as `roles` or `groups` makes them; each may name its norm.
        lr: eta (0.02 suits factor=None; with a factor it is one over the sharpness).
        norm: "spectral", "frobenius", "max", "row" or "column", of groups that name none.
        factor: what multiplies the dual maps: None, "layer" or "network", see above. "network" keeps all directions until
            the last is found: memory of one more gradient.
        scale: None, or "rms" for norms between vectors measured by their root mean square: dual maps times sqrt(m/n)
            ("spectral"), sqrt(n) ("row"), sqrt(m) ("column"), so that inputs of RMS 1 change outputs by about eta; "row" is
            then that of an embedding kept as (num, dim). "max" stays; "frobenius" takes the root of its entries' number.
        momentum: of an average of gradients before the map (0: the paper switches averages off).
        weight_decay: decoupled, multiplied by lr (0: not in the paper).
        ns_steps: steps of Newton-Schulz for "spectral" (5, as in Muon); None is the exact SVD.
        ns_dtype: their precision, as in `NorMuon`.
        vector_lr_ratio, betas, vector_eps, vector_weight_decay, rest: of what the norms leave, as in `TrustRegion`.
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient, one that is not finite, or a complex
        parameter, or for factor="network" where `spread` has dealt the matrices out.
    Paper: Bernstein & Newhouse 2024, arXiv 2409.20325, theory without code. The common factor over a network's layers is
        recalled. For convolutions the paper takes a norm per kernel tap (recalled), we that of the flattened (out, rest).

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.tensor([[3.0, 4.0], [0.0, 0.1]])
    >>> SteepestDescent([w], lr=1.0, norm="row").step()
    >>> w.data
    tensor([[-0.6000, -0.8000],
            [ 0.0000, -1.0000]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        *,
        norm: str = "spectral",
        factor: str | None = None,
        scale: str | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        ns_steps: int | None = 5,
        ns_dtype: torch.dtype | None = None,
        vector_lr_ratio: float = VECTOR_RATE_RATIO,
        betas: tuple[float, float] = (0.9, 0.95),
        vector_eps: float = 1e-10,
        vector_weight_decay: float = 0.0,
        rest: Rest = None,
    ) -> None:
        own: Group = {"lr": lr, "norm": norm, "factor": factor, "scale": scale, "momentum": momentum}
        own |= {"nesterov": False, "weight_decay": weight_decay, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        super().__init__(
            params, own | settings_of_the_rest(vector_lr_ratio, betas, vector_eps, vector_weight_decay), rest
        )

    def _check(self, group: Group) -> None:
        super()._check(group)
        if group["factor"] not in FACTORS:
            raise BadInput(f"SteepestDescent knows the factors None, layer and network, got {group['factor']!r}")
        if group["scale"] not in SCALES:
            raise BadInput(f"SteepestDescent knows the scales None and rms, got {group['scale']!r}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        if self.ranks is not None and any(g["factor"] == "network" for g in self.param_groups):
            raise BadInput('SteepestDescent cannot find factor="network" where the matrices are spread over ranks')
        self._waiting: list[tuple[Tensor, Tensor, Group]] = []
        self._duals: list[Tensor] = []
        loss = super().step(closure)
        if self._waiting:
            total = torch.stack([d.to(self._duals[0].device) for d in self._duals]).sum()
            for W, D, group in self._waiting:
                super()._move(W, (D * total.to(D.device)).to(D.dtype), group)
        self._waiting, self._duals = [], []
        return loss

    def _move(self, W: Tensor, wanted: Tensor | Scaled, group: Group) -> None:
        if group["factor"] != "network":
            super()._move(W, wanted, group)
        else:
            assert isinstance(wanted, Tensor)
            self._waiting.append((W, wanted, group))

    def _sized(self, D: Tensor, U: Tensor, group: Group) -> Tensor | Scaled:
        unit = self._unit(D, group) if group["scale"] == "rms" else 1.0
        D = D.mul_(unit) if unit != 1 else D
        if group["factor"] is None:
            return D
        if group["factor"] == "layer" and group["norm"] == "frobenius":  # all its parameters are one layer
            return D * (unit * self._length.to(D.device, D.dtype))
        dual = here((at_least_float32(U) * D).sum())
        if group["factor"] == "network":
            self._duals.append(dual)
            return D
        return D * dual.to(D.dtype) if hasattr(D, "full_tensor") else (D, dual)

    def _unit(self, D: Tensor, group: Group) -> float:
        """What the dual map is multiplied by where vectors are measured by their root mean square."""
        if group["norm"] == "max":
            return 1.0
        if group["norm"] == "frobenius":
            return float(sum(p.numel() for p, _, _ in self._together) ** 0.5)
        m, n = D.shape
        return float({"spectral": m / n, "row": n, "column": m}[group["norm"]] ** 0.5)


def roles(model: nn.Module) -> list[Group]:
    """A model's parameters by the role of their layer, each group with the norm of that role.

    - weights of linear, convolution and attention layers, the output head too: "spectral", l2 to l2;
    - embeddings (`nn.Embedding`, `nn.EmbeddingBag`; a head tied to one as well), whose inputs are one-hot: l1 to l2, which
      is the "row" norm of a weight kept as (num, dim);
    - everything else (biases, gains, bare parameters): "max". A gain acts as a diagonal matrix, whose largest singular
      value is its largest entry (derived).

    Args: model: the model that `SteepestDescent` or `TrustRegion` will train.
    Returns: up to four groups, none empty, every parameter once.
    Raises: BadInput: as `groups`, for a model without a hidden matrix.

    >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(g["norm"], [tuple(p.shape) for p in g["params"]]) for g in roles(net)]
    [('spectral', [(8, 4), (2, 8)]), ('row', [(9, 4)]), ('max', [(8,), (2,)])]
    """
    split = groups(model, head=None)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    found: list[Group] = []
    rows: list[Tensor] = []
    for group in split:
        rows += [p for p in group["params"] if id(p) in tables]
        params = [p for p in group["params"] if id(p) not in tables]
        found.append({**group, "params": params, "norm": "spectral" if group["matrix"] else "max"})
    found.insert(-1 if found[-1]["norm"] in WHOLE else len(found), {"params": rows, "norm": "row", "matrix": True})
    return [g for g in found if g["params"]]
