import copy
from functools import partial

import pytest
import torch
from scipy import fft
from torch import nn

from pondera.errors import BadInput
from pondera.optim.dct_projection import DCTAdamW, carry_over, largest_columns


def waves(m: int, n: int, t: int) -> torch.Tensor:
    """A full-rank gradient anyone can compute again."""
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.sin(1 + 1.7 * i + 0.9 * j * j + 2.3 * t) + 0.5 * torch.cos(i * j + t)


def moved(shape, gradients, dtype=torch.float64, **kw) -> torch.Tensor:
    w = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = DCTAdamW([w], **{"lr": 0.02, **kw})
    for g in gradients:
        w.grad = g.to(w)
        optimizer.step()
    return w.detach()


def test_the_first_step_by_hand():
    # rows (1, 1) and (3, -1): coordinates sqrt2 (1, 0) and sqrt2 (1, 2). Sums of sizes 2 and 2, the columns of l1; by l2
    # the second, (0, 2), is the larger. Adam's first step is the sign along it, (1, -1) / sqrt2.
    g = torch.tensor([[1.0, 1.0], [3.0, -1.0]], dtype=torch.float64)
    by_hand = -0.02 * torch.tensor([[0.0, 0.0], [0.5**0.5, -(0.5**0.5)]], dtype=torch.float64)
    assert torch.allclose(moved((2, 2), [g], rank=1, norm=2), by_hand, atol=1e-9)


def test_which_columns_are_largest():
    S = torch.tensor([[0.0, 3.0, 2.0], [4.0, 0.0, 2.5], [0.0, 3.0, 2.0]])  # l1: 4, 6, 6.5; l2: 4, 4.24, 3.77
    assert largest_columns(S, 1, 1).tolist() == [2]
    assert largest_columns(S, 1, 2).tolist() == [1]
    assert largest_columns(S, 2, 2).tolist() == [0, 1]


def test_moments_are_matched_like_the_product_of_bases():
    Q, _ = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    old, new = torch.tensor([0, 2, 3, 7], dtype=torch.int32), torch.tensor([2, 5, 7, 8], dtype=torch.int32)
    m = torch.randn(6, 4, dtype=torch.float64)
    by_product = m @ Q[:, old.long()].T @ Q[:, new.long()]
    carry_over((m,), old, new, 9)
    assert torch.allclose(m, by_product, atol=1e-14)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_full_rank_is_adamw_in_the_cosine_basis(shape):
    gradients = [waves(*shape, t) for t in range(6)]
    ours = moved(shape, gradients, rank=99, weight_decay=0.1)
    axis = 1 if shape[1] <= shape[0] else 0

    def turned(x, back=False):
        return torch.from_numpy((fft.idct if back else fft.dct)(x.numpy(), norm="ortho", axis=axis))

    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    adamw = torch.optim.AdamW([w], lr=0.02, weight_decay=0.1)
    for g in gradients:
        w.grad = turned(g)
        adamw.step()
    assert torch.allclose(ours, turned(w.detach(), back=True), atol=1e-10)


def test_the_best_choice_in_the_basis_loses_at_most_its_share():
    G, d = waves(11, 8, 0), 8
    Q = torch.from_numpy(fft.dct(torch.eye(d, dtype=torch.float64).numpy(), norm="ortho"))
    for r in range(1, d + 1):
        kept = Q[:, largest_columns(G @ Q, r, 2).long()]
        lost = (G - G @ kept @ kept.T).square().sum() / G.square().sum()
        assert lost <= 1 - r / d + 1e-12


def test_figures_of_the_authors_code():
    # IST-DASLab/ISTA-DASLab-Optimizers (4c98e6e), DCTAdamW(lr=0.02, weight_decay=0.1, rank=2, proj="dct",
    # rotate_subspace=True, sim_type="makhoul"), ten steps, with its rotation not written over its own factor; its DCT
    # matrix is of float32
    tall = [
        [-0.050181793, -0.000777378, -0.018865486, 0.030538941],
        [-0.017192820, 0.004413323, 0.015229543, 0.036835690],
        [0.051812867, 0.018755214, 0.000887648, -0.032170010],
        [-0.014744194, 0.006621932, -0.026264799, -0.004898664],
        [-0.039487954, -0.018807599, -0.000835264, 0.019845093],
    ]
    wide_with_feedback = [
        [-0.008497469, -0.025319923, 0.015760399, -0.000089787, -0.000431476],
        [-0.004905218, 0.037052306, 0.017538784, 0.045907803, 0.033743423],
        [0.054288520, 0.019553872, -0.032042189, -0.024940904, 0.008575632],
        [-0.040885859, -0.031286268, -0.001256985, -0.020877111, -0.041887593],
    ]
    for shape, feedback, theirs, atol in (((5, 4), False, tall, 1e-7), ((4, 5), True, wide_with_feedback, 3e-5)):
        gradients = [waves(*shape, t) for t in range(10)]
        ours = moved(shape, gradients, rank=2, weight_decay=0.1, error_feedback=feedback)
        assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), atol=atol)


def test_columns_are_chosen_every_so_many_steps():
    w = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    optimizer = DCTAdamW([w], rank=1, update_proj_gap=3)
    columns = []
    for k in (0, 1, 2, 3, 0, 1):  # a gradient in one cosine alone
        w.grad = torch.from_numpy(fft.idct(torch.eye(4, dtype=torch.float64)[k].expand(5, 4).numpy(), norm="ortho"))
        optimizer.step()
        columns += optimizer.state[w]["columns"].tolist()
    assert columns == [0, 0, 2, 2, 2, 1]


def test_error_feedback_loses_nothing():
    w = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    optimizer = DCTAdamW([w], rank=2, betas=(0.0, 0.9), error_feedback=True)
    seen, went = torch.zeros(6, 5, dtype=torch.float64), torch.zeros(6, 5, dtype=torch.float64)
    for t in range(7):
        w.grad = waves(6, 5, t)
        optimizer.step()
        state = optimizer.state[w]
        seen += w.grad
        went += (
            state["exp_avg"] @ optimizer._basis(w)[:, state["columns"].long()].T
        )  # with beta1 = 0 what was projected
    assert torch.allclose(went + state["error"], seen, atol=1e-12)


def test_state_is_two_moments_of_r_columns_and_r_indices():
    for shape in ((40, 12), (12, 40)):
        w = nn.Parameter(torch.zeros(shape))
        w.grad = torch.ones_like(w)
        optimizer = DCTAdamW([w], rank=3)
        optimizer.step()
        assert sum(s.numel() for s in optimizer.state[w].values() if s.ndim) == 2 * 40 * 3 + 3
    assert len(optimizer._bases) == 1


def test_one_basis_for_all_matrices_of_a_size_and_of_a_copy():
    ws = [nn.Parameter(torch.zeros(9, 4)), nn.Parameter(torch.zeros(4, 7)), nn.Parameter(torch.zeros(5, 5))]
    optimizer = DCTAdamW(ws, rank=2)
    for w in ws:
        w.grad = torch.ones_like(w)
    optimizer.step()
    assert sorted(key[0] for key in optimizer._bases) == [4, 5]
    assert copy.deepcopy(optimizer)._bases == {}


def test_indices_survive_a_checkpoint_in_bfloat16():
    # bfloat16 counts to 256; a cast of the state to the parameter's dtype would move column 301
    def one(start=None):
        w = nn.Parameter(torch.zeros(400, 400, dtype=torch.bfloat16) if start is None else start.detach().clone())
        return w, DCTAdamW([w], rank=1, lr=0.1)

    w, optimizer = one()
    w.grad = torch.from_numpy(fft.idct(torch.eye(400)[301].expand(400, 400).numpy(), norm="ortho")).bfloat16()
    optimizer.step()
    twin, resumed = one(w)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[twin]["columns"].tolist() == optimizer.state[w]["columns"].tolist() == [301]
    twin.grad = w.grad.clone()
    optimizer.step()
    resumed.step()
    assert torch.equal(w, twin)


def test_convolution_is_its_flattened_matrix():
    w = nn.Parameter(torch.zeros(6, 3, 2, 2, dtype=torch.float64))
    w.grad = waves(6, 12, 0).reshape(w.shape)
    DCTAdamW([w], lr=0.02, rank=2).step()
    assert torch.allclose(w.detach().flatten(1), moved((6, 12), [waves(6, 12, 0)], rank=2))


def test_a_vector_is_moved_by_adamw():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours, theirs = DCTAdamW([a], lr=0.1), torch.optim.AdamW([b], lr=0.1, weight_decay=0.0)
    for t in range(3):
        a.grad = b.grad = torch.tensor([1.0, -2.0, 0.1 * t])
        ours.step()
        theirs.step()
    assert torch.allclose(a, b)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"rank": 0}, "whole number of at least 1 for rank, got 0"),
        ({"update_proj_gap": 1.5}, "whole number of at least 1 for update_proj_gap, got 1.5"),
        ({"norm": 3}, "knows the norms 1 and 2, got 3"),
        ({"eps": -1.0}, "needs eps of at least 0, finite, got -1"),
        ({"betas": (0.9, 1.0)}, "needs betas of at least 0 and below 1, got 1"),
    ],
)
def test_bad_input_is_one_sentence(bad, words):
    with pytest.raises(BadInput, match=words):
        DCTAdamW([nn.Parameter(torch.zeros(2, 2))], **bad)


def test_the_replications_galore_is_a_kept_librarys():
    theirs = pytest.importorskip("pytorch_optimizer").GaLore
    from pondera.replications.optim.dct_projection import GaLore

    def make_ours(w, gap):
        return GaLore([w], lr=0.02, rank=2, update_proj_gap=gap)

    def make_theirs(w, group):
        return theirs([{"params": [w], **group}], lr=0.02, eps=1e-8)

    def run(make, shape):
        w = nn.Parameter(torch.zeros(shape))
        optimizer = make(w)
        for t in range(7):
            w.grad = waves(*shape, t).float()
            optimizer.step()
        return w.detach()

    # of a wide matrix they take the other factor of the decomposition, whose signs may differ from one basis to the next
    for shape, gap in (((6, 4), 3), ((4, 6), 99)):
        group = {"rank": 2, "update_proj_gap": gap, "scale": 1.0, "projection_type": "std"}
        ours = run(partial(make_ours, gap=gap), shape)
        assert torch.allclose(ours, run(partial(make_theirs, group=group), shape), atol=1e-5)
