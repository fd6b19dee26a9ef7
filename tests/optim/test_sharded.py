"""FSDP2 on two processes gives the weights of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn


def trained(shard: bool) -> dict[str, torch.Tensor]:
    """Every parameter after three steps of every method; rows that do not divide by two, a convolution, a vector."""
    from pondera.optim._groups import groups
    from pondera.optim.auon import AuON, HybridAuON
    from pondera.optim.decoupled_decay import SGDW
    from pondera.optim.normuon import NorMuon

    out = {}
    for method in (NorMuon, AuON, HybridAuON, SGDW):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv1d(2, 5, 3), nn.GELU(), nn.ConvTranspose1d(5, 3, 3), nn.Flatten(), nn.Linear(18, 7), nn.Linear(7, 3)
        )
        x, y = torch.randn(8, 2, 6), torch.arange(8) % 3
        if shard:
            from torch.distributed.fsdp import fully_shard

            fully_shard(net, mesh=dist.init_device_mesh("cpu", (2,)))
        optimizer = method(groups(net), lr=0.05, weight_decay=0.1)
        for step in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            if step == 1:  # resume between steps from its own state
                state = optimizer.state_dict()
                optimizer = method(groups(net), lr=1.0)
                optimizer.load_state_dict(state)
        for name, p in net.named_parameters():
            held = optimizer.state[p]["exp_avg" if "exp_avg" in optimizer.state[p] else "momentum_buffer"]
            assert type(held) is (type(p.data)), f"{name}: state is not sharded like its parameter"
            out[f"{method.__name__} {name}"] = p.full_tensor().detach() if shard else p.detach()
    return out


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_equal_one(tmp_path):
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, str(Path(__file__)), str(tmp_path)]
    ranks = [
        subprocess.Popen([*command], env=env | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)
    ]
    for rank in ranks:
        try:
            _, said = rank.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            for other in ranks:
                other.kill()
            raise
        assert rank.returncode == 0, said[-3000:]
    together, alone = torch.load(tmp_path / "weights.pt"), trained(shard=False)
    assert set(together) == set(alone)
    for name, w in alone.items():
        assert torch.allclose(together[name], w, atol=1e-6), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(os.environ["RANK"]), world_size=2)
    result = trained(shard=True)
    if dist.get_rank() == 0:
        torch.save(result, folder / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()
