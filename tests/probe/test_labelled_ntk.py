import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.probe.labelled_ntk import LabelledKernel, labelled_ntk, redundant_first, sample_clusters
from pondera.probe.ntk import ntk
from pondera.probe.pseudo_ntk import pseudo_ntk

from ..conformance.models import make

# -- the kernel --------------------------------------------------------------------------------------------------------


def test_a_linear_layer_by_hand():
    # kernel of the layer: (x x' + 1) I; signs (1, -1, -1) and (-1, 1, -1): s s' / 3 is 1 for equal labels, -1/3 for others
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]])
    found = labelled_ntk(nn.Linear(2, 3), x, torch.tensor([0, 1, 0]))
    agree = torch.tensor([[1, -1 / 3, 1], [-1 / 3, 1, -1 / 3], [1, -1 / 3, 1]])
    assert torch.allclose(found.kernel, (x @ x.T + 1) * agree)
    assert found.parameters == 9


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual"])
def test_is_the_full_kernel_between_signs(name):
    model, batch = make(name)
    batch, y = batch[:6], torch.tensor([0, 1, 2, 3, 0, 1])
    s = 2.0 * nn.functional.one_hot(y, 4) - 1
    expected = torch.einsum("ia,ijab,jb->ij", s, ntk(model, batch).kernel, s) / 4
    assert torch.allclose(labelled_ntk(model, batch, y).kernel, expected, rtol=1e-3, atol=1e-5)


def test_agrees_with_the_authors():
    """Rows 0 and 5 of the MaskSumKernel of github.com/Shawn-Guo-CN/lpNTK (analysis/ntk.py, experiment 2.1) on this net.

    Their kernel leaves out 1 / K and passes through single precision.
    """
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=torch.float64) * 1.7 + k + 1).view_as(p))
    x = torch.cos(torch.arange(36, dtype=torch.float64) * 2.3).view(12, 3)
    found = 3 * labelled_ntk(net, x, torch.arange(12) % 3).kernel
    row0 = [11.632758557796478, -3.5921501517295837, -2.957426592707634, 5.112995475530624, -0.9040054231882095,
            -0.8365985751152039, 3.8489614874124527, -1.8929537162184715, -2.3177634477615356, 9.643108606338501,
            -3.6788504123687744, -3.879557341337204]  # fmt: skip
    row5 = [-0.8365985751152039, -1.0877373069524765, 3.7354164458811283, -2.160080701112747, -0.6848139762878418,
            11.2920560836792, -1.6527845859527588, 0.9153760671615601, 3.304784119129181, -0.3101976811885834,
            -0.9423675537109375, 2.861790880560875]  # fmt: skip
    assert found[0].tolist() == pytest.approx(row0, abs=2e-6)
    assert found[5].tolist() == pytest.approx(row5, abs=2e-6)


def test_without_labels_the_guesses_are_taken():
    model, batch = make("mlp")
    model.eval()
    guesses = model(batch).argmax(1)
    a, b = labelled_ntk(model, batch), labelled_ntk(model, batch, guesses)
    assert torch.equal(a.labels, guesses)
    assert torch.equal(a.kernel, b.kernel)


@pytest.mark.parametrize("flat", [False, True])
def test_one_output_is_read_by_its_sign(flat):
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x)[:, 0] if flat else super().forward(x)

    net = Net(2, 1, bias=False)
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert labelled_ntk(net, x, torch.tensor([0, 1])).kernel.tolist() == [[1, -1], [-1, 2]]
    assert torch.equal(labelled_ntk(net, x).labels, (net(x).flatten() > 0).long())


def test_a_label_at_every_place():
    model, tokens = make("attention")
    tokens = tokens[:4]
    labels = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    found = labelled_ntk(model, tokens, labels)
    s = (2.0 * nn.functional.one_hot(labels, 11) - 1).flatten(1)
    expected = torch.einsum("ia,ijab,jb->ij", s, ntk(model, tokens).kernel, s) / 66
    assert torch.allclose(found.kernel, expected, rtol=1e-3, atol=1e-3)
    assert found.groups.tolist() == [0, 0, 0, 0]
    assert "pairs with the same label" in found.summary()


def test_pixels_have_their_classes_on_axis_one():
    torch.manual_seed(0)
    net, x = nn.Conv2d(1, 3, 3, padding=1), torch.randn(2, 1, 4, 4)
    labels = torch.randint(3, (2, 4, 4))
    found = labelled_ntk(net, x, labels)
    s = (2.0 * nn.functional.one_hot(labels, 3) - 1).movedim(-1, 1).flatten(1)
    assert torch.allclose(
        found.kernel, torch.einsum("ia,ijab,jb->ij", s, ntk(net, x).kernel, s) / 48, rtol=1e-4, atol=1e-4
    )


def test_wide_networks_have_the_kernel_times_the_share_of_signs_that_agree():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3), torch.tensor([0, 0, 1, 2])
    full = torch.zeros(4, 4)
    labelled = torch.zeros(4, 4)
    for _ in range(60):
        net = nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 3))
        full += ntk(net, x, output=0).kernel
        labelled += labelled_ntk(net, x, y).kernel
    share = torch.where(y[:, None] == y, 1.0, -1 / 3)  # (K - 4) / K with K = 3
    assert (labelled - full * share).norm() < 0.08 * full.norm()


def test_a_step_on_one_example_moves_the_other_as_said():
    """Its sign is that of the change of s(y_j) z(x_j) after a step along s(y_i) z(x_i)."""
    torch.manual_seed(0)
    net, x, y = (
        nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double(),
        torch.randn(5, 3).double(),
        [0, 1, 2, 0, 1],
    )
    s = 2.0 * nn.functional.one_hot(torch.tensor(y), 3) - 1
    kernel = labelled_ntk(net, x, torch.tensor(y)).kernel
    before = (s * net(x)).sum(1)
    (s[2] * net(x[2])).sum().backward()
    with torch.no_grad():
        for p in net.parameters():
            p += 1e-6 * p.grad
        moved = ((s * net(x)).sum(1) - before) / 1e-6 / 3
    assert torch.allclose(moved, kernel[2], atol=1e-4)


# -- what is read from it ----------------------------------------------------------------------------------------------


def kernel_of(vectors, labels):
    v = torch.tensor(vectors)
    return LabelledKernel(v @ v.T, torch.tensor(labels), 1)


def test_relations_by_the_nearest_of_three():
    # angles 0, 50, 70, 130 degrees and a vanishing vector
    a = torch.tensor([0.0, 50, 70, 130]).deg2rad()
    v = [[float(t.cos()) * 3, float(t.sin()) * 3] for t in a] + [[0.0, 0.0]]
    found = kernel_of(v, [0, 0, 0, 0, 0])
    assert found.relations[0].tolist() == [1, 1, 0, -1, 0]
    assert found.relations[1].tolist() == [1, 1, 1, 0, 0]  # 20 degrees to the third, 80 to the fourth
    assert found.cosine[4].tolist() == [0.0] * 5
    assert found.cosine.diagonal()[:4].tolist() == pytest.approx([1.0] * 4)


def test_typicality_is_the_mean_cosine_with_ones_own_label():
    found = kernel_of([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0], [0.0, 1.0], [1.0, 0.0]], [0, 0, 0, 1, 2])
    assert found.typicality.tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0, 0.0])


def test_who_is_served_better_by_another():
    found = kernel_of([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]], [0, 0, 1])
    assert found.self_first.tolist() == [False, True, True]


# Clusters by the authors' code (experiment 3.2, farthest_clustering) of the kernel below: heads and members
AUTHORS = {
    2: [(9, [0, 1, 4, 5, 9]), (7, [2, 3, 6, 7, 8])],
    4: [(9, [1, 5, 9]), (7, [3, 7]), (6, [2, 6]), (8, [0, 4, 8])],
    7: [(9, [1, 5, 9]), (7, [3, 7]), (6, [6]), (8, [8]), (0, [0]), (2, [2]), (4, [4])],
}


def sines():
    j = torch.sin(torch.arange(60, dtype=torch.float64) * 1.3).view(10, 6)
    j = j * (1 + 0.1 * torch.arange(10, dtype=torch.float64)).unsqueeze(1)
    return LabelledKernel(j @ j.T, torch.zeros(10, dtype=torch.long), 1)


@pytest.mark.parametrize("count", AUTHORS)
def test_clusters_agree_with_the_authors(count):
    found = sample_clusters(sines(), count)
    members = [(int(h), (found.cluster == k).nonzero().flatten().tolist()) for k, h in enumerate(found.heads)]
    assert members == AUTHORS[count]
    assert found.sizes.tolist() == [len(m) for _, m in AUTHORS[count]]


def test_clusters_stay_within_a_label():
    g = torch.Generator().manual_seed(0)
    v = torch.randn(30, 5, generator=g)
    labels = torch.randint(4, (30,), generator=g)
    found = sample_clusters(LabelledKernel(v @ v.T, labels, 1), 3)
    assert (labels[found.heads[found.cluster]] == labels).all()
    assert torch.equal(found.cluster[found.heads], torch.arange(len(found.heads)))
    assert found.sizes.sum() == 30
    assert len(found.heads) == sum(min(3, int(n)) for n in labels.bincount())


def test_clusters_against_the_definition():
    g = torch.Generator().manual_seed(1)
    v = torch.randn(25, 4, generator=g)
    k = v @ v.T
    found = sample_clusters(LabelledKernel(k, torch.zeros(25, dtype=torch.long), 1), 6)
    heads = found.heads.tolist()
    for n in range(1, 6):
        near = k[heads[:n]].amax(0)  # similarity of each example to the nearest head
        near[heads[:n]] = torch.inf
        assert int(near.argmin()) == heads[n]
    others = [i for i in range(25) if i not in heads]
    assert found.cluster[others].tolist() == k[heads][:, others].argmax(0).tolist()


def test_as_many_clusters_as_examples_at_most():
    found = sample_clusters(sines(), 99)
    assert sorted(found.heads.tolist()) == list(range(10))
    assert found.sizes.tolist() == [1] * 10
    with pytest.raises(BadInput, match="at least one cluster a label, got 0"):
        sample_clusters(sines(), 0)


def test_the_order_keeps_the_heads_of_every_clustering():
    order = redundant_first(sines()).tolist()
    assert sorted(order) == list(range(10))
    for count in range(1, 10):
        assert sorted(order[10 - count :]) == sorted(sample_clusters(sines(), count).heads.tolist())


def test_labels_shrink_in_proportion():
    g = torch.Generator().manual_seed(0)
    v, labels = torch.randn(60, 5, generator=g), torch.tensor([0] * 40 + [1] * 20)
    dropped = labels[redundant_first(LabelledKernel(v @ v.T, labels, 1))[:30]]
    assert dropped.bincount().tolist() == [20, 10]


def test_twins_go_before_what_is_alone():
    # two copies each of three directions, one vector of its own
    v = [[5.0, 0, 0, 0], [4.9, 0, 0, 0], [0, 5.0, 0, 0], [0, 4.9, 0, 0], [0, 0, 5.0, 0], [0, 0, 4.9, 0], [0, 0, 0, 1.0]]
    order = redundant_first(kernel_of(v, [0] * 7)).tolist()
    assert sorted(order[:3]) == [1, 3, 5]


def test_summary_and_plot():
    found = kernel_of([[1.0, 0.1], [2.0, 0.0], [-1.0, 0.1], [0.0, 1.0]], [0, 0, 0, 1])
    said = found.summary()
    assert "pairs with the same label: 33% interchangeable, 0% unrelated, 67% contradictory" in said
    assert "Least like the others of their label: 2" in said
    assert len(found.plot().axes) == 3
    assert "no pairs" in kernel_of([[1.0]], [0]).summary()
    assert len(kernel_of([[1.0], [2.0]], [0, 0]).plot().axes) == 3


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.zeros(3, dtype=torch.long), r"integer targets of shape \(4,\), got int64 tensor of shape \(3,\)"),
        (torch.zeros(4), "integer targets"),
        (torch.zeros(4, 3, dtype=torch.long), "integer targets"),
        ([0, 1, 2, 0], "got list"),
        (torch.tensor([0, 1, 2, 3]), "targets from 0 to 2, got 0 to 3"),
        (torch.tensor([0, 1, 2, -1]), "targets from 0 to 2, got -1 to 2"),
    ],
)
def test_bad_targets(targets, words):
    with pytest.raises(BadInput, match=words):
        labelled_ntk(nn.Linear(2, 3), torch.randn(4, 2), targets)


def test_bad_models_and_batches():
    with pytest.raises(BadInput, match="labelled_ntk could not run the model"):
        labelled_ntk(nn.Linear(3, 2), torch.randn(4, 5))
    with pytest.raises(BadInput, match="meta device"):
        labelled_ntk(nn.Linear(3, 2, device="meta"), torch.randn(4, 3))
    with pytest.raises(BadInput, match="found none"):
        labelled_ntk(nn.Linear(3, 2).requires_grad_(False), torch.randn(4, 3))


def test_two_classes_with_equal_labels_are_the_pseudo_kernel_of_their_difference():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(5, 3)
    flipped = nn.Sequential(*net[:2], nn.Linear(6, 2))
    with torch.no_grad():  # the second output negated: the sum of logits is then z_0 - z_1
        flipped[2].weight.copy_(net[2].weight * torch.tensor([[1.0], [-1.0]]))
    expected = pseudo_ntk(flipped, x).kernel
    assert torch.allclose(labelled_ntk(net, x, torch.zeros(5, dtype=torch.long)).kernel, expected, atol=1e-5)
