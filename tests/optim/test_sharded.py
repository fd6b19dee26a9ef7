"""Two processes give the weights of one: FSDP2, and plain copies as DistributedDataParallel has them, each alone and spread."""

import inspect
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

WAYS = ("sharded", "sharded and spread", "spread")


@contextmanager
def counted(optimizer, found):
    """Count the directions this rank finds."""
    plain = getattr(optimizer, "_direction", None)

    def direction(*args):
        found.add_(1)
        return plain(*args)

    optimizer._direction = direction
    yield
    del optimizer._direction


def trained(way: str = "") -> dict[str, torch.Tensor]:
    """Every parameter after four steps of every method; rows that do not divide by two, a convolution, a vector."""
    import pondera.optim
    from pondera.optim import SGDW, gather_state, groups, spread
    from pondera.optim._base import MatrixOptimizer

    public = [getattr(pondera.optim, name) for name in pondera.optim.__all__]
    matrix = [m for m in public if inspect.isclass(m) and issubclass(m, MatrixOptimizer)]
    out = {}
    for method in [*matrix, SGDW]:
        share = "spread" in way and method in matrix
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv1d(2, 5, 3), nn.GELU(), nn.ConvTranspose1d(5, 3, 3), nn.Flatten(), nn.Linear(18, 7), nn.Linear(7, 3)
        ).double()
        x, y = torch.randn(8, 2, 6).double(), torch.arange(8) % 3
        if "sharded" in way:
            from torch.distributed.fsdp import fully_shard

            fully_shard(net, mesh=dist.init_device_mesh("cpu", (2,)))
        optimizer = method(groups(net), lr=0.05, weight_decay=0.1)
        found = torch.zeros(())
        for step in range(4):
            if share and step in (0, 2):
                spread(optimizer)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            with counted(optimizer, found):
                optimizer.step()
            if step == 1:  # resume between steps from its own state
                if share:
                    gather_state(optimizer)
                state = optimizer.state_dict()
                optimizer = method(groups(net), lr=1.0)
                optimizer.load_state_dict(state)
        if share and not method.elementwise:
            dist.all_reduce(found)
            assert found == 4 * 3, f"{method.__name__}: each of three matrices once a step, not {found} in four"
        for name, p in net.named_parameters():
            for held in ("exp_avg", "momentum_buffer"):
                if held in optimizer.state[p] and optimizer.state[p][held].shape == p.shape:
                    assert type(optimizer.state[p][held]) is type(p.data), f"{name}: not sharded like its parameter"
            out[f"{method.__name__} {name}"] = p.full_tensor().detach() if "sharded" in way else p.detach()
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
            _, said = rank.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            for other in ranks:
                other.kill()
            raise
        assert rank.returncode == 0, said[-3000:]
    alone = trained()
    for way in WAYS:
        together = torch.load(tmp_path / f"{way}.pt")
        assert set(together) == set(alone)
        for name, w in alone.items():
            assert torch.allclose(together[name], w, atol=1e-9), f"{name}, {way}"


def test_spread_and_gather_refuse_in_one_sentence():
    from pondera.errors import BadInput
    from pondera.optim import NorMuon, gather_state, spread

    w = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(BadInput, match=r"spread needs a matrix optimizer of pondera.optim, got SGD"):
        spread(torch.optim.SGD(w))
    with pytest.raises(BadInput, match="spread needs a process group"):
        spread(NorMuon(w))
    with pytest.raises(BadInput, match="gather_state needs an optimizer that `spread` has set up"):
        gather_state(NorMuon(w))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(os.environ["RANK"]), world_size=2)
    for kind in WAYS:
        result = trained(kind)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo may still run, and end the exit of the interpreter by an abort
