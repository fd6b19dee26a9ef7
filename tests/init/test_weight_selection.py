import json
import os
import subprocess
import sys
from dataclasses import astuple
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.init import _select_file
from pondera.init._select_file import select_file
from pondera.init.weight_selection import select_from_, uniform_indices


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fill(model):
    """Every tensor of the state counts up from a multiple of 1000, so that each entry says where it came from."""
    with torch.no_grad():
        for k, x in enumerate(model.state_dict().values()):
            x.copy_(torch.arange(x.numel()).view(x.shape) + 1000 * k)
    return model


def tensors(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))


class ViT(nn.Module):
    def __init__(self, d=4, blocks=2, classes=3):
        super().__init__()
        self.pos_embed, self.patch_embed = nn.Parameter(torch.randn(1, 5, d)), nn.Conv2d(1, d, 2)
        self.blocks, self.norm, self.head = (
            nn.ModuleList(Block(d) for _ in range(blocks)),
            nn.LayerNorm(d),
            nn.Linear(d, classes),
        )


class Tied(nn.Module):
    def __init__(self, d, words=7, places=4):
        super().__init__()
        self.head = nn.Linear(d, words, bias=False)
        self.token, self.place = nn.Embedding(words, d), nn.Embedding(places, d)
        self.head.weight = self.token.weight


# -- elements ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "S", "expected"),
    [
        (8, 4, [0, 2, 4, 6]),  # divides: the last is never taken
        (5, 1, [0]),
        (7, 3, [0, 3, 6]),  # else the first and the last are
        (6, 4, [0, 2, 3, 5]),
        (10, 4, [0, 3, 6, 9]),
        (11, 8, [0, 1, 3, 4, 6, 7, 9, 10]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_uniform_indices_of_the_authors_code(T, S, expected):
    assert uniform_indices(T, S).tolist() == expected


def test_agrees_with_the_authors_code_on_all_sizes():
    """The code at e9b6d0c: index sets of all pairs below 200 without a tie in the rounding, position-weighted sum.

    With ties too, all 44,850 pairs below 300 were the same here; near a tie float32 decides, so it stays out of the test.
    """
    total = pairs = 0
    for T in range(1, 200):
        for S in range(1, T + 1):
            if T % S == 0 or not any(2 * i * (T - 1) % (2 * (S - 1)) == S - 1 for i in range(S)):
                total += int((uniform_indices(T, S) * torch.arange(1, S + 1)).sum())
                pairs += 1
    assert (pairs, total) == (13655, 4780869740)


def test_agrees_with_the_authors_code_on_a_kernel():
    big, small = nn.Conv2d(6, 12, 5, bias=False), nn.Conv2d(4, 5, 3, bias=False)
    fill(big)
    select_from_(small, big)
    # their selection of arange(1800) as (12, 6, 5, 5) to (5, 4, 3, 3): sum and two entries
    assert small.weight.double().sum().item() == 164610
    assert (small.weight[3, 2, 1, 0].item(), small.weight[-1, -1, -1, -1].item()) == (1285, 1799)


def test_whole_state_by_hand():
    big = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
    small = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    fill(big)
    big[1].num_batches_tracked.fill_(17)
    assert select_from_(small, big) is small
    assert small[0].weight.flatten().tolist() == [0, 4]  # rows 0 and 2 of 4, column 0 of 2
    assert small[0].bias.tolist() == [1000, 1002]
    assert small[1].weight.tolist() == [2000, 2002]
    assert small[1].running_var.tolist() == [5000, 5002]
    assert small[1].num_batches_tracked.item() == 17


def test_channels_stay_matched_through_a_block():
    """A student that takes the channels a teacher uses computes what the teacher does: the others are dead."""
    torch.manual_seed(0)
    big, small = Block(8), Block(4)
    x = torch.randn(5, 8)
    x[:, 1::2] = 0
    with torch.no_grad():
        big.mlp[2].weight[:, 1::2] = 0  # hidden units a student does not take
        select_from_(small, big)
        wide, narrow = big.mlp(x)[:, ::2], small.mlp(x[:, ::2])
    assert torch.allclose(wide, narrow, atol=1e-6)


@pytest.mark.parametrize("method", ["uniform", "consecutive", "random"])
def test_one_index_set_for_each_pair_of_sizes(method):
    big, small = fill(ViT(7)), ViT(3)
    select_from_(small, big, method=method, generator=generator())
    stream = small.norm.weight % 1000  # which of the 7 channels were taken
    assert stream.tolist() == sorted(set(stream.tolist())) and stream.max() < 7
    if method == "consecutive":
        assert stream.tolist() == [0, 1, 2]
    for block in small.blocks:
        assert torch.equal(block.norm.bias % 1000, stream)
        assert torch.equal(block.proj.bias % 1000, stream)
        assert torch.equal(block.proj.weight[0] % 1000 % 7, stream)
        assert torch.equal(block.mlp[2].weight[:, 0] % 1000 // 14, stream)
        hidden = block.mlp[0].bias % 1000
        assert torch.equal(block.mlp[0].weight[:, 0] % 1000 // 7, hidden)
        assert torch.equal(block.mlp[2].weight[0] % 1000 % 14, hidden)
        for part in range(3):  # query, key and value each take the stream's channels, though 3 does not divide 7
            rows = slice(3 * part, 3 * part + 3)
            assert torch.equal(block.qkv.bias[rows] % 1000, stream + 7 * part)
            assert torch.equal(block.qkv.weight[rows, 0] % 1000 // 7, stream + 7 * part)


def test_attention_module_is_selected_within_query_key_and_value():
    big, small = fill(nn.MultiheadAttention(7, 1)), nn.MultiheadAttention(3, 1)
    select_from_(small, big)
    assert (small.in_proj_weight[:, 0] // 7).tolist() == [0, 3, 6, 7, 10, 13, 14, 17, 20]
    assert (small.in_proj_bias % 1000).tolist() == [0, 3, 6, 7, 10, 13, 14, 17, 20]


def test_random_draws_from_its_generator_alone():
    big = fill(ViT(8))
    before = torch.get_rng_state()
    a, b, c = (select_from_(ViT(4), big, method="random", generator=generator(s)) for s in (0, 0, 1))
    torch.set_rng_state(before)
    select_from_(a, big, method="random", generator=generator(0))
    assert torch.equal(before, torch.get_rng_state())
    kept = {"head.weight", "head.bias"}
    draws = [{k: v for k, v in tensors(m).items() if k not in kept} for m in (a, b, c)]
    assert same(draws[0], draws[1])
    assert not same(draws[0], draws[2])


def test_equal_sizes_are_copied_whole_and_rounded_to_the_students_dtype():
    big = fill(ViT())
    small = select_from_(ViT().bfloat16(), big, keep=(), method="random", generator=generator())
    assert same(tensors(small), {k: v.bfloat16() for k, v in tensors(big).items()})


# -- layers and what is kept ------------------------------------------------------------------------------------------


def test_first_and_uniform_layers():
    big = fill(ViT(8, blocks=6))
    number = {b.norm.weight[0].item(): i for i, b in enumerate(big.blocks)}
    for layers, expected in (("first", [0, 1, 2]), ("uniform", [0, 2, 4])):
        small = select_from_(ViT(4, blocks=3), big, layers=layers)
        assert [number[b.norm.weight[0].item()] for b in small.blocks] == expected
    small = select_from_(ViT(4, blocks=4), big, layers="uniform")
    assert [number[b.norm.weight[0].item()] for b in small.blocks] == [0, 2, 3, 5]


def test_head_keeps_its_start_unless_told_otherwise():
    big, small = fill(ViT(8, classes=9)), ViT(4)
    before = tensors(small)
    select_from_(small, big)
    changed = {k for k, v in tensors(small).items() if not torch.equal(v, before[k])}
    assert changed == set(before) - {"head.weight", "head.bias"}
    select_from_(small, big, keep=())
    assert small.head.bias.tolist() == [26000, 26003, 26006]


def test_keep_means_whole_parts_of_names():
    class Heads(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.overhead, self.head = nn.Linear(d, d), nn.ModuleDict({"norm": nn.LayerNorm(d)})

    big, small = fill(Heads(4)), Heads(2)
    select_from_(small, big)
    assert small.overhead.bias.tolist() == [1000, 1002]
    assert small.head["norm"].weight.tolist() == [1, 1]
    select_from_(small, big, keep="overhead.bias")
    assert small.head["norm"].weight.tolist() == [2000, 2002]


def test_blocks_a_student_has_more_of_may_be_kept():
    big, small = fill(ViT(8, blocks=1)), ViT(4, blocks=2)
    with pytest.raises(BadInput, match=r"no counterpart in the teacher of the student's blocks\.1\.norm\.weight"):
        select_from_(small, big)
    own = small.blocks[1].norm.weight.clone()
    select_from_(small, big, keep=["head", "blocks.1"])
    assert torch.equal(small.blocks[1].norm.weight, own)


def test_tied_tensors_are_selected_once():
    big, small = fill(Tied(8)), Tied(4)
    select_from_(small, big, keep="place")
    assert small.head.weight is small.token.weight
    assert torch.equal(small.token.weight, big.token.weight[:, ::2])


def test_parametrized_layers_are_selected_as_they_are_held():
    big, small = (parametrizations.weight_norm(nn.Linear(d, d)) for d in (6, 3))
    select_from_(small, big)
    g, v = (x[::2] for x in (big.parametrizations.weight.original0, big.parametrizations.weight.original1))
    assert torch.allclose(small.weight, g * v[:, ::2] / v[:, ::2].norm(dim=1, keepdim=True))


def mlp(*sizes):
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def with_nan():
    big = ViT(8)
    with torch.no_grad():
        big.blocks[1].proj.weight[2, 2] = torch.nan
    return big


class Counter(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.register_buffer("index", torch.arange(n))
        self.fc = nn.Linear(n, n)


@pytest.mark.parametrize(
    ("student", "teacher", "kwargs", "words"),
    [
        (lambda: ViT(4), lambda: ViT(8), {"method": "unifrom"}, "did you mean uniform"),
        (lambda: ViT(4), lambda: ViT(8), {"layers": "last"}, "knows layers first, uniform, got 'last'"),
        (
            lambda: ViT(4),
            lambda: ViT(8),
            {"keep": "haed"},
            "nothing called 'haed' in the student to keep; did you mean head",
        ),
        (lambda: ViT(8), lambda: ViT(4), {}, r"pos_embed of shape \(1, 5, 8\) .* at least as large"),
        (lambda: ViT(4), with_nan, {}, r"NaN or infinity .* blocks\.1\.proj\.weight"),
        (lambda: ViT(4, blocks=3), lambda: ViT(8), {}, r"no counterpart .* blocks\.2\.norm\.weight \(4,\)"),
        (lambda: mlp(4, 4, 2), lambda: mlp(8, 8, 8, 2), {}, "leave out the teacher's 4, .* no stack of equal ones"),
        (lambda: nn.Conv1d(2, 2, 3), lambda: nn.Conv2d(4, 4, 3), {}, "weight .*another number of dimensions"),
        (lambda: Tied(4, words=6), lambda: Tied(8), {}, r"token\.weight .* stand for tokens or positions"),
        (lambda: Tied(4, places=2), lambda: Tied(8), {}, r"place\.weight .* stand for tokens or positions"),
        (lambda: Counter(2), lambda: Counter(4), {}, "index .* counters and indices need the same shape"),
        (lambda: ViT(4), lambda: nn.Linear(4, 4), {}, "no counterpart in the teacher of the student's pos_embed"),
        (lambda: ViT(4), lambda: ViT(8).to("meta"), {}, "meta device"),
        (lambda: nn.LazyLinear(3), lambda: nn.Linear(4, 4), {}, "lazy"),
        (lambda: ViT(4), lambda: "big", {}, "nn.Module as teacher, got str"),
        (lambda: nn.ReLU(), lambda: ViT(8), {}, "no tensor in the state of the student, a ReLU"),
        (lambda: nn.Linear(2, 2), lambda: nn.Linear(4, 4), {"keep": ["weight", "bias"]}, "nothing to select"),
    ],
)
def test_refused_in_one_sentence_and_nothing_changed(student, teacher, kwargs, words):
    student, teacher = student(), teacher()
    lazy = isinstance(student, nn.LazyLinear)
    before = {} if lazy else tensors(student)
    with pytest.raises(BadInput, match=words) as error:
        select_from_(student, teacher, **kwargs)
    assert "\n" not in str(error.value)
    assert lazy or same(before, tensors(student))


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A large model in one file and in two with an index, a small one in bfloat16, and the modules they hold."""
    torch.manual_seed(0)
    big, small = ViT(8, blocks=3, classes=9), ViT(3).bfloat16()
    state = dict(big.state_dict())
    save_file(state, tmp_path / "big.safetensors")
    parts = {f"big-{i}.safetensors": dict(list(state.items())[i::2]) for i in range(2)}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    where = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "big.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    save_file(dict(small.state_dict()), tmp_path / "small.safetensors", metadata={"format": "pt", "made": "here"})
    return tmp_path, big, small


@pytest.mark.parametrize("source", ["big.safetensors", "big.safetensors.index.json"])
@pytest.mark.parametrize("method", ["uniform", "consecutive", "random"])
@pytest.mark.parametrize("chunk", [1, 100, 2**24])
def test_file_is_what_the_module_becomes(files, source, method, chunk, monkeypatch):
    folder, big, small = files
    monkeypatch.setattr(_select_file, "CHUNK", chunk)
    kwargs = {"method": method, "layers": "uniform"}
    report = select_file(folder / source, folder / "small.safetensors", folder / "out.safetensors", **kwargs, generator=generator())  # fmt: skip
    select_from_(small, big, **kwargs, generator=generator())
    assert same(load_file(folder / "out.safetensors"), tensors(small))
    assert [r.name for r in report] == sorted(small.state_dict())
    told = {r.name: astuple(r)[1:] for r in report}
    assert told["head.weight"] == ((3, 3), None, None)
    assert told["blocks.1.norm.weight"] == ((3,), "blocks.2.norm.weight", (8,))


def test_written_file_is_aligned_and_keeps_the_metadata(files):
    from safetensors import safe_open

    folder, *_ = files
    one = load_file(folder / "small.safetensors")
    one |= {
        "a": torch.ones(3, dtype=torch.uint8),
        "z": torch.tensor(2.0),
        "n": torch.zeros(0, 4),
        "t": torch.tensor(True),
    }
    save_file(one, folder / "small.safetensors", metadata={"made": "hére"})
    save_file(load_file(folder / "big.safetensors") | {k: one[k] for k in "aznt"}, folder / "big.safetensors")
    select_file(folder / "big.safetensors", folder / "small.safetensors", folder / "out.safetensors")
    with safe_open(folder / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"made": "hére"}
        assert {k: (v.shape, v.dtype) for k, v in one.items()} == {
            k: (file.get_tensor(k).shape, file.get_tensor(k).dtype)
            for k in file.keys()  # noqa: SIM118 (not a dict)
        }
        assert all(file.get_tensor(k).data_ptr() % one[k].element_size() == 0 for k in one if one[k].numel())
        assert file.get_tensor("t").item() is True


def truncate(folder):
    path = folder / "big.safetensors"
    os.truncate(path, path.stat().st_size - 10)


def cut_shard(folder):
    os.truncate(folder / "big-1.safetensors", 40)
    (folder / "big.safetensors.index.json").replace(folder / "big.json")


def change(folder, file, **new):
    state = load_file(folder / file)
    save_file({k: v for k, v in (state | new).items() if v is not None}, folder / file)


def lose_from_shard(folder):
    change(folder, "big-1.safetensors", **{"blocks.1.norm.weight": None, "blocks.1.norm.bias": None})
    (folder / "big.safetensors.index.json").replace(folder / "big.json")


NAN = {"blocks.1.norm.weight": torch.full((8,), torch.nan)}


@pytest.mark.parametrize(
    ("spoil", "args", "words"),
    [
        (truncate, {}, r"cannot read .*big\.safetensors as a whole safetensors file: .*not fully covered"),
        (cut_shard, {"big": "big.json"}, r"cannot read .*big-1\.safetensors as a whole safetensors file"),
        (lose_from_shard, {"big": "big.json"}, r"misses blocks\.1\.norm\.\w+ in .*big-1\.safetensors, where big\.json says"),
        (lambda f: (f / "big.json").write_text("{}"), {"big": "big.json"}, "as an index .*weight_map"),
        (lambda f: (f / "big.json").write_text("no json"), {"big": "big.json"}, "as an index"),
        (lambda f: None, {"big": "none.safetensors"}, "none.safetensors"),
        (lambda f: None, {"like": "none.safetensors"}, "none.safetensors"),
        (lambda f: change(f, "big.safetensors", **{"blocks.1.norm.weight": None}), {}, r"no counterpart .*blocks\.1\.norm\.weight"),
        (lambda f: change(f, "big.safetensors", pos_embed=torch.ones(5, 8)), {}, "pos_embed .* another number of dimensions"),
        (lambda f: change(f, "big.safetensors", pos_embed=torch.ones(1, 4, 8)), {}, "pos_embed .* at least as large"),
        (lambda f: change(f, "big.safetensors", pos_embed=torch.ones(1, 5, 8).int()), {}, "pos_embed .* one holds integers"),
        (lambda f: change(f, "big.safetensors", **NAN), {}, r"NaN or infinity .* blocks\.1\.norm\.weight of .*big\.safetensors"),
        (lambda f: [change(f, n, **{"wte.weight": torch.ones(r, 3)}) for n, r in (("big.safetensors", 9), ("small.safetensors", 6))], {}, r"wte\.weight .* tokens"),
        (lambda f: None, {"out": "nowhere/out.safetensors"}, "folder that exists"),
        (lambda f: None, {"out": "big.safetensors"}, "would write over"),
        (lambda f: None, {"method": "nearest"}, "knows method"),
    ],
)  # fmt: skip
def test_files_refused_by_name_and_nothing_left(files, spoil, args, words):
    folder, *_ = files
    spoil(folder)
    paths = {"big": "big.safetensors", "like": "small.safetensors", "out": "out.safetensors"}
    kwargs = {k: folder / v if k in paths else v for k, v in (paths | args).items()}
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(BadInput, match=words) as error:
        select_file(**kwargs)
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("nameless", [True, False])
def test_an_old_file_stays_until_the_new_one_is_whole(files, nameless, monkeypatch):
    folder, *_ = files
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    out = folder / "out.safetensors"
    out.write_text("old")
    names = {p.name for p in folder.iterdir()}
    change(folder, "big.safetensors", **NAN)
    with pytest.raises(BadInput, match="NaN"):
        select_file(folder / "big.safetensors", folder / "small.safetensors", out)
    assert out.read_text() == "old"
    select_file(folder / "big.safetensors", folder / "small.safetensors", out, keep=["head", "blocks.1"])
    assert "pos_embed" in load_file(out)
    assert {p.name for p in folder.iterdir()} == names


STREAM = """
import os, signal, sys
import torch
from pathlib import Path
from pondera.init import _select_file
folder = Path(sys.argv[1])
_select_file.select_file(folder / "small.safetensors", folder / "small.safetensors", folder / "warm.safetensors")
_select_file.CHUNK = 2**20
def memory(which):  # ru_maxrss would carry over the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
if sys.argv[2] == "kill":
    rows, seen = _select_file._rows, []
    def slow(*args):
        seen.append(args)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows(*args)
    _select_file._rows = slow
_select_file.select_file(folder / "big.safetensors", folder / "small.safetensors", folder / "out.safetensors")
print(memory("VmHWM") - before)
"""


def stream(folder, how):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, "-c", STREAM, str(folder), how], env=env, capture_output=True, text=True, timeout=120
    )


def layers_of(size, n=12):
    return {f"blocks.{i}.weight": torch.full(size, float(i)) for i in range(n)}


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the system does not tell a process its peak")
def test_memory_stays_below_the_largest_tensor(tmp_path):
    # 12 tensors of 8 MiB (96 MiB) to 12 of 4 MiB (48 MiB), 1 MiB at a time
    save_file(layers_of((2048, 1024)), tmp_path / "big.safetensors")
    save_file(layers_of((1024, 1024)), tmp_path / "small.safetensors")
    run = stream(tmp_path, "run")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 8 * 2**20
    assert same(load_file(tmp_path / "out.safetensors"), layers_of((1024, 1024)))


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="the system has no files without a name")
def test_a_kill_half_way_leaves_nothing(tmp_path):
    save_file(layers_of((64, 64)), tmp_path / "big.safetensors")
    save_file(layers_of((32, 32)), tmp_path / "small.safetensors")
    run = stream(tmp_path, "kill")
    assert run.returncode == -9, run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.safetensors", "small.safetensors", "warm.safetensors"]
