"""Rich or lazy: how far training moved a network's weights, its tangent kernel and its representation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._weights import require_owned
from pondera.errors import BadInput, nearest, require_extra, require_finite
from pondera.probe._untouched import in_words, require_model, run, scores, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
WHO = "laziness"
LIMIT = 1 << 28  # entries of the Jacobian: 1 GiB in float32
CHUNK = 64  # outputs differentiated at a time
SHOWN = 40  # weights a plot has room for


@dataclass(frozen=True)
class Laziness:
    """What training changed; alignments are cosines, 1 where nothing turned.

    Attributes:
        weight_change: ||W_t - W_0||_F over all owned weights together.
        relative_change: the same over ||W_0||_F.
        kernel_alignment: of the tangent kernels before and after. Lazy learning keeps it near 1.
        kernel_growth: norm of the kernel after over before.
        representation_alignment: of the Gram matrices of the representation.
        change_of: relative change of each owned weight, in the order of `names`.
        names: the owned weights.
    """

    weight_change: Float[Tensor, ""]
    relative_change: Float[Tensor, ""]
    kernel_alignment: Float[Tensor, ""]
    kernel_growth: Float[Tensor, ""]
    representation_alignment: Float[Tensor, ""]
    change_of: Float[Tensor, "weights"]
    names: tuple[str, ...]

    def summary(self) -> str:
        """The finding in plain words."""
        kernel = "kept" if self.kernel_alignment > 0.9 else "turned" if self.kernel_alignment > 0.5 else "replaced"
        return (
            f"Training moved the weights by {self.relative_change:.2g} of their norm (most {self.change_of.max():.2g}: "
            f"{self.names[int(self.change_of.argmax())]}) and {kernel} the tangent kernel: alignment "
            f"{self.kernel_alignment:.2f} (1 is lazy), {self.kernel_growth:.2g} times its size. The representation's "
            f"alignment is {self.representation_alignment:.2f}."
        )

    def plot(self) -> "Figure":
        """The alignments, and the relative change of each weight (a matplotlib figure)."""
        require_extra("Laziness.plot", "matplotlib")
        from matplotlib.figure import Figure

        shown = slice(0, SHOWN)
        fig = Figure(figsize=(9, max(2.6, 0.22 * len(self.names[shown]) + 1)), layout="constrained")
        left, right = fig.subplots(1, 2)
        left.barh(
            ["tangent kernel", "representation"],
            [float(self.kernel_alignment), float(self.representation_alignment)],
            color="#4477aa",
        )
        left.set(xlabel="alignment before and after (1: lazy)", xlim=(0, 1))
        right.barh(list(self.names[shown]), self.change_of[shown].tolist(), color="#cc6677")
        right.tick_params(axis="y", labelsize=6)
        right.set(xlabel="change of the weight / its norm")
        for ax in (left, right):
            ax.invert_yaxis()
        return fig


def laziness(before: nn.Module, after: nn.Module, batch: Batch, *, layer: str | None = None) -> Laziness:
    r"""Compare a network before and after training: did it learn lazily or richly?

    With J the derivatives of all outputs on the batch by all parameters, and H the representation, a row an example,

    .. math:: K = J J^T, \qquad KA = \frac{\langle K_0, K_t \rangle}{\lVert K_0 \rVert_F \lVert K_t \rVert_F},
              \qquad RA = \frac{\langle H_0 H_0^T, H_t H_t^T \rangle}{\lVert H_0 H_0^T \rVert_F \lVert H_t H_t^T \rVert_F}

    and the norm of the change of the weights. In the lazy regime a network learns as its linearisation at the start
    would: KA and RA stay near 1 and weights move little. In the rich regime it makes features of its own. The measures
    are comparable between runs of one architecture that reached one loss.

    Only parameters that require gradients in `before` count in K; freeze the others to look at one layer. Both models
    run in eval mode and are left as they were.

    Args:
        before, after: two models of one structure, such as a deepcopy made at the start and the trained model.
        batch: what forward takes: a tensor, a tuple or list (positional), or a mapping (by keyword). Every output of
            every example is a row of J; a few dozen examples are enough.
        layer: name of the module whose output is the representation. None: what enters the linear layer that runs last.
            Every position of (N, positions, d) is a row.
    Returns: a `Laziness`.
    Raises: BadInput: if the two have other parameters; if the batch is empty, holds NaN or does not fit; if an output is
        no floating-point tensor or not finite; if a kernel or representation is zero; if the layer is unknown, does not
        run or gives no tensor; if J would have more than 2^28 entries; for a model on the meta device or without a
        parameter that requires a gradient.
    Paper: Liu, Baratin, Cornford, Mihalas, Shea-Brown and Lajoie 2024, arXiv 2310.08513. The cosines, not centred, are
        those of the authors' code, which takes the derivatives by the recurrent weight alone, at all time steps of some
        tasks, and the representation at the last step.

    >>> from copy import deepcopy
    >>> before = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> after = deepcopy(before)
    >>> with torch.no_grad():
    ...     w = after[2].weight.mul_(-1)
    >>> found = laziness(before, after, torch.eye(2))
    >>> found.change_of.tolist(), round(found.kernel_alignment.item(), 4)
    ([0.0, 2.0], 1.0)
    """
    for model in (before, after):
        require_model(model, WHO)
    _same_structure(before, after)
    change, norm = _changes(before, after)
    names = tuple(one.name for one in require_owned(before, WHO))
    wanted = [name for name, p in before.named_parameters() if p.requires_grad]
    if not wanted:
        raise BadInput(f"{WHO} needs a parameter that requires a gradient, for the tangent kernel is by those")
    jacobian = [_look(model, batch, layer, wanted) for model in (before, after)]
    (j0, h0), (jt, ht) = jacobian
    k0, kt = j0 @ j0.T, jt @ jt.T
    return Laziness(
        weight_change=change.norm(),
        relative_change=change.norm() / norm.norm(),
        kernel_alignment=_cosine(k0, kt, "tangent kernel"),
        kernel_growth=kt.norm() / k0.norm(),
        representation_alignment=_cosine(h0 @ h0.T, ht @ ht.T, "representation"),
        change_of=torch.where(change > 0, change / norm, 0.0),
        names=names,
    )


def _same_structure(before: nn.Module, after: nn.Module) -> None:
    a, b = ({k: tuple(p.shape) for k, p in m.named_parameters()} for m in (before, after))
    for name in (*a, *b):
        if a.get(name) != b.get(name):
            raise BadInput(
                f"{WHO} needs two models of one structure; {name} is of shape {a.get(name, 'none')} before and "
                f"{b.get(name, 'none')} after"
            )


@torch.no_grad()
def _changes(before: nn.Module, after: nn.Module) -> tuple[Float[Tensor, "weights"], Float[Tensor, "weights"]]:
    """Norms of the change and of the start of every owned weight."""
    rows = []
    for a, b in zip(require_owned(before, WHO), require_owned(after, WHO), strict=True):
        w0, wt = (require_finite(one.read(), WHO, one.name).double().cpu() for one in (a, b))
        rows.append((float((wt - w0).norm()), float(w0.norm())))
    change, norm = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return change, norm


def _look(
    model: nn.Module, batch: Batch, layer: str | None, wanted: list[str]
) -> tuple[Float[Tensor, "outputs parameters"], Float[Tensor, "rows d"]]:
    """The Jacobian of all outputs and the representation, both in float64 where the model is, else float32."""
    with untouched(model, grad=True):
        kept: list[Tensor] = []
        _watch(model, layer, kept)
        params = [p for name, p in model.named_parameters() if name in wanted]
        for p in params:
            p.requires_grad_()
        out = require_finite(scores(run(model, batch, WHO), WHO), WHO, "model's output").flatten()
        size = len(out) * max(len(out), sum(p.numel() for p in params))
        if size > LIMIT:
            raise BadInput(
                f"{WHO} would need {size:.1e} derivatives ({len(out)} outputs), more "
                f"than 2^28; give a smaller batch, or freeze parameters"
            )
        if not kept:
            raise BadInput(f"{WHO} saw {f'{layer} not' if layer is not None else 'no linear layer'} run on this batch")
        rows = []
        with in_words(batch, WHO, "differentiate the model on its batch"):
            for one in torch.eye(len(out), dtype=out.dtype, device=out.device).split(CHUNK):
                grads = torch.autograd.grad(
                    out, params, one, is_grads_batched=True, retain_graph=True, materialize_grads=True
                )
                rows.append(torch.cat([g.flatten(1) for g in grads], 1))
        h = kept[-1].detach()
    work = torch.promote_types(out.dtype, torch.float32)
    return torch.cat(rows).to(work), require_finite(h.flatten(0, -2), WHO, "representation").to(work)


def _watch(model: nn.Module, layer: str | None, kept: list[Tensor]) -> None:
    """Keep what enters every linear layer, or what leaves the named module; `untouched` takes the hooks away again."""
    if layer is None:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        return
    modules = dict(model.named_modules())
    if layer not in modules:
        raise BadInput(f"{WHO} found no module named {layer!r}{nearest(layer, modules)}")
    modules[layer].register_forward_hook(lambda _, args, out: kept.append(scores(out, WHO)))


def _cosine(a: Tensor, b: Tensor, what: str) -> Float[Tensor, ""]:
    size = a.norm() * b.norm()
    if not size > 0:
        raise BadInput(f"{WHO} met a {what} that is zero on this batch, so it has no alignment")
    return (a * b).sum() / size
