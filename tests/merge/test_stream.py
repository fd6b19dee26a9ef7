"""What every merge shares: names, dtypes, ties, files, shards, memory, and what is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pondera.errors import BadInput
from pondera.merge import _stream, fuse, fuse_files, model_stock_files, wise_ft, wise_ft_files
from pondera.merge._stream import merge_states


def state(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    return {
        "body.0.weight": draw(6, 5),
        "body.0.bias": draw(6),
        "body.1.kernel": draw(4, 3, 2, 2),
        "body.1.count": torch.tensor(7 + seed),
        "body.1.mask": torch.tensor([True, False, True]),
        "scale": draw(),
        "nothing": draw(0, 4),
        "head.weight": draw(3, 6),
    }


def mean(*states):
    base = states[0]
    return {
        k: sum(s[k].float() for s in states).div(len(states)).to(x.dtype) if x.is_floating_point() else x
        for k, x in base.items()
    }


def same(a, b, **near):
    assert list(a) == list(b)
    for k in a:
        assert (a[k].dtype, a[k].shape) == (b[k].dtype, b[k].shape), k
        assert torch.allclose(a[k].float(), b[k].float(), **near), k


# -- in memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 200, 2**22])
def test_blocks_of_any_size_give_the_same(budget, monkeypatch):
    monkeypatch.setattr(_stream, "BUDGET", budget)
    merged = fuse([state(0), state(1), state(2)])
    same(merged, mean(state(0), state(1), state(2)))
    assert merged["body.1.count"].item() == 7
    how = {t.name: t.how for t in merged.report.tensors}
    assert how["body.1.count"] == "copied, models differ"
    assert how["body.1.mask"] == "copied"
    assert [n for n, h in how.items() if h == "merged"] == [k for k, x in state(0).items() if x.is_floating_point()]


def test_base_gives_dtype_and_is_not_touched():
    models = [state(0, torch.bfloat16), state(1, torch.float16), state(2)]
    before = [{k: v.clone() for k, v in m.items()} for m in models]
    merged = fuse(models)
    same(merged, mean(*models))
    assert merged["scale"].dtype == torch.bfloat16
    for m, b in zip(models, before):
        assert all(torch.equal(m[k], b[k]) for k in m)
    merged["body.1.mask"].fill_(False)
    assert models[0]["body.1.mask"].any(), "copies are copies"


def test_half_precision_is_averaged_in_float32():
    big = torch.full((3,), 60000.0, dtype=torch.float16)  # the sum of two is beyond float16
    assert torch.equal(fuse([{"w": big}, {"w": big}])["w"], big)
    fine = 1 + torch.tensor([1e-12], dtype=torch.float64)
    assert fuse([{"w": fine}, {"w": fine}])["w"].item() == fine.item()
    both = fuse([{"w": torch.zeros(1)}, {"w": fine}])["w"]
    assert both.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_other_number_types(dtype):
    a, b = (torch.tensor([x, 2.0]).to(dtype) for x in (1.0, 3.0))
    merged = fuse([{"w": a}, {"w": b}])["w"]
    assert merged.dtype == dtype
    assert merged.to(torch.complex64).tolist() == [2, 2]


def test_tied_tensors_stay_tied_and_untied_ones_do_not_become_so():
    def tied(seed, tie=True):
        x = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        return {"in": x, "out": x if tie else x + 1}

    merged = fuse([tied(0), tied(1)])
    assert merged["in"].data_ptr() == merged["out"].data_ptr()
    apart = fuse([tied(0), tied(1, tie=False)])
    assert torch.allclose(apart["out"], apart["in"] + 0.5)


def test_modules_views_and_parameters_are_taken_as_they_are():
    a, b = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    merged = fuse([a, b])
    assert not any(x.requires_grad for x in merged.values())
    a.load_state_dict(merged)
    assert torch.allclose(a[0].weight, merged["0.weight"])
    turned = torch.arange(6.0).view(2, 3).T
    assert torch.equal(fuse([{"w": turned}, {"w": turned + 2}])["w"], turned + 1)


def test_a_rule_may_ask_for_whole_tensors():
    def largest(parts, facts):
        facts["models"] = float(len(parts))
        yield torch.stack([p.whole() for p in parts]).amax(0).flatten()

    merged = merge_states("largest", [state(0), state(1)], largest)
    assert torch.equal(merged["body.1.kernel"], torch.maximum(state(0)["body.1.kernel"], state(1)["body.1.kernel"]))
    assert "models: from 2" in merged.report.summary()


def test_report_says_how_far_each_tensor_moved():
    report = fuse([{"a": torch.tensor([3.0, 4.0]), "n": torch.zeros(1), "z": torch.zeros(1)}] + [{"a": torch.tensor([3.0, 6.0]), "n": torch.ones(1), "z": torch.zeros(1)}]).report  # fmt: skip
    change = {t.name: t.change for t in report.tensors}
    assert change == {"a": pytest.approx(0.2), "n": float("inf"), "z": 0.0}
    assert json.loads(json.dumps(report.to_json()))["tensors"][1]["change"] == "inf"
    assert "2 models, 3 tensors merged, 0 copied" in report.summary()


def bad(**new):
    return {k: v for k, v in (state(1) | new).items() if v is not None}


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (lambda: [state(0)], "at least 2 models, got 1"),
        (list, "at least 2 models, got 0"),
        (lambda: [state(0), bad(scale=None)], "same names: model 2 lacks scale"),
        (lambda: [state(0), bad(extra=torch.ones(1), scale=None)], "lacks scale and has extra besides"),
        (lambda: [state(0), state(1), bad(scale=torch.ones(2))], r"same shapes: model 3 differs in scale \(\) against \(2,\)"),
        (lambda: [state(0), bad(**{"body.1.count": torch.tensor(1.0)})], "integers with other numbers: .* body.1.count"),
        (lambda: [state(0), bad(scale=torch.tensor(torch.nan))], "NaN or infinity in scale of model 2"),
        (lambda: [bad(scale=torch.tensor(torch.inf)), state(0)], "NaN or infinity in scale of model 1"),
        (lambda: [state(0), bad(scale=torch.ones((), device="meta"))], "scale in model 2 on the meta device"),
        (lambda: [state(0), bad(scale=torch.ones(1).to_sparse())], "dense tensors"),
        (lambda: [state(0), bad(scale="x")], "needs tensors, got str as scale of model 2"),
        (lambda: [state(0), "model.pt"], "state dicts or modules, got str as model 2"),
        (lambda: [nn.LazyLinear(2), nn.LazyLinear(2)], "lazy"),
        (lambda: [{}, {}], "no tensor in model 1"),
    ],
)  # fmt: skip
def test_refused_in_one_sentence(models, words):
    with pytest.raises(BadInput, match=words) as error:
        fuse(models())
    assert "\n" not in str(error.value)


def test_what_the_base_cannot_hold_is_refused():
    with pytest.raises(BadInput, match=r"would write NaN or infinity into w, which is float16"):
        fuse([{"w": torch.ones(1).half()}, {"w": torch.full((1,), 1e6)}])


# -- files ------------------------------------------------------------------------------------------------------------


def save(folder, name, tensors, parts=1, metadata=None):
    """One file, or `parts` of them with an index."""
    if parts == 1:
        save_file(tensors, folder / f"{name}.safetensors", metadata=metadata)
        return folder / f"{name}.safetensors"
    (folder / name).mkdir()
    where = {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        part = dict(list(tensors.items())[i::parts])
        save_file(part, folder / name / file, metadata=metadata)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1, "made": "here"}, "weight_map": {k: where[k] for k in tensors}}
    (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / name


@pytest.mark.parametrize("budget", [1, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_is_what_memory_gives(tmp_path, dtype, budget, monkeypatch):
    monkeypatch.setattr(_stream, "BUDGET", budget)
    states = [state(i, dtype) for i in range(3)]
    paths = [
        save(tmp_path, "a", states[0], metadata={"format": "pt", "made": "hére"}),
        save(tmp_path, "b", states[1], parts=3),
        save(tmp_path, "c", states[2], parts=2) / "model.safetensors.index.json",
    ]
    report = fuse_files(paths, tmp_path / "out.safetensors")
    merged = fuse(states)
    same(dict(sorted(load_file(tmp_path / "out.safetensors").items())), dict(sorted(merged.items())), rtol=0, atol=0)
    assert {t.name: (t.how, t.change) for t in report.tensors} == {
        t.name: (t.how, t.change) for t in merged.report.tensors
    }
    assert report.files == [tmp_path / "out.safetensors"]
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        kept = file.metadata()
        assert yaml.safe_load(kept.pop("merge_recipe")) == {
            "merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": 1.0}} for p in paths],
        }  # fmt: skip
        assert kept == {"format": "pt", "made": "hére"}
        for k in file.keys():  # noqa: SIM118 (not a dict)
            x = file.get_tensor(k)
            assert not x.numel() or x.data_ptr() % x.element_size() == 0


def test_shards_and_their_index(tmp_path):
    states = [{f"layer.{i}": torch.full((10,), float(i + s)) for i in range(5)} for s in range(2)]
    a, b = (save(tmp_path, name, s, parts=2) for name, s in zip("ab", states))
    report = fuse_files([a, b], tmp_path / "out", shard_size=100)  # two tensors of 40 bytes fit
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [f.name for f in report.files] == [*names, "model.safetensors.index.json"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f.name for f in report.files}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200, "made": "here"}
    assert index["weight_map"] == {f"layer.{i}": names[i // 2] for i in range(5)}
    got = {k: v for n in names for k, v in load_file(tmp_path / "out" / n).items()}
    same(dict(sorted(got.items())), dict(fuse(states)))
    again = wise_ft_files(tmp_path / "out", a, tmp_path / "again.safetensors", 1.0)  # what was written can be read
    assert len(again.merged) == 5
    assert torch.equal(load_file(tmp_path / "again.safetensors")["layer.3"], states[0]["layer.3"])


@pytest.mark.parametrize(("size", "n"), [("40B", 5), ("0.1KB", 3), (1, 5), ("1 GiB", 1), (10**12, 1)])
def test_shard_sizes(tmp_path, size, n):
    a = save(tmp_path, "a", {f"layer.{i}": torch.full((10,), float(i)) for i in range(5)})
    assert len(fuse_files([a, a], tmp_path / "out", shard_size=size).files) == n + 1


def test_a_transformers_model_reads_the_result(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    models = [transformers.GPT2LMHeadModel(config) for _ in range(2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    for name in ("merges.txt", "spiece.model", "README.md", "trainer_state.json"):
        (tmp_path / "0" / name).write_text(name)
    report = fuse_files([tmp_path / "0", tmp_path / "1"], tmp_path / "out", shard_size="4KB")
    beside = {f.name for f in report.files} - {f.name for f in report.files if "safetensors" in f.name}
    assert beside == {"config.json", "generation_config.json", "merges.txt", "spiece.model", "README.md"}
    assert (tmp_path / "out" / "README.md").read_text() != "README.md", "the card is the merge's own"
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in report.files}
    alone = fuse_files([tmp_path / "0" / "model.safetensors", tmp_path / "1"], tmp_path / "o2", shard_size="4KB")
    assert all("safetensors" in f.name for f in alone.files)
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.transformer.wte.weight
    for (name, x), y, z in zip(merged.named_parameters(), *(m.parameters() for m in models)):
        assert torch.allclose(x, (y + z) / 2), name


def cut(folder):
    path = folder / "b" / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 10)


def rewrite(folder, **new):
    old = load_file(folder / "a.safetensors")
    save_file({k: v for k, v in (old | new).items() if v is not None}, folder / "a.safetensors")


@pytest.mark.parametrize(
    ("spoil", "given", "words"),
    [
        (cut, {}, r"cannot read .*b/model-00002-of-00002\.safetensors as a whole safetensors file: .*not fully covered"),
        (lambda f: (f / "a.safetensors").write_text("no"), {}, r"cannot read .*a\.safetensors as a whole safetensors file"),
        (lambda f: (f / "a.safetensors").write_bytes(b"PK\x03\x04" + bytes(100)), {}, "as a whole safetensors file"),
        (lambda f: (f / "a.safetensors").unlink(), {}, r"cannot read .*a\.safetensors .*No such file"),
        (lambda f: (f / "b" / "model.safetensors.index.json").write_text("{}"), {}, "as an index .*weight_map"),
        (lambda f: (f / "b" / "model-00001-of-00002.safetensors").unlink(), {}, "model-00001-of-00002.safetensors as a whole"),
        (lambda f: (f / "b" / "model.safetensors.index.json").unlink(), {}, "one model in the folder .* name the file"),
        (lambda f: (f / "a.safetensors").replace(f / "b" / "x.bin"), {"a": "empty"}, "finds no .safetensors file"),
        (lambda f: save_file({"scale": torch.ones(1)}, f / "b" / "model-00001-of-00002.safetensors"), {}, r"misses .* in .*00001-of-00002.safetensors, where model.safetensors.index.json says"),
        (lambda f: rewrite(f, scale=None), {}, r"same names: model 2 \(.*index.json\) has scale besides"),
        (lambda f: rewrite(f, scale=torch.ones(2)), {}, r"same shapes: model 2 .*differs in scale \(2,\) against \(\)"),
        (lambda f: rewrite(f, scale=torch.tensor(torch.nan)), {}, r"NaN or infinity in scale of model 1 \(.*a\.safetensors\)"),
        (lambda f: None, {"out": "a.safetensors"}, "would write over .*a.safetensors, which it reads as model 1"),
        (lambda f: None, {"out": "b/model-00001-of-00002.safetensors"}, "would write over .* reads as model 2"),
        (lambda f: None, {"out": "none/out.safetensors"}, "folder .*none does not exist"),
        (lambda f: None, {"out": "out"}, "a name that ends in .safetensors, or a shard size"),
        (lambda f: None, {"shard_size": "5GB"}, "a folder's name when it writes shards"),
        (lambda f: None, {"out": "b", "shard_size": "5GB"}, "into a new folder only, and .*b exists"),
        (lambda f: None, {"out": "new", "shard_size": "five"}, "shard size such as .* got 'five'"),
        (lambda f: None, {"out": "new", "shard_size": 0}, "shard size such as .* got 0"),
    ],
)  # fmt: skip
def test_files_refused_by_name_and_nothing_left(tmp_path, spoil, given, words):
    save(tmp_path, "a", state(0))
    save(tmp_path, "b", state(1), parts=2)
    (tmp_path / "empty").mkdir()
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    size = {p: p.stat().st_size for p in before}
    paths = [tmp_path / given.get("a", "a.safetensors"), tmp_path / "b"]
    with pytest.raises(BadInput, match=words) as error:
        fuse_files(paths, tmp_path / given.get("out", "out.safetensors"), shard_size=given.get("shard_size"))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert {p: p.stat().st_size for p in before} == size


@pytest.mark.parametrize("nameless", [True, False])
def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path, nameless, monkeypatch):
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    a, out = save(tmp_path, "a", state(0)), tmp_path / "out.safetensors"
    b = save(tmp_path, "b", bad(**{"head.weight": torch.full((3, 6), torch.nan)}))
    out.write_text("old")
    with pytest.raises(BadInput, match="NaN"):
        fuse_files([a, b], out)
    assert out.read_text() == "old"
    fuse_files([a, a], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "out.safetensors"]
    same(dict(sorted(load_file(out).items())), dict(sorted(state(0).items())))


STREAM = """
import os, signal, sys
from pathlib import Path
from pondera.merge import _stream, fuse_files, model_stock_files, wise_ft_files
folder, how = Path(sys.argv[1]), sys.argv[2]
a, b = folder / "a.safetensors", folder / "b.safetensors"
model_stock_files(folder / "c.safetensors", [folder / "c.safetensors"] * 2, folder / "warm.safetensors")
def memory(which):  # ru_maxrss would carry over the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))
if how.startswith("kill"):
    blocks, seen = _stream._blocks_of, []
    def killed(*args):
        seen.append(args)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return blocks(*args)
    _stream._blocks_of = killed
merges = {
    "fuse": lambda: fuse_files([a, b, b, b, b, b], folder / "fused.safetensors"),
    "stock": lambda: model_stock_files(a, [b, b, b], folder / "stock.safetensors"),
    "shards": lambda: fuse_files([a, b], folder / "out", shard_size="1MB"),
}
for one in how.split()[-1].split("+"):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    merges[one]()
    print(memory("VmHWM") - before)
"""


def stream(folder, how):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, "-c", STREAM, str(folder), how], env=env, capture_output=True, text=True, timeout=120
    )


def three(folder, layers, *shape):
    for name in "abc":
        n = layers if name != "c" else 1
        save_file({f"blocks.{i}.weight": torch.full(shape, i + ord(name) - 97.0) for i in range(n)}, folder / f"{name}.safetensors")  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the system does not tell a process its peak")
def test_memory_stays_below_four_of_the_largest_tensor(tmp_path):
    # 8 tensors of 8 MiB (64 MiB a model), six models and four
    three(tmp_path, 8, 2048, 1024)
    run = stream(tmp_path, "fuse+stock")
    assert run.returncode == 0, run.stderr
    assert max(map(int, run.stdout.split())) < 4 * 8 * 2**20
    assert load_file(tmp_path / "fused.safetensors")["blocks.3.weight"][7, 7].item() == pytest.approx(3 + 5 / 6)
    assert load_file(tmp_path / "stock.safetensors")["blocks.3.weight"][7, 7].item() == 4


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="the system has no files without a name")
def test_a_kill_half_way_leaves_nothing(tmp_path):
    three(tmp_path, 12, 64, 64)
    run = stream(tmp_path, "kill fuse")
    assert run.returncode == -9, run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n}.safetensors" for n in ("a", "b", "c", "warm")]


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the child reads its memory there")
def test_a_kill_half_way_through_shards_leaves_only_what_is_hidden(tmp_path):
    three(tmp_path, 12, 512, 512)
    run = stream(tmp_path, "kill shards")
    assert run.returncode == -9, run.stderr
    shown = [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")]
    assert sorted(shown) == [f"{n}.safetensors" for n in ("a", "b", "c", "warm")]
    fuse_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "out", shard_size="1MB")
    assert len(list((tmp_path / "out").iterdir())) == 13


def test_the_way_there_and_back_is_the_same_in_both_doors(tmp_path):
    a, b = state(0), state(1)
    pa, pb = save(tmp_path, "a", a), save(tmp_path, "b", b)
    for alpha in (0.0, 0.3, 1.0):
        wise_ft_files(pa, pb, tmp_path / "out.safetensors", alpha)
        same(
            dict(sorted(load_file(tmp_path / "out.safetensors").items())),
            dict(sorted(wise_ft(a, b, alpha).items())),
            rtol=0,
            atol=0,
        )
    model_stock_files(pa, [pb, pb], tmp_path / "out.safetensors")
    assert torch.allclose(load_file(tmp_path / "out.safetensors")["head.weight"], b["head.weight"])
