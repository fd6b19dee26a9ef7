"""Nearest Kronecker products: alternating power steps beside scipy's svds, as the authors use it, on the same gradients.

Run `python -m benchmarks fisher_svd`. And the whole of `fisher_svd` beside the whitening of SVD-LLM, in time and in the loss of
the small pre-trained GPT, its feed-forward layers cut to 60%.
"""

import copy
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.optim import interleaved, timed
from pondera.compress import fisher_svd, nearest_kronecker
from pondera.lab.tasks import gpt

SIZES = ((32, 64), (128, 64), (128, 128))  # out and in, by samples below
SAMPLES = 64


def by_svds(g: Tensor) -> tuple[Tensor, Tensor]:
    """Three triples of the rearranged Fisher by products, the first used, its sign set by the trace."""
    from scipy.sparse.linalg import LinearOperator, svds

    k, out, inner = g.shape
    tall, wide = g.flatten(0, 1), g.mT.flatten(0, 1)

    def to_out(v: Any) -> Any:
        a = torch.as_tensor(v).reshape(inner, inner)
        return (wide.mT @ (a @ g.mT).flatten(0, 1) / k).flatten().numpy()

    def to_in(u: Any) -> Any:
        b = torch.as_tensor(u).reshape(out, out)
        return (tall.mT @ (b @ g).flatten(0, 1) / k).flatten().numpy()

    product = LinearOperator((out**2, inner**2), matvec=to_out, rmatvec=to_in, dtype="float64")
    u, s, vh = svds(product, k=3, random_state=0)
    b, a = torch.tensor(u[:, -1] * s[-1]).view(out, out), torch.tensor(vh[-1].copy()).view(inner, inner)
    return a * a.trace().sign(), b * b.trace().sign()


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for out, inner in SIZES[: 1 if quick else None]:
            g = gradients(out, inner)
            (a, b), (c, d) = nearest_kronecker(g), by_svds(g)
            off = float(
                (torch.outer(a.diagonal(), b.diagonal()) - torch.outer(c.diagonal(), d.diagonal())).norm() / b.norm()
            )
            ours, peer = interleaved(lambda g=g: nearest_kronecker(g), lambda g=g: by_svds(g))  # type: ignore[misc]
            row = {"name": f"{SAMPLES} gradients {out} x {inner}", "ours": "nearest_kronecker", "peer": "scipy svds"}
            note = f"float64; diagonals of the products agree to {off:.1g}"
            rows.append(row | {"seconds_ours": ours, "seconds_peer": peer, "ratio": ours / peer, "note": note})
        return rows if quick else [*rows, beside_whitening()]
    finally:
        torch.set_num_threads(threads)


def gradients(out: int, inner: int) -> Tensor:
    """Sums of a few outer products, as the gradients of short sequences are."""
    g = torch.Generator().manual_seed(out + inner)
    x = torch.randn(SAMPLES, 8, inner, generator=g, dtype=torch.float64) * torch.arange(1, inner + 1) ** -0.5
    d = torch.randn(SAMPLES, 8, out, generator=g, dtype=torch.float64) * torch.arange(1, out + 1) ** -0.5
    return d.mT @ x


def beside_whitening() -> dict[str, Any]:
    net, library = gpt.build(), Path(sysconfig.get_path("stdlib"))
    x, y = gpt.windows((library / "argparse.py").read_text(encoding="utf-8"), 128)
    tests = gpt.windows((library / "textwrap.py").read_text(encoding="utf-8"), 128)
    data = [(x[k : k + 16, :64], y[k : k + 16, :64]) for k in range(0, 64, 16)]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def cut(factors: str) -> tuple[nn.Module, Callable[[], Any]]:
        model = copy.deepcopy(net)
        return model, lambda: fisher_svd(
            model, data, 0.6, loss=loss, factors=factors, damping=1.0, only="blocks.*.[ud]*"
        )  # type: ignore[arg-type]

    (ours, cut_ours), (theirs, cut_theirs) = cut("nearest"), cut("activations")
    a, b = timed(cut_ours), timed(cut_theirs)
    with torch.no_grad():
        losses = [float(loss(model, tests)) for model in (net, ours, theirs)]
    note = "one run; loss on textwrap.py {:.3f} dense, {:.3f} cut by ours, {:.3f} by the peer, both damped by 1".format(
        *losses
    )
    row = {"name": "feed-forward layers of a small GPT to 60%", "ours": "fisher_svd", "peer": "whitening as SVD-LLM"}
    return row | {"seconds_ours": a, "seconds_peer": b, "ratio": a / b, "note": note}


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))
