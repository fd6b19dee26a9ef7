"""The training Jacobian: how a change of the initial weights comes out in the trained ones, direction by direction."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from pondera.errors import BadInput, describe, require_extra, require_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Parameters = Tensor | Mapping[str, Tensor]
Train = Callable[[Any], Any]
WHO = "training_jacobian"


class Regions(NamedTuple):
    """Which singular values are above 1 (chaotic), near 1 (bulk) and below 1 (stable), as masks."""

    chaotic: Bool[Tensor, "values"]
    bulk: Bool[Tensor, "values"]
    stable: Bool[Tensor, "values"]


@dataclass(frozen=True)
class TrainingJacobian:
    """J = d theta_T / d theta_0, or J V on a subspace with orthonormal basis V, and its singular value decomposition.

    Attributes:
        jacobian: J V, one column a direction (V = I unless directions were given).
        singular: its singular values, largest first.
        left, right: singular vectors as columns, both in parameter space: a small change along right[:, i] of the start
            comes out of training as a change along left[:, i], singular[i] times as long.
        final: the trained parameters, flat.
    """

    jacobian: Float[Tensor, "parameters directions"]
    singular: Float[Tensor, "values"]
    left: Float[Tensor, "parameters values"]
    right: Float[Tensor, "parameters values"]
    final: Float[Tensor, "parameters"]

    @property
    def alignment(self) -> Float[Tensor, "values"]:
        """Cosine between the left and the right vector of each singular value."""
        return (self.left * self.right).sum(0)

    def regions(self, tolerance: float = 0.01) -> Regions:
        """Split the singular values: bulk within `tolerance` of 1, chaotic above, stable below.

        Raises: BadInput: for a tolerance outside (0, 1).
        """
        if not 0 < tolerance < 1:
            raise BadInput(f"{WHO}'s regions need a tolerance between 0 and 1, got {tolerance}")
        away = self.singular - 1
        return Regions(away > tolerance, away.abs() <= tolerance, away < -tolerance)

    def summary(self, tolerance: float = 0.01) -> str:
        """The three regions in plain words."""
        chaotic, bulk, stable = self.regions(tolerance)
        n, (parameters, directions) = len(self.singular), self.jacobian.shape
        of = "" if parameters == directions else f" on a subspace of {directions} directions"
        text = (
            f"Training of {parameters} parameters{of}: a small change of the start is stretched along "
            f"{chaotic.sum() / n:.1%} of the directions (up to {self.singular[0]:.3g} times), shrunk along "
            f"{stable.sum() / n:.1%} (down to {self.singular[-1]:.3g}) and keeps its length within {tolerance:g} along "
            f"{bulk.sum() / n:.1%}"
        )
        if bulk.any():
            text += f", the bulk, where it also keeps its direction to a median cosine of {_median(self, bulk):.4f}"
        return f"{text}."

    def plot(self) -> "Figure":
        """Singular values, and the cosine between left and right vectors, by rank (a matplotlib figure)."""
        require_extra("TrainingJacobian.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(9, 3.4), layout="constrained")
        spectrum, cosine = fig.subplots(1, 2)
        values = self.singular.detach().cpu()
        rank = torch.arange(1, len(values) + 1)
        spectrum.plot(rank, values, color="#4477aa")
        spectrum.axhline(1, color="black", lw=1, ls="--")
        spectrum.set(xlabel="rank", ylabel="singular value", yscale="log" if values[-1] > 0 else "symlog")
        cosine.scatter(rank, self.alignment.detach().cpu(), s=6, alpha=0.3, color="#aa3377", linewidths=0)
        cosine.set(xlabel="rank", ylabel="cosine of left and right vector", ylim=(-1.05, 1.05))
        return fig


def training_jacobian(
    train: Train,
    parameters: Parameters,
    *,
    directions: Float[Tensor, "parameters directions"] | None = None,
    chunk: int = 512,
) -> TrainingJacobian:
    r"""Differentiate a whole training run, from the initial parameters to the trained ones, in forward mode.

    Training is a map theta_0 -> theta_T. Its Jacobian

    .. math:: J = \frac{\partial \theta_T}{\partial \theta_0} = U \Sigma V^T,
              \qquad J = \prod_{t=T-1}^{0} (I - \eta_t H_t) \text{ for gradient descent without momentum}

    with H_t the Hessian of the loss of step t, says what training makes of a small change of the start. Columns J v come
    from forward mode, `chunk` of them side by side: every step costs a few gradients a column and no step is kept, so
    memory does not grow with the length of training. Time grows with the square of the number of parameters and the
    decomposition with its cube; beyond some thousand give `directions`.

    Args:
        train: takes the initial parameters and returns the trained ones in the same form, by operations torch can
            differentiate in forward mode (out of place, no random draws; fix the data's order before). `sgd_training`
            builds one.
        parameters: the start: a tensor, or a mapping from names to tensors such as `dict(model.named_parameters())`.
        directions: columns that span the subspace to look at, in the order of the flattened parameters; orthonormalised
            first. None for all.
        chunk: columns at once; fewer take less memory.
    Returns: a `TrainingJacobian`. On a subspace its values lie between the smallest and the largest of J.
    Raises: BadInput: for parameters that are not all float32 or all float64, are empty, not finite or on the meta device;
        if `train` cannot be differentiated, returns another form or ends in numbers that are not finite; for directions
        of another length or that depend linearly on each other; for a chunk below 1.
    Paper: Belrose and Scherlis 2024, arXiv 2412.07003. The notebook of the authors takes all columns of J by jax; the
        subspaces are ours, and so is the default width of the bulk in `regions`.

    >>> H = torch.diag(torch.tensor([0.0, 1.0, 30.0]))  # gradient descent on theta^T H theta / 2, rate 0.1, two steps
    >>> def train(theta):
    ...     for _ in range(2):
    ...         theta = theta - 0.1 * H @ theta
    ...     return theta
    >>> found = training_jacobian(train, torch.ones(3))
    >>> found.singular  # (1 - 3)^2, 1 and (1 - 0.1)^2
    tensor([4.0000, 1.0000, 0.8100])
    >>> [int(region.sum()) for region in found.regions()]
    [1, 1, 1]
    """
    theta, form = _flatten(parameters, "initial")
    basis = _basis(directions, theta)
    if chunk < 1:
        raise BadInput(f"{WHO} needs a chunk of at least 1 column, got {chunk}")

    def flat(vector: Tensor) -> Tensor:
        out, got = _flatten(train(_restore(vector, form)), "trained")
        if got != form:
            raise BadInput(f"{WHO} needs a train that returns what it takes, {_words(form)}; it returned {_words(got)}")
        return out

    def push(direction: Tensor) -> Any:  # the trained parameters and J direction
        return jvp(flat, (theta,), (direction,))

    columns = []
    for rows in basis.T.split(chunk):
        try:
            final, pushed = vmap(push, out_dims=(None, 0))(rows)
        except (BadInput, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:300] or "no message"
            raise BadInput(f"{WHO} could not differentiate train: {type(error).__name__}: {said}") from error
        columns.append(pushed.detach())
    jacobian = torch.cat(columns).T
    final = final.detach()
    for numbers, what in ((final, "trained parameters"), (jacobian, "Jacobian")):
        require_finite(numbers, WHO, f"{what}; train at a smaller rate")
    left, singular, vh = torch.linalg.svd(jacobian, full_matrices=False)
    right = vh.T if directions is None else basis @ vh.T
    return TrainingJacobian(jacobian, singular, left, right, final)


@dataclass(frozen=True)
class BulkOverlap:
    """How far two bulk subspaces coincide.

    cosines: of the principal angles between them, largest first. shared: mean of their squares, the part of the smaller
    subspace that lies in the other, 0 to 1. chance: what a random subspace of the same dimension would share.
    sizes: the two dimensions.
    """

    cosines: Float[Tensor, "angles"]
    shared: Float[Tensor, ""]
    chance: float
    sizes: tuple[int, int]

    @property
    def beyond_chance(self) -> float:
        """(shared - chance) / (1 - chance): 0 by chance, 1 when one subspace holds the other."""
        return (float(self.shared) - self.chance) / (1 - self.chance) if self.chance < 1 else 0.0

    def summary(self) -> str:
        """The overlap in plain words."""
        return (
            f"Bulks of {self.sizes[0]} and {self.sizes[1]} dimensions share {self.shared:.1%} of the smaller one; "
            f"by chance it would be {self.chance:.1%}."
        )


def bulk_overlap(a: TrainingJacobian, b: TrainingJacobian, *, tolerance: float = 0.01) -> BulkOverlap:
    r"""Principal angles between the bulk subspaces of two training runs (right singular vectors: changes of the start).

    .. math:: \cos \phi_i = \sigma_i(V_a^T V_b), \qquad
              \text{shared} = \frac{\lVert V_a^T V_b \rVert_F^2}{\min(k_a, k_b)}, \qquad
              \text{chance} = \frac{\max(k_a, k_b)}{P}

    with V_a, V_b the vectors of k_a and k_b bulk values and P parameters; chance is the mean over random subspaces.

    Args:
        a, b: full Jacobians of runs with the same parameters (other seeds, labels or data).
        tolerance: half width of the bulk around 1.
    Returns: a `BulkOverlap`.
    Raises: BadInput: if the two have different parameters, one was taken on a subspace, or one has no bulk.
    Paper: Belrose and Scherlis 2024, arXiv 2412.07003, which reports an overlap of bulks between seeds; this measure of it
        is derived.

    >>> def run(h):
    ...     return training_jacobian(lambda theta: theta * (1 - torch.tensor(h)), torch.ones(4))
    >>> overlap = bulk_overlap(run([0.0, 0.0, 0.5, 0.5]), run([0.5, 0.0, 0.0, 0.5]))
    >>> overlap.shared, overlap.chance
    (tensor(0.5000), 0.5)
    """
    who = "bulk_overlap"
    for one in (a, b):
        if one.jacobian.shape[0] != one.jacobian.shape[1]:
            raise BadInput(f"{who} needs full Jacobians, got one on {one.jacobian.shape[1]} directions")
    n = len(a.final)
    if len(b.final) != n:
        raise BadInput(f"{who} needs two runs with the same parameters, got {n} and {len(b.final)}")
    va, vb = (one.right[:, one.regions(tolerance).bulk] for one in (a, b))
    sizes = va.shape[1], vb.shape[1]
    if not all(sizes):
        raise BadInput(
            f"{who} needs two bulks, got {sizes[0]} and {sizes[1]} singular values within {tolerance:g} of 1"
        )
    cosines = torch.linalg.svdvals(va.T @ vb.to(va)).clamp(max=1)
    return BulkOverlap(cosines, cosines.square().mean(), max(sizes) / n, sizes)


def sgd_training(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Sequence[tuple[Any, Any]],
    *,
    rate: float | Sequence[float],
    momentum: float = 0.0,
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    r"""A differentiable training run by plain SGD, as `training_jacobian` takes it.

    .. math:: m_{t+1} = \mu m_t + \nabla L_t(\theta_t), \qquad \theta_{t+1} = \theta_t - \eta_t m_{t+1}

    Args:
        model: the network; copied, its own numbers do not matter. What draws at random (dropout in training mode) or
            changes its buffers (BatchNorm in training mode) cannot be differentiated: call `model.eval()` first.
        loss: takes the model's output and the target, returns a scalar. The gradients of torch's `mse_loss` and
            `huber_loss` have no forward derivative: write them out, ``lambda out, y: (out - y).square().mean()``.
        batches: (input, target) of every step, in order; ``[(x, y)] * 100`` for a hundred full-batch steps.
        rate: eta, one for all steps or one a step.
        momentum: mu, as in `torch.optim.SGD`.
    Returns: a function from initial to trained parameters, both `dict(model.named_parameters())` in form.
    Raises: BadInput: for no batches, another number of rates than of batches, or rates or a momentum that are negative or
        not finite.
    Paper: Belrose and Scherlis 2024, arXiv 2412.07003 (their digits: batches of 64, momentum 0.9, rate 0.1 by a cosine).

    >>> model = nn.Linear(2, 1)
    >>> train = sgd_training(model, lambda out, y: (out - y).square().mean(), [(torch.eye(2), torch.ones(2, 1))] * 3, rate=0.1)
    >>> training_jacobian(train, dict(model.named_parameters())).singular.shape
    torch.Size([3])
    """
    who = "sgd_training"
    if not batches:
        raise BadInput(f"{who} needs at least one batch, got none")
    rates = [float(rate)] * len(batches) if isinstance(rate, (int, float)) else [float(r) for r in rate]
    if len(rates) != len(batches):
        raise BadInput(f"{who} needs one rate, or one a batch, got {len(rates)} rates for {len(batches)} batches")
    if not all(0 <= r < math.inf for r in (*rates, momentum)):
        raise BadInput(f"{who} needs finite rates and a finite momentum of at least 0")
    held = copy.deepcopy(model)

    def train(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        theta = dict(parameters)
        velocity = {k: torch.zeros_like(v) for k, v in theta.items()}
        for (x, y), eta in zip(batches, rates, strict=True):
            gradient = grad(lambda p, x=x, y=y: loss(functional_call(held, p, (x,)), y))(theta)
            velocity = {k: momentum * velocity[k] + gradient[k] for k in theta}
            theta = {k: theta[k] - eta * velocity[k] for k in theta}
        return theta

    return train


Form = tuple[tuple[str, torch.Size], ...] | torch.Size


def _flatten(parameters: Parameters, which: str) -> tuple[Float[Tensor, "parameters"], Form]:
    """All parameters in one vector, and what is needed to undo it."""
    form: Form
    if isinstance(parameters, Tensor):
        named, form = {"": parameters}, parameters.shape
    elif isinstance(parameters, Mapping) and all(isinstance(v, Tensor) for v in parameters.values()):
        named, form = dict(parameters), tuple((k, v.shape) for k, v in parameters.items())
    else:
        raise BadInput(f"{WHO} needs {which} parameters in a tensor or a mapping of tensors, got {_kind(parameters)}")
    if not sum(v.numel() for v in named.values()):
        raise BadInput(f"{WHO} needs {which} parameters with numbers in them, got none")
    dtypes = {v.dtype for v in named.values()}
    if dtypes not in ({torch.float32}, {torch.float64}):
        kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise BadInput(f"{WHO} needs {which} parameters that are all float32 or all float64, got {kinds}")
    if which == "initial":
        for name, value in named.items():
            require_finite(value, WHO, f"parameter {name}".rstrip())
        named = {k: v.detach() for k, v in named.items()}
    return torch.cat([v.reshape(-1) for v in named.values()]), form


def _restore(vector: Float[Tensor, "parameters"], form: Form) -> Parameters:
    if isinstance(form, torch.Size):
        return vector.reshape(form)
    parts = vector.split([math.prod(shape) for _, shape in form])
    return {name: part.reshape(shape) for (name, shape), part in zip(form, parts, strict=True)}


def _basis(directions: Tensor | None, theta: Tensor) -> Float[Tensor, "parameters directions"]:
    n = len(theta)
    if directions is None:
        return torch.eye(n, dtype=theta.dtype, device=theta.device)
    require_finite(directions, WHO, "directions")
    if directions.ndim != 2 or len(directions) != n or not 1 <= directions.shape[1] <= n:
        raise BadInput(
            f"{WHO} needs directions as columns of length {n}, 1 to {n} of them, got a {describe(directions)}"
        )
    values = torch.linalg.svdvals(directions.double())
    if values[-1] <= values[0] * max(directions.shape) * torch.finfo(theta.dtype).eps:
        raise BadInput(f"{WHO} needs independent directions, got {directions.shape[1]} that span fewer dimensions")
    return torch.linalg.qr(directions.to(theta))[0]


def _kind(x: Any) -> str:
    if isinstance(x, Mapping):
        return "a mapping with " + ", ".join(sorted({type(v).__name__ for v in x.values()}))
    return type(x).__name__


def _words(form: Form) -> str:
    if isinstance(form, torch.Size):
        return f"a tensor of shape {tuple(form)}"
    return "a mapping with " + ", ".join(f"{name} {tuple(shape)}" for name, shape in form[:6])


def _median(found: TrainingJacobian, mask: Tensor) -> float:
    return float(found.alignment[mask].median())
