"""Our adapters over a base that bitsandbytes holds in four bits, as in QLoRA; on the CPU."""

import copy

import peft
import pytest
import torch
from torch import nn

import pondera.adapters

bnb = pytest.importorskip("bitsandbytes")
CONFIGS = {
    "SvftConfig": {}, "SorsaConfig": {}, "GivensConfig": {}, "OftConfig": {"block_size": 8}, "DotaConfig": {},
    "TLoraConfig": {"r_min": 4},
}  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def four_bits():
    torch.manual_seed(0)
    net = Net()
    for name in "ab":
        plain = getattr(net, name)
        packed = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        packed.load_state_dict(plain.state_dict())
        setattr(net, name, packed.to("cpu"))
    return net


@pytest.mark.parametrize("name", CONFIGS)
def test_four_bit_base(name, tmp_path):
    net, x = four_bits(), torch.randn(16, 64)
    base, before = copy.deepcopy(net), net(x)
    assert net.a.weight.dtype == torch.uint8
    adapted = peft.get_peft_model(net, getattr(pondera.adapters, name)(target_modules=["a", "b"], **CONFIGS[name]))
    assert torch.allclose(adapted(x), before, atol=1e-5)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    wanted = adapted(x)
    wanted.square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert adapted.base_model.model.a.base_layer.weight.dtype == torch.uint8

    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).train()  # in eval mode bitsandbytes rounds otherwise
    assert torch.allclose(again(x), wanted, atol=1e-5)

    layer = adapted.base_model.model.a
    dense = layer.merged_weight(layer.get_base_weight(), ["default"])
    adapted.merge_adapter()  # the merged weight is packed again, and rounded by that
    rounded = layer.get_base_weight()
    assert (rounded - dense).norm() < 0.12 * dense.norm()
    adapted.unmerge_adapter()
    assert (adapted(x) - wanted).norm() < 1e-3 * wanted.norm()
