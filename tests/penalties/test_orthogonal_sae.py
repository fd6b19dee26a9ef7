import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pondera.errors import BadInput
from pondera.penalties import SparseAutoencoder, orthogonal_decoder


def decoder(n=12, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(w, chunk, order):
    """Term by term, as the formula says."""
    total = 0.0
    for part in torch.tensor(order).split(chunk):
        for i in part.tolist():
            cosines = [float(torch.cosine_similarity(w[i], w[j], dim=0)) for j in part.tolist() if j != i]
            total += max([0.0, *cosines]) ** 2
    return total / len(w)


@pytest.mark.parametrize("chunk", [2, 4, 5, 6, 11, 12, 100])
def test_equals_the_sum_term_by_term(chunk):
    w, order = decoder(), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    value = orthogonal_decoder(w, chunk=chunk, order=order)
    assert value.item() == pytest.approx(by_loops(w, chunk, order.tolist()))


def test_by_hand_and_zero_on_its_target_set():
    w = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])  # nearest: 0.6, 0.8, 0.8
    assert orthogonal_decoder(w).item() == pytest.approx((0.36 + 0.64 + 0.64) / 3)
    q = torch.linalg.qr(decoder(5, 5))[0]
    assert orthogonal_decoder(torch.eye(6)).item() == 0
    assert orthogonal_decoder(torch.cat([torch.eye(4), -torch.eye(4)])).item() == 0  # opposites do not count
    assert orthogonal_decoder(q).item() < 1e-30
    assert orthogonal_decoder(torch.ones(3, 2)).item() == pytest.approx(1)


def test_chunks_see_no_more_than_all_pairs():
    w = decoder(64, 8)
    for seed in range(5):
        part = orthogonal_decoder(w, chunk=16, generator=torch.Generator().manual_seed(seed))
        assert 0 < part < orthogonal_decoder(w)


def test_gradient_is_right_and_orthogonal_to_each_row():
    w, order = decoder().requires_grad_(), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    for chunk in (5, 100):
        assert torch.autograd.gradcheck(lambda t, c=chunk: orthogonal_decoder(t, chunk=c, order=order), w)
    (g,) = torch.autograd.grad(orthogonal_decoder(w), w)
    assert (g * w).sum(1).abs().max() < 1e-12
    scaled = w.detach() * torch.arange(1.0, 13).unsqueeze(1)
    assert orthogonal_decoder(scaled).item() == pytest.approx(orthogonal_decoder(w).item())


def test_draws_anew_with_the_generator_and_keeps_the_global_state():
    w, g = decoder(), torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    first, second = (orthogonal_decoder(w, chunk=3, generator=g) for _ in range(2))
    assert first != second
    assert first == orthogonal_decoder(w, chunk=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_operations_grow_with_the_features_at_one_chunk():
    counts = []
    for n in (64, 128):
        with FlopCounterMode(display=False) as counter:
            orthogonal_decoder(torch.randn(n, 8), chunk=16)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 64 * 16 * 8, 2 * 128 * 16 * 8]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scalar_of_the_decoders_dtype(dtype):
    value = orthogonal_decoder(decoder().to(dtype))
    assert (value.dtype, value.shape) == (dtype, ())
    assert value.item() == pytest.approx(orthogonal_decoder(decoder()).item(), rel=0.03)


def test_a_row_of_zeros_and_a_single_feature():
    w = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    value = orthogonal_decoder(w)
    value.backward()
    assert value.item() == 0
    assert w.grad.isfinite().all()
    assert orthogonal_decoder(torch.ones(1, 3)).item() == 0


def test_batch_topk_keeps_k_an_example_on_average_and_a_threshold_for_evaluation():
    sae, x = SparseAutoencoder(6, 20, 3, generator=torch.Generator().manual_seed(0)), torch.randn(50, 6)
    reconstruction, code = sae(x)
    assert reconstruction.shape == x.shape
    assert int((code > 0).sum()) == 150
    assert len(set((code > 0).sum(1).tolist())) > 1
    assert sae.threshold.item() == pytest.approx(code[code > 0].min().item())
    sae.eval()
    together, alone = sae(x)[1], torch.stack([sae(one)[1] for one in x])
    assert torch.allclose(together, alone, atol=1e-6)  # no example depends on its neighbours
    assert abs(int((together > 0).sum()) - 150) <= 1


def test_reconstruction_by_hand_and_state():
    sae = SparseAutoencoder(2, 3, 1)
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
        sae.decoder.copy_(torch.tensor([[2.0, 0], [0, 3], [1, 1]]))
        sae.bias.copy_(torch.tensor([0.5, 0.0]))
    reconstruction, code = sae(torch.tensor([[2.5, 1.0]]))
    assert code.tolist() == [[2.0, 0.0, 0.0]]
    assert reconstruction.tolist() == [[4.5, 0.0]]
    assert torch.allclose(sae.normalize_().decoder.norm(dim=1), torch.ones(3))
    twin = SparseAutoencoder(2, 3, 1)
    twin.load_state_dict(sae.state_dict())
    assert torch.equal(twin.eval()(torch.ones(4, 2))[0], sae.eval()(torch.ones(4, 2))[0])


def test_trains_in_half_precision_too():
    sae = SparseAutoencoder(4, 8, 2).bfloat16()
    reconstruction, _ = sae(torch.randn(6, 4, dtype=torch.bfloat16))
    (reconstruction.square().mean() + orthogonal_decoder(sae.decoder)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: orthogonal_decoder(torch.ones(3)), "two dimensions"),
        (lambda: orthogonal_decoder(torch.ones(3, 2, 2)), "shape"),
        (lambda: orthogonal_decoder(torch.ones(3, 2).long()), "floating-point"),
        (lambda: orthogonal_decoder(torch.ones(3, 2), chunk=1), "chunk of at least 2"),
        (lambda: orthogonal_decoder(torch.ones(3, 2), order=torch.tensor([0, 1, 1])), "each once"),
        (lambda: SparseAutoencoder(4, 8, 9), "1 <= k <= features"),
        (lambda: SparseAutoencoder(4, 8, 2)(torch.ones(3, 5)), "width 4"),
        (lambda: SparseAutoencoder(4, 8, 2)(torch.ones(3, 4).long()), "floating-point"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(BadInput, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_is_a_module():
    assert isinstance(SparseAutoencoder(2, 3, 1), nn.Module)
    assert "k=1" in repr(SparseAutoencoder(2, 3, 1))


def test_of_a_model_its_decoder_is_taken():
    sae = SparseAutoencoder(6, 10, 2)
    assert orthogonal_decoder(sae) == orthogonal_decoder(sae.decoder)
    other = torch.nn.Module()
    other.decoder = torch.nn.Linear(10, 6)
    assert orthogonal_decoder(other) == orthogonal_decoder(other.decoder.weight.T)
    with pytest.raises(BadInput, match="a model whose decoder is one or an nn.Linear, got a Linear"):
        orthogonal_decoder(torch.nn.Linear(3, 4))
