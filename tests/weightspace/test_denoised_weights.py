import copy

import pytest
import torch

from pondera.errors import BadInput
from pondera.weightspace import WeightBlocks, WeightDiffusion
from pondera.weightspace.denoised_weights import cosine_schedule, ddim


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def collection(n=40, seed=1):
    g = gen(seed)
    scales = {"a": ((5, 3), 1.0), "b": ((5,), 0.01), "c": ((2, 5), 30.0)}
    return {name: 2 + s * torch.randn(n, *shape, generator=g) for name, (shape, s) in scales.items()}


@pytest.mark.parametrize("size", [1, 4, 7, 30, 64])
def test_blocks_there_and_back(size):
    """30 entries: cut and put together again; what is in the filling never comes out."""
    states = collection()
    blocks = WeightBlocks(states, size)
    packed = blocks.pack(states)
    assert packed.shape == (40, -(-30 // size), size)
    assert blocks.mask.sum() == 30
    assert not packed[:, ~blocks.mask].any()
    back = blocks.unpack(packed)
    assert all(torch.allclose(back[n], states[n], rtol=1e-5, atol=1e-5) for n in states)
    filled = blocks.unpack(packed.masked_fill(~blocks.mask, 9.0))
    assert all(torch.equal(filled[n], back[n]) for n in states)
    flat = packed.flatten(1)[:, :30]
    for part in flat.split([15, 5, 10], 1):  # every tensor in its own units
        assert part.square().mean().item() == pytest.approx(1, rel=1e-4)
    assert flat.mean(0).abs().max() < 1e-4


def test_filling_does_not_count():
    states = collection()
    model = WeightDiffusion(states, 2, block=16, hidden=16)
    c = torch.randn(40, 2, generator=gen())
    before = model.loss(states, c, gen(3))
    with torch.no_grad():
        model.leave.bias[14:] += 100.0  # the last block has 14 entries; in the first these places are entries
    index, t, x = torch.tensor([1]), torch.tensor([5]), torch.zeros(1, 16)
    assert model(x, t, c[:1], index)[0, 14:].min() > 50
    assert model.loss(states, c, gen(3)) > before  # by the first block's entries
    one = {n: v for n, v in states.items() if n != "c"} | {"c": states["c"][:, :1, :1]}  # 21 entries: one block of 32
    model = WeightDiffusion(one, 2, block=32, hidden=16)
    before = model.loss(one, c, gen(3))
    with torch.no_grad():
        model.leave.bias[21:] += 100.0
    assert model.loss(one, c, gen(3)) == before


def test_one_network_is_reproduced():
    """A collection of one, twice: its deviations are nothing, and samples are the network."""
    one = {n: x[:1].expand(8, *x.shape[1:]).clone() for n, x in collection().items()}
    made = WeightDiffusion(one, 1, block=8, hidden=8).sample(torch.zeros(3, 1), gen())
    assert all(torch.allclose(made[n], one[n][:3], atol=1e-4) for n in one)


def test_learns_the_mean_given_the_task():
    """Weights linear in the embedding: after training, one step gives them for new tasks."""
    g = gen(2)
    maps = {"w": torch.randn(2, 6, generator=g), "b": torch.randn(2, 3, generator=g)}
    c, new = torch.randn(200, 2, generator=g), torch.randn(20, 2, generator=g)
    torch.manual_seed(0)
    model = WeightDiffusion({n: c @ m for n, m in maps.items()}, 2, block=4, hidden=32, layers=2)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        adam.zero_grad()
        model.loss({n: c @ m for n, m in maps.items()}, c, g, batch=128).backward()
        adam.step()
    for steps in (1, 20):
        made = model.sample(new, g, steps)
        wanted = torch.cat([new @ m for m in maps.values()], 1)
        assert (torch.cat(list(made.values()), 1) - wanted).square().mean() < 0.2 * wanted.square().mean()
    twin = copy.deepcopy(model)
    assert all(torch.equal(twin.sample(new, gen(5))[n], x) for n, x in model.sample(new, gen(5)).items())


def test_agrees_with_diffusers():
    """DDIMScheduler with clean-sample prediction and the squared cosine, in single steps."""
    diffusers = pytest.importorskip("diffusers")
    kept = cosine_schedule(1000)
    theirs = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )
    assert torch.allclose(kept, theirs.alphas_cumprod, atol=1e-6)
    x = torch.randn(5, 4, generator=gen())

    def denoise(x, t):
        return torch.tanh(x) * (1 - t / 2000)

    ours = ddim(denoise, x, kept, 9)  # 999, 888, ..., 111
    theirs.num_inference_steps = 9
    for t in range(999, 111, -111):
        x = theirs.step(denoise(x, t), t, x).prev_sample
    assert torch.allclose(ours, denoise(x, 111), atol=1e-5)


def test_refusals():
    states = collection()
    with pytest.raises(BadInput, match="a size of at least 1, a whole number, got 0"):
        WeightBlocks(states, 0)
    with pytest.raises(BadInput, match="NaN or infinite of 200 in its b"):
        WeightBlocks(states | {"b": states["b"] * torch.nan}, 4)
    blocks = WeightBlocks(states, 8)
    with pytest.raises(BadInput, match=r"needs a as \(networks, 5, 3\), got none"):
        blocks.pack({"b": states["b"]})
    with pytest.raises(BadInput, match=r"needs \(networks, 4, 8\)"):
        blocks.unpack(torch.zeros(2, 3, 8))
    with pytest.raises(BadInput, match="needs condition of at least 1"):
        WeightDiffusion(states, 0)
    model = WeightDiffusion(states, 2, hidden=8)
    with pytest.raises(BadInput, match=r"embeddings \(40 networks, 2\)"):
        model.loss(states, torch.zeros(3, 2), gen())
    with pytest.raises(BadInput, match="1 to 1000 steps, got 0"):
        model.sample(torch.zeros(3, 2), gen(), 0)
    with pytest.raises(BadInput, match="NaN or infinite of 6 in its embeddings"):
        model.sample(torch.full((3, 2), torch.nan), gen())
