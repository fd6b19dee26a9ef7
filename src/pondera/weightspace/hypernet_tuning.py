"""Hypernet tuning: one run that trains weights and, by a hypernetwork, the hyperparameters of their loss."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call, vmap

from pondera.errors import BadInput, describe, require_finite

Loss = Callable[..., Tensor]
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class LinearHypernet(nn.Module):
    r"""A model's weights as a linear function of hyperparameters, around a centre.

    .. math:: w_\phi(\lambda) = b + A \, (\lambda - c), \qquad A \in R^{p \times k} \text{ or, with a rank, } A = L R

    b starts as the model's weights and A as zero (with a rank: L as zero, R as Gaussian over the root of k): at the start
    no weight answers to any hyperparameter. p (k + 1) numbers, with a rank p (rank + 1) + rank k.

    Args:
        model: any module; all its parameters that take gradients are made by the hypernetwork.
        center: c, one hyperparameter an entry, (k,).
        rank: of A; None keeps A whole, which is the paper's, and too large for many hyperparameters.
        generator: draws R.
    Returns: from forward, for hyperparameters (*batch, k), the weights by name, each (*batch, *shape).
    Raises: BadInput: for a model without trainable parameters, a centre that is not one finite dimension, a rank below 1.

    >>> net = LinearHypernet(nn.Linear(3, 2), torch.zeros(4))
    >>> {name: tuple(w.shape) for name, w in net(torch.randn(5, 4)).items()}
    {'weight': (5, 2, 3), 'bias': (5, 2)}
    """

    center: Tensor

    def __init__(
        self,
        model: nn.Module,
        center: Float[Tensor, "k"],
        rank: int | None = None,
        *,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        who = "LinearHypernet"
        require_finite(center, who, "center")
        if center.ndim != 1 or not len(center):
            raise BadInput(f"{who} needs the hyperparameters as one dimension (k,), got a {describe(center)}")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise BadInput(f"{who} needs a rank of at least 1 or None, got {rank!r}")
        named = {name: w for name, w in model.named_parameters() if w.requires_grad}
        if not named:
            raise BadInput(f"{who} needs a model with parameters that take gradients, got a {type(model).__name__}")
        self.names, self.rank, k = list(named), rank, len(center)
        inner = k if rank is None else rank
        self.base = nn.ParameterList([w.detach().clone() for w in named.values()])
        self.response = nn.ParameterList([w.new_zeros(*w.shape, inner) for w in named.values()])
        self.mixing: nn.Parameter | None = None
        if rank is not None:
            drawn = torch.randn(rank, k, generator=generator).to(center) / math.sqrt(k)
            self.mixing = nn.Parameter(drawn)
        self.register_buffer("center", center.detach().clone())

    def forward(self, hyper: Float[Tensor, "*batch k"]) -> dict[str, Tensor]:
        z = hyper - self.center
        if self.mixing is not None:
            z = z @ self.mixing.mT
        return {
            name: b + torch.tensordot(z.to(a.dtype), a, dims=([-1], [-1]))
            for name, b, a in zip(self.names, self.base, self.response, strict=True)
        }

    @torch.no_grad()
    def recenter(self, center: Float[Tensor, "k"]) -> None:
        """Move c, and b with it: the same function of the hyperparameters."""
        for b, w in zip(self.base, self(center).values(), strict=True):
            b.copy_(w)
        self.center.copy_(center)


class _Losses(nn.Module):
    """The model inside a module whose forward is a loss, so that a loss is written as for any model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: Loss, *args: Any) -> Tensor:
        return loss(self.model, *args)


class HypernetTuner:
    r"""Hyperparameters tuned in the one run that trains the weights: a local hypernetwork follows the best response.

    A step draws hyperparameters around the present ones and moves the hypernetwork on their training losses, then moves the
    hyperparameters on the validation loss, whose gradient reaches them through the hypernetwork alone:

    .. math:: \lambda_i \sim N(\hat\lambda, \sigma^2 I), \quad
              \phi \leftarrow \phi - \alpha \nabla_\phi \frac1n \sum_i L_T(w_\phi(\lambda_i), \lambda_i), \qquad
              \hat\lambda \leftarrow \hat\lambda - \beta \nabla_{\hat\lambda} L_V(w_\phi(\hat\lambda))

    Hyperparameters are continuous and enter the training loss; take logarithms of what is positive (penalties). The
    learning rate is none of them. A step costs `samples` training gradients and one validation gradient.

    Args:
        model: any module. The losses see it with the hypernetwork's weights in place; it is not changed before `write`.
            Batch norms in training mode cannot be batched over the draws.
        hyper: where the search starts, (k,), on the model's device; -3.5 in the paper's local run (log of a penalty).
        train_loss: ``train_loss(model, batch, hyper)``, a scalar; hyper is (k,). Run under `torch.func.vmap`.
        valid_loss: ``valid_loss(model, batch)``, a scalar.
        rank: of the hypernetwork (see `LinearHypernet`); a number for many hyperparameters.
        sigma: scale of the draws, in units of the hyperparameters. 0.5 is ours: with the authors' 0 the response is learnt
            from the path alone, and above 1 a linear one is biased.
        samples: n; 10 in the authors' code.
        optimizer: makes the hypernetwork's optimizer from its parameters. Adam at 1e-3 is ours; the paper's local run is
            plain SGD at 1e-4.
        hyper_optimizer: makes the one of the hyperparameters; Adam at 0.01 in the authors' code.
        bounds: hyperparameters, drawn or present, are held within; (-100, 4) for the draws of the paper's global run.
        generator: draws the hyperparameters, on its own device.
    Raises: BadInput: as `LinearHypernet`; for a sigma, samples or bounds out of range; in a step, for a loss that is not a
        finite scalar (where it is the validation loss, the hypernetwork has made its step).
    Paper: Lorraine and Duvenaud 2018, arXiv 1802.09419, the local algorithm (its number recalled). The centre at the present
        hyperparameters is ours and changes coordinates only; so is the rank, for which the paper has a p x k matrix. The
        global form is a wide `sigma` and steps without a validation batch.

    >>> x, y = torch.randn(64, 5), torch.randn(64)
    >>> def ridge(model, batch, hyper):
    ...     return (model(batch[0])[:, 0] - batch[1]).square().mean() + hyper.exp().sum() * model.weight.square().sum()
    >>> def squares(model, batch):
    ...     return (model(batch[0])[:, 0] - batch[1]).square().mean()
    >>> tuner = HypernetTuner(nn.Linear(5, 1, bias=False), torch.zeros(1), ridge, squares)
    >>> for _ in range(3):
    ...     train, valid = tuner.step((x[:32], y[:32]), (x[32:], y[32:]))
    >>> model = tuner.write()
    """

    def __init__(
        self,
        model: nn.Module,
        hyper: Float[Tensor, "k"],
        train_loss: Loss,
        valid_loss: Loss,
        *,
        rank: int | None = None,
        sigma: float = 0.5,
        samples: int = 10,
        optimizer: Optimizer | None = None,
        hyper_optimizer: Optimizer | None = None,
        bounds: tuple[float, float] = (-math.inf, math.inf),
        generator: Generator | None = None,
    ) -> None:
        who = "HypernetTuner"
        self.hypernet = LinearHypernet(model, hyper, rank, generator=generator)
        if not (sigma >= 0 and math.isfinite(sigma)):
            raise BadInput(f"{who} needs a sigma of at least 0, got {sigma}")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise BadInput(f"{who} needs samples of at least 1, a whole number, got {samples!r}")
        if not bounds[0] < bounds[1] or bool((hyper < bounds[0]).any() | (hyper > bounds[1]).any()):
            raise BadInput(f"{who} needs bounds around the start, got {bounds} and {hyper.tolist()[:4]}")
        self.model, self.train_loss, self.valid_loss = model, train_loss, valid_loss
        self.sigma, self.samples, self.bounds, self.generator = sigma, samples, bounds, generator
        self.hyper = nn.Parameter(hyper.detach().clone())
        self.optimizer = (optimizer or _adam(1e-3))(self.hypernet.parameters())
        self.hyper_optimizer = (hyper_optimizer or _adam(0.01))([self.hyper])
        self._losses = _Losses(model)

    def step(self, train_batch: Any, valid_batch: Any = None) -> tuple[Tensor, Tensor | None]:
        """One step of the hypernetwork, then one of the hyperparameters where there is a validation batch.

        Returns: the mean training loss over the draws and the validation loss (None without a batch), before their steps.
        """
        device = self.generator.device if self.generator else self.hyper.device
        noise = torch.randn(self.samples, len(self.hyper), generator=self.generator, device=device).to(self.hyper)
        drawn = (self.hyper.detach() + self.sigma * noise).clamp(*self.bounds)
        each = vmap(lambda w, h: self._loss(w, self.train_loss, train_batch, h), randomness="different")
        train = each(self.hypernet(drawn), drawn).mean()
        phi = list(self.hypernet.parameters())
        gradients = torch.autograd.grad(_scalar(train, "training"), phi, allow_unused=True)
        _descend(self.optimizer, phi, gradients)
        if valid_batch is None:
            return train.detach(), None
        valid = self._loss(self.hypernet(self.hyper), self.valid_loss, valid_batch)
        gradient = torch.autograd.grad(_scalar(valid, "validation"), [self.hyper])
        _descend(self.hyper_optimizer, [self.hyper], gradient)
        with torch.no_grad():
            self.hyper.clamp_(*self.bounds)
        self.hypernet.recenter(self.hyper.detach())
        return train.detach(), valid.detach()

    def weights(self, hyper: Float[Tensor, "*batch k"] | None = None) -> dict[str, Tensor]:
        """The weights at given hyperparameters, or at the present ones."""
        return self.hypernet(self.hyper if hyper is None else hyper)

    @torch.no_grad()
    def write(self) -> nn.Module:
        """Put the weights at the present hyperparameters into the model, in place, and return it."""
        named = dict(self.model.named_parameters())
        for name, w in self.weights().items():
            named[name].copy_(w)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """All of the run but the generator's state: hypernetwork, hyperparameters, optimizers."""
        return {
            "hypernet": self.hypernet.state_dict(),
            "hyper": self.hyper.detach(),
            "optimizer": self.optimizer.state_dict(),
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.hypernet.load_state_dict(state["hypernet"])
        with torch.no_grad():
            self.hyper.copy_(state["hyper"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hyper_optimizer.load_state_dict(state["hyper_optimizer"])

    def _loss(self, weights: dict[str, Tensor], loss: Loss, *args: Any) -> Tensor:
        named = {f"model.{name}": w for name, w in weights.items()}
        found: Tensor = functional_call(self._losses, named, (loss, *args))
        if not isinstance(found, Tensor) or found.ndim:
            raise BadInput(f"HypernetTuner needs losses that are scalars, got {_words(found)}")
        return found


def _words(x: Any) -> str:
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _adam(rate: float) -> Optimizer:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def _scalar(loss: Tensor, which: str) -> Tensor:
    if not loss.requires_grad:
        raise BadInput(f"HypernetTuner needs a {which} loss that depends on the weights, got one without a gradient")
    if not bool(torch.isfinite(loss)):
        raise BadInput(f"HypernetTuner needs finite losses, got a {which} loss of {loss.item()}")
    return loss


def _descend(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]
) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad()
