"""qGOFT: turn a layer's input by a tree of Givens rotations, one number for each input instead of one for each pair."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.adapters._base import NO_SUM, AdapterConfig, AdapterLayer, AdapterModel, InputRotation
from pondera.adapters._register import register
from pondera.errors import BadInput
from pondera.linalg.givens import givens_tree, rotations

FORMS = ("strict", "scaled", "quasi")


@dataclass
class GivensConfig(AdapterConfig):
    r"""GOFT and qGOFT: the input of n features is multiplied by n - 1 plane rotations, all at their start the identity.

    .. math:: y = W (x R) + b, \quad R = G_L \cdots G_1 \, \mathrm{diag}(d), \quad L = \lceil \log_2 n \rceil

    G_l turns disjoint pairs of coordinates, those whose indices are 2^(l-1) apart in a binary tree
    (`pondera.linalg.givens.givens_tree`), which costs O(n) a row and makes no n x n matrix. The merged weight W R^T comes
    from the same steps on the rows of W.

    Args:
        form: ``"strict"`` trains the n - 1 angles, R is a rotation; ``"scaled"`` also a length for each input,
            :math:`d` (2n - 1 numbers; the default of the authors' code); ``"quasi"`` frees each rotation to any 2 x 2
            matrix (4n - 4 numbers), which changes norms and angles. Nothing but the penalty `soft_orthogonality` then
            holds it near a rotation.
        mirror: derived here: multiply by a second tree, root first and without the first one's root (n - 2 more
            rotations). The tree alone cannot send every vector to every other of its length (index 1 is touched by one
            rotation only); the two can. Off by default, as in the authors' code.
    Raises: BadInput: for another form, or a layer of fewer than two inputs.
    Paper: Ma et al. 2024, arXiv 2404.04316 (abstract) and the authors' code, version 1. There an angle is
        :math:`\pi \tanh(a)` of the trained a, whose gradient dies far out and is pi times larger at the start; here it is
        the angle itself, so that the code's rates correspond to pi times smaller ones here. Version 2 of that code
        turns neighbours at every level, which is no rotation. The paper's sentence that O(n) rotations make any
        rotation cannot hold: rotations of n coordinates have n (n - 1) / 2 dimensions.

    >>> import peft
    >>> net = nn.Sequential(nn.Linear(8, 4))
    >>> x = torch.randn(2, 8)
    >>> before = net(x)
    >>> tuned = peft.get_peft_model(net, GivensConfig(form="strict", target_modules=["0"]))
    >>> torch.equal(tuned(x), before), tuned.get_nb_trainable_parameters()[0]
    (True, 7)
    """

    form: str = field(default="scaled", metadata={"help": "strict, scaled or quasi"})
    mirror: bool = field(default=False, metadata={"help": "a second tree, so that any vector reaches any other"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise BadInput(f"GivensConfig needs a form among {', '.join(FORMS)}, got {self.form!r}")

    @classmethod
    def tuner(cls) -> type[AdapterModel]:
        return GivensModel


class Givens(InputRotation):
    """R = G_L ... G_1 diag(d), or M G_L ... G_1 diag(d) with the mirror M, the transpose of a tree without its root."""

    def __init__(self, weight: Float[Tensor, "out n"], config: GivensConfig) -> None:
        super().__init__()
        n = weight.shape[1]
        if n < 2:
            raise BadInput(f"Givens rotations need a layer of at least 2 inputs, got {n}")
        self.first = n - 1  # blocks of the first tree; the rest belong to the mirror
        m = 2 * n - 3 if config.mirror else n - 1
        self.theta = self.blocks = self.d = None
        if config.form == "quasi":
            self.blocks = nn.Parameter(torch.eye(2, dtype=weight.dtype).repeat(m, 1, 1))
        else:
            self.theta = nn.Parameter(torch.zeros(m, dtype=weight.dtype))
        if config.form == "scaled":
            self.d = nn.Parameter(torch.ones(n, dtype=weight.dtype))

    def trees(self) -> tuple[Float[Tensor, "n-1 2 2"], Float[Tensor, "m 2 2"] | None]:
        blocks = rotations(self.theta) if self.blocks is None else self.blocks
        return blocks[: self.first], blocks[self.first :] if len(blocks) > self.first else None

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        tree, mirror = self.trees()
        if mirror is not None:  # a row times M is M^T, the tree from leaf to root, times the column
            x = givens_tree(x, mirror)
        x = givens_tree(x, tree, transpose=True)
        return x if self.d is None else x * self.d

    def merged(self, weight: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        tree, mirror = self.trees()
        weight = givens_tree(weight if self.d is None else weight * self.d, tree)
        return weight if mirror is None else givens_tree(weight, mirror, transpose=True)


class GivensLayer(AdapterLayer):
    """A layer with qGOFT adapters."""

    adapter_layer_names = ("pondera_givens_core",)
    core = Givens


class GivensModel(AdapterModel):
    """A model with qGOFT adapters; made by `peft.get_peft_model`."""

    prefix = "pondera_givens_"
    tuner_layer_cls = GivensLayer
    paper_name = "qGOFT"
    no_sum = NO_SUM


def soft_orthogonality(model: nn.Module) -> Float[Tensor, ""]:
    r"""The penalty that holds the quasi form near rotations, over the active adapters of a model.

    .. math:: \sum_B \lVert B^T B - I \rVert_F^2

    over all 2 x 2 blocks B: zero exactly when each is orthogonal, and then R is. Add it to the loss with a weight.
    Derived: the abstract names a soft orthogonality regularisation; the authors' code has none, and its form and weight
    in the paper were not seen. Penalising the blocks costs O(n), penalising R would cost O(n^2) and more.

    Raises: BadInput: if no active adapter has the quasi form.

    >>> import peft
    >>> tuned = peft.get_peft_model(nn.Sequential(nn.Linear(3, 2)), GivensConfig(form="quasi", target_modules=["0"]))
    >>> soft_orthogonality(tuned)
    tensor(0., grad_fn=<SumBackward0>)
    """
    blocks = [
        core.blocks
        for layer in model.modules()
        if isinstance(layer, GivensLayer)
        for name, core in layer.cores.items()
        if name in layer.active_adapters and core.blocks is not None
    ]
    if not blocks:
        raise BadInput("soft_orthogonality found no active qGOFT adapter of the form 'quasi' in the model")
    gaps = [(b.mT @ b - torch.eye(2, dtype=b.dtype, device=b.device)).square().sum() for b in blocks]
    return torch.stack([g.to(gaps[0].device) for g in gaps]).sum()


register(GivensConfig, GivensModel)
