"""A linear layer of two factors, and its way there and back: what every low-rank compression leaves."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput, describe


class LowRankLinear(nn.Module):
    r"""y = up(down(x)) + bias, a matrix of rank at most r: r (in + out) numbers in the place of in x out.

    Args:
        in_features, out_features: as of `nn.Linear`.
        rank: r, 1 to min(in, out). Numbers are saved only below in out / (in + out).
        bias: on the second factor.
    Shapes: x (*, in) to (*, out). down (r, in), up (out, r).
    Start: as `nn.Linear` draws each factor; `from_factors` sets them.
    Raises: BadInput: for a rank out of range.

    >>> layer = LowRankLinear.from_factors(torch.ones(3, 1), torch.ones(1, 2), None)
    >>> layer(torch.tensor([1.0, 2.0]))
    tensor([3., 3., 3.], grad_fn=...)
    >>> layer.merged().weight.shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise BadInput(
                f"LowRankLinear needs a rank of 1 to {min(in_features, out_features)} for {in_features} to {out_features}, got {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        kind = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, in_features, **kind))  # type: ignore[arg-type]
        self.up = nn.Parameter(torch.empty(out_features, rank, **kind))  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.empty(out_features, **kind)) if bias else None  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for w in (self.down, self.up):
            nn.init.uniform_(w, -(w.shape[1] ** -0.5), w.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.rank**-0.5), self.rank**-0.5)

    @classmethod
    def from_factors(
        cls, up: Float[Tensor, "out r"], down: Float[Tensor, "r in"], bias: Float[Tensor, "out"] | None
    ) -> "LowRankLinear":
        """A layer that holds these factors (copies of them) and this bias."""
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise BadInput(f"LowRankLinear needs factors (out, r) and (r, in), got {describe(up)} and {describe(down)}")
        made = cls(down.shape[1], up.shape[0], up.shape[1], bias is not None, device=up.device, dtype=up.dtype)
        with torch.no_grad():
            made.up.copy_(up)
            made.down.copy_(down)
            if bias is not None and made.bias is not None:
                made.bias.copy_(bias)
        return made

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same map as a plain `nn.Linear`: no number saved, and loads anywhere."""
        up = self.up
        full = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=up.device, dtype=up.dtype)
        full.weight.copy_(up @ self.down)
        if self.bias is not None:
            full.bias.copy_(self.bias)
        return full

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"


def replace_linear(model: nn.Module, new: dict[str, nn.Module]) -> None:
    """Put layers into a model by name, in the mode of those they replace."""
    for name, layer in new.items():
        parent, _, last = name.rpartition(".")
        layer.train(model.get_submodule(name).training)
        setattr(model.get_submodule(parent), last, layer)
