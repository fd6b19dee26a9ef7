"""Smooth on the manifold: a graph-Laplacian penalty whose weights move to where a function is steepest."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput, describe, require_finite, require_float


class ManifoldSmooth(nn.Module):
    r"""Dynamically weighted manifold regularisation, by primal and dual steps.

    The least Lipschitz constant along the data's manifold, at a mean loss of at most epsilon, is a saddle point of

    .. math:: \mu \, (\ell(f) - \epsilon) + \frac12 \sum_{ij} \frac{\lambda_i + \lambda_j}{2} \, w_{ij} \lVert f_i - f_j \rVert^2,
              \qquad \mu \ge 0, \; \lambda \ge 0, \; \sum_i \lambda_i = 1

    The edges are those to the nearest neighbours, either way, with heat-kernel weights w_ij = exp(-|x_i - x_j|^2 / 4t). Each
    training step descends in f; then `update` ascends in the dual variables: lambda gathers where the slope over an edge is
    largest, mu grows while the loss exceeds epsilon:

    .. math:: \lambda_i \leftarrow \lambda_i \, e^{\eta_\lambda s_i^2 / \max_j s_j^2} / Z, \quad
              s_i = \max_{j \sim i} \frac{\lVert f_i - f_j \rVert}{\lVert x_i - x_j \rVert}, \qquad
              \mu \leftarrow \big[ \mu + \eta_\mu (\ell - \epsilon) \big]_0^{\mu_{\max}}

    With lambda as it starts, 1/n, the penalty is the plain Laplacian one, f' L f / n.

    Args:
        points: x, the points the function is held smooth on, labelled or not; fixed.
        neighbours: of each point in the graph; 10 (ours).
        temperature: t; by default a quarter of the median squared edge (ours), for which a median edge weighs 1/e.
        epsilon: the loss aimed at; 0.01 in the released two-moons script.
        step_lambda: eta_lambda, 0.1; 0 keeps the plain penalty.
        step_mu: eta_mu, 0.5 in the released script; 0 keeps mu at 1, where the factor is tuned instead.
        most_mu: where mu stops (ours). A mu that stays there says that epsilon is out of reach.
    State: `weights` (lambda) and `mu` are buffers, in `state_dict`.
    Returns: calling it with outputs gives the scalar penalty, 0 exactly for functions that are constant on each connected
        part of the graph. Add mu times the loss.
    Raises: BadInput: if points are no finite matrix of two or more, neighbours fewer than one or as many as points, or a setting
        is negative.
    Paper: Cervino et al. 2022, arXiv 2210.00301 (body recalled; code read). The released code differs: its penalty tr((lambda f)' L f)
        equals this for constant lambda alone and can be negative; its slopes are over all pairs; its lambda adds the slopes
        and divides by the sum, which ends in proportion to them, where ours goes on to the steepest points.

    >>> smooth = ManifoldSmooth(torch.tensor([[0.0], [1.0], [2.0]]), neighbours=1)
    >>> smooth(torch.tensor([5.0, 5.0, 5.0])).item()
    0.0
    >>> f = torch.tensor([0.0, 1.0, 4.0])
    >>> smooth.lipschitz(f).item()
    3.0
    >>> smooth.update(f, loss=torch.tensor(0.5)).weights.argmin().item(), round(smooth.mu.item(), 3)
    (0, 1.245)
    """

    weights: Tensor
    mu: Tensor
    edges: Tensor
    kernel: Tensor
    lengths: Tensor

    def __init__(
        self,
        points: Float[Tensor, "n d"],
        *,
        neighbours: int = 10,
        temperature: float | None = None,
        epsilon: float = 0.01,
        step_lambda: float = 0.1,
        step_mu: float = 0.5,
        most_mu: float = 1000.0,
    ) -> None:
        super().__init__()
        require_finite(points, "ManifoldSmooth", "points")
        if points.ndim != 2 or not 1 <= neighbours < len(points):
            raise BadInput(
                f"ManifoldSmooth needs points of shape (n, d) and from 1 to n - 1 neighbours, got a {describe(points)} "
                f"and {neighbours}"
            )
        if min(epsilon, step_lambda, step_mu, most_mu) < 0 or (temperature is not None and not temperature > 0):
            raise BadInput("ManifoldSmooth needs steps, epsilon and most_mu of at least 0 and a positive temperature")
        x = points.detach()
        x = x.float() if x.element_size() < 4 else x
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
        near = torch.zeros_like(distance, dtype=torch.bool).scatter_(
            1, distance.topk(neighbours, largest=False).indices, True
        )
        i, j = (near | near.T).triu(1).nonzero(as_tuple=True)
        lengths = distance[i, j]
        t = temperature or float(lengths.square().median()) / 4
        if not bool((lengths > 0).all()):
            raise BadInput("ManifoldSmooth needs points that differ, got two in the same place")
        self.register_buffer("edges", torch.stack([i, j]), persistent=False)
        self.register_buffer("lengths", lengths, persistent=False)
        self.register_buffer("kernel", (-lengths.square() / (4 * t)).exp(), persistent=False)
        self.register_buffer("weights", torch.full((len(x),), 1 / len(x), dtype=x.dtype, device=x.device))
        self.register_buffer("mu", torch.ones((), dtype=x.dtype, device=x.device))
        self.epsilon, self.step_lambda, self.step_mu, self.most_mu = epsilon, step_lambda, step_mu, most_mu

    def forward(self, outputs: Float[Tensor, "n *k"]) -> Float[Tensor, ""]:
        """The penalty of the function's values at all points, in their order; for classes logits rather than probabilities."""
        steps = self._steps(outputs).square().sum(1)  # each edge once, which is the half of the sum over i and j
        i, j = self.edges
        return ((self.weights[i] + self.weights[j]) / 2 * self.kernel * steps).sum().to(outputs.dtype)

    def laplacian(self) -> Float[Tensor, "n n"]:
        """The matrix of the penalty as it stands: forward(f) = tr(f' L f)."""
        n, (i, j) = len(self.weights), self.edges
        w = torch.zeros(n, n, dtype=self.kernel.dtype, device=self.kernel.device)
        w[i, j] = w[j, i] = (self.weights[i] + self.weights[j]) / 2 * self.kernel
        return torch.diag(w.sum(1)) - w

    def slopes(self, outputs: Float[Tensor, "n *k"]) -> Float[Tensor, " n"]:
        """s: the largest slope over an edge at each point."""
        steep = self._steps(outputs).norm(dim=1) / self.lengths
        i, j = self.edges
        at = torch.zeros(len(self.weights), dtype=steep.dtype, device=steep.device)
        return at.scatter_reduce(0, i, steep, "amax").scatter_reduce(0, j, steep, "amax")

    def lipschitz(self, outputs: Float[Tensor, "n *k"]) -> Float[Tensor, ""]:
        """The Lipschitz constant of these values along the graph."""
        return self.slopes(outputs).amax()

    @torch.no_grad()
    def update(self, outputs: Float[Tensor, "n *k"], loss: Float[Tensor, ""]) -> "ManifoldSmooth":
        """A step of the dual variables.

        Raises: BadInput: if outputs do not fit or are not finite, or the loss is not.
        """
        require_finite(outputs, "ManifoldSmooth", "outputs")
        require_finite(loss, "ManifoldSmooth", "loss")
        steep = self.slopes(outputs).square().to(self.weights)
        grown = self.weights * (self.step_lambda * steep / steep.amax().clamp_min(torch.finfo(steep.dtype).tiny)).exp()
        self.weights.copy_(grown / grown.sum())
        self.mu.add_(self.step_mu * (loss.to(self.mu) - self.epsilon)).clamp_(0, self.most_mu)
        return self

    def _steps(self, outputs: Tensor) -> Tensor:
        require_float(outputs, "ManifoldSmooth", "outputs")
        if outputs.ndim < 1 or len(outputs) != len(self.weights):
            raise BadInput(
                f"ManifoldSmooth needs the outputs at all its {len(self.weights)} points, got a {describe(outputs)}"
            )
        i, j = self.edges
        f = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
        f = f.to(torch.promote_types(f.dtype, self.kernel.dtype))
        return f[i] - f[j]

    def extra_repr(self) -> str:
        return f"points={len(self.weights)}, edges={len(self.lengths)}, epsilon={self.epsilon}"
