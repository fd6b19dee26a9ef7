"""HiPPO-Prophecy: a state-space layer, written down and not trained, that predicts the next sample of a smooth signal."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput, describe, nearest
from pondera.nn._state_space import hippo_legt, require_size

READOUTS = ("derivative", "extrapolate")


def prophecy_weights(
    state: int, window: int, readout: str = "derivative"
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n"], Float[Tensor, "n"], float]:
    r"""The system (Abar, Bbar, C, D) that predicts the next sample, in float64:

    .. math:: x_k = \bar A x_{k-1} + \bar B\, \frac{u_{k-1} + u_k}{2}, \qquad \hat u_{k+1} = C x_k + D u_k

    HiPPO-LegT, x' = A x + B u, holds the last `window` samples as coefficients of Legendre polynomials; c x, c_n = sqrt(2n + 1),
    is their value at the present, so that u' is about c A x + c B u. With h = 1 / window, the trapezoidal rule gives
    Abar = (I - h A / 2)^-1 (I + h A / 2), Bbar = (I - h A / 2)^-1 h B, and a step of Euler C = h c A, D = 1 + h c B
    (``derivative``). Or the polynomial is evaluated one sample ahead, C_n = sqrt(2n + 1) P_n(1 + 2 h), D = 0 (``extrapolate``).

    The input must enter as the mean of two samples: held over the step, as in S4, it is out of time with u_k, which the
    feed-through c B = N^2 multiplies, and the error grows with N.

    Args:
        state: N, the number of polynomials. window: samples held; at least 2 N, or the coefficients alias.
        readout: derivative (the paper's) or extrapolate (ours).
    Returns: Abar, Bbar, C, D.
    Raises: BadInput: for sizes or names out of range.
    Paper: Arangath Joseph, Haefeli, Liniger and Gulcehre 2024, arXiv 2407.09375. Only its abstract and introduction were read:
        that the system's output is made to be the derivative and a step of it the prediction is theirs; the formulas here are
        derived from HiPPO-LegT, whose matrices are those of the authors of S4.

    >>> A, B, C, D = prophecy_weights(4, 16)
    >>> x = torch.linalg.solve(torch.eye(4) - A, B)  # a constant signal of 1
    >>> round((C @ x + D).item(), 6)
    1.0
    """
    N = require_size(state, "prophecy_weights", "state")
    W = require_size(window, "prophecy_weights", "window", least=2 * N)
    if readout not in READOUTS:
        raise BadInput(
            f"prophecy_weights knows {', '.join(READOUTS)}, got {readout!r}{nearest(str(readout), READOUTS)}"
        )
    A, B = hippo_legt(N)
    h, eye = 1 / W, torch.eye(N, dtype=torch.float64)
    implicit = eye - h / 2 * A
    Abar, Bbar = torch.linalg.solve(implicit, eye + h / 2 * A), torch.linalg.solve(implicit, h * B)
    c = (2 * torch.arange(N, dtype=torch.float64) + 1).sqrt()
    if readout == "derivative":
        return Abar, Bbar, h * (c @ A), float(1 + h * (c @ B))
    z = 1 + 2 * h
    P = [1.0, z]
    for n in range(1, N):  # Bonnet's recursion
        P.append(((2 * n + 1) * z * P[n] - n * P[n - 1]) / (n + 1))
    return Abar, Bbar, c * torch.tensor(P[:N], dtype=torch.float64), 0.0


class HippoProphecy(nn.Module):
    r"""Predict the next sample of each feature of a sequence ``(*, length, features)``, with nothing trained.

    Output k is the prediction of sample k + 1 from samples 0..k: `prophecy_weights`, the same for every feature. It is a
    fixed linear filter: smooth signals are predicted well whatever system they come from, one step ahead; noise is multiplied.
    The state starts at zero, and that fades a little more slowly than the window passes: leave out the first four windows.

    The four weights are parameters, in float64, from which training may go on. The convolution is taken by FFT in float64,
    whatever the input, for the filter is a difference of large terms; the result has the dtype of the input, float32 at least.

    Args:
        state, window, readout: as in `prophecy_weights`; 8 polynomials over 64 samples by default (ours). More follow faster
            signals, and multiply noise.
        device, dtype: of the input; the weights are in float64.
    Raises: BadInput: for sizes or names out of range; in use for an input in half precision, or with no length.
    Paper: Arangath Joseph, Haefeli, Liniger and Gulcehre 2024, arXiv 2407.09375 (see `prophecy_weights`).

    >>> t = torch.arange(400, dtype=torch.float64)[:, None] / 100
    >>> layer = HippoProphecy(readout="extrapolate")
    >>> error = layer(t.sin())[:-1] - t.sin()[1:]
    >>> bool(error[256:].abs().max() < 1e-6)
    True
    """

    A: nn.Parameter
    B: nn.Parameter
    C: nn.Parameter
    D: nn.Parameter

    def __init__(
        self,
        state: int = 8,
        window: int = 64,
        readout: str = "derivative",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and dtype not in (torch.float32, torch.float64):
            raise BadInput(
                f"HippoProphecy needs float32 or float64: its filter is a difference of large terms; got {dtype}"
            )
        self.state, self.window, self.readout = state, window, readout
        A, B, C, D = prophecy_weights(state, window, readout)
        for name, value in zip("ABCD", (A, B, C, torch.tensor(D, dtype=torch.float64))):
            setattr(self, name, nn.Parameter(value.to(device)))

    def kernel(self, length: int) -> Float[Tensor, "length"]:
        """The filter's answer to one impulse, with D, in float64."""
        states, power = self.B.double()[None], self.A.double()
        for _ in range(math.ceil(math.log2(max(length, 1)))):
            states, power = torch.cat([states, states @ power.mT]), power @ power
        held = states[:length] @ self.C.double() / 2
        late = torch.cat([held.new_zeros(1), held[:-1]])  # the other half of each sample enters one step later
        return held + late + self.D * torch.eye(1, length, dtype=held.dtype, device=held.device)[0]

    def forward(self, x: Float[Tensor, "*batch length features"]) -> Float[Tensor, "*batch length features"]:
        if x.dtype not in (torch.float32, torch.float64):
            raise BadInput(
                f"HippoProphecy needs float32 or float64: its filter is a difference of large terms; got a {describe(x)}"
            )
        if x.ndim < 2 or not x.shape[-2]:
            raise BadInput(
                f"HippoProphecy needs (*, length, features) with a length of at least 1, got a {describe(x)}"
            )
        if not x.numel():
            return x.clone()
        L = x.shape[-2]
        with torch.autocast(x.device.type, enabled=False):
            u, K = x.mT.double(), self.kernel(L)
            y = torch.fft.irfft(torch.fft.rfft(u, 2 * L) * torch.fft.rfft(K, 2 * L), 2 * L)[..., :L]
        return y.mT.to(x.dtype)

    def step(
        self, x: Float[Tensor, "*batch features"], held: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "*batch features"], tuple[Tensor, Tensor]]:
        """One time step as a recurrence: the prediction after `x`, and what to give with the next sample (None before the first)."""
        if not x.ndim or x.dtype not in (torch.float32, torch.float64):
            raise BadInput(f"HippoProphecy.step needs (*, features) in float32 or float64, got a {describe(x)}")
        u = x.double()
        state, before = held if held is not None else (u.new_zeros(*u.shape, self.state), torch.zeros_like(u))
        state = state @ self.A.double().mT + self.B.double() * ((before + u) / 2)[..., None]
        return (state @ self.C.double() + self.D.double() * u).to(x.dtype), (state, u)

    def extra_repr(self) -> str:
        return f"state={self.state}, window={self.window}, readout={self.readout}"
