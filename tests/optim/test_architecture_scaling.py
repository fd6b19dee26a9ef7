import inspect
import math

import pytest
import torch
from torch import nn

from pondera import optim
from pondera.errors import BadInput
from pondera.optim import architecture_scaled, architecture_scaled_, path_depths, topology


class Cell(nn.Module):
    """stem -> a -> b, and beside it a skip and a longer way: b + skip + d."""

    def __init__(self, width=32):
        super().__init__()
        self.stem, self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(5))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        one = self.b(torch.relu(self.a(x)))
        other = self.d(self.c(x))
        return self.head((one + other + x).relu())


class Residual(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 5, padding=2), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(blocks)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def row(depth, width=8):
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)))


@pytest.mark.parametrize("name", ["path_depths", "topology", "architecture_scaled", "architecture_scaled_"])
def test_docstrings(name):
    doc = inspect.getdoc(getattr(optim, name))
    for part in ("Args:", "Returns:", "Raises:", "Paper:", ">>>"):
        assert part in doc


def every_path(edges, at, end):
    """Brute force: the depths of all paths, one by one."""
    if at == end:
        return [0]
    return [k + deeper for a, b, k in edges if a == at for deeper in every_path(edges, b, end)]


@pytest.mark.parametrize("seed", range(8))
def test_paths_against_brute_force(seed):
    g = torch.Generator().manual_seed(seed)
    edges = [(i, i + 1, 1) for i in range(6)]
    edges += [(i, j, k) for i in range(6) for j in range(i + 1, 7) for k in (0, 1) if torch.rand(1, generator=g) < 0.4]
    depths = every_path(edges, 0, 6)
    assert path_depths(edges) == {d: depths.count(d) for d in set(depths)}


def test_more_paths_than_can_be_walked():
    blocks = 300  # each with a skip: 2^300 paths, binomially deep
    edges = [edge for i in range(blocks) for edge in ((i, i + 1, 1), (i, i + 1, 0))]
    found = path_depths(edges)
    assert found[150] == math.comb(blocks, 150)
    assert sum(found.values()) == 2**blocks
    (group,) = architecture_scaled(row(3), 1.0, depths={d: n for d, n in found.items() if d})
    # the sum of L^3 over 2^n paths of n fair coins is 2^n n^2 (n + 3) / 8
    assert group["lr"] == pytest.approx(
        math.exp(-0.5 * (blocks * math.log(2) + math.log(blocks**2 * (blocks + 3) / 8 / 27)))
    )


def test_what_a_graph_is():
    found = topology(Cell())
    assert found.depths == {2: 1, 4: 2}
    assert found.degrees == {
        "stem.weight": 1,
        "a.weight": 1,
        "b.weight": 3,
        "c.weight": 1,
        "d.weight": 3,
        "head.weight": 1,
    }
    assert found.factor == pytest.approx((8 + 64 + 64) ** -0.5)
    found = topology(Residual())
    assert found.depths == {2: 1, 3: 3, 4: 3, 5: 1}
    assert found.degrees["blocks.1.0.weight"] == 2
    assert found.degrees["stem.weight"] == 1
    assert found.kernel == pytest.approx((3 * 5**3) ** 0.25)
    assert "8 paths of 2 to 5 weight layers" in found.summary()


@pytest.mark.parametrize(
    ("code", "depths", "theirs", "by_layers"),
    [
        ("2_02_002", [3], 0.1414213562373095, 0.185903200617956),
        ("2_12_212", [1, 1, 1, 3], 0.10289915108550529, 0.14481323760764334),
        ("2_22_222_2222", [1, 2, 2, 2, 3, 3, 3, 4], 0.05496343348972133, 0.07302967433402215),
        ("2_11_121_0122", [1, 1, 1, 1, 2, 2, 3], 0.07735230766683719, 0.10939268258329751),
    ],
)
def test_the_authors_code(code, depths, theirs, by_layers):
    """dag_depths and auto_scale_lr_depth_width of principled_scaling_lr_init (674f69b), base rate 0.4 and depth 3.

    Their depths are of the layers between stem and read-out; the rates are at these plus three, as their script has it, and plus
    two, the weight layers there are.
    """
    edges = [("in", 0, 1), (len(code.split("_")), "out", 1)]
    for to, node in enumerate(code.split("_"), 1):
        edges += [(start, to, int(kind) - 1) for start, kind in enumerate(node) if kind != "0"]
    found = path_depths(edges)
    assert sorted(d - 2 for d, n in found.items() for _ in range(n)) == depths
    for more, rate in ((0, by_layers), (1, theirs)):
        (group,) = architecture_scaled(row(2), 0.4, depths={d + more: n for d, n in found.items()})
        assert group["lr"] == pytest.approx(rate, rel=1e-12)


def test_rates_of_rows_and_kernels():
    (group,) = architecture_scaled(row(12), 0.8)
    assert group["lr"] == pytest.approx(0.8 / 8)  # (12 / 3)^1.5
    assert len(group["params"]) == 24
    assert architecture_scaled(row(3), 0.8)[0]["lr"] == pytest.approx(0.8)
    assert architecture_scaled(row(12), 0.8, base=row(6))[0]["lr"] == pytest.approx(0.8 / 2**1.5)

    def conv(q):
        return nn.Sequential(nn.Conv2d(1, 4, q), nn.ReLU(), nn.Conv2d(4, 4, q), nn.Flatten(), nn.Linear(4, 2))

    assert architecture_scaled(conv(5), 0.8, base=conv(3))[0]["lr"] == pytest.approx(0.8 * 3 / 5)
    assert architecture_scaled(conv(5), 0.8, base_kernel=3)[0]["lr"] == pytest.approx(0.8 * 3 / 5)


def test_every_node_keeps_its_scale():
    torch.manual_seed(0)
    net = architecture_scaled_(Cell(400), generator=torch.Generator().manual_seed(1))
    w = {name: p.std().item() ** 2 * 400 for name, p in net.named_parameters() if name.endswith("weight")}
    assert w["a.weight"] == pytest.approx(2, rel=0.03)
    assert w["b.weight"] == pytest.approx(2 / 3, rel=0.03)
    assert net.head.weight.std().item() * 400 == pytest.approx(1, rel=0.1)
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_start_repeats_and_keeps_what_it_does_not_own(dtype):
    net, twin = (Residual().to(dtype) for _ in range(2))
    with torch.no_grad():
        net.blocks[0][1].weight.fill_(3)
    for n in (net, twin):
        assert architecture_scaled_(n, generator=torch.Generator().manual_seed(2)) is n
    assert all(torch.equal(a, b) for a, b in zip(net.blocks[1].parameters(), twin.blocks[1].parameters(), strict=True))
    assert net.blocks[0][1].weight.eq(3).all()
    by_hand = architecture_scaled_(
        Residual().to(dtype),
        degrees={f"blocks.{k}.0.weight": 2 for k in range(3)},
        generator=torch.Generator().manual_seed(2),
    )
    assert torch.equal(by_hand.blocks[2][0].weight, net.blocks[2][0].weight)


def test_a_sum_of_one_thing_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.a(x)
            return self.head(y + y)

    assert topology(Twice()).depths == {2: 2}


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) * self.b(x)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(self.a(x))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: path_depths([]), "at least one edge"),
        (lambda: path_depths([(0, 1)]), r"edges as \(from, to, layers\)"),
        (lambda: path_depths([(0, 1, -1)]), "layers of an edge, got -1"),
        (lambda: path_depths([(0, 1, 1), (1, 2, 1), (2, 1, 1), (1, 3, 1)]), "without cycles"),
        (lambda: path_depths([(0, 2, 1), (1, 2, 1)]), "one input and one output, got 2 and 1"),
        (lambda: topology(Product()), "added or concatenated"),
        (lambda: topology(Branching()), "cannot trace Branching"),
        (lambda: topology(Again()), "a runs 2 times"),
        (lambda: topology(nn.MultiheadAttention(4, 2)), "attention"),
        (lambda: topology(nn.ReLU()), "no weight it owns"),
        (lambda: architecture_scaled(row(2), 0.0), "positive, finite lr, got 0"),
        (lambda: architecture_scaled(row(2), 0.1, depths={}), "numbers of paths by depth"),
        (lambda: architecture_scaled(row(2), 0.1, base={3: 0.5}), "numbers of paths by depth"),
        (lambda: architecture_scaled(row(2).requires_grad_(False), 0.1), "requires a gradient"),
        (lambda: architecture_scaled_(row(2), degrees={"no.weight": 2}), "no weight named 'no.weight'"),
        (lambda: architecture_scaled_(row(2), degrees={"0.0.weight": 0}), "branches of 0.0.weight, got 0"),
        (lambda: architecture_scaled_(row(2), readout="tail"), "no weight layer named 'tail'"),
    ],
)
def test_refuses_in_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_concatenated_branches_are_all_paths():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            return self.head(torch.cat([x, self.b(x)], 1))

    found = topology(Dense())
    assert found.depths == {2: 1, 3: 1}
    assert set(found.degrees.values()) == {1}
