"""Runs on several cards, as far as that can be seen without one: who sees which, and that memory is looked at first."""

from pathlib import Path

import pytest
import torch

from pondera.errors import BadInput
from pondera.lab import _compare, compare
from pondera.lab.execute import Processes, visible_gpus

from . import naps


def test_cards_are_those_that_cuda_is_told_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus("cuda") == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    assert visible_gpus("cuda") == ["4", "GPU-abc"]
    assert visible_gpus("cpu") == visible_gpus("cuda:1") == []


def test_each_worker_sees_a_card_of_its_own_in_turn(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))  # where the workers find this package
    hands = Processes(3, 1, None, naps.work, gpus=["4", "7"])
    try:
        for i in range(3):
            hands.submit(naps.Nap(str(i), "import os; out['card'] = os.environ.get('CUDA_VISIBLE_DEVICES')"))
        found = {}
        while len(found) < 3:
            found |= {spec.key: result["card"] for spec, result in hands.wait(30)}
        assert found == {"0": "4", "1": "7", "2": "4"}
    finally:
        hands.close()


def test_runs_that_do_not_fit_together_are_refused_after_the_first(tiny, monkeypatch):
    class Card:
        total_memory = 10 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Card)
    monkeypatch.setattr(_compare, "visible_gpus", lambda device: ["0"])

    class Four:
        def __init__(self):
            self.sent, self.most = [], 0

        @property
        def free(self):
            return 4 - len(self.sent)

        def submit(self, spec):
            self.sent.append(spec)
            self.most = max(self.most, len(self.sent))

        def wait(self, seconds):
            spec = self.sent.pop(0)
            yield spec, {"status": "diverged", "reason": "planted", "curve": [], "peak_memory": 3 * 2**30, "wall": 0.0}

        def close(self):
            pass

    hands = Four()
    monkeypatch.setattr(_compare, "executor", lambda *a, **k: hands)
    with pytest.raises(
        BadInput, match="4 runs do not fit on one GPU: the first took 3.0 GiB of its 10.0; give at most 3 workers"
    ):
        compare(tiny, [""], seeds=2, workers=4, store="sqlite://", progress=False)
    assert hands.most == 1
