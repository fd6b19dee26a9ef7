"""SVFT: a sparse matrix of coefficients between the weight's own singular vectors."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.adapters._base import AdapterConfig, AdapterLayer, AdapterModel, Additive
from pondera.adapters._register import register
from pondera.errors import BadInput, nearest, require_finite

PATTERNS = ("plain", "banded", "random", "top_k")
STARTS = ("zero", "kaiming")


@dataclass
class SvftConfig(AdapterConfig):
    r"""Train a few coefficients between the singular vectors of each weight.

    .. math:: y = W x + U M V^\top x, \qquad W = U \Sigma V^\top \;\text{(thin SVD)}

    U, V and W are frozen. M is n x n, n = min(out, in), and zero but for k trained entries at fixed places:

    - plain: the diagonal, k = n. The singular values move and the singular vectors stay.
    - banded: all |i - j| <= d, k = n (2d + 1) - d (d + 1).
    - random: as many distinct places, drawn from torch's global generator as `get_peft_model` is called.
    - top_k: as many places with the largest :math:`|u_i^\top v_j|`. Square layers alone have them.

    U and V are not saved: they are computed from the base weight again, in float64, each pair with the sign that a fixed
    rule gives it. A short signature of them is saved, and loading refuses a base whose vectors differ. They differ for
    other values of the base, also for the same values rounded to another dtype, and where the base has equal singular
    values (a null space), which no rule can tell apart on another machine. Merged weights go anywhere.

    Each forward costs three products beside the layer's own (V, M, U), or two (plain); U and V together are up to twice
    as large as W. Good rates are high: the authors take 5e-2 for plain and 5e-3 to 5e-2 with d = 16.

    Args:
        pattern: ``"banded"`` (the authors' default), ``"plain"``, ``"random"`` or ``"top_k"``.
        off_diagonal: d, 16 in the authors' scripts; it counts entries for random and top_k and is not read for plain.
            A layer with n <= d has all n x n entries.
        start: ``"zero"``: M = 0, the model as it was. ``"kaiming"``: as in the authors' code, entries of M from
            N(0, 1/(2k)), which changes the model from the first step on.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in every adapter here.
    Raises: BadInput: for an unknown pattern or start, a negative or fractional `off_diagonal`, NaN or infinite weights,
        top_k on a layer that is not square, and on loading for a base with other singular vectors.
    Paper: Lingam et al. 2024, arXiv 2405.19597; from the abstract and the authors' code, the text was not at hand.
        Differences to the code: it rebuilds the whole weight from U, Sigma, M, V at every forward. Its gate, one
        trained factor sigmoid(g) = 1/2 at the start on each layer's M, is left out: it only scales M and has no
        gradient at M = 0; with Adam, half the authors' rate makes steps of the same size here. Its random places may
        coincide. Its top_k takes the largest signed entries of the product U V, or of U or V alone for other
        shapes; ours compares left with right vectors, and without the sign, which is arbitrary. Its truncation to
        fewer vectors, which drops the rest of the weight, is left out.

    >>> from peft import get_peft_model
    >>> config = SvftConfig(pattern="banded", off_diagonal=1, target_modules=["0"])
    >>> net = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
    >>> net.print_trainable_parameters()
    trainable params: 10 || all params: 38 || trainable%: 26.3158
    """

    pattern: str = field(default="banded", metadata={"help": "where M has entries: plain, banded, random or top_k"})
    off_diagonal: int = field(default=16, metadata={"help": "d, the diagonals on each side of the main one"})
    start: str = field(default="zero", metadata={"help": "zero or kaiming"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("pattern", PATTERNS), ("start", STARTS)):
            given = getattr(self, name)
            if given not in known:
                raise BadInput(f"SVFT's {name} is one of {', '.join(known)}, got {given!r}{nearest(str(given), known)}")
        if not isinstance(self.off_diagonal, int) or isinstance(self.off_diagonal, bool) or self.off_diagonal < 0:
            raise BadInput(f"SVFT needs a whole number of at least 0 for off_diagonal, got {self.off_diagonal!r}")

    @classmethod
    def tuner(cls) -> type[AdapterModel]:
        return SvftModel

    def for_sum(self, rank: int) -> "SvftConfig":
        return replace(self, start="zero")


class Svft(Additive):
    """Trained: m. Saved beside it: where its entries lie (if drawn or chosen), and the signature of U and V."""

    U: Float[Tensor, "out n"]
    Vt: Float[Tensor, "n in"]
    place: Int[Tensor, " k"]
    signature: Float[Tensor, "3 n"]

    def __init__(self, weight: Float[Tensor, "out in"], config: SvftConfig) -> None:
        super().__init__()
        require_finite(weight, "SVFT", "weight")
        U, s, Vt = signed_svd(weight)
        n = len(s)
        d = 0 if config.pattern == "plain" else min(config.off_diagonal, n - 1)
        place = _places(config.pattern, n, d, U, Vt)
        m = torch.zeros(len(place), dtype=weight.dtype, device=weight.device)
        if config.start == "kaiming":
            m.normal_(0, (2 * len(place)) ** -0.5)  # sqrt(2/k) times the gate's 1/2
        self.m = nn.Parameter(m)
        self.plain = config.pattern == "plain"
        self.register_buffer("place", place, persistent=config.pattern in ("random", "top_k"))
        self.register_buffer("U", U.to(weight), persistent=False)
        self.register_buffer("Vt", Vt.to(weight), persistent=False)
        self.register_buffer("signature", _signature(U, s, Vt).to(weight))

    @staticmethod
    def linear(parts: list[tuple[float, "Svft"]]) -> tuple[Float[Tensor, " k"], Int[Tensor, " k"]]:
        """The weighted sum of coefficients between the same singular vectors, and their places."""
        place = parts[0][1].place
        if not all(torch.equal(core.place, place) for _, core in parts):
            raise BadInput("SVFT adds up coefficients of the same places; these adapters have them at different ones")
        return torch.stack([w * core.m for w, core in parts]).sum(0), place

    def hold(self, m: Float[Tensor, " k"], place: Int[Tensor, " k"]) -> None:
        """Become these coefficients."""
        self.m.copy_(m)
        self.place.copy_(place)

    def M(self) -> Float[Tensor, "n n"]:
        n = self.U.shape[1]
        return torch.zeros(n * n, dtype=self.m.dtype, device=self.m.device).index_add(0, self.place, self.m).view(n, n)

    def delta(self) -> Float[Tensor, "out in"]:
        return (self.U * self.m if self.plain else self.U @ self.M()) @ self.Vt

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        z = F.linear(x, self.Vt)
        return F.linear(z * self.m if self.plain else F.linear(z, self.M()), self.U)

    def rows(self, index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        left = F.embedding(index, self.U)
        return (left * self.m if self.plain else left @ self.M()) @ self.Vt

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "signature")
        if saved is not None and saved.shape == self.signature.shape:
            _require_same_vectors(saved, self.signature)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SvftLayer(AdapterLayer):
    """A layer with SVFT adapters."""

    adapter_layer_names = ("pondera_svft_core",)
    core = Svft


class SvftModel(AdapterModel):
    """A model with SVFT adapters; made by `peft.get_peft_model`."""

    prefix = "pondera_svft_"
    tuner_layer_cls = SvftLayer
    paper_name = "SVFT"
    sums = ("linear",)


def signed_svd(
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out n"], Float[Tensor, " n"], Float[Tensor, "n in"]]:
    """Thin SVD in float64, the same on every machine unless singular values are equal: <u_i, probe> > 0 fixes signs."""
    # Apple's GPUs have no float64
    work = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device).double()
    U, s, Vt = torch.linalg.svd(work, full_matrices=False)
    sign = torch.where(_probe(len(U), U) @ U < 0, -1.0, 1.0).double()
    return U * sign, s, Vt * sign[:, None]


def _probe(size: int, like: Tensor) -> Float[Tensor, " size"]:
    """A fixed vector that is orthogonal to no singular vector, except by accident."""
    return torch.arange(1, size + 1, dtype=like.dtype, device=like.device).sin()


def _signature(U: Tensor, s: Tensor, Vt: Tensor) -> Float[Tensor, "3 n"]:
    """A turn of two neighbouring vectors by an angle changes their entries by about that angle."""
    scale = s[0] if s[0] > 0 else torch.ones_like(s[0])
    return torch.stack([s / scale, _probe(len(U), U) @ U, Vt @ _probe(Vt.shape[1], Vt)])


def _require_same_vectors(saved: Float[Tensor, "3 n"], own: Float[Tensor, "3 n"]) -> None:
    exact = min(torch.finfo(x.dtype).bits for x in (saved, own)) >= 32
    gap = (saved.detach().double().cpu() - own.detach().double().cpu()).abs().amax(0)
    off = int((~(gap <= (1e-3 if exact else 0.05))).sum())
    if off:
        raise BadInput(
            f"the saved SVFT coefficients belong to other singular vectors than those of this base weight ({off} of "
            f"{len(gap)} differ); load the base with the values it was trained with, dtype included, or merge there"
        )


def _places(pattern: str, n: int, d: int, U: Tensor, Vt: Tensor) -> Int[Tensor, " k"]:
    """Where M has entries, as i n + j in ascending order."""
    k = n * (2 * d + 1) - d * (d + 1)
    i = torch.arange(n, device=U.device)
    if pattern == "random":
        return torch.randperm(n * n)[:k].sort().values.to(U.device)
    if pattern == "top_k":
        if len(U) != Vt.shape[1]:
            raise BadInput(
                f"SVFT's top_k compares left with right singular vectors, which needs a square weight, got "
                f"{(len(U), Vt.shape[1])}"
            )
        aligned = (U.T @ Vt.T).abs()
        return aligned.flatten().topk(k).indices.sort().values
    return ((i[:, None] - i).abs() <= d).flatten().nonzero().squeeze(1)


register(SvftConfig, SvftModel)
