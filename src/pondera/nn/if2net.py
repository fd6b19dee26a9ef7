"""A network that learns tasks one after another and keeps what it said before: frozen random features, projected output weights."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe, require_finite


class IF2Net(nn.Module):
    r"""Random features that stay, and output weights that change only where earlier tasks are not affected.

    .. math:: \phi(x) = \mathrm{relu}\left(\frac{W x - m}{s} + b\right), \qquad f(x) = V \phi(x)

    W and b are random and frozen. The representation is adjusted once: m and s are mean and standard deviation of W x over the
    first task, so that all features work at their scale, and are frozen then as well. `fit_task` learns one task, in closed
    form and once: with A the features of its rows, Y their targets and P the projector onto the directions that are free,

    .. math:: D = \arg\min_D \lVert A (V^T + P D) - Y \rVert^2 + \lambda \lVert D \rVert^2, \qquad V^T \leftarrow V^T + P D

    after which the directions that A uses are no longer free. With `threshold` 0 these are all of A's row space, and what the
    net says on the rows of earlier tasks stays as it was to rounding, while it says so at new rows of theirs only nearly. A
    larger threshold keeps the main directions of a task, those whose singular value is above so much of its largest: less is
    kept, more is left to learn with, and old answers move a little. No task is named at test.

    There are as many directions as hidden features. A task that finds none free is refused; `free` says what is left.

    Args:
        in_features, out_features: sizes of the last dimension before and after; all classes that will come have their output.
        hidden_features: how many random features (1000; they should outnumber the rows of all tasks where threshold is 0).
        threshold: see above (0.01: our choice, on digits; the paper's rule for its "parsimonious" space was not at hand).
        ridge: lambda, by the mean square of the features (0.01: our choice).
        generator: source of W and b; None takes torch's default one.
        device, dtype: of the weights. Tasks are solved in float64 whatever the dtype.
    Raises: BadInput: for sizes that are not positive whole numbers, a threshold outside of [0, 1) or a ridge that is not positive.
    Paper: Li et al. 2023, arXiv 2306.10480. The abstract fixes frozen random weights, an adjustment of representations and
        projected output weights; the body and code were not at hand. The adjustment by the first task's moments and the projector from
        singular values are ours; per-task adjustments would need the task's name at test, or change old answers.

    >>> net = IF2Net(2, 2, 50, generator=torch.Generator().manual_seed(0), threshold=0.0)
    >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    >>> _ = net.fit_task(x[:20], torch.zeros(20, dtype=torch.long))
    >>> before = net(x[:20])
    >>> _ = net.fit_task(x[20:] + 3, torch.ones(20, dtype=torch.long))
    >>> torch.allclose(net(x[:20]), before, atol=1e-4), round(net.free, 2)
    (True, 0.2)
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    kept: Tensor
    n_kept: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int = 1000,
        *,
        threshold: float = 0.01,
        ridge: float = 0.01,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "hidden_features": hidden_features}
        for what, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise BadInput(f"IF2Net needs {what} of at least 1, a whole number, got {size!r}")
        if not 0 <= threshold < 1 or not 0 < ridge < float("inf"):
            raise BadInput(f"IF2Net needs a threshold in [0, 1) and a positive ridge, got {threshold} and {ridge}")
        self.in_features, self.out_features, self.hidden_features = in_features, out_features, hidden_features
        self.threshold, self.ridge = threshold, ridge
        h = hidden_features
        for name, shape in (("weight", (h, in_features)), ("bias", (h,)), ("mean", (h,)), ("std", (h,))):
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype))
        # an orthonormal basis of the directions in use, one a row, the rest of it zero
        self.register_buffer("kept", torch.zeros(h, h, device=device, dtype=torch.float64))
        self.register_buffer("n_kept", torch.zeros((), device=device, dtype=torch.long))
        self.output = nn.Parameter(torch.empty(out_features, h, device=device, dtype=dtype))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw features anew and forget all tasks."""
        self.weight.normal_(0, self.in_features**-0.5, generator=generator)
        self.bias.normal_(0, 1, generator=generator)
        self.mean.zero_()
        self.std.fill_(1.0)
        self.kept.zero_()
        self.n_kept.zero_()
        self.output.zero_()

    @property
    def free(self) -> float:
        """The share of directions that are still free."""
        return 1 - int(self.n_kept) / self.hidden_features

    def features(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch hidden_features"]:
        """phi(x)."""
        if x.shape[-1:] != (self.in_features,):
            raise BadInput(f"IF2Net needs {self.in_features} features last, got a {describe(x)}")
        scale = self.std.reciprocal()
        return F.linear(x, self.weight * scale[:, None], self.bias - self.mean * scale).relu()

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return F.linear(self.features(x), self.output)

    @torch.no_grad()
    def fit_task(self, x: Float[Tensor, "rows in_features"], y: Tensor) -> "IF2Net":
        """Learn one task from all of its rows.

        Args:
            x: the rows.
            y: their classes, (rows,), as whole numbers, or targets, (rows, out_features).
        Returns: the net.
        Raises: BadInput: for rows that are none, not finite, or do not fit the net or `y`; and where no direction is free.
            The net is then what it was.
        """
        require_finite(x, "IF2Net.fit_task", "rows")
        if x.ndim != 2 or not len(x) or x.shape[1] != self.in_features:
            raise BadInput(f"IF2Net.fit_task needs rows (n, {self.in_features}), got a {describe(x)}")
        target = self._target(x, y)
        q = self.kept[: int(self.n_kept)]
        if len(q) == self.hidden_features:
            raise BadInput(
                f"IF2Net.fit_task found none of {self.hidden_features} directions free; a net with more hidden features, or "
                "with a higher threshold, has room for more tasks"
            )
        if not len(q):  # the first task
            pre = F.linear(x.double(), self.weight.double())
            self.mean.copy_(pre.mean(0))
            spread = pre.std(0, correction=0)
            self.std.copy_(torch.where(spread > 1e-6 * spread.max(), spread, 1.0))
        a = self.features(x).double()
        b = a - (a @ q.T) @ q  # A P, twice for rounding
        b = b - (b @ q.T) @ q
        u, s, vh = torch.linalg.svd(b, full_matrices=False)
        largest = torch.linalg.eigvalsh(a @ a.T if len(a) < a.shape[1] else a.T @ a)[-1].sqrt()  # singular value of A
        eps = max(a.shape) * torch.finfo(torch.float64).eps
        rest = target - a @ self.output.double().T
        ridge = self.ridge * len(a) * a.square().mean()
        known = s > eps * largest
        change = (u * torch.where(known, s / (s.square() + ridge), 0.0)).T @ rest
        self.output.add_((vh.T @ change).T.to(self.output.dtype))
        new = vh[s > max(self.threshold, eps) * largest]
        self.kept[len(q) : len(q) + len(new)] = new
        self.n_kept.add_(len(new))
        return self

    def _target(self, x: Tensor, y: Tensor) -> Tensor:
        if not isinstance(y, Tensor) or len(y) != len(x):
            said = describe(y) if isinstance(y, Tensor) else type(y).__name__
            raise BadInput(f"IF2Net.fit_task needs {len(x)} targets, one a row, got a {said}")
        if y.is_floating_point():
            require_finite(y, "IF2Net.fit_task", "targets")
            if y.shape != (len(x), self.out_features):
                raise BadInput(f"IF2Net.fit_task needs targets ({len(x)}, {self.out_features}), got a {describe(y)}")
            return y.double()
        if y.ndim != 1 or int(y.min()) < 0 or int(y.max()) >= self.out_features:
            raise BadInput(
                f"IF2Net.fit_task needs classes from 0 to {self.out_features - 1}, got a {describe(y)}"
                + (f" from {int(y.min())} to {int(y.max())}" if y.ndim == 1 else "")
            )
        return F.one_hot(y.long(), self.out_features).double()

    def extra_repr(self) -> str:
        sizes = (
            f"in_features={self.in_features}, out_features={self.out_features}, hidden_features={self.hidden_features}"
        )
        return f"{sizes}, threshold={self.threshold:g}, ridge={self.ridge:g}"
