"""SINGD: natural gradient with Kronecker factors that are moved by products alone, never inverted, and may be structured."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput, NotFinite, nearest
from pondera.optim._base import Group, in_range, is_sharded, require_finite, two_betas, whole_number, with_gradient
from pondera.optim._structures import STRUCTURES, Structure

LOSS_AVERAGES = ("batch", "batch+sequence", None)
Layer = nn.Linear | nn.Conv2d


class StructuredNGD(Optimizer):
    r"""Structured inverse-free natural gradient descent: K K^T and C C^T stand for the inverses of KFAC's factors.

    For a layer y = W a (a with a 1 appended for the bias, W of d x p), n examples, A their rows of inputs and E the
    gradients of the mean loss at y, one row each:

    .. math::
        U &= A^T A / n, \qquad \Gamma = n\, E^T E \\
        H_K &= \Pi(K^T U K), \qquad H_C = \Pi(C^T \Gamma C) \\
        m_K &\leftarrow \alpha_1 m_K + \tfrac12 \big( \overline{\mathrm{tr}}(H_C)\, H_K
            + \lambda\, \overline{\mathrm{tr}}(C^T C)\, \Pi(K^T K) - I \big), \qquad m_C \text{ likewise} \\
        K &\leftarrow K - \beta_1 K m_K, \qquad C \leftarrow C - \beta_1 C m_C \\
        M &\leftarrow \alpha_2 M + C C^T\, \nabla W\, K K^T + \gamma W, \qquad W \leftarrow W - \beta_2 M

    with the mean of a diagonal for tr, K and C starting at I, moved every T steps. There is no inverse, root or
    decomposition anywhere: K K^T tends to (tr(H_C) U + lambda tr(C^T C) I)^{-1} by itself. K, C and their momenta lie in a
    class of matrices closed under products, onto which \Pi projects. Layers are linear ones and convolutions of one group
    whose weight belongs to one layer alone; what else trains is moved by AdamW in the same optimizer.

    The model is watched: a forward pass leaves a hook on the outputs of its layers, which the backward pass calls. Several
    backward passes before a step count as one batch if each loss was divided by their number. A copy of the optimizer and
    the model together is watched as well, one of the model alone is not.

    Args:
        model: the model to train, of which the layers are watched.
        params: which parameters train, or groups of them; None is all of the model that want a gradient. Weight and bias
            of a layer must be in one group. Of a group marked ``matrix=False``, as `groups` makes them, all goes to AdamW.
        lr: beta_2 (0.01: ours, after trials on digits; 1e-3: code).
        momentum: alpha_2 (0.9: code).
        damping: lambda (1e-3: code).
        alpha1: momentum of the factors (0.5: code). Take 0 with `kfac_like`.
        weight_decay: gamma, added to the direction as in torch.optim.SGD (0: code).
        T: steps between two moves of the factors (10: code).
        lr_cov: beta_1, the rate of the factors (0.01: code). Large ones make them overshoot, the more with a small T.
        structure: of K and C, one name for both or two: "dense", "diagonal", "block_diagonal" (blocks of 30),
            "lower_toeplitz", "upper_toeplitz", "hierarchical" (15 dense rows at either end, diagonal between).
        loss_average: over what the loss is a mean, which Gamma is scaled by: "batch"; "batch+sequence", all places between
            the first and the last axis too, as for tokens; None for a sum.
        kfac_like: 1 in the place of both traces, so that K K^T tends to KFAC's (U + lambda I)^{-1} (False: code).
        normalize_lr_cov: divide beta_1 by the largest entry of the momentum where that is above 1, and weigh what is new by
            1 - alpha_1 (True: ours, as the factors overshoot at first; False: code).
        vector_lr_ratio: AdamW's rate over lr, for the rest (0.1: ours).
        betas, vector_eps, vector_weight_decay: AdamW's own ((0.9, 0.999), 1e-8, 0).
    Raises: BadInput: for a setting out of range, a model that is none, weight and bias of a layer in different groups; in
        `step`, before anything has moved, for a sparse gradient, a sharded or complex parameter, gradients with NaN or
        infinity, or such as a GradScaler has unscaled beforehand.
    Paper: Lin et al. 2023, arXiv 2302.09738 (dense); Lin et al. 2024, arXiv 2312.05705 (structures). Code:
        github.com/f-dangel/singd, followed throughout (its "expand" for layers used at several places). That of the first
        paper, github.com/yorkerlin/StructuredNGD-DL, has a hidden warm-up of beta_1, which is 2e-4 for 100 steps and
        2e-3 to step 500. Where singd takes a block-diagonal K for its transpose, ours does not (it is not symmetric after two
        moves; the difference is small). Unlike singd: all parameters are trained, closures work, float64 works with all structures, and
        gradients accumulated over several backward passes are one batch. State is kept in the weight's dtype.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> optimizer = StructuredNGD(net, structure=("diagonal", "dense"))
    >>> net(torch.ones(2, 4)).square().mean().backward()
    >>> optimizer.step()
    >>> {k: tuple(optimizer.state[net[0].weight][k].shape) for k in ("K", "C")}
    {'K': (5, 1, 1), 'C': (1, 8, 8)}
    """

    wants_model = True  # what it is made of, in the place of parameters
    _step_supports_amp_scaling = True  # torch's name for: a GradScaler hands its scale over instead of dividing by it

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        lr: float | Tensor = 0.01,
        *,
        momentum: float = 0.9,
        damping: float = 1e-3,
        alpha1: float = 0.5,
        weight_decay: float = 0.0,
        T: int = 10,
        lr_cov: float = 0.01,
        structure: str | tuple[str, str] = "dense",
        loss_average: str | None = "batch",
        kfac_like: bool = False,
        normalize_lr_cov: bool = True,
        vector_lr_ratio: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        vector_eps: float = 1e-8,
        vector_weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise BadInput(f"StructuredNGD needs the model, an nn.Module, got {type(model).__name__}")
        self.model = model
        self._layers: dict[Layer, tuple[list[nn.Parameter], Group]] = {}
        self._hooks: dict[Layer, Any] = {}
        self._fresh: dict[Layer, tuple[Tensor, int, Tensor, int]] = {}  # H_K, its rows, H_C, its examples
        own: Group = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "alpha1": alpha1,
            "weight_decay": weight_decay,
        }
        own |= {"T": T, "lr_cov": lr_cov, "structure": structure, "loss_average": loss_average, "kfac_like": kfac_like}
        own |= {
            "normalize_lr_cov": normalize_lr_cov,
            "matrix": True,
            "vector_lr_ratio": vector_lr_ratio,
            "betas": betas,
        }
        own |= {"vector_eps": vector_eps, "vector_weight_decay": vector_weight_decay}
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        super().__init__(params, own)

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._watch()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # a copy, not a state_dict that is loaded
            self._layers, self._hooks, self._fresh = {}, {}, {}
        self._watch()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._fresh.clear()

    def _check(self, group: Group) -> None:
        who = "StructuredNGD"
        for name in ("lr", "damping", "lr_cov", "weight_decay", "vector_lr_ratio", "vector_eps", "vector_weight_decay"):
            in_range(who, name, group[name], 0)
        for name in ("momentum", "alpha1"):
            in_range(who, name, group[name], 0, 1)
        two_betas(who, "betas", group["betas"])
        whole_number(who, "T", group["T"])
        if group["loss_average"] not in LOSS_AVERAGES:
            raise BadInput(f"{who} knows the averages batch, batch+sequence and None, got {group['loss_average']!r}")
        names = _pair(group["structure"])
        for name in names:
            if name not in STRUCTURES:
                raise BadInput(f"{who} knows no structure {name!r}{nearest(str(name), STRUCTURES)}")

    # -- what is watched ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Find the layers that are moved as such, and watch those that were not yet."""
        group_of = {id(p): g for g in self.param_groups for p in g["params"]}
        holders: dict[int, int] = {}
        for module in self.model.modules():
            for p in module.parameters(recurse=False):
                holders[id(p)] = holders.get(id(p), 0) + 1
        for module in self.model.modules():
            if not _is_layer(module):
                continue
            W, b, group = module.weight, module.bias, group_of.get(id(module.weight))
            if group is None or not group["matrix"] or not W.requires_grad or holders[id(W)] > 1:
                continue
            of_bias = group_of.get(id(b)) if b is not None and holders[id(b)] == 1 else None
            if of_bias is not None and of_bias is not group and of_bias["matrix"]:
                raise BadInput(
                    "StructuredNGD needs weight and bias of a layer in one group; those of a layer of shape "
                    f"{tuple(W.shape)} are in two"
                )
            trained = of_bias is group and b is not None and b.requires_grad
            self._layers[module] = ([W, b] if trained and b is not None else [W], group)  # type: ignore[list-item]
            if module not in self._hooks:
                self._hooks[module] = module.register_forward_hook(_Watch(self))

    def _passed(self, layer: Layer, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward pass: where the factors are due, have its backward pass call `_collect`."""
        if layer not in self._layers or not torch.is_grad_enabled() or not output.requires_grad:
            return
        (W, *_), group = self._layers[layer]
        if int(self.state[W].get("step", 0) if W in self.state else 0) % group["T"] == 0:
            output.register_hook(partial(self._collect, layer, inputs[0].detach()))

    @torch.no_grad()
    def _collect(self, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        """H_K and H_C of a batch, joined with those of backward passes before it."""
        params, group = self._layers[layer]
        W, state = params[0], self._state(layer)
        A, E, n = rows(layer, x.to(W.dtype), gradient.to(W.dtype), group["loss_average"])
        if len(params) > 1:
            A = torch.cat([A, A.new_ones(len(A), 1)], 1)
        k, c = self._structures(layer)
        H_K = k.gram(k.transposed_times(state["K"], A.T * len(A) ** -0.5))
        H_C = c.gram(c.transposed_times(state["C"], E.T * n**0.5))
        many = len(A)
        if layer in self._fresh:
            other_K, before, other_C, seen = self._fresh[layer]
            H_K = other_K.lerp(H_K, many / (before + many))
            H_C = (other_C / seen + H_C / n) * (seen + n)
            many, n = before + many, seen + n
        self._fresh[layer] = (H_K, many, H_C, n)

    def _structures(self, layer: Layer) -> tuple[Structure, Structure]:
        params, group = self._layers[layer]
        d, p = params[0].flatten(1).shape
        of_K, of_C = _pair(group["structure"])
        return STRUCTURES[of_K](p + len(params) - 1), STRUCTURES[of_C](d)

    def _state(self, layer: Layer) -> dict[str, Any]:
        (W, *_), group = self._layers[layer]
        state: dict[str, Any] = self.state[W]
        if "K" not in state:
            k, c = self._structures(layer)
            state.update(step=torch.tensor(0.0), K=k.eye(W.detach()), C=c.eye(W.detach()))
            if group["alpha1"]:
                state.update(m_K=torch.zeros_like(state["K"]), m_C=torch.zeros_like(state["C"]))
        return state

    # -- what is moved -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._scale()
        if scale == 0:  # the scaler has found an infinite gradient
            self._fresh.clear()
            return loss
        moved = {p for g in self.param_groups for p in with_gradient(g["params"], "StructuredNGD")}
        try:
            require_finite(list(moved), "StructuredNGD")
        except NotFinite:
            self._fresh.clear()
            raise
        if any(is_sharded(p) for p in moved):
            raise BadInput(
                "StructuredNGD needs whole parameters, got a sharded one (DTensor); use DistributedDataParallel"
            )
        for layer, (params, group) in self._layers.items():
            if params[0] in moved:
                if layer in self._fresh:
                    self._move_factors(layer, self._state(layer), group, scale)
                self._move_layer(layer, params, group, scale)
                moved -= set(params)
        self._fresh.clear()
        for group in self.param_groups:
            self._move_rest([p for p in group["params"] if p in moved], group, scale)
        return loss

    def _scale(self) -> float:
        """What the loss was multiplied by in the backward pass; 0 if the step is to be skipped."""
        found = getattr(self, "found_inf", None)  # both are set by GradScaler.step while it calls `step`
        if found is None:
            return 1.0
        if getattr(self, "grad_scale", None) is None:
            raise BadInput(
                "StructuredNGD needs gradients as the scaler made them, got unscaled ones: the scale of what it saw in the backward "
                "pass is lost; leave out scaler.unscale_, or train in bfloat16, which needs no scaler"
            )
        return 0.0 if float(found) else float(self.grad_scale)  # type: ignore[attr-defined]

    def _move_factors(self, layer: Layer, state: dict[str, Any], group: Group, scale: float) -> None:
        (k, c), (H_K, _, H_C, _) = self._structures(layer), self._fresh[layer]
        H_C = H_C / scale**2
        _mean_over_ranks(H_K, H_C)
        K, C, alpha, damping = state["K"], state["C"], group["alpha1"], group["damping"]
        KK, CC = k.own_gram(K), c.own_gram(C)
        by_C, by_K, damp_C, damp_K = 1.0, 1.0, 1.0, 1.0
        if not group["kfac_like"]:
            by_C, by_K = c.mean_of_diagonal(H_C), k.mean_of_diagonal(H_K)  # type: ignore[assignment]
            damp_C, damp_K = c.mean_of_diagonal(CC), k.mean_of_diagonal(KK)  # type: ignore[assignment]
        share = 0.5 * (1 - alpha if group["normalize_lr_cov"] else 1)
        m_K = (H_K * by_C + KK * (damping * damp_C) - k.eye(K)) * share
        m_C = (H_C * by_K + CC * (damping * damp_K) - c.eye(C)) * share
        if alpha:
            m_K, m_C = state["m_K"].mul_(alpha).add_(m_K), state["m_C"].mul_(alpha).add_(m_C)
        for structure, factor, m in ((k, K, m_K), (c, C, m_C)):
            move = structure.product(factor, m)
            rate = group["lr_cov"] / m.abs().max().clamp(min=1) if group["normalize_lr_cov"] else group["lr_cov"]
            factor.sub_(move * rate)

    def _move_layer(self, layer: Layer, params: list[nn.Parameter], group: Group, scale: float) -> None:
        (k, c), state = self._structures(layer), self._state(layer)
        K, C = state["K"], state["C"]
        G = torch.cat([p.grad.flatten(1) if p.ndim > 1 else p.grad[:, None] for p in params], 1)  # type: ignore[union-attr]
        G = G / scale if scale != 1 else G
        N = k.times(K, k.transposed_times(K, G.T)).T
        N = c.times(C, c.transposed_times(C, N))
        width = N.shape[1] - len(params) + 1
        for p, new in zip(params, (N[:, :width], N[:, -1]), strict=False):
            new = new.reshape(p.shape)
            if group["weight_decay"]:
                new = new.add(p, alpha=group["weight_decay"])
            if group["momentum"]:
                own = self.state[p]
                if "momentum_buffer" not in own:
                    own["momentum_buffer"] = torch.zeros_like(p)
                new = own["momentum_buffer"].mul_(group["momentum"]).add_(new)
            p.sub_(new * group["lr"])
        state["step"] += 1

    def _move_rest(self, params: list[Tensor], group: Group, scale: float) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad / scale if scale != 1 else p.grad for p in params],  # type: ignore[operator, misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"] * group["vector_lr_ratio"],
            weight_decay=group["vector_weight_decay"],
            eps=group["vector_eps"],
            maximize=False,
        )


class _Watch:
    """A forward hook that shows a layer to the optimizer, without keeping it alive; a copy shows it to nobody."""

    def __init__(self, optimizer: StructuredNGD | None = None) -> None:
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else None

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
        optimizer = self.optimizer() if self.optimizer is not None else None
        if optimizer is not None:
            optimizer._passed(layer, inputs, output)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Watch, ()


def rows(
    layer: Layer, x: Tensor, gradient: Tensor, loss_average: str | None
) -> tuple[Float[Tensor, "rows p"], Float[Tensor, "rows d"], int]:
    """Inputs and gradients of a layer, a row for each place it was used at, and how many losses the mean was over."""
    if isinstance(layer, nn.Conv2d):
        x, gradient = (t if t.ndim == 4 else t[None] for t in (x, gradient))
        places = gradient.shape[2:].numel()
        A, E = patches(layer, x).mT.flatten(0, 1), gradient.flatten(2).mT.flatten(0, 1)
        many = len(gradient)
    else:
        A, E = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        many = len(gradient) if gradient.ndim > 1 else 1
        places = len(E) // max(many, 1)
    return A, E, {"batch": many, "batch+sequence": many * places, None: 1}[loss_average]


def patches(layer: nn.Conv2d, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p places"]:
    """What a convolution's kernel sees at each place."""
    sides: list[int] = []  # left, right, top, bottom
    for axis in (1, 0):
        if isinstance(layer.padding, str):
            both = layer.dilation[axis] * (layer.kernel_size[axis] - 1) if layer.padding == "same" else 0
            sides += [both // 2, both - both // 2]
        else:
            sides += [int(layer.padding[axis])] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, sides, mode=mode) if any(sides) else x
    return F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)


def _is_layer(module: nn.Module) -> bool:
    """A layer whose own forward multiplies by its weight, once an input."""
    if isinstance(module, NonDynamicallyQuantizableLinear) or not isinstance(module, (nn.Linear, nn.Conv2d)):
        return False  # the former is the output of nn.MultiheadAttention, whose forward is never called
    if parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter):
        return False
    return isinstance(module, nn.Linear) or module.groups == 1


def _pair(structure: Any) -> tuple[Any, Any]:
    return (
        (structure[0], structure[1])
        if isinstance(structure, (tuple, list)) and len(structure) == 2
        else (structure,) * 2
    )


def _mean_over_ranks(*tensors: Tensor) -> None:
    """In place, where the run is distributed: every rank has seen its own part of the batch."""
    from torch import distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for t in tensors:
            dist.all_reduce(t)
            t.div_(dist.get_world_size())
