import copy
import inspect
import io
import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim import Bloop


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def holder(n=3):
    return nn.Parameter(torch.zeros(n, dtype=torch.float64))


def test_docstring():
    doc = inspect.getdoc(Bloop)
    for part in ("Args:", "Raises:", "Paper:", ">>>"):
        assert part in doc


def test_by_hand():
    p = holder(2)
    bloop = Bloop([p], lam=0.5, rho=0.1)
    bloop.combine([vector(2, 0)], [vector(1, 3)])  # the first average is the first gradient: (1, 3) less (1, 0)
    assert torch.equal(p.grad, vector(2, 1.5))
    assert torch.equal(bloop.ema[0], vector(2, 0))
    bloop.combine([vector(0, 2)], [vector(1, 3)])  # on the old average
    assert torch.equal(p.grad, vector(0, 3.5))
    assert torch.allclose(bloop.ema[0], vector(1.8, 0.2))


def test_the_authors_code():
    """bloop_direction of apple/ml-bloop (c4626c6), ema 0.1, lambda 0.5, three steps from the first gradient; its eps at 1e-7."""
    p = holder(2)
    bloop = Bloop([p], lam=0.5, rho=0.1, order="code")
    e = None
    for k in range(4):
        g, a = vector(math.sin(k + 1), math.cos(2 * k)), vector(math.cos(k), 1.0 + k)
        bloop.combine([g], [a])
        e = g if e is None else e + 0.1 * (g - e)
        assert torch.allclose(p.grad, g + 0.5 * (a - (a @ e) / (e @ e + 1e-7) * e), atol=1e-6)
    assert torch.allclose(p.grad, vector(-2.030910804052964, 2.0457663993091053), atol=1e-6)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_one_vector_over_all_parameters():
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (4,), ()]
    params = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    bloop, whole = Bloop(params, lam=2.0, rho=0.3), holder(11)
    twin = Bloop([whole], lam=2.0, rho=0.3)
    for _ in range(3):
        main, aux = ([torch.randn(s, generator=g, dtype=torch.float64) for s in shapes] for _ in range(2))
        bloop.combine(main, aux)
        twin.combine([flat(main)], [flat(aux)])
        assert torch.allclose(flat([p.grad for p in params]), whole.grad)


def test_what_cannot_hurt_the_main_loss():
    p, g, a = holder(), vector(1, 2, -1), vector(3, 0, 5)
    for lam in (0.0, 1.0, 50.0):
        Bloop([p], lam=lam).combine([g], [a])
        assert p.grad @ g == pytest.approx(float(g @ g))
    Bloop([p], lam=3.0).combine([g], [-g])
    assert torch.allclose(p.grad, g)
    Bloop([p], lam=0.0).combine([g], [a])
    assert torch.equal(p.grad, g)
    Bloop([p], lam=3.0).combine([vector(0, 0, 0)], [a])  # no direction to spare
    assert torch.equal(p.grad, 3 * a)
    Bloop([p], lam=3.0).combine([1e-12 * g], [1e-12 * a])  # tiny gradients are projected as large ones are
    assert float(p.grad @ g) == pytest.approx(1e-12 * float(g @ g))


def test_the_example_of_section_3_3():
    """L_main = a^2 / 2, L_aux = ((a - 1)^2 + b^2) / 2: a plain sum ends at (lam / (1 + lam), 0), Bloop at (0, 0)."""
    ends = []
    for surgery in (True, False):
        p = nn.Parameter(vector(1.0, 1.0))
        bloop, optimizer = Bloop([p], lam=1.0), torch.optim.SGD([p], lr=0.3)
        for _ in range(60):
            optimizer.zero_grad()
            main, aux = p[0] ** 2 / 2, ((p[0] - 1) ** 2 + p[1] ** 2) / 2
            if surgery:
                bloop.backward(main, aux)
            else:
                (main + aux).backward()
            optimizer.step()
        ends.append(p.detach())
    assert torch.allclose(ends[0], vector(0, 0), atol=1e-6)
    assert torch.allclose(ends[1], vector(0.5, 0), atol=1e-6)


def test_projecting_on_noise_takes_one_dimension_of_p():
    g = torch.Generator().manual_seed(0)
    p, aux, total = holder(4), vector(1, 0, 0, 0), vector(0, 0, 0, 0)
    for _ in range(1000):
        main = torch.randn(4, generator=g, dtype=torch.float64)
        Bloop([p], lam=1.0).combine([main], [aux])
        total += p.grad - main
    assert torch.allclose(total / 1000, 0.75 * aux, atol=0.06)


def test_several_losses_by_gram_schmidt():
    p = holder()
    Bloop([p], lam=[1.0, 10.0]).combine([vector(1, 0, 0)], [[vector(5, 1, 0)], [vector(2, 7, 3)]])
    assert torch.allclose(p.grad, vector(1, 1, 30))
    Bloop([p], lam=2.0).combine([vector(1, 0, 0)], [[vector(5, 1, 0)], [vector(2, 7, 3)]])
    assert torch.allclose(p.grad, vector(1, 2, 6))


def test_backward_shares_a_graph_and_counts_what_is_not_reached():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net.apart = nn.Linear(2, 2)
    h = net[:3](torch.randn(5, 3))
    bloop = Bloop(net, lam=0.3)
    bloop.backward(h.square().mean(), h.sum() + net.apart.weight.square().sum())
    assert torch.allclose(net.apart.weight.grad, 0.6 * net.apart.weight)
    assert not net.apart.bias.grad.any()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    torch.optim.SGD(net.parameters(), lr=0.1).step()


def test_resume_is_bit_exact():
    def run(bloop, p, steps):
        for k in steps:
            bloop.combine([vector(math.sin(k), k, 1)], [vector(1, math.cos(k), k)])
        return p.grad.clone()

    p, q = holder(), holder()
    whole = run(Bloop([p], rho=0.2), p, range(6))
    first = Bloop([q], rho=0.2)
    run(first, q, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Bloop([q], lam=9.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(second)
    assert torch.equal(run(second, q, range(3, 6)), whole)
    assert not torch.equal(twin.ema[0], second.ema[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    Bloop([p], lam=1.0).combine([torch.tensor([2, 0, 0], dtype=dtype)], [torch.tensor([1, 3, 1], dtype=dtype)])
    assert p.grad.dtype == dtype
    assert p.grad.tolist() == [2, 3, 1]


P = holder()
G = vector(1, 2, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Bloop([]), "at least one parameter"),
        (lambda: Bloop([P], lam=-1.0), "lam of at least 0"),
        (lambda: Bloop([P], lam=[]), "number for lam"),
        (lambda: Bloop([P], rho=0.0), "rho above 0"),
        (lambda: Bloop([P], rho=1.5), "rho of at most 1"),
        (lambda: Bloop([P], order="new"), "orders paper and code"),
        (lambda: Bloop([P]).backward(P.sum(), P), "scalar with a graph for its aux loss, got float64 tensor of shape"),
        (lambda: Bloop([P]).backward(1.0, P.sum()), "main loss, got 1.0"),
        (lambda: Bloop([P]).combine([G, G], [G]), "1 main gradients, one for each parameter, got 2"),
        (lambda: Bloop([P]).combine([G[:2]], [G]), r"gradient of shape \(3,\)"),
        (lambda: Bloop([P]).combine([G], [G * math.nan]), "finite gradients"),
        (lambda: Bloop([P], lam=[1.0, 2.0]).combine([G], [G]), "as many auxiliary losses as weights lam, 2, got 1"),
        (lambda: Bloop([P]).load_state_dict({"ema": None}), "this lacks each, lam, order, rho"),
        (lambda: Bloop([P]).load_state_dict(Bloop([P]).state_dict() | {"ema": [G[:1]]}), "saved gradient of shape"),
    ],
)
def test_refuses_in_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_nothing_is_changed_by_what_is_refused():
    p = holder()
    bloop = Bloop([p])
    bloop.combine([G], [G])
    grad, ema = p.grad.clone(), bloop.ema[0].clone()
    with pytest.raises(BadInput):
        bloop.combine([G * math.inf], [G])
    assert torch.equal(p.grad, grad)
    assert torch.equal(bloop.ema[0], ema)
