"""S4D: a sequence layer whose state matrix is diagonal, with the starts that make it remember."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe, nearest
from pondera.nn._state_space import DiagonalSystem, hippo_legs, require_size

STARTS = ("legs", "inv", "lin", "real")
DISCRETIZATIONS = ("zoh", "bilinear")
Q = 64  # length of a kernel's rows: about the root of the lengths that matter, and no length is compiled into the layer
B_MOST = 2.0  # the largest |B| that S4D-LegS starts from, as in the authors' code


def s4d_start(start: str, state: int) -> DiagonalSystem:
    r"""The poles A and inputs B that S4D starts from, one of each conjugate pair: n = 0..N/2 - 1 for N = `state`.

    .. math::
        \text{legs: } A_n = -\tfrac12 + i\,\omega_n, \qquad \text{inv: } -\tfrac12 + i \frac{N}{\pi}
        \Bigl(\frac{N}{2n + 1} - 1\Bigr), \qquad \text{lin: } -\tfrac12 + i \pi n, \qquad \text{real: } -(n + 1)

    The omega_n > 0 are eigenvalues of the skew part A + P P^T, P_n = sqrt(n + 1/2), of HiPPO-LegS, whose eigenvectors are
    V; its inputs are B = V* B_hippo, the phase of each eigenvector such that they are positive. The others have B = 1.

    With half of that B the system of `legs` goes to HiPPO-LegS itself as N grows, for inputs of bounded frequency (the
    paper's theorem): its read-out for a row c of the dense system is ``c @ V``. The sup over all frequencies does not fall.

    Args:
        start: legs, inv, lin or real.
        state: N, even.
    Returns: `A`, `B` (complex128) and, for legs, `V` (N, N/2), as a named tuple; no clip, nothing halved.
    Raises: BadInput: for another name, or a state that is not an even whole number.
    Paper: Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893, Sec. 4. The formulas are read in the authors' code
        (state-spaces/s4); for real it keeps N/2 poles, too, and so do we.

    >>> s4d_start("lin", 6).A.imag / torch.pi
    tensor([0., 1., 2.], dtype=torch.float64)
    """
    if start not in STARTS:
        raise BadInput(f"s4d_start knows {', '.join(STARTS)}, got {start!r}{nearest(str(start), STARTS)}")
    N = require_size(state, "s4d_start", "state", least=2, even=True)
    n = torch.arange(N // 2, dtype=torch.float64)
    if start == "legs":
        A, B = hippo_legs(N)
        P = (torch.arange(N, dtype=torch.float64) + 0.5).sqrt()
        omega, V = torch.linalg.eigh(-1j * (A + torch.outer(P, P)))
        omega, V = omega[N // 2 :], V[:, N // 2 :]  # ascending, so that these are the positive half
        taken = V.mH @ B.to(V)
        return DiagonalSystem(torch.complex(torch.full_like(omega, -0.5), omega), taken.abs().to(V), V * taken.sgn())
    imaginary = {"inv": N / math.pi * (N / (2 * n + 1) - 1), "lin": math.pi * n, "real": 0 * n}[start]
    A = torch.complex(-(n + 1) if start == "real" else torch.full_like(n, -0.5), imaginary)
    return DiagonalSystem(A, torch.ones_like(A))


class S4D(nn.Module):
    r"""A diagonal state-space layer on sequences ``(*, length, features)``.

    Each feature has a system of its own, of N/2 complex modes (the other half are their conjugates),

    .. math:: x_l = \bar A x_{l-1} + \bar B u_l, \qquad y_l = 2\,\mathrm{Re} \sum_n C_n x_{l,n} + D u_l, \qquad
        A = -\exp(a) + i \omega,

    discretised with a step Delta of its own: by zero-order hold, Abar = exp(Delta A), Bbar = (Abar - 1) B / A, or bilinearly,
    Abar = (1 + Delta A / 2) / (1 - Delta A / 2), Bbar = Delta B / (1 - Delta A / 2). So y is the convolution of u with

    .. math:: \bar K_l = 2\,\mathrm{Re} \sum_n C_n \bar B_n \bar A_n^l, \qquad l = 0..L-1

    by FFT of length 2L. With ``l = q Q + r``, Q = 64, this Vandermonde product is one of two small matrices of powers, (L/Q, N)
    by (N, Q): no table of H x N/2 x L exponentials is made. `step` is the same system as a recurrence. After it come GELU and
    a gated linear map of the features, ``GLU(mix(.))``, as in the paper's block; the residual, norm and dropout around the
    block are the caller's.

    Kernel and convolution are computed in float32 at least, also in half precision and under autocast. Memory is decided by
    the start of A and Delta; let `system_parameters` train at a small rate of their own (0.001 in the paper) and without
    weight decay.

    Args:
        features: H, the size of the last dimension.
        state: N, even; 64 in the paper.
        start: ``"legs"``, ``"inv"``, ``"lin"`` or ``"real"`` (see `s4d_start`), or a system ``(A, B)`` or ``(A, B, V)`` of
            N/2 modes for all features. With a V, C starts as ``c @ V`` for a real standard normal c, which for legs is the
            law of the others: complex standard normal. The B of legs is clipped to modulus 2; one given is taken as it is.
        discretization: ``"zoh"`` (the default of paper and code) or ``"bilinear"``.
        dt_min, dt_max: Delta starts log-uniform between them; 0.001 and 0.1 in the paper.
        mixing: False leaves out GELU and the gated map: a linear layer of its own system for each feature.
        device, dtype: as in `nn.Linear`.
    Raises: BadInput: for sizes, names or steps out of range, a system with a pole that is not finite or not left of zero, and in
        use for a sequence that is empty, has no length, or another number of features.
    Paper: Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893. B is trained and C is complex normal as in the authors' code
        (state-spaces/s4, SSMKernelDiag), which clips the imaginary part of B where we clip its modulus: its phase is free.

    >>> layer = S4D(3, state=8)
    >>> u = torch.randn(2, 100, 3)
    >>> y, held = layer(u), None
    >>> for l in range(100):
    ...     y_l, held = layer.step(u[:, l], held)
    >>> torch.allclose(y_l, y[:, -1], atol=1e-5)
    True
    """

    def __init__(
        self,
        features: int,
        state: int = 64,
        *,
        start: str | tuple[Tensor, ...] = "legs",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        mixing: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = require_size(features, "S4D", "features")
        self.state = require_size(state, "S4D", "state", least=2, even=True)
        if discretization not in DISCRETIZATIONS:
            known = ", ".join(DISCRETIZATIONS)
            raise BadInput(
                f"S4D knows the discretizations {known}, got {discretization!r}{nearest(str(discretization), DISCRETIZATIONS)}"
            )
        if not 0 < dt_min <= dt_max < math.inf:
            raise BadInput(f"S4D needs 0 < dt_min <= dt_max, both finite, got {dt_min!r} and {dt_max!r}")
        self.start, self.discretization, self.dt_min, self.dt_max = start, discretization, dt_min, dt_max
        self._system = _system(start, self.state)
        H, n = features, state // 2
        kw = {"device": device, "dtype": dtype}
        self.log_dt = nn.Parameter(torch.empty(H, **kw))  # type: ignore[arg-type]
        self.log_decay = nn.Parameter(torch.empty(H, n, **kw))  # type: ignore[arg-type]
        self.frequency = nn.Parameter(torch.empty(H, n, **kw))  # type: ignore[arg-type]
        self.B = nn.Parameter(torch.empty(H, n, 2, **kw))  # type: ignore[arg-type]
        self.C = nn.Parameter(torch.empty(H, n, 2, **kw))  # type: ignore[arg-type]
        self.D = nn.Parameter(torch.empty(H, **kw))  # type: ignore[arg-type]
        self.mix = nn.Linear(H, 2 * H, **kw) if mixing else None  # type: ignore[arg-type]
        if not self.D.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the paper's start again, from torch's default generator."""
        A, B, V = self._system
        like = {"dtype": torch.promote_types(self.D.dtype, torch.float32), "device": self.D.device}
        self.log_dt.copy_(torch.empty_like(self.D, **like).uniform_(math.log(self.dt_min), math.log(self.dt_max)))  # type: ignore[arg-type]
        self.log_decay.copy_((-A.real).log())
        self.frequency.copy_(A.imag)
        self.B.copy_(torch.view_as_real(B))
        if V is None:
            self.C.normal_(0, 0.5**0.5)
        else:
            c = torch.randn(self.features, len(V), **like).cpu()  # type: ignore[call-overload]
            self.C.copy_(torch.view_as_real(c.to(V) @ V))
        self.D.normal_()
        if self.mix is not None:
            self.mix.reset_parameters()

    def system_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of A, B and Delta: for a group with a small rate and no weight decay."""
        yield from (self.log_dt, self.log_decay, self.frequency, self.B)

    def discrete(self) -> tuple[Complex[Tensor, "H n"], Complex[Tensor, "H n"], Complex[Tensor, "H n"]]:
        """Logarithms of Abar, and Bbar and C, in float32's complex numbers at least."""
        work = torch.promote_types(self.D.dtype, torch.float32)
        A = torch.complex(-self.log_decay.to(work).exp(), self.frequency.to(work))
        dt = self.log_dt.to(work).exp()[:, None]
        B, C = (torch.view_as_complex(p.to(work)) for p in (self.B, self.C))
        dtA = dt * A
        if self.discretization == "zoh":
            return dtA, torch.expm1(dtA) / A * B, C  # expm1: exp - 1 would lose the digits of a small step
        return ((1 + dtA / 2) / (1 - dtA / 2)).log(), dt / (1 - dtA / 2) * B, C

    def kernel(self, length: int) -> Float[Tensor, "H length"]:
        """Kbar, the answer of each feature's system to one impulse, without D."""
        if length < 1:
            raise BadInput(f"S4D's kernel needs a length of at least 1, got {length}")
        with torch.autocast(self.D.device.type, enabled=False):
            log_A, B, C = self.discrete()
            inner = _powers(log_A, torch.arange(Q, device=self.D.device))
            outer = (C * B)[..., None] * _powers(log_A, Q * torch.arange(-(-length // Q), device=self.D.device))
            # 2 Re of the complex product, as a real one over both parts
            left = torch.cat([outer.real, -outer.imag], 1).mT
            right = torch.cat([inner.real, inner.imag], 1)
            return 2 * torch.bmm(left, right).flatten(1)[:, :length]

    def forward(self, x: Float[Tensor, "*batch length features"]) -> Float[Tensor, "*batch length features"]:
        if x.ndim < 2 or x.shape[-1] != self.features or not x.shape[-2] or not x.is_floating_point():
            raise BadInput(
                f"S4D needs real numbers as (*, length, {self.features}) with a length of at least 1, got a {describe(x)}"
            )
        L = x.shape[-2]
        with torch.autocast(x.device.type, enabled=False):
            K = self.kernel(L)
            u = x.mT.to(K.dtype)
            y = self.D.to(K.dtype)[:, None] * u
            if x.numel():  # an FFT takes no empty batch
                y = y + torch.fft.irfft(torch.fft.rfft(u, 2 * L) * torch.fft.rfft(K, 2 * L), 2 * L)[..., :L]
            y = y.mT
        return self._out(y, x)

    def step(
        self, x: Float[Tensor, "*batch features"], state: Complex[Tensor, "*batch H n"] | None = None
    ) -> tuple[Float[Tensor, "*batch features"], Complex[Tensor, "*batch H n"]]:
        """One time step of the recurrence: the output for `x`, and the state to give with the next (None before the first)."""
        if not x.ndim or x.shape[-1] != self.features or not x.is_floating_point():
            raise BadInput(f"S4D.step needs real numbers as (*, {self.features}), got a {describe(x)}")
        held = (*x.shape, self.state // 2)
        if state is not None and (state.shape != held or not state.is_complex()):
            raise BadInput(
                f"S4D.step needs a complex state of shape {held} for this input, got {tuple(state.shape)} {state.dtype}"
            )
        with torch.autocast(x.device.type, enabled=False):
            log_A, B, C = self.discrete()
            u = x.to(log_A.real.dtype)
            state = B * u[..., None] if state is None else log_A.exp() * state + B * u[..., None]
            y = 2 * (C * state).sum(-1).real + self.D.to(u.dtype) * u
        return self._out(y, x), state

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.to(x.dtype)
        return y if self.mix is None else F.glu(self.mix(F.gelu(y)), -1)

    def extra_repr(self) -> str:
        start = self.start if isinstance(self.start, str) else "given"
        return f"{self.features}, state={self.state}, start={start}, discretization={self.discretization}"


def _powers(log_A: Complex[Tensor, "H n"], exponents: Tensor) -> Complex[Tensor, "H n e"]:
    return (log_A[..., None] * exponents).exp()


def _system(start: str | tuple[Tensor, ...], state: int) -> DiagonalSystem:
    if isinstance(start, str):
        A, B, V = s4d_start(start, state)
        return DiagonalSystem(A, B / (B.abs() / B_MOST).clamp_min(1), V)
    if not isinstance(start, tuple) or len(start) not in (2, 3):
        raise BadInput(
            f"S4D needs for start one of {', '.join(STARTS)} or a tuple (A, B) or (A, B, V), got {type(start).__name__}"
        )
    found = DiagonalSystem(*start)
    for name, t in zip("ABV", found):
        if t is None and name == "V":
            continue
        wanted = (state // 2,)
        if not isinstance(t, Tensor) or t.shape[-1:] != wanted or t.ndim != (2 if name == "V" else 1):
            came = describe(t) if isinstance(t, Tensor) else type(t).__name__
            raise BadInput(
                f"S4D with a state of {state} needs {wanted[0]} modes in the {name} of its start, got a {came}"
            )
        if not bool(torch.view_as_real(t + 0j).isfinite().all()):
            raise BadInput(f"S4D needs finite numbers in the {name} of its start, got NaN or infinity")
    if bool((found.A.real >= 0).any()):
        raise BadInput(
            f"S4D needs poles left of zero, got a real part of {found.A.real.max():.3g} in the A of its start"
        )
    return DiagonalSystem(*(None if t is None else (t.detach().cpu() + 0j).to(torch.complex128) for t in found))
