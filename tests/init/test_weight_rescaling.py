import os
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.init.weight_rescaling import TargetVariance, layer_index_rescale_


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """As a language model is laid out: embedding, blocks, norm, head."""

    def __init__(self, blocks=4, width=200):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(Block(width) for _ in range(blocks))})
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, x):
        x = self.embed(x)
        for block in self.model["layers"]:
            x = block(x)
        return self.head(self.norm(x))


# -- the start --------------------------------------------------------------------------------------------------------


def test_deviation_falls_with_the_root_of_the_blocks_index():
    net = layer_index_rescale_(Net(), std=0.1, scale_factor=2.0, generator=generator())
    for l, block in enumerate(net.model["layers"], start=1):
        for layer in (block.up, block.down):
            # 40,000 draws: the sample deviation is off by 0.35% (one sigma)
            assert layer.weight.std().item() == pytest.approx(0.1 / (2 * l) ** 0.5, rel=0.02)
            assert abs(layer.weight.mean().item()) < 0.1 * 5 / 200
            assert not layer.bias.any()
    assert net.head.weight.std().item() == pytest.approx(0.1, rel=0.06)


@pytest.mark.parametrize(
    ("scale_factor", "deviations"),
    [
        (1.0, [0.01996, 0.01413, 0.01152, 0.01002, 0.00894]),
        (2.0, [0.01408, 0.00998, 0.00817, 0.00706, 0.00633]),
    ],
)
def test_deviations_of_the_authors_code(scale_factor, deviations):
    """Theirs (ba067ad) on five blocks of one 300 x 300 layer, drawn anew: 90,000 entries, sampling error 0.24%."""
    net = nn.ModuleList(nn.Linear(300, 300) for _ in range(5))
    layer_index_rescale_(net, std=0.02, scale_factor=scale_factor, generator=generator())
    assert [m.weight.std().item() for m in net] == pytest.approx(deviations, rel=0.015)


def test_norms_and_embeddings_stay():
    net = Net()
    before = tensors(net)
    layer_index_rescale_(net, generator=generator())
    stays = {k for k, v in tensors(net).items() if torch.equal(v, before[k])}
    assert stays == {k for k in before if "norm" in k or "embed" in k}


def test_a_stream_of_many_blocks_stays_bounded():
    """Block l adds about 1 / l^2 of what the first adds; with one deviation for all they add alike."""
    torch.manual_seed(0)
    x, added = torch.randn(64, 200), {}
    for how in ("by index", "alike"):
        net = nn.ModuleList(Block(200) for _ in range(16))
        layer_index_rescale_(net, std=0.05, generator=generator(1))
        h, added[how] = x, []
        for l, block in enumerate(net, start=1):
            with torch.no_grad():
                if how == "alike":
                    block.up.weight.mul_(l**0.5)
                    block.down.weight.mul_(l**0.5)
                new = block(h)
                added[how].append((new - h).square().mean().item())
                h = new
    l = torch.arange(1.0, 17)
    by_index, alike = (torch.tensor(added[how]) / added[how][0] for how in ("by index", "alike"))
    assert ((by_index * l**2 - 1).abs() < 0.25).all()
    assert ((alike - 1).abs() < 0.25).all()


def test_a_tensor_is_told_its_block():
    w = torch.empty(300, 300)
    assert layer_index_rescale_(w, std=0.1, generator=generator()) is w
    outside = w.clone()
    assert outside.std().item() == pytest.approx(0.1, rel=0.01)
    layer_index_rescale_(w, std=0.1, layer=4, scale_factor=0.25, generator=generator())
    assert torch.equal(w, outside)  # 4 * 0.25 = 1
    layer_index_rescale_(w, std=0.1, layer=9, generator=generator())
    assert torch.allclose(w, outside / 3)


class TwoStacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = (nn.ModuleList(nn.Linear(100, 100) for _ in range(2)) for _ in range(2))


def test_blocks_are_found_or_named():
    mixed = nn.Sequential(nn.Conv1d(2, 50, 3), *(nn.Linear(50, 50) for _ in range(3)), nn.Flatten())
    layer_index_rescale_(mixed, std=1.0, generator=generator())  # one class twice or more: those are the blocks
    assert mixed[0].weight.std().item() == pytest.approx(1, rel=0.15)
    assert mixed[3].weight.std().item() == pytest.approx(3**-0.5, rel=0.06)
    held = nn.Sequential(parametrizations.weight_norm(nn.Linear(50, 50)), nn.ReLU(), nn.Linear(50, 50))
    layer_index_rescale_(held, std=1.0, generator=generator())
    assert held[0].weight.std().item() == pytest.approx(1, rel=0.06)
    assert held[2].weight.std().item() == pytest.approx(2**-0.5, rel=0.06)
    two = layer_index_rescale_(TwoStacks(), std=1.0, blocks="decoder", generator=generator())
    deviations = [m.weight.std().item() for m in (*two.encoder, *two.decoder)]
    assert deviations == pytest.approx([1, 1, 1, 2**-0.5], rel=0.03)


class Conv1D(nn.Module):
    """Passes for the layer of GPT-2, which keeps its weight as (in, out)."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(50, 150)), nn.Parameter(torch.zeros(150))


def test_layers_the_authors_code_leaves_out_are_started():
    net = nn.ModuleList(Conv1D() for _ in range(3))
    layer_index_rescale_(net, std=0.1, generator=generator())
    assert [m.weight.std().item() for m in net] == pytest.approx([0.1, 0.1 / 2**0.5, 0.1 / 3**0.5], rel=0.03)
    stack = nn.ModuleList(nn.MultiheadAttention(60, 2) for _ in range(2))
    layer_index_rescale_(stack, std=0.1, generator=generator())
    assert stack[1].in_proj_weight.std().item() == pytest.approx(0.1 / 2**0.5, rel=0.03)


@pytest.mark.parametrize(
    ("target", "kwargs", "words"),
    [
        (lambda: Net(), {"std": 0.0}, "std and scale_factor above 0 and finite, got 0.0"),
        (lambda: Net(), {"scale_factor": float("nan")}, "above 0 and finite, got 0.02 and nan"),
        (lambda: Net(), {"layer": 2}, "layer= with a tensor alone, counted from 1, got 2 and Net"),
        (lambda: torch.ones(3, 3), {"layer": 0}, "counted from 1, got 0"),
        (lambda: torch.ones(3, 3), {"blocks": "h"}, "got a tensor and blocks='h'"),
        (lambda: torch.ones(3), {}, "at least two dimensions"),
        (lambda: Net(), {"blocks": "model.layer"}, "no module 'model.layer' in Net; did you mean model.layers"),
        (lambda: Net(), {"blocks": "norm"}, "no block with a linear, convolution or attention layer in 'norm'"),
        (lambda: TwoStacks(), {}, "found several: 'encoder', 'decoder'; name one"),
        (lambda: Block(3), {}, "found none; name one"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)), {}, "found none"),
        (lambda: nn.Sequential(nn.Linear(2, 2, device="meta"), nn.ReLU()), {}, "meta device"),
        (lambda: nn.LayerNorm(3), {}, "found no weight it owns in LayerNorm"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(target, kwargs, words):
    with pytest.raises(BadInput, match=words):
        layer_index_rescale_(target(), **kwargs)


def test_refused_half_way_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3), name="bias", dim=None))
    before = tensors(net)
    with pytest.raises(BadInput, match=r"bias of 1\.weight is parametrized"):
        layer_index_rescale_(net)
    assert same(before, tensors(net))


# -- the hook ---------------------------------------------------------------------------------------------------------


def spread(w, std):
    """Give a weight exactly this deviation."""
    with torch.no_grad():
        w.copy_(torch.randn(w.shape, generator=generator()))
        w.mul_(std / w.std())


def test_rescaled_by_hand():
    # (1, 2, 3, 6): mean 3, unbiased deviation sqrt(14 / 3); W' = (W - 3) / sqrt(14 / 3) * 1 + 3
    net = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        net[1].weight.copy_(net[0].weight / 2)  # deviation 1.08: within 1.2
        net[0].bias.fill_(5.0)
    root = (14 / 3) ** 0.5
    assert TargetVariance(net, target=1.0).rescale() == pytest.approx({"0.weight": root})
    assert net[0].weight.flatten().tolist() == pytest.approx([3 - 2 / root, 3 - 1 / root, 3, 3 + 3 / root])
    assert net[1].weight.flatten().tolist() == [0.5, 1, 1.5, 3]
    assert net[0].bias.tolist() == [5, 5]


class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 4, bias=False)


def counted():
    """A fixed net: every parameter k is 0.003 + 0.01 (k + 1) sin(1.7 i + k) over its entries i."""
    net = nn.ModuleDict({"layers": nn.ModuleList(Uneven() for _ in range(3)), "head": nn.Linear(4, 4)})
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            i = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)
            p.copy_((1.7 * i + k).sin() * 0.01 * (k + 1) + 0.003)
    return net


@pytest.mark.parametrize(
    ("scale_with_depth", "corners"),
    [
        # first entry, last entry and deviation of each matrix after one pass of the authors' callback (ba067ad, target 0.02)
        (False, [(0.003, -0.006718, 0.007298), (-0.01881, -0.015935, 0.02), (-0.023477, -0.011091, 0.02), (0.017126, 0.020767, 0.02), (-0.011924, 0.022124, 0.02), (0.038386, 0.037561, 0.02), (0.107046, 0.056464, 0.11507)]),
        (True, [(0.003, -0.006718, 0.007298), (-0.01881, -0.015935, 0.02), (-0.015987, -0.007229, 0.014142), (0.014078, 0.016652, 0.014142), (-0.005548, 0.01411, 0.011547), (0.028242, 0.027766, 0.011547), (0.107046, 0.056464, 0.11507)]),
    ],
)  # fmt: skip
def test_agrees_with_the_authors_code(scale_with_depth, corners):
    """All parameters, biases included, were within 1e-8 of theirs."""
    net = counted()
    biases = {k: v.clone() for k, v in net.named_parameters() if "bias" in k}
    TargetVariance(net, target=0.02, scale_with_depth=scale_with_depth, zero_bias=True).rescale()
    found = [(p[0, 0].item(), p[-1, -1].item(), p.std().item()) for p in net.parameters() if p.ndim == 2]
    assert [x for row in found for x in row] == pytest.approx([x for row in corners for x in row], abs=1e-6)
    zeroed = {k for k, v in net.named_parameters() if k in biases and not v.any()}
    assert zeroed == {"layers.1.a.bias", "layers.2.a.bias"}  # layers.0.a was not too far, b has none
    assert all(torch.equal(v, net.get_parameter(k)) for k, v in biases.items() if k not in zeroed)


def test_exactly_at_the_threshold_and_below_is_left():
    net = nn.ModuleList([nn.Linear(20, 20).double(), nn.Linear(20, 20).double()])
    for layer, std in zip(net, (1.2, 0.1)):
        spread(layer.weight, std)
    before = tensors(net)
    at = net[0].weight.std().item()
    assert TargetVariance(net, target=1.0, threshold=at * (1 + 1e-12)).rescale() == {}
    assert same(before, tensors(net))
    assert list(TargetVariance(net, target=1.0, threshold=at * (1 - 1e-12)).rescale()) == ["0.weight"]
    assert net[0].weight.std().item() == pytest.approx(1.0, rel=1e-12)


def test_hook_fires_every_k_optimizer_steps_and_leaves_what_lies_outside():
    net, seen = Net(blocks=2, width=20), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    hook = TargetVariance(net, target=0.05, every=3)
    rescale = hook.rescale
    hook.rescale = lambda: seen.append((hook.steps, rescale()))
    optimizer.register_step_post_hook(hook)
    x = torch.randint(11, (8, 5), generator=generator())
    for _ in range(7):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
    assert [step for step, _ in seen] == [3, 6]
    names = {f"model.layers.{l}.{m}.weight" for l in range(2) for m in ("up", "down")}
    assert set(seen[0][1]) == names
    outside = {k: v for k, v in net.named_parameters() if v.ndim == 2 and k not in names}
    assert set(outside) == {"embed.weight", "head.weight"}
    assert all(v.std() > 0.06 for v in outside.values())


def test_a_run_that_goes_on_rescales_at_the_same_steps():
    whole, first = TargetVariance(Net(2, 8), every=5), TargetVariance(Net(2, 8), every=5)
    for _ in range(3):
        first()
    second = TargetVariance(Net(2, 8), every=5)
    second.load_state_dict(first.state_dict())
    fired = []
    second.rescale = lambda: fired.append("second")
    whole.rescale = lambda: fired.append("whole")
    for step in range(1, 6):
        whole()
        if step > 3:
            second()
    assert sorted(fired) == ["second", "whole"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precisions(dtype):
    net = nn.ModuleList(nn.Linear(64, 64, dtype=dtype) for _ in range(2))
    for layer in net:
        spread(layer.weight, 1.0)
    assert len(TargetVariance(net, target=0.02).rescale()) == 2
    assert net[0].weight.dtype == dtype
    assert net[0].weight.double().std().item() == pytest.approx(0.02, rel=2 * torch.finfo(dtype).eps)


def test_parametrized_attention_and_convolution_weights():
    net = nn.ModuleList(
        [
            parametrizations.weight_norm(nn.Linear(9, 9)),
            nn.MultiheadAttention(8, 2),
            nn.ConvTranspose2d(4, 6, 3, groups=2),
        ]
    )
    with torch.no_grad():
        net[1].in_proj_weight[:8].mul_(100)  # the query alone is far off
        net[0].parametrizations.weight.original0.mul_(100)
    key = net[1].in_proj_weight[8:16].clone()
    hook = TargetVariance(net, target=0.3)
    assert list(hook.rescale()) == ["0.weight", "1.in_proj_weight[q]"]
    assert net[0].weight.std().item() == pytest.approx(0.3, rel=1e-5)
    assert net[1].in_proj_weight[:8].std().item() == pytest.approx(0.3, rel=1e-5)
    assert torch.equal(net[1].in_proj_weight[8:16], key)


def test_training_that_broke_is_said_and_nothing_is_rescaled():
    net = Net(2, 8)
    spread(net.model["layers"][0].up.weight, 1.0)
    with torch.no_grad():
        net.model["layers"][1].down.weight[0, 0] = torch.nan
    before = tensors(net)
    with pytest.raises(BadInput, match=r"NaN or infinity in model\.layers\.1\.down\.weight after 1 steps"):
        TargetVariance(net, every=1)()
    assert all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        (lambda: Net(), {"target": 0.0}, "target above 0 and threshold of at least 1, got 0.0 and 1.2"),
        (lambda: Net(), {"threshold": 0.9}, "threshold of at least 1, got 0.02 and 0.9"),
        (lambda: Net(), {"every": 0}, "every as a whole number of at least 1, got 0"),
        (lambda: Net(), {"every": 2.5}, "whole number"),
        (lambda: Net(), {"blocks": "layers"}, "no module 'layers' in Net"),
        (lambda: TwoStacks(), {}, "several: 'encoder', 'decoder'"),
        (lambda: nn.LayerNorm(3), {}, "LayerNorm"),
        (lambda: torch.ones(3, 3), {}, "Tensor"),
        (lambda: Net().to("meta"), {}, "meta device"),
    ],
)
def test_hook_refuses(model, kwargs, words):
    with pytest.raises(BadInput, match=words):
        TargetVariance(model(), **kwargs)


def rescaled(shard):
    """Weights after the hook; rows that do not divide by two."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 7), nn.Linear(7, 3))
    if shard:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=dist.init_device_mesh("cpu", (2,)))
    TargetVariance(net, target=0.05).rescale()
    return {k: p.full_tensor().detach() if shard else p.detach() for k, p in net.named_parameters()}


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_sharded_weights_are_rescaled_over_all_shards(tmp_path):
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said
    one, two = rescaled(shard=False), torch.load(tmp_path / "weights.pt")
    assert all(torch.allclose(one[k], two[k], atol=1e-6) for k in one)
    assert one["1.weight"].std().item() == pytest.approx(0.05, rel=1e-5)


if __name__ == "__main__":
    folder = sys.argv[1]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(os.environ["RANK"]), world_size=2)
    weights = rescaled(shard=True)
    if dist.get_rank() == 0:
        torch.save(weights, f"{folder}/weights.pt")
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's may still run, and end the interpreter's own exit by an abort
