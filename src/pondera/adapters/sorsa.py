"""SORSA: train the principal singular triplets of each weight, with a pull of the singular vectors to orthonormality."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.adapters._base import AdapterConfig, AdapterLayer, AdapterModel, Additive, require_rank
from pondera.adapters._register import register
from pondera.errors import BadInput, require_finite

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass
class SorsaConfig(AdapterConfig):
    r"""Train the first r singular values and vectors of each weight; add `orthonormality` of the model to the loss.

    .. math::
        y = \left(W + c \, (U \Sigma V^\top - U_p \Sigma_p V_p^\top)\right) x, \qquad
        W = U_p \Sigma_p V_p^\top + W_r \;\text{(SVD, first } r \text{ and rest)}

    U (out x r), the diagonal of Sigma (r numbers) and V^T (r x in) start at the principal triplets and are trained:
    r (out + in + 1) numbers a layer. The base weight is not rewritten; the change is computed as

    .. math::
        \left(U (\Sigma - \Sigma_p) + (U - U_p) \Sigma_p\right) V^\top + U_p \Sigma_p (V - V_p)^\top,

    exactly 0 at the start, and rounded in proportion to its own size. The frozen start is saved beside the trained
    triplets (twice the size): the change then does not depend on how another machine rounds the singular vectors, or on
    the dtype the base is loaded in.

    Without the penalty this is PiSSA with the singular values as parameters of their own.

    Args:
        r: triplets a layer, 4 by default as in the authors' library; their experiments have 128.
        alpha: c = alpha / r; None (the authors' default) is c = 1.
        rank_pattern, alpha_pattern: another r or alpha for some layers, by their names' endings or expressions, as in PEFT.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in every adapter here.
    Raises: BadInput: for an `r` above the smaller side of a layer, an `alpha` that is not a positive number, NaN or
        infinite weights.
    Paper: Cao 2024, arXiv 2409.00055; from the abstract and the authors' code. Differences to the code: it replaces the
        weight by the residual, rounded to the base's dtype, and has a dropout on the adapter's input, which is left
        out here.

    >>> from peft import get_peft_model
    >>> net = get_peft_model(nn.Sequential(nn.Linear(6, 4)), SorsaConfig(r=2, target_modules=["0"]))
    >>> net.get_nb_trainable_parameters()[0]
    22
    >>> bool(orthonormality(net) < 1e-5)
    True
    """

    r: int = field(default=4, metadata={"help": "number of singular triplets trained in each layer"})
    alpha: float | None = field(default=None, metadata={"help": "the change is scaled by alpha / r; None: by 1"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "layers' own r"})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "layers' own alpha"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not 0 < alpha < torch.inf:
                raise BadInput(f"SORSA needs a positive, finite alpha or None, got {alpha!r}")

    def for_sum(self, rank: int) -> "SorsaConfig":
        return replace(self, r=rank, alpha=None, rank_pattern={}, alpha_pattern={})

    @classmethod
    def tuner(cls) -> type[AdapterModel]:
        return SorsaModel


class Sorsa(Additive):
    """Trained: U, S, Vt. Frozen and saved: their start U0, S0, Vt0."""

    U: Float[Tensor, "out r"]
    S: Float[Tensor, " r"]
    Vt: Float[Tensor, "r in"]
    U0: Float[Tensor, "out r"]
    S0: Float[Tensor, " r"]
    Vt0: Float[Tensor, "r in"]

    def __init__(self, weight: Float[Tensor, "out in"], config: SorsaConfig) -> None:
        super().__init__()
        r = require_rank(config.r, weight, "SORSA")
        require_finite(weight, "SORSA", "weight")
        self.c = 1.0 if config.alpha is None else config.alpha / r
        U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
        for name, start in (("U", U[:, :r]), ("S", S[:r]), ("Vt", Vt[:r])):
            self.register_buffer(f"{name}0", start.clone(memory_format=torch.contiguous_format))
            self.register_parameter(name, nn.Parameter(start.clone(memory_format=torch.contiguous_format)))

    def factors(self) -> tuple[Float[Tensor, "out r2"], Float[Tensor, "r2 in"]]:
        """The change is left @ right; the two terms share one product of rank 2 r."""
        moved = self.U * (self.S - self.S0) + (self.U - self.U0) * self.S0  # U S - U0 S0, free of cancellation
        left = torch.cat([moved, self.U0 * self.S0], dim=1)
        return left if self.c == 1.0 else self.c * left, torch.cat([self.Vt, self.Vt - self.Vt0])

    def hold(self, left: Float[Tensor, "out k"], right: Float[Tensor, "k in"]) -> None:
        """Become the change left @ right, from a start of zeros."""
        for name in ("U", "S", "Vt", "U0", "S0", "Vt0"):
            getattr(self, name).zero_()
        k = len(right)
        self.U[:, :k], self.S[:k], self.Vt[:k] = left, 1.0, right

    def delta(self) -> Float[Tensor, "out in"]:
        left, right = self.factors()
        return left @ right

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        left, right = self.factors()
        return F.linear(F.linear(x, right), left)

    def rows(self, index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        left, right = self.factors()
        return F.embedding(index, left) @ right


class SorsaLayer(AdapterLayer):
    """A layer with SORSA adapters."""

    adapter_layer_names = ("pondera_sorsa_core",)
    core = Sorsa


class SorsaModel(AdapterModel):
    """A model with SORSA adapters; made by `peft.get_peft_model`."""

    prefix = "pondera_sorsa_"
    tuner_layer_cls = SorsaLayer
    paper_name = "SORSA"
    sums = ("svd", "cat")


def orthonormality(model: nn.Module, *, squared: bool = False) -> Float[Tensor, ""]:
    r"""How far the trained singular vectors of a model are from orthonormal; the penalty of SORSA.

    .. math:: \frac{1}{2L} \sum_{l=1}^{L} \left( \lVert U_l^\top U_l - I \rVert_F + \lVert V_l^\top V_l - I \rVert_F \right)

    over all L adapted layers (and the active adapters): a mean, so the pull on one layer falls as 1 / (2 L).

    The norm is not squared in the authors' code: its gradient has the same length, about 2 / (2 L), however near a
    factor is to orthonormal, so it ends in steps around 0 of the size of the rate; at exactly 0 it is 0. Squared, it
    fades out. In a loop of one's own, add ``factor * orthonormality(model)`` to the loss. The authors' Trainer adds the
    gradient of (gamma / rate) times it after the task's gradient has been clipped, once a step, with gamma 4e-4 and
    rate 3e-5, and AdamW then rescales the sum: see `orthonormality_callback`.

    Args:
        model: a model with SORSA adapters.
        squared: take the squares of the norms.
    Returns: a scalar, in float32 or wider; differentiable.
    Raises: BadInput: if the model has no active SORSA adapter.
    Paper: Cao 2024, arXiv 2409.00055; the form is that of the authors' code.

    >>> from peft import get_peft_model
    >>> net = get_peft_model(nn.Sequential(nn.Linear(3, 3)), SorsaConfig(r=1, target_modules=["0"]))
    >>> core = net.base_model.model[0].cores["default"]
    >>> with torch.no_grad():
    ...     _ = core.U.mul_(2)  # |u|^2 = 4, one of two factors is off by 3
    >>> round(orthonormality(net).item(), 4), round(orthonormality(net, squared=True).item(), 4)
    (1.5, 4.5)
    """
    gaps = []
    for layer in model.modules():
        if isinstance(layer, SorsaLayer):
            for name in layer.active_adapters:
                if name in layer.cores:
                    core = layer.cores[name]
                    gaps += [_gap(core.U.mT), _gap(core.Vt)]
    if not gaps:
        raise BadInput(f"orthonormality found no active SORSA adapter in {type(model).__name__}")
    first = gaps[0].device
    norms = torch.stack([gap.norm().to(first) for gap in gaps])
    return (norms.square() if squared else norms).mean()


def _gap(rows: Float[Tensor, "r size"]) -> Float[Tensor, "r r"]:
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)


def orthonormality_callback(gamma: float = 4e-4, *, squared: bool = False) -> "TrainerCallback":
    """For transformers' Trainer: the pull as the authors add it, between the clipping and the optimizer's step.

    The gradient of (gamma / args.learning_rate) times `orthonormality` is added to that of the task. Models whose
    parameters are sharded (FSDP, DeepSpeed's third stage) need the penalty in the loss instead.

    Args:
        gamma: the authors' run script has 4e-4.
        squared: as in `orthonormality`.
    Returns: a callback for ``Trainer(callbacks=[...])``.
    Raises: BadInput: if `gamma` is negative or not finite.

    >>> callback = orthonormality_callback(gamma=1e-4)
    >>> callback.on_pre_optimizer_step.__name__
    'on_pre_optimizer_step'
    """
    from transformers import TrainerCallback

    if not 0 <= gamma < torch.inf:
        raise BadInput(f"orthonormality_callback needs a finite gamma of at least 0, got {gamma!r}")

    class Orthonormality(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            (gamma / args.learning_rate * orthonormality(model, squared=squared)).backward()

    return Orthonormality()


register(SorsaConfig, SorsaModel)
