"""Classes of matrices closed under products, each kept as one tensor: what a structured preconditioner is made of.

Sums and multiples of matrices of a class are those of their tensors. `gram` projects a symmetric matrix X X^T onto a class: where
the class holds both of two mirrored entries it takes them as they are, where it holds one of them it takes the double.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 30  # side of a block; the last one has what is left
TOP = BOTTOM = 15  # dense rows at either end of a hierarchical matrix


class Blocks:
    """Block-diagonal, kept as (blocks, side, side); what pads the last block stays 0. One block: dense; side 1: diagonal."""

    def __init__(self, n: int, side: int) -> None:
        self.n, self.side, self.count = n, side, -(-n // side)

    def eye(self, like: Tensor) -> Tensor:
        K = like.new_zeros(self.count, self.side, self.side)
        ones = like.new_zeros(self.count * self.side)
        ones[: self.n] = 1
        K.diagonal(dim1=1, dim2=2).copy_(ones.view(self.count, self.side))
        return K

    def times(self, K: Tensor, X: Float[Tensor, "n b"]) -> Float[Tensor, "n b"]:
        return K[:, :, 0] * X if self.side == 1 else (K @ self._split(X)).flatten(0, 1)[: self.n]

    def transposed_times(self, K: Tensor, X: Float[Tensor, "n b"]) -> Float[Tensor, "n b"]:
        return self.times(K.mT, X)

    def product(self, K: Tensor, M: Tensor) -> Tensor:
        return K * M if self.side == 1 else K @ M

    def gram(self, X: Float[Tensor, "n b"]) -> Tensor:
        if self.side == 1:
            return X.square().sum(1)[:, None, None]
        Y = self._split(X)
        return Y @ Y.mT

    def own_gram(self, K: Tensor) -> Tensor:
        return self.product(K.mT, K)

    def mean_of_diagonal(self, H: Tensor) -> Tensor:
        return H.diagonal(dim1=1, dim2=2).sum() / self.n

    def _split(self, X: Tensor) -> Tensor:
        lacking = self.count * self.side - self.n
        X = torch.nn.functional.pad(X, (0, 0, 0, lacking)) if lacking else X
        return X.reshape(self.count, self.side, -1)


class Toeplitz:
    """Lower (or upper) triangular with constant diagonals, kept as them, the main one first; products are convolutions.

    They are taken by a Fourier transform of twice the length, in float32 at least.
    """

    def __init__(self, n: int, upper: bool) -> None:
        self.n, self.upper = n, upper

    def eye(self, like: Tensor) -> Tensor:
        K = like.new_zeros(self.n)
        K[0] = 1
        return K

    def times(self, K: Tensor, X: Float[Tensor, "n b"]) -> Float[Tensor, "n b"]:
        return self._filtered(K, X, self.upper)

    def transposed_times(self, K: Tensor, X: Float[Tensor, "n b"]) -> Float[Tensor, "n b"]:
        return self._filtered(K, X, not self.upper)

    def product(self, K: Tensor, M: Tensor) -> Tensor:
        return self._filtered(K, M[:, None], False)[:, 0]

    def gram(self, X: Float[Tensor, "n b"]) -> Tensor:
        spectrum = self._spectrum(X)
        return self._means((spectrum.real.square() + spectrum.imag.square()).sum(1), X.dtype)

    def own_gram(self, K: Tensor) -> Tensor:
        # the k-th diagonal of K^T K sums (n - u) d_u d_(u - k) over u: every product comes in n - u places
        weighed = K * torch.arange(self.n, 0, -1, dtype=K.dtype, device=K.device)
        return self._means(self._spectrum(weighed) * self._spectrum(K).conj(), K.dtype)

    def mean_of_diagonal(self, H: Tensor) -> Tensor:
        return H[0]

    def _spectrum(self, X: Tensor) -> Tensor:
        return torch.fft.rfft(X.to(torch.promote_types(X.dtype, torch.float32)), 2 * self.n, dim=0)

    def _filtered(self, K: Tensor, X: Tensor, upward: bool) -> Tensor:
        by = self._spectrum(K)[:, None]
        Y = torch.fft.irfft(self._spectrum(X) * (by.conj() if upward else by), 2 * self.n, dim=0)
        return Y[: self.n].to(X.dtype)

    def _means(self, spectrum: Tensor, dtype: torch.dtype) -> Tensor:
        """Means of the diagonals of a symmetric matrix from the spectrum of their sums, doubled off the main one."""
        d = torch.fft.irfft(spectrum, 2 * self.n)[: self.n]
        d = 2 * d / torch.arange(self.n, 0, -1, dtype=d.dtype, device=d.device)
        d[0] /= 2
        return d.to(dtype)


class Hierarchical:
    """Diagonal in the middle, with dense rows above and, from the middle on, below: [[A, B, B'], [0, c, 0], [0, D, E]].

    Kept as one vector: the rows [A, B, B'], then c, then the rows [D, E].
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.top = min(n, TOP)
        self.bottom = min(n - self.top, BOTTOM)
        self.middle = n - self.top - self.bottom

    def eye(self, like: Tensor) -> Tensor:
        K = like.new_zeros(self.top * self.n + self.middle + self.bottom * (self.middle + self.bottom))
        upper, c, lower = self._parts(K)
        upper.diagonal().fill_(1)
        c.fill_(1)
        lower[:, self.middle :].diagonal().fill_(1)
        return K

    def times(self, K: Tensor, X: Float[Tensor, "n b"]) -> Float[Tensor, "n b"]:
        upper, c, lower = self._parts(K)
        return torch.cat([upper @ X, c[:, None] * self._rows(X)[1], lower @ X[self.top :]])

    def transposed_times(self, K: Tensor, X: Float[Tensor, "n b"]) -> Float[Tensor, "n b"]:
        upper, c, lower = self._parts(K)
        above, within, below = self._rows(X)
        Y = upper.T @ above
        Y[self.top :] += lower.T @ below
        self._rows(Y)[1].add_(c[:, None] * within)
        return Y

    def product(self, K: Tensor, M: Tensor) -> Tensor:
        (upper, c, lower), (by_upper, by_c, by_lower) = self._parts(K), self._parts(M)
        A, B, rest = upper.split([self.top, self.middle, self.bottom], 1)
        D, E = lower.split([self.middle, self.bottom], 1)
        new_upper, new_lower = A @ by_upper, E @ by_lower
        new_upper[:, self.top :] += rest @ by_lower
        new_upper[:, self.top : self.top + self.middle] += B * by_c
        new_lower[:, : self.middle] += D * by_c
        return self._joined(new_upper, c * by_c, new_lower)

    def gram(self, X: Float[Tensor, "n b"]) -> Tensor:
        above, within, below = self._rows(X)
        return self._joined(*self._doubled(above @ X.T, below @ X[self.top :].T, within.square().sum(1)))

    def own_gram(self, K: Tensor) -> Tensor:
        upper, c, lower = self._parts(K)
        A, right = upper[:, : self.top], upper[:, self.top :]
        rest, E = upper[:, self.top + self.middle :], lower[:, self.middle :]
        sums = c.square() + right[:, : self.middle].square().sum(0) + lower[:, : self.middle].square().sum(0)
        return self._joined(*self._doubled(A.T @ upper, rest.T @ right + E.T @ lower, sums))

    def mean_of_diagonal(self, H: Tensor) -> Tensor:
        upper, c, lower = self._parts(H)
        return (upper.diagonal().sum() + c.sum() + lower[:, self.middle :].diagonal().sum()) / self.n

    def _parts(self, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        right = self.middle + self.bottom
        upper, c, lower = K.split([self.top * self.n, self.middle, self.bottom * right])
        return upper.view(self.top, self.n), c, lower.view(self.bottom, right)

    def _rows(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        above, within, below = X.split([self.top, self.middle, self.bottom])
        return above, within, below

    def _doubled(self, upper: Tensor, lower: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries whose mirror images the class has not, twice: right of A, left of E."""
        upper[:, self.top :] *= 2
        lower[:, : self.middle] *= 2
        return upper, c, lower

    def _joined(self, upper: Tensor, c: Tensor, lower: Tensor) -> Tensor:
        return torch.cat([upper.flatten(), c, lower.flatten()])


Structure = Blocks | Toeplitz | Hierarchical

STRUCTURES: dict[str, Callable[[int], Structure]] = {
    "dense": lambda n: Blocks(n, n),
    "diagonal": lambda n: Blocks(n, 1),
    "block_diagonal": lambda n: Blocks(n, min(n, BLOCK)),
    "lower_toeplitz": lambda n: Toeplitz(n, False),
    "upper_toeplitz": lambda n: Toeplitz(n, True),
    "hierarchical": Hierarchical,
}
