"""What the matrix optimizers share: a method is the direction it takes from a matrix's gradient and its state.

Momentum, decoupled decay, parameter groups, layouts, sharding and the optimizer for everything else are here, once.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from pondera.errors import BadInput, NotFinite, nearest

Group = dict[str, Any]
State = dict[str, Any]
Scaled = tuple[Tensor, Tensor]  # a direction D and a factor c that broadcasts against it: the move is c D
Rest = str | Callable[..., Optimizer] | None


class MatrixOptimizer(Optimizer):
    """Matrices move by the method's `_direction`, everything else by AdamW or another optimizer, in one optimizer.

    A matrix is a parameter of two or more dimensions in a group not marked ``matrix=False``, seen as (out, rest). Rates
    are linked: the rest runs at ``lr * vector_lr_ratio``, so one learning rate, one schedule and one search move both.
    Momentum is kept in the parameter's dtype, as torch.optim does.

    A method gives `_direction`. Its settings go into `defaults`; those read here are lr, weight_decay, momentum (0 when
    missing: no buffer), nesterov (True when missing), and for the rest vector_lr_ratio, betas, vector_eps and
    vector_weight_decay.

    rest: what moves the rest. None is AdamW; else the name of a class of torch.optim, or what makes an optimizer of
    ``(params, lr=...)``. It is not part of the state: give it again when resuming.
    """

    matrix_method = True  # wants groups(model) where there is a model to split
    needs_gradient = False  # whether `_direction` reads the gradient beside the momentum
    precise = False  # whether what `_direction` keeps in `state` has float32 at least, whatever the weights have
    elementwise = False  # whether `_direction` takes any layout and shard as it is, so that nothing need be gathered

    def __init__(self, params: Any, defaults: Group, rest: Rest = None) -> None:
        self.rest = _named(type(self).__name__, rest)
        self._others: dict[int, Optimizer] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.ranks: Any = None  # a process group that shares the work, see `spread`
        super().__init__(params, {"matrix": True, "transposed": False, **defaults})

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rest": self.rest}  # a copy is not spread: process groups cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"rest": getattr(self, "rest", None), "ranks": getattr(self, "ranks", None), **state})
        self._others, self._buffers = {}, {}

    def load_state_dict(self, state_dict: Group) -> None:
        """As in torch.optim, but for what a method keeps of a matrix beside its momentum: whole numbers stay as they were saved,
        and of a `precise` method so does the rest; torch casts all of it to the parameter's dtype."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, name in zip(group["params"], saved["params"], strict=True):
                if not group["matrix"] or p.ndim < 2:
                    continue
                for key, value in state_dict["state"].get(name, {}).items():
                    if not isinstance(value, Tensor) or value.ndim == 0 or key == "momentum_buffer":
                        continue
                    if self.precise or not value.is_floating_point():
                        dtype = accurate(p.dtype) if value.is_floating_point() else value.dtype
                        self.state[p][key] = value.detach().to(p.device, dtype, copy=True)

    def _check(self, group: Group) -> None:
        """Raise BadInput for a setting out of range; a subclass adds its own."""
        who = type(self).__name__
        for name in ("lr", "weight_decay", "vector_lr_ratio", "vector_weight_decay"):
            in_range(who, name, group[name], 0)
        in_range(who, "momentum", group.get("momentum", 0.0), 0, 1)
        two_betas(who, "betas", group["betas"])
        in_range(who, "vector_eps", group["vector_eps"], 0)

    def _direction(
        self, update: Float[Tensor, "m n"], gradient: Float[Tensor, "m n"] | None, state: State, group: Group
    ) -> Tensor | Scaled:
        """Times lr what the weight moves by, downhill.

        update: the gradient after momentum, as one whole matrix; may be overwritten only if there is momentum, so better
        not. gradient: the raw one, where `needs_gradient`. state: of this parameter, for whatever the method keeps.
        Returns: a new tensor, or that and a factor that broadcasts against it, which saves a pass over the matrix.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices: list[tuple[Tensor, Group]] = []
        every = [with_gradient(group["params"], type(self).__name__) for group in self.param_groups]
        require_finite([p for moved in every for p in moved], type(self).__name__)
        for i, (moved, group) in enumerate(zip(every, self.param_groups, strict=True)):
            matrices += [(p, group) for p in moved if group["matrix"] and p.ndim >= 2]
            self._move_rest([p for p in moved if not group["matrix"] or p.ndim < 2], group, i)
        if self.ranks is None:
            for W, group in matrices:
                self._move(W, self._wanted(W, group), group)
        else:
            self._move_together(matrices)
        return loss

    def _momentum(self, G: Tensor, state: State, group: Group) -> Tensor:
        """The gradient after momentum: M <- b M + (1 - b) G, then M, or Nesterov's b M + (1 - b) G."""
        beta = group.get("momentum", 0.0)
        if not beta:
            return G
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(G)
        M: Tensor = state["momentum_buffer"]
        M.lerp_(G, 1 - beta)
        if not group.get("nesterov", True):
            return M
        if not self.elementwise or is_sharded(G):
            return G.lerp(M, beta)
        return torch.lerp(G, M, beta, out=self._scratch(G))

    def _scratch(self, like: Tensor) -> Tensor:
        """A buffer for what is used up within the step: fresh memory costs as much as the sums done in it."""
        kind = like.device, like.dtype
        if kind not in self._buffers or self._buffers[kind].numel() < like.numel():
            self._buffers[kind] = like.new_empty(like.numel())
        return self._buffers[kind][: like.numel()].view(like.shape)

    def _wanted(self, W: Tensor, group: Group) -> Tensor | Scaled:
        """Momentum, then the direction, laid out and sharded like the weight."""
        G, state = W.grad, self.state[W]
        assert G is not None
        U = self._momentum(G, state, group)
        if self.elementwise:
            return self._direction(U, G, state, group)
        whole = as_whole(U, group["transposed"])
        grad = as_whole(G, group["transposed"]) if self.needs_gradient else None
        return like(U, self._direction(whole, grad, state, group), group["transposed"])

    def _move(self, W: Tensor, wanted: Tensor | Scaled, group: Group) -> None:
        """W <- (1 - lr decay) W - lr c D."""
        lr = group["lr"]
        if group["weight_decay"]:
            W.mul_(1 - lr * group["weight_decay"])
        D, c = wanted if isinstance(wanted, tuple) else (wanted, None)
        D = D.to(W.dtype)
        if c is None and not isinstance(lr, Tensor):
            W.add_(D, alpha=-lr)
        elif c is None:
            W.sub_(D * lr)
        elif isinstance(lr, Tensor):
            W.sub_(D * (c * lr).to(W.dtype))
        else:
            W.addcmul_(D, c.to(W.dtype), value=-lr)

    def _move_rest(self, params: list[Tensor], group: Group, index: int) -> None:
        if not params:
            return
        lr = group["lr"] * group["vector_lr_ratio"]
        if self.rest is not None:
            if index not in self._others:
                decay = {"weight_decay": group["vector_weight_decay"]}
                decay = decay if "weight_decay" in _parameters(self.rest) else {}
                self._others[index] = self.rest(params, lr=lr, **decay)
            other = self._others[index]
            other.state = self.state  # so that one state_dict holds all of it
            other.param_groups[0].update(params=params, lr=lr)
            other.step()
            return
        for p in params:
            if not self.state[p]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p].update(step=torch.tensor(0.0), **zeros)
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=group["vector_weight_decay"],
            eps=group["vector_eps"],
            maximize=False,
        )

    # -- work shared over ranks -------------------------------------------------------------------------------------

    def _owners(self) -> dict[Tensor, int]:
        """Which rank finds the direction of each matrix: dealt out from the dearest to the cheapest, the same everywhere."""
        from torch import distributed as dist

        ranks = dist.get_world_size(self.ranks)
        every = [p for g in self.param_groups if g["matrix"] for p in g["params"] if p.ndim >= 2]
        cost = [p.numel() * min(p.shape[0], p.numel() // max(p.shape[0], 1)) for p in every]
        order = sorted(range(len(every)), key=lambda i: -cost[i])
        return {every[i]: turn % ranks for turn, i in enumerate(order)}

    def _move_together(self, matrices: list[tuple[Tensor, Group]]) -> None:
        """Each direction is found by the rank that owns the matrix and sent to the others, a matrix a rank at a time."""
        from torch import distributed as dist

        if self.elementwise:  # cheaper to find than to send
            for W, group in matrices:
                self._move(W, self._wanted(W, group), group)
            return
        owners, me = self._owners(), dist.get_rank(self.ranks)
        left: dict[int, list[tuple[Tensor, Group]]] = {}
        for W, group in matrices:
            left.setdefault(owners[W], []).append((W, group))
        for owned in left.values():
            owned.sort(key=lambda one: -one[0].numel())
        while any(left.values()):
            turn = [(rank, *owned.pop(0)) for rank, owned in sorted(left.items()) if owned]
            found: list[tuple[Tensor, Tensor]] = []
            for rank, W, group in turn:  # all find theirs first, so that none waits for another's
                G, state = W.grad, self.state[W]
                assert G is not None
                U = self._momentum(G, state, group)
                whole = as_whole(U, group["transposed"])
                grad = as_whole(G, group["transposed"]) if self.needs_gradient else None
                D = self._direction(whole, grad, state, group) if rank == me else torch.empty_like(whole)
                D = D[0] * D[1] if isinstance(D, tuple) else D
                found.append((U, D.to(whole.dtype).contiguous()))
            for (rank, W, group), (U, D) in zip(turn, found, strict=True):
                dist.broadcast(D, src=_global_rank(self.ranks, rank), group=self.ranks)
                self._move(W, like(U, D, group["transposed"]), group)


def spread(optimizer: MatrixOptimizer, group: Any = None) -> MatrixOptimizer:
    """Let the ranks of a process group share the work: each matrix's direction is found once and sent to the others.

    For training where every rank holds all gradients: DistributedDataParallel, or FSDP2, whose shards are gathered a
    matrix a rank at a time. Without it every rank finds every direction. A copy of the optimizer is not spread.

    What a method keeps beside momentum (factors, second moments) then lies with the rank that owns the matrix: call
    `gather_state` on all ranks before `state_dict`.

    Args:
        optimizer: one of this room's matrix optimizers.
        group: the process group; None is the default one. Under FSDP2 that of its mesh.
    Returns: `optimizer`.
    Raises: BadInput: for another optimizer, or if no process group is there.
    """
    from torch import distributed as dist

    if not isinstance(optimizer, MatrixOptimizer):
        raise BadInput(f"spread needs a matrix optimizer of pondera.optim, got {type(optimizer).__name__}")
    if not dist.is_available() or not dist.is_initialized():
        raise BadInput("spread needs a process group; call torch.distributed.init_process_group first, or leave it out")
    optimizer.ranks = dist.group.WORLD if group is None else group
    return optimizer


def gather_state(optimizer: MatrixOptimizer) -> None:
    """Send what each rank keeps of its own matrices to all, so that every `state_dict` is whole; all ranks call it.

    Raises: BadInput: for an optimizer that is not spread.
    """
    from torch import distributed as dist

    if getattr(optimizer, "ranks", None) is None:
        raise BadInput("gather_state needs an optimizer that `spread` has set up")
    me = dist.get_rank(optimizer.ranks)
    for W, owner in optimizer._owners().items():
        own = {k: v for k, v in optimizer.state.get(W, {}).items() if k != "momentum_buffer"} if owner == me else None
        box = [own]
        dist.broadcast_object_list(box, src=_global_rank(optimizer.ranks, owner), group=optimizer.ranks)
        if owner != me and box[0]:
            optimizer.state[W].update({k: _to(v, W.device) for k, v in box[0].items()})


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) and value.ndim else value


def _global_rank(group: Any, rank: int) -> int:
    from torch import distributed as dist

    return rank if group is None or group is dist.group.WORLD else dist.get_global_rank(group, rank)


def accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# -- layouts ----------------------------------------------------------------------------------------------------------


def as_whole(x: Tensor, transposed: bool = False) -> Float[Tensor, "m n"]:
    """`x` as one whole (out, rest) matrix; a DTensor (FSDP2, tensor parallel) is gathered."""
    whole = x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]
    return (whole.transpose(0, 1) if transposed else whole).flatten(1)


def like(x: Tensor, direction: Tensor | Scaled, transposed: bool = False) -> Tensor | Scaled:
    """A whole (out, rest) direction laid out and sharded like `x`; of a DTensor each rank keeps its own part."""
    D, c = direction if isinstance(direction, tuple) else (direction, None)
    sharded = is_sharded(x)
    if c is not None and (sharded or (transposed and c.ndim)):
        D, c = D * c, None
    shape = list(x.shape)
    if transposed:
        shape[0], shape[1] = shape[1], shape[0]
    D = D.reshape(shape)
    D = D.transpose(0, 1) if transposed else D
    if sharded:
        from torch.distributed.tensor import DTensor, Replicate

        mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
        everywhere = DTensor.from_local(D.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        return everywhere.redistribute(placements=placements)
    if c is None:
        return D
    return D, c if c.ndim < 2 else c.reshape(*c.shape, *[1] * (len(shape) - 2))


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor (told by its face: importing torch.distributed costs time and may not be built in)."""
    return hasattr(x, "full_tensor")


# -- settings ---------------------------------------------------------------------------------------------------------


def _named(who: str, rest: Rest) -> Callable[..., Optimizer] | None:
    """What makes the optimizer of the rest; None for AdamW."""
    if isinstance(rest, str):
        known = [n for n, v in vars(torch.optim).items() if isinstance(v, type) and issubclass(v, Optimizer)]
        if rest not in known or rest == "Optimizer":
            raise BadInput(
                f"{who} needs the name of an optimizer of torch.optim for rest, got {rest!r}{nearest(rest, known)}"
            )
        made: Callable[..., Optimizer] = getattr(torch.optim, rest)
        return made
    if rest is not None and not callable(rest):
        raise BadInput(f"{who} needs an optimizer class, or its name in torch.optim, for rest, got {rest!r}")
    return rest


def _parameters(make: Any) -> Iterable[str]:
    try:
        return inspect.signature(make).parameters
    except ValueError:
        return ()


def with_gradient(params: list[Tensor], who: str) -> list[Tensor]:
    """Those of `params` that have a gradient, checked to be dense and real."""
    moved = [p for p in params if p.grad is not None]
    for p in moved:
        assert p.grad is not None
        if p.grad.is_sparse:
            raise BadInput(
                f"{who} needs dense gradients, got a sparse one for a parameter of shape {tuple(p.shape)}; "
                "build its embedding with sparse=False"
            )
        if p.is_complex():
            raise BadInput(
                f"{who} needs real parameters, got a complex one of shape {tuple(p.shape)}; hold its view_as_real"
            )
    return moved


@torch.no_grad()
def require_finite(params: list[Tensor], who: str) -> None:
    """NotFinite (a BadInput), before anything has moved, if a gradient of `params` holds NaN or infinity.

    torch's own optimizers let it through, and from then on weights and state are NaN. One pass over the gradients, and
    on an accelerator one wait for the answer; a step under `torch.compile` does without.
    """
    if torch.compiler.is_compiling():
        return
    local = [p.grad.to_local() if is_sharded(p.grad) else p.grad for p in params if p.grad is not None]  # type: ignore[attr-defined]
    ends = [torch.stack(g.aminmax()).float() if g.numel() else None for g in local]
    waiting = [e for e in ends if e is not None and e.device.type != "cpu"]
    if waiting and bool(torch.stack([e.to(waiting[0].device) for e in waiting]).isfinite().all()):
        ends = [None if e is not None and e.device.type != "cpu" else e for e in ends]
    for p, e in zip(params, ends, strict=True):
        if e is not None and not all(map(math.isfinite, e.tolist())):
            raise NotFinite(
                f"{who} needs finite gradients, got NaN or infinity for a parameter of shape {tuple(p.shape)}; nothing was "
                "moved: look for the step that diverged, lower the rate, or scale half-precision losses by a GradScaler"
            )


def settings_of_the_rest(ratio: float, betas: tuple[float, float], eps: float, decay: float) -> Group:
    """What a group says of the parameters that are no matrices, as the methods' own arguments give it."""
    return {"vector_lr_ratio": ratio, "betas": betas, "vector_eps": eps, "vector_weight_decay": decay}


def in_range(who: str, name: str, value: Any, low: float, below: float = math.inf, *, open_low: bool = False) -> None:
    """BadInput unless low <= value < below (low < value with `open_low`); a one-element tensor counts as its number."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(f"{who} needs a number for {name}, got {value!r}") from None
    if not (low <= number < below) or (open_low and number == low):
        least = f"above {low:g}" if open_low else f"of at least {low:g}"
        most = " and below 1" if below == 1 else ", finite"
        raise BadInput(f"{who} needs {name} {least}{most}, got {number:g}")


def whole_number(who: str, name: str, value: Any) -> None:
    """BadInput unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadInput(f"{who} needs a whole number of at least 1 for {name}, got {value!r}")


def two_betas(who: str, name: str, value: Any) -> None:
    """BadInput unless `value` is two numbers of at least 0 and below 1."""
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise BadInput(f"{who} needs two numbers for {name}, got {value!r}")
    for beta in value:
        in_range(who, name, beta, 0, 1)
