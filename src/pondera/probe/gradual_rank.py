"""Gradual rank: how many directions of each weight training has used since the start."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pondera._weights import require_owned
from pondera.errors import BadInput, require_extra, require_finite
from pondera.linalg import as_matrix
from pondera.probe._untouched import require_model, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHO = "rank_of_change"
SHOWN = 40  # matrices a plot has room for
PROJECTIONS = (  # names under which separate projections of one attention are kept: query, key, value, out
    ("query", "key", "value", "out"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
)


@dataclass(frozen=True)
class RankOfChange:
    """The change D of every matrix since the reference, by its singular values s_1 >= s_2 >= ...

    Attributes:
        names: the matrices: owned weights by their names, products of heads as "layer.key_query[head]" and
            "layer.value_out[head]".
        stable_rank: ||D||_F^2 / ||D||_2^2, between 1 and the rank; 0 where nothing changed.
        rank: number of singular values above `tol` times the largest.
        relative_change: ||D||_F over the norm of the matrix at the reference (infinite from zero).
        spectra: the singular values of each D, descending.
        tol: as asked.
    """

    names: tuple[str, ...]
    stable_rank: Float[Tensor, "matrices"]
    rank: Int[Tensor, "matrices"]
    relative_change: Float[Tensor, "matrices"]
    spectra: tuple[Float[Tensor, "rank"], ...]
    tol: float

    def of(self, part: str) -> Float[Tensor, "some"]:
        """The stable ranks of the matrices whose name contains `part`, such as "key_query"."""
        return self.stable_rank[[i for i, name in enumerate(self.names) if part in name]]

    def summary(self) -> str:
        """The finding in plain words."""
        moved = self.stable_rank > 0
        if not moved.any():
            return f"None of the {len(self.names)} matrices differs from the reference."
        s, low = self.stable_rank, self.stable_rank.masked_fill(~moved, torch.inf)
        full = torch.tensor([len(spectrum) for spectrum in self.spectra])
        still = f" {int((~moved).sum())} did not change." if not moved.all() else ""
        return (
            f"{int(moved.sum())} of {len(self.names)} matrices changed, by {self.relative_change[moved].median():.2g} of "
            f"their norm (median). The stable rank of the change is {s[moved].median():.1f} (median), from "
            f"{low.min():.1f} ({self.names[int(low.argmin())]}) to {s.max():.1f} ({self.names[int(s.argmax())]}); "
            f"directions above {self.tol:g} of the strongest: {int(self.rank[moved].median())} of "
            f"{int(full[moved].median())} (medians).{still}"
        )

    def plot(self) -> "Figure":
        """Stable rank of each change, and its singular values by the largest (a matplotlib figure)."""
        require_extra("RankOfChange.plot", "matplotlib")
        from matplotlib.figure import Figure

        shown = range(min(len(self.names), SHOWN))
        fig = Figure(figsize=(10, max(3.0, 0.22 * len(shown) + 1)), layout="constrained")
        left, right = fig.subplots(1, 2)
        left.barh([self.names[i] for i in shown], self.stable_rank[: len(shown)].tolist(), color="#4477aa")
        left.tick_params(axis="y", labelsize=6)
        left.invert_yaxis()
        left.set(xlabel="stable rank of the change")
        for i in shown:
            s = self.spectra[i]
            if s[0] > 0:
                right.plot(range(1, len(s) + 1), (s / s[0]).tolist(), color="#4477aa", alpha=0.4, lw=1)
        right.axhline(self.tol, color="black", ls="--", lw=1, label="tol")
        right.set(xlabel="direction", ylabel="singular value / largest", yscale="log", ylim=(1e-4, 1.5))
        right.legend(frameon=False)
        return fig


def rank_of_change(
    model: nn.Module, reference: nn.Module | Mapping[str, Tensor], *, heads: int | None = None, tol: float = 0.1
) -> RankOfChange:
    r"""Measure how many directions the weights of `model` have moved in since `reference`.

    For each owned weight, seen as a matrix of one row an output,

    .. math:: D = W_t - W_0, \qquad \text{stable rank} = \frac{\lVert D \rVert_F^2}{\lVert D \rVert_2^2}

    and for each attention head, with X the tokens as rows, of what its pairs of matrices do together:

    .. math:: D = W_K W_Q^T - W_{K,0} W_{Q,0}^T, \qquad D = W_V W_O^T - W_{V,0} W_{O,0}^T

    (of rank at most twice the head's width). Transformers gain these ranks little by little, from a start small enough
    one at a time. Call it at a few checkpoints to see that; at the end it says what rank an adapter would need.

    Heads are found in `nn.MultiheadAttention`, and in any module that keeps its projections as linear layers named
    query, key, value and out (or q_proj, k_proj, v_proj and o_proj or out_proj), all of one inner width. The model is
    left as it was.

    Args:
        model: the model now.
        reference: the model at the start, or its `state_dict()` (a copy: `state_dict` itself follows the training).
        heads: number of heads where a module with such projections does not say it (as num_heads or n_heads). None:
            no products for those modules.
        tol: what counts as a direction for `rank`, as a part of the strongest (0.1: ours; the paper shows spectra).
    Returns: a `RankOfChange`.
    Raises: BadInput: if the reference does not fit the model; for NaN or infinite weights, a model without owned
        weights or on the meta device; if heads does not divide a width; for a tol outside (0, 1).
    Paper: Boix-Adsera et al. 2023, arXiv 2306.07042: stable rank and spectra of the changed products of heads, as its
        figures have them. The single weights beside them are ours.

    >>> net = nn.Linear(3, 3, bias=False)
    >>> start = {k: v.clone() for k, v in net.state_dict().items()}
    >>> with torch.no_grad():
    ...     w = net.weight.add_(torch.diag(torch.tensor([4.0, 2.0, 0.0])))
    >>> found = rank_of_change(net, start)
    >>> round(found.stable_rank.item(), 4), found.rank.item()
    (1.25, 2)
    """
    require_model(model, WHO)
    require_owned(model, WHO)
    if not 0 < tol < 1:
        raise BadInput(f"{WHO} needs a tol between 0 and 1, got {tol}")
    state = _state(reference)
    with untouched(model):
        try:
            model.load_state_dict(state)
        except Exception as error:
            said = " ".join(str(error).split())[:300]
            raise BadInput(f"{WHO} needs a reference with the model's own weights: {said}") from error
        start = {name: require_finite(w, WHO, f"reference's {name}") for name, w in _matrices(model, heads)}
    spectra = tuple(
        torch.linalg.svdvals(require_finite(w, WHO, f"model's {name}") - start[name])
        for name, w in _matrices(model, heads)
    )
    norm, top = torch.stack([s.norm() for s in spectra]), torch.stack([s[0] for s in spectra])
    before = torch.stack([w.norm() for w in start.values()])
    return RankOfChange(
        names=tuple(start),
        stable_rank=torch.where(top > 0, (norm / top).square(), 0.0),
        rank=torch.stack([(s > tol * s[0]).sum() for s in spectra]),
        relative_change=torch.where(norm > 0, norm / before, 0.0),
        spectra=spectra,
        tol=tol,
    )


def _state(reference: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(reference, nn.Module):
        return require_model(reference, WHO).state_dict()
    if isinstance(reference, Mapping) and all(isinstance(t, Tensor) for t in reference.values()):
        return reference
    raise BadInput(
        f"{WHO} needs the model at the start or its state_dict for a reference, got {type(reference).__name__}"
    )


@torch.no_grad()
def _matrices(model: nn.Module, heads: int | None) -> Iterator[tuple[str, Float[Tensor, "m n"]]]:
    """Every owned weight as a float64 matrix of its own, then the products of every head, by name."""
    for one in require_owned(model, WHO):
        yield one.name, _plain(as_matrix(one.read()))
    formed = heads is None
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for (q, k, v, o), count in _projections(dot, module, heads):
            # rows of q, k, v and columns of o belong to heads, one after another
            parts = zip(*(t.chunk(count) for t in (q, k, v, o.t())), strict=True)
            for h, (qh, kh, vh, oh) in enumerate(parts):
                yield f"{dot}key_query[{h}]", kh.t() @ qh
                yield f"{dot}value_out[{h}]", vh.t() @ oh
            formed = True
    if not formed:
        raise BadInput(f"{WHO} was given heads={heads} but found no attention with projections it knows by name")


def _projections(dot: str, module: nn.Module, heads: int | None) -> Iterator[tuple[tuple[Tensor, ...], int]]:
    """The four matrices (out, in) of an attention and its number of heads; nothing for other modules."""
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            qkv = module.in_proj_weight.chunk(3)
        else:
            qkv = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        yield tuple(_plain(w) for w in (*qkv, module.out_proj.weight)), module.num_heads
        return
    for names in PROJECTIONS:
        layers = [getattr(module, name, None) for name in names]
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        own = getattr(module, "num_heads", getattr(module, "n_heads", None))
        count, weights = heads if heads is not None else own, tuple(_plain(layer.weight) for layer in layers)
        widths = {*(len(w) for w in weights[:3]), weights[3].shape[1]}
        if not isinstance(count, int) or len(widths) > 1:
            return  # grouped queries have no such product; without a number of heads none is formed
        (width,) = widths
        if count < 1 or width % count:
            raise BadInput(f"{WHO} cannot part the width {width} of {dot}{names[0]} into {count} heads")
        yield weights, count
        return


def _plain(w: Tensor) -> Tensor:
    return w.detach().to("cpu", torch.float64, copy=True)
