import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.merge import balancing_scale, bang, bang_files, bang_loss, wise_ft


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def nets():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(2)]


# -- WiSE-FT ----------------------------------------------------------------------------------------------------------


def test_the_ends_are_the_models_and_the_middle_is_between():
    pre, ft = nets()
    for alpha, end in ((0.0, pre), (1.0, ft)):
        assert all(torch.equal(x, end.state_dict()[k]) for k, x in wise_ft(pre, ft, alpha).items())
    for k, x in wise_ft(pre, ft, 0.3).items():
        assert torch.allclose(x, 0.7 * pre.state_dict()[k] + 0.3 * ft.state_dict()[k])
    assert torch.equal(wise_ft(pre, ft)["0.weight"], wise_ft(ft, pre)["0.weight"])


def test_averaged_weights_of_a_linear_model_are_averaged_outputs():
    """The paper's remark on linear models: ensembles in weight and in output space are the same there."""
    pre, ft = nn.Linear(4, 3), nn.Linear(4, 3)
    x, merged = torch.randn(5, 4), nn.Linear(4, 3)
    merged.load_state_dict(wise_ft(pre, ft, 0.25))
    assert torch.allclose(merged(x), 0.75 * pre(x) + 0.25 * ft(x), atol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_is_a_share(alpha):
    with pytest.raises(BadInput, match="alpha between 0 and 1"):
        wise_ft(*nets(), alpha)


# -- the scaled head --------------------------------------------------------------------------------------------------


def test_a_scaled_head_scales_the_logits_and_nothing_else():
    pre, ft = nets()
    x, merged = torch.randn(5, 4), nets()[0]
    merged.load_state_dict(bang(pre, ft, 1.0, head="2", scale=0.4))
    assert torch.allclose(merged(x), 0.4 * ft(x), atol=1e-6)
    both = bang(pre, ft, 0.5, head=["2"], scale=0.4)
    assert torch.equal(both["0.weight"], wise_ft(pre, ft)["0.weight"])
    assert torch.allclose(both["2.bias"], 0.5 * pre[2].bias + 0.2 * ft[2].bias)
    assert {t.name for t in both.report.tensors if "scale" in t.facts} == {"2.weight", "2.bias"}
    assert "scale: from 0.4" in both.report.summary()


def test_without_a_head_it_is_wise_ft():
    pre, ft = nets()
    assert all(torch.equal(x, wise_ft(pre, ft, 0.3)[k]) for k, x in bang(pre, ft, 0.3).items())


def test_files_are_as_memory(tmp_path):
    pre, ft = (dict(n.state_dict()) for n in nets())
    for name, s in (("pre", pre), ("ft", ft)):
        save_file(s, tmp_path / f"{name}.safetensors")
    bang_files(
        tmp_path / "pre.safetensors", tmp_path / "ft.safetensors", tmp_path / "o.safetensors", 0.3, head="2", scale=2.0
    )
    got = load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(x, got[k]) for k, x in bang(pre, ft, 0.3, head="2", scale=2.0).items())


def test_a_head_tied_to_something_else_is_refused():
    def tied(seed):
        x = torch.randn(3, generator=generator(seed))
        return {"wte": x, "lm_head": x}

    with pytest.raises(BadInput, match="lm_head apart from wte, to which it is tied"):
        bang(tied(0), tied(1), head="lm_head", scale=0.5)
    assert wise_ft(tied(0), tied(1))["wte"].isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"head": "2"}, "head and its scale together"),
        ({"scale": 0.5}, "head and its scale together"),
        ({"head": "2", "scale": 0.0}, "scale above 0"),
        ({"head": "2", "scale": float("nan")}, "scale above 0"),
        ({"head": "head", "scale": 0.5}, "nothing called 'head'"),
        ({"alpha": 2.0}, "alpha between"),
    ],
)
def test_bang_refuses(kwargs, words):
    with pytest.raises(BadInput, match=words):
        bang(*nets(), **kwargs)


# -- the factor -------------------------------------------------------------------------------------------------------


def test_the_factor_makes_both_equally_sure():
    pre, ft = torch.randn(200, 5, generator=generator(0)), 3 * torch.randn(200, 5, generator=generator(1))
    s = balancing_scale(pre, ft)
    sure = [x.softmax(-1).amax(-1).mean().item() for x in (pre, s * ft)]
    assert sure[0] == pytest.approx(sure[1], abs=1e-5)
    assert 0.2 < s < 0.5
    assert balancing_scale(pre, 7 * pre) == pytest.approx(1 / 7, rel=1e-5)
    assert balancing_scale(pre, pre) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("pre", "ft", "words"),
    [
        (torch.randn(4, 3), torch.randn(4, 2), r"fine-tuned ones as a float32 tensor of shape \(4, 2\)"),
        (torch.randn(4), torch.randn(4), "pretrained ones as a"),
        (torch.randn(0, 3), torch.randn(0, 3), "pretrained ones as a"),
        (torch.randn(4, 3), torch.full((4, 3), torch.nan), "NaN or infinite of 12 in its fine-tuned logits"),
        (torch.randn(4, 3), torch.zeros(4, 3), "no factor"),
        (torch.zeros(4, 3), torch.randn(4, 3), "no factor"),
        (torch.ones(4, 3).long(), torch.randn(4, 3), "floating-point pretrained logits"),
    ],
)
def test_the_factor_refuses(pre, ft, words):
    with pytest.raises(BadInput, match=words):
        balancing_scale(pre, ft)


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    plain = bang_loss(model, x, y, smoothing=0, mixup=0)
    assert torch.equal(plain, F.cross_entropy(model(x), y))
    eps, log = 0.3, model(x).log_softmax(-1)
    smooth = (1 - eps) * -log[range(6), y].mean() - eps * log.mean()
    assert torch.allclose(bang_loss(model, x, y, smoothing=eps, mixup=0), smooth)
    assert torch.equal(bang_loss(model, x, y, mixup=0), F.cross_entropy(model(x), y, label_smoothing=0.1))


def test_mixup_by_hand():
    seen = []

    def model(z):
        seen.append(z)
        return z

    x, y = torch.eye(5) * 3, torch.arange(5)
    loss = bang_loss(model, x, y, smoothing=0.1, mixup=1.0, generator=generator(3))
    (z,) = seen
    share = float(z.diagonal().min()) / 3  # each row is share of itself, the rest of one other or of itself
    order = torch.tensor([int((row - share * x[i]).argmax()) for i, row in enumerate(z)])
    assert torch.allclose(z, share * x + (1 - share) * x[order])
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
    target = share * F.one_hot(y, 5) + (1 - share) * F.one_hot(y[order], 5)
    target = 0.9 * target + 0.1 / 5
    assert torch.allclose(loss, -(target * z.log_softmax(-1)).sum(-1).mean(), atol=1e-6)


def test_the_share_is_drawn_from_beta():
    shares = []

    def model(z):
        shares.append(float(z[0, 0]))
        return z

    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for a in (0.2, 2.0):
        shares.clear()
        g = generator(0)
        for _ in range(1500):
            bang_loss(model, x, torch.tensor([0, 1]), mixup=a, generator=g)
        mixed = torch.tensor([s for s in shares if s < 1])  # where the order was not the identity
        assert mixed.mean().item() == pytest.approx(0.5, abs=0.05)
        assert mixed.var().item() == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.15)  # of Beta(a, a)


def test_same_generator_same_loss_and_global_state_untouched():
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    before = torch.get_rng_state()
    losses = [bang_loss(model, x, y, generator=generator(5)) for _ in range(2)]
    assert losses[0].item() == losses[1].item()
    assert torch.equal(before, torch.get_rng_state())
    losses[0].backward()
    assert model.weight.grad.isfinite().all()


def test_the_loss_leaves_a_model_less_sure():
    g = generator(0)
    x = torch.randn(200, 10, generator=g)
    y = (x[:, 0] > 0).long()
    sure = {}
    for name, kwargs in {"sharp": {"smoothing": 0, "mixup": 0}, "calm": {}}.items():
        torch.manual_seed(0)
        model = nn.Linear(10, 2)
        opt = torch.optim.Adam(model.parameters(), lr=0.2)
        for _ in range(30):
            opt.zero_grad()
            bang_loss(model, x, y, generator=g, **kwargs).backward()
            opt.step()
        sure[name] = model(x).softmax(-1).amax(-1).mean().item()
    assert sure["calm"] < sure["sharp"] - 0.03


@pytest.mark.parametrize(
    ("x", "y", "kwargs", "words"),
    [
        (torch.randn(4, 4), torch.zeros(4).long(), {"smoothing": 1.0}, r"smoothing in \[0, 1\)"),
        (torch.randn(4, 4), torch.zeros(4).long(), {"mixup": -1.0}, "mixup of at least 0"),
        (torch.randn(4, 4), torch.zeros(3).long(), {}, r"one int64 class index for each input, got a int64 tensor of shape \(3,\)"),
        (torch.randn(4, 4), torch.zeros(4), {}, "one int64 class index"),
        (torch.randn(0, 4), torch.zeros(0).long(), {}, "one int64 class index"),
        (torch.ones(4, 4).long(), torch.zeros(4).long(), {}, "floating-point batch of inputs"),
    ],
)  # fmt: skip
def test_the_loss_refuses(x, y, kwargs, words):
    with pytest.raises(BadInput, match=words):
        bang_loss(nn.Linear(4, 3), x, y, **kwargs)
