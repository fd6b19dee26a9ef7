"""OrtSAE: a sparse autoencoder whose features are kept from becoming each other's near copies."""

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from pondera.errors import BadInput, describe, require_float, require_matrix


def orthogonal_decoder(
    decoder: Float[Tensor, "features d"] | nn.Module,
    *,
    chunk: int = 8192,
    order: Int[Tensor, " features"] | None = None,
    generator: Generator | None = None,
) -> Float[Tensor, ""]:
    r"""Squared cosine of each feature with its nearest neighbour among a random chunk of the others, mean over features.

    .. math:: L = \frac{1}{n} \sum_i \max \Big( 0, \max_{j \ne i, \; j \in C(i)}
              \frac{d_i^T d_j}{\lVert d_i \rVert \lVert d_j \rVert} \Big)^2

    The features are shuffled into chunks C of equal size at every call, so the cost is n c d multiplications and not
    n^2 d, and the memory that is kept for the gradient n d: pairs are found without one, and only their cosines are
    differentiated. Opposite features do not count. Lengths do not matter.

    Args:
        decoder: a feature's direction a row; or a model with a `decoder`, which is such a matrix or an `nn.Linear` whose columns
            they are.
        chunk: c, how many features are compared with each other; 8192 in the paper (recalled). The last chunk may be
            smaller; a feature alone in its chunk counts 0.
        order: features in the order they are cut into chunks; by default drawn, where there is more than one chunk.
        generator: draws the order.
    Returns: a scalar in the decoder's dtype (cosines are taken in float32 at least), 0 exactly where no two features of a chunk
        lie at less than a right angle: for all pairs that takes at most 2 d features, and orthogonal ones, or their opposites,
        do it. Equal nearest neighbours: the gradient is that of one of them.
    Raises: BadInput: if a model has no such decoder, decoder is no floating-point matrix with entries, chunk is below 2, or
        order is no permutation.
    Paper: Korznikov et al. 2025, arXiv 2509.22033. No code was released; settings are recalled: factor 0.25 with the squared error,
        at every fifth step. A mean over features, so a smaller last chunk weighs no more.

    >>> orthogonal_decoder(torch.eye(4))
    tensor(0.)
    >>> orthogonal_decoder(torch.tensor([[1.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]))  # 0.6, 0.6 and none
    tensor(0.2400)
    """
    if isinstance(decoder, nn.Module):
        held = getattr(decoder, "decoder", None)
        held = held.weight.T if isinstance(held, nn.Linear) else held
        if not isinstance(held, Tensor):
            raise BadInput(
                f"orthogonal_decoder needs a matrix of features, or a model whose decoder is one or an nn.Linear, got a "
                f"{type(decoder).__name__}"
            )
        decoder = held
    require_matrix(decoder, "orthogonal_decoder", "decoder")
    if decoder.ndim != 2:
        raise BadInput(f"orthogonal_decoder needs a decoder of shape (features, d), got a {describe(decoder)}")
    if chunk < 2:
        raise BadInput(f"orthogonal_decoder needs a chunk of at least 2 features, got {chunk}")
    n = len(decoder)
    if order is None:
        order = torch.arange(n) if n <= chunk else torch.randperm(n, generator=generator)
    elif order.shape != (n,) or not torch.equal(order.cpu().sort().values, torch.arange(n)):
        raise BadInput(f"orthogonal_decoder needs an order of all {n} features, each once, got a {describe(order)}")
    order = order.to(decoder.device)
    rows = decoder.float() if decoder.element_size() < 4 else decoder
    unit = nn.functional.normalize(rows, dim=1)
    with torch.no_grad():
        nearest = torch.cat([_nearest(unit[part], part) for part in order.split(chunk)])
    cosine = (unit[order] * unit[nearest]).sum(1)
    cosine = torch.where(order == nearest, 0.0, cosine.relu())  # a feature alone in its chunk
    return (cosine.square().sum() / n).to(decoder.dtype)


def _nearest(unit: Tensor, part: Tensor) -> Tensor:
    """For each row of a chunk the index of the one nearest in direction, among all features."""
    cosines = unit @ unit.T
    if len(part) > 1:
        cosines.fill_diagonal_(-torch.inf)
    return part[cosines.argmax(1)]


class SparseAutoencoder(nn.Module):
    r"""Activations as sparse sums of features: an overcomplete dictionary, k features an example on average (BatchTopK).

    .. math:: f = \operatorname{top}_{kB} \operatorname{relu}(W_e (x - b)), \qquad \hat x = W_d^T f + b

    In training the k B largest activations of the batch of B examples stay. Examples thus take as many as they need. In
    evaluation an activation stays that lies above a threshold, the running mean of the smallest that stayed, so that an
    example does not depend on its neighbours. Call `normalize_` after each step to hold features at unit length.

    Args:
        d: width of the activations.
        features: n, how many features; more than d as a rule.
        k: how many are active in an example, on average.
        generator: draws the start: decoder rows uniform on the sphere; the encoder is its transpose.
    Raises: BadInput: if a size is not positive or k exceeds the features.
    Paper: Korznikov et al. 2025, arXiv 2509.22033, with the architecture of Bussmann et al. 2024, arXiv 2412.06410. Its help for
        features that are never active (AuxK) is left out. The threshold's rate, 0.01, is ours.

    >>> sae = SparseAutoencoder(4, 8, k=2)
    >>> reconstruction, code = sae(torch.randn(16, 4))
    >>> code.shape, int((code > 0).sum()) <= 32
    (torch.Size([16, 8]), True)
    >>> loss = (reconstruction - 1).square().mean() + 0.25 * orthogonal_decoder(sae.decoder)
    """

    threshold: Tensor

    def __init__(self, d: int, features: int, k: int, *, generator: Generator | None = None) -> None:
        super().__init__()
        if d < 1 or not 1 <= k <= features:
            raise BadInput(
                f"SparseAutoencoder needs a positive width and 1 <= k <= features, got d {d}, k {k} of {features}"
            )
        self.k = k
        start = nn.functional.normalize(torch.randn(features, d, generator=generator), dim=1)
        self.encoder, self.decoder = nn.Parameter(start.clone()), nn.Parameter(start)
        self.encoder_bias, self.bias = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(d))
        self.register_buffer("threshold", torch.tensor(torch.nan))  # not a number until a batch was seen

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch features"]:
        """The features' activations, zero but for the chosen ones."""
        require_float(x, "SparseAutoencoder", "activations")
        if x.shape[-1:] != self.bias.shape or not x.numel():
            raise BadInput(
                f"SparseAutoencoder needs activations of width {len(self.bias)}, at least one, got a {describe(x)}"
            )
        f = nn.functional.linear(x - self.bias, self.encoder, self.encoder_bias).relu()
        if not self.training:
            return torch.where(f > self.threshold.nan_to_num(0.0), f, 0.0)
        kept = f.flatten().topk(self.k * (f.numel() // f.shape[-1]))
        with torch.no_grad():
            least = kept.values[-1].to(self.threshold.dtype)
            self.threshold.copy_(torch.where(self.threshold.isnan(), least, self.threshold.lerp(least, 0.01)))
        return torch.zeros_like(f).flatten().scatter(0, kept.indices, kept.values).view_as(f)

    def decode(self, code: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch d"]:
        """The sum of the features, weighed by their activations."""
        return code @ self.decoder + self.bias

    def forward(self, x: Float[Tensor, "*batch d"]) -> tuple[Tensor, Tensor]:
        """Reconstruction and activations."""
        code = self.encode(x)
        return self.decode(code), code

    @torch.no_grad()
    def normalize_(self) -> "SparseAutoencoder":
        """Put the features back to unit length; after each step of the optimizer."""
        self.decoder.copy_(nn.functional.normalize(self.decoder, dim=1))
        return self

    def extra_repr(self) -> str:
        return f"d={len(self.bias)}, features={len(self.encoder)}, k={self.k}"
