r"""DoTA: the pretrained weight's own tensor train is what an adapter trains.

With the digits of rows and columns paired, i = (i_1 .. i_N) and j = (j_1 .. j_N), a matrix product operator of bonds d_k is

.. math:: \mathrm{MPO}(G)_{ij} = G_1[i_1, j_1] \, G_2[i_2, j_2] \cdots G_N[i_N, j_N]

The paper freezes the residual W_res = W - MPO(G^0) of the weight's own truncated train and trains G from G^0. Here the
base weight stays and the start is taken off the change, which is the same map:

.. math:: y = W_{res} x + \mathrm{MPO}(G) x = W x + (\mathrm{MPO}(G) - \mathrm{MPO}(G^0)) x
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.adapters._base import AdapterConfig, AdapterLayer, AdapterModel, Additive
from pondera.adapters._register import register
from pondera.errors import BadInput, nearest, require_finite
from pondera.linalg.tensor_train import balance, split_size, tensor_train, train_bonds, train_matrix

STARTS = ("pretrained", "random")


@dataclass
class DotaConfig(AdapterConfig):
    """DoTA: trained cores of a matrix product operator that start as the truncated train of the pretrained weight.

    A layer of m x n has sum_k d_{k-1} i_k j_k d_k trained numbers. Every step contracts the cores to one m x n matrix, at
    a cost of about d m n, and runs one dense product beside the layer's own.

    Args:
        r: the most any bond may have, d; a bond near an end has less where its side is smaller. Default 8 (ours: the
            paper's values could not be had).
        n_cores: N, the number of cores (5, as in the group's other papers on such trains; ours for this one). Sizes are
            split by their primes as evenly as these allow, rows from large to small factors and columns from small to
            large. A large prime stays whole: 127 is 127 x 1 x 1 x 1 x 1, and where both sizes are prime the train is the
            matrix product of PiSSA. 11008 is 43 x 4 x 4 x 4 x 4.
        shape: the digits' sizes, ``[[i_1 .. i_N], [j_1 .. j_N]]`` with prod(i) = m and prod(j) = n of the layer seen as
            (out, in), instead of `n_cores`; for adapted layers of one size.
        rank_pattern: another r for some layers, by their names' endings or expressions, as in PEFT.
        start: ``"pretrained"``, or ``"random"`` for the usual start of tensor adapters, which the paper compares with:
            normal cores of variance 1 / (d_{k-1} j_k), so that the signal keeps its size, and a last core of zeros.

    The gauge: cores between which a matrix and its inverse are slipped give the same weight and train differently. Here
    each bond's singular values are shared evenly by its two cores, as in the group's code (`linalg.tensor_train.balance`).

    The start G^0 is kept in buffers and saved: the change then is the same on any base, and does not hang on an SVD
    coming out alike elsewhere. QDoTA is this over a base that PEFT quantises: W is what the base stands for, and the start
    is exact for it. The paper quantises the residual instead; for that, put W_res quantised plus MPO(G^0) into the base.

    Raises:
        BadInput: for a bond above the layer's largest full bond, shapes that do not give its size, fewer than two cores,
            an unknown start, NaN or infinite weights, and a weight of zeros, whose cores no gradient would reach.
    Paper: Hu et al. 2024, arXiv 2412.20891 (derived from its abstract and the group's class for such trains, zfgao66/OPF;
        the authors' code is not out). Deviation: trains are truncated by TT-SVD, which is nearer to W than cutting the
        balanced cores, as that class does.

    >>> import peft
    >>> net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    >>> adapted = peft.get_peft_model(net, DotaConfig(r=4, n_cores=3, target_modules=["0"]))
    >>> adapted.get_nb_trainable_parameters()
    (160, 668)
    """

    r: int = field(default=8, metadata={"help": "bond dimension"})
    n_cores: int = field(default=5, metadata={"help": "number of cores"})
    shape: list[list[int]] | None = field(default=None, metadata={"help": "sizes of row and column digits"})
    start: str = field(default="pretrained", metadata={"help": "pretrained or random"})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "layers' own r"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in STARTS:
            raise BadInput(
                f"DoTA's start is one of {', '.join(STARTS)}, got {self.start!r}{nearest(self.start, STARTS)}"
            )
        if self.shape is not None:
            try:
                rows, cols = (list(map(int, sizes)) for sizes in self.shape)
                train_bonds(rows, cols)
            except (TypeError, ValueError) as e:
                raise BadInput(
                    f"DoTA needs shape as [[i_1 .. i_N], [j_1 .. j_N]] of positive sizes, got {self.shape!r}"
                ) from e
            self.shape, self.n_cores = [rows, cols], len(rows)
        if not isinstance(self.n_cores, int) or self.n_cores < 2:
            raise BadInput(f"DoTA needs at least 2 cores, got {self.n_cores!r}")

    @classmethod
    def tuner(cls) -> type[AdapterModel]:
        return DotaModel


class Dota(Additive):
    """One layer's cores, core_0 .. core_{N-1}, and their frozen start, start_0 .. start_{N-1}."""

    def __init__(self, weight: Float[Tensor, "out in"], config: DotaConfig) -> None:
        super().__init__()
        rows, cols = _digits(weight, config)
        most = max(train_bonds(rows, cols))
        if not isinstance(config.r, int) or isinstance(config.r, bool) or not 1 <= config.r <= most:
            raise BadInput(
                f"DoTA needs r from 1 to {most} for a layer of {tuple(weight.shape)} split into "
                f"{rows} x {cols}, got {config.r!r}"
            )
        self.n_cores, self.from_weight = len(rows), config.start == "pretrained"
        bonds = train_bonds(rows, cols, config.r)
        if self.from_weight:
            if not require_finite(weight, "DoTA", "weight").any():
                raise BadInput(
                    "DoTA's cores would start at zero for a weight of zeros, and stay there; use start='random'"
                )
            cores = balance(tensor_train(weight.double(), rows, cols, bond=config.r))
        else:
            cores = [
                torch.randn(d, i, j, e, device=weight.device) * (d * j) ** -0.5
                for d, i, j, e in zip(bonds, rows, cols, bonds[1:])
            ]
            cores[-1].zero_()
        for k, core in enumerate(cores):
            core = core.to(weight.dtype).contiguous()
            self.register_parameter(f"core_{k}", nn.Parameter(core))
            if self.from_weight:
                self.register_buffer(f"start_{k}", core.clone())

    def delta(self) -> Float[Tensor, "out in"]:
        trained = train_matrix([getattr(self, f"core_{k}") for k in range(self.n_cores)])
        if not self.from_weight:
            return trained  # the last core starts at zero
        return trained - train_matrix([getattr(self, f"start_{k}") for k in range(self.n_cores)])


def _digits(weight: Tensor, config: DotaConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    out, fan_in = weight.shape
    if config.shape is None:
        return split_size(out, config.n_cores), split_size(fan_in, config.n_cores)[::-1]
    rows, cols = (tuple(sizes) for sizes in config.shape)
    if (sizes := (torch.Size(rows).numel(), torch.Size(cols).numel())) != (out, fan_in):
        raise BadInput(f"DoTA's shape {config.shape} is that of a layer of {sizes}, got one of {(out, fan_in)}")
    return rows, cols


class DotaLayer(AdapterLayer):
    """A layer with DoTA adapters."""

    adapter_layer_names = ("pondera_dota_core",)
    core = Dota


class DotaModel(AdapterModel):
    """A model with DoTA adapters; made by `peft.get_peft_model`."""

    prefix = "pondera_dota_"
    tuner_layer_cls = DotaLayer
    paper_name = "DoTA"
    no_sum = "a sum of tensor trains is no train of the same bonds; turn each into a LoRA with peft.convert_to_lora and add those"


register(DotaConfig, DotaModel)
