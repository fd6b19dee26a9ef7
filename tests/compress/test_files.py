"""Compression file to file: against the same in memory, in every form, and what is refused."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from pondera.compress import load_compressed, prune_files, quantize_files, quantize_tensor, svd_files, trim_files
from pondera.compress.files import _pack, _unpack
from pondera.errors import BadInput

IDS = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models of three kinds as Hugging Face saves them: GPT-2 (its own layout, tied head), Llama, a classifier."""
    torch.manual_seed(0)
    at = tmp_path_factory.mktemp("models")
    small = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    models = {
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
            )
        ),
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**small, num_key_value_heads=2, max_position_embeddings=64)
        ),
        "bert": transformers.BertForSequenceClassification(
            transformers.BertConfig(**small, max_position_embeddings=64)
        ),
    }
    for name, model in models.items():
        model.eval().save_pretrained(at / name, max_shard_size="30KB" if name == "llama" else "5GB")
    return at, models


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize(
    "way",
    [
        (svd_files, {"keep": 0.6}),
        (svd_files, {"keep": 0.6, "merged": True}),
        (quantize_files, {"bits": 3, "form": "packed", "group": 16}),
        (quantize_files, {"bits": 8, "form": "packed", "group": None}),
        (quantize_files, {"bits": 4, "form": "dense"}),
        (quantize_files, {}),
        (prune_files, {"keep": 0.7}),
        (prune_files, {"pattern": "2:4"}),
    ],
    ids=lambda way: f"{way[0].__name__}-{'-'.join(map(str, way[1].values()))}",
)
def test_what_is_read_again_is_what_was_reported(folders, kind, way, tmp_path):
    at, models = folders
    call, settings = way
    report = call(at / kind, tmp_path / "out", calibration=IDS, **settings)
    form = report.facts["form"]
    if form in ("factors", "packed"):
        with pytest.raises((OSError, ValueError)):  # a plain loader must not take it for the model
            type(models[kind]).from_pretrained(tmp_path / "out")
        model = load_compressed(tmp_path / "out")
    else:
        model = type(models[kind]).from_pretrained(tmp_path / "out").eval()
    changed = report.changed
    assert {row.name for row in changed} == set(linear(models[kind])) - {
        r.name for r in report.layers if r.how == "kept"
    }
    assert all(0 <= row.error < 1 for row in changed)  # 0 where fewer rows come than the rank
    assert max(row.error for row in changed) > 0
    assert all(row.of == "output" for row in changed)
    # the second pass measured what the loaded model does
    last = (lambda m: m.base_model(input_ids=IDS)[0]) if kind != "bert" else (lambda m: m(input_ids=IDS)[0])
    with torch.no_grad():
        old, new = last(models[kind]), last(model)
    close = 0.05 if form == "nf4" else 1e-3  # bitsandbytes' kernels round on their way
    assert float((new - old).norm() / old.norm()) == pytest.approx(report.facts["output_change"], rel=close)
    if kind != "bert":
        wanted = nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        assert report.facts["loss_after"] == pytest.approx(float(wanted), rel=1e-4)
    assert json.loads((tmp_path / "out" / "pondera_compress.json").read_text())["method"] == report.method
    assert (tmp_path / "out" / "config.json").exists()


def linear(model):
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    head = model.get_output_embeddings() or model.classifier
    return [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds) and m is not head]


def test_the_factors_are_the_best_for_the_outputs_on_the_data(folders, tmp_path):
    """Against the same computed with the whole model in memory: the cut in the metric of E[x x']."""
    at, models = folders
    seen = {}
    layer = models["llama"].model.layers[0].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].flatten(0, 1)))
    logits(models["llama"])
    hook.remove()
    report = svd_files(at / "llama", tmp_path / "out", keep=0.5, calibration=IDS, only="*layers.0.mlp.down_proj")
    (row,) = report.layers
    x, w = seen["x"].double(), layer.weight.detach().double()
    out = x @ w.T
    best = torch.linalg.svdvals(out)
    r = row.facts["rank"]
    assert r == 0.5 * w.numel() // sum(w.shape)
    assert row.error == pytest.approx(float(best[r:].norm() / best.norm()), rel=1e-3), (
        "the least error that rank allows"
    )
    plain = svd_files(at / "llama", tmp_path / "plain", keep=0.5, only="*layers.0.mlp.down_proj")
    assert plain.layers[0].of == "weight"
    s = torch.linalg.svdvals(w)
    assert plain.layers[0].error == pytest.approx(float(s[r:].norm() / s.norm()), rel=1e-4)
    held = {k: v for f in (tmp_path / "plain").glob("*.safetensors") for k, v in load_file(f).items()}
    cut = held["model.layers.0.mlp.down_proj.up"] @ held["model.layers.0.mlp.down_proj.down"]
    assert float((cut - w).norm() / w.norm()) == pytest.approx(plain.layers[0].error, rel=1e-4)


def test_wanda_keeps_what_reads_most(folders, tmp_path):
    at, models = folders
    name = "model.layers.1.mlp.up_proj"
    seen = {}
    layer = models["llama"].get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].flatten(0, 1)))
    logits(models["llama"])
    hook.remove()
    prune_files(at / "llama", tmp_path / "out", keep=0.25, calibration=IDS, only=name)
    new = {k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()}[f"{name}.weight"]
    score = layer.weight.abs() * seen["x"].norm(dim=0)
    assert torch.equal(new != 0, score >= score.topk(8, dim=1).values[:, -1:])


def test_patterns_and_codes():
    codes = torch.randint(-7, 8, (5, 7))
    assert torch.equal(_unpack(_pack(codes), 7).long(), codes)


def test_bytes_are_saved_where_it_says_so(folders, tmp_path):
    at, _ = folders
    full = sum(f.stat().st_size for f in (at / "gpt2").glob("*.safetensors"))
    report = quantize_files(at / "gpt2", tmp_path / "a", bits=2, form="packed", group=32)
    held = load_file(tmp_path / "a" / "packed.safetensors")
    rows = {row.name: row for row in report.layers}
    name = "transformer.h.0.mlp.c_fc.weight"
    stem = name.removesuffix("weight")
    assert rows[name].bits == 8 * (held[f"{stem}codes"].nbytes + held[f"{stem}scale"].nbytes)
    assert rows[name].bits < rows[name].was_bits / 5
    assert (tmp_path / "a" / "packed.safetensors").stat().st_size < full / 2


def test_a_single_file_and_shards(tmp_path):
    torch.manual_seed(0)
    state = {"body.0.weight": torch.randn(6, 5), "body.0.bias": torch.randn(6), "embed.weight": torch.randn(9, 5)}
    save_file(state, tmp_path / "m.safetensors")
    report = quantize_files(tmp_path / "m.safetensors", tmp_path / "q.safetensors", bits=5, form="dense", group=None)
    got = load_file(tmp_path / "q.safetensors")
    assert [row.name for row in report.layers] == ["body.0.weight"], "an embedding is no linear layer"
    assert torch.equal(got["body.0.weight"], quantize_tensor(state["body.0.weight"], 5).dequantize())
    assert torch.equal(got["body.0.bias"], state["body.0.bias"])
    assert torch.equal(got["embed.weight"], state["embed.weight"])
    half = {k: v.bfloat16() for k, v in state.items()}
    save_file(half, tmp_path / "h.safetensors")
    report = prune_files(tmp_path / "h.safetensors", tmp_path / "shards", keep=0.5, shard_size="100B")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    assert (
        load_file(tmp_path / "shards" / index["weight_map"]["body.0.weight"])["body.0.weight"].dtype == torch.bfloat16
    )
    assert report.layers[0].was_bits == 30 * 16


def test_refused_in_one_sentence_and_nothing_left(folders, tmp_path):
    at, _ = folders
    (tmp_path / "short.txt").write_text("too short")
    save_file({"a.weight": torch.full((4, 4), torch.nan)}, tmp_path / "nan.safetensors")
    save_file({"a.bias": torch.zeros(4)}, tmp_path / "none.safetensors")
    llama, out = at / "llama", tmp_path / "out"
    before = sorted(p.name for p in tmp_path.iterdir())
    for call, words in (
        (lambda: svd_files(llama, out, keep=0.0), "above 0 and at most 1"),
        (lambda: quantize_files(llama, out, bits=9), "bits of 2 to 8"),
        (lambda: quantize_files(llama, out, bits=3, form="nf4"), "take packed"),
        (lambda: quantize_files(llama, out, form="gguf"), "form 'nf4', 'packed' or 'dense'"),
        (lambda: prune_files(llama, out, pattern="4:2"), "pattern such as 2:4"),
        (lambda: prune_files(llama, out, pattern="2:5"), "does not divide"),
        (lambda: svd_files(llama, out, only="nothing"), "no linear layer"),
        (lambda: svd_files(tmp_path / "gone", out), "cannot read|finds no"),
        (lambda: svd_files(tmp_path / "none.safetensors", tmp_path / "o.safetensors"), "no linear layer"),
        (lambda: svd_files(tmp_path / "nan.safetensors", tmp_path / "o.safetensors"), "finite numbers"),
        (lambda: svd_files(tmp_path / "nan.safetensors", tmp_path / "o.safetensors", calibration=IDS), "config.json"),
        (lambda: svd_files(llama, tmp_path / "o.safetensors"), "writes a folder where it reads one"),
        (lambda: svd_files(llama, llama), "would write over"),
        (lambda: svd_files(llama, tmp_path / "no" / "out"), "does not exist"),
        (lambda: svd_files(llama, out, calibration=IDS + 120), "ids of 0 to 127"),
        (lambda: svd_files(llama, out, calibration=torch.zeros(0, 3, dtype=torch.long)), "shape .rows, length."),
        (lambda: svd_files(llama, out, calibration=tmp_path / "gone.txt"), "cannot read"),
        (lambda: svd_files(llama, out, calibration=tmp_path / "short.txt"), "no tokenizer"),
        (lambda: load_compressed(llama), "no compression of pondera's"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == before, words
    svd_files(llama, out)
    with pytest.raises(BadInput, match="--replace"):
        svd_files(llama, out)
    svd_files(llama, out, replace=True)


def test_text_is_read_by_the_folders_tokenizer(folders, tmp_path):
    import shutil

    from tokenizers import Tokenizer, models, pre_tokenizers

    at, _ = folders
    shutil.copytree(at / "llama", tmp_path / "m")
    words = [f"w{i}" for i in range(127)]
    tokens = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i + 1 for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[UNK]").save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text(" ".join(words * 3))
    (tmp_path / "short.txt").write_text("w1 w2")
    report = prune_files(tmp_path / "m", tmp_path / "out", calibration=tmp_path / "text.txt")
    assert math.isfinite(report.facts["loss_after"])
    with pytest.raises(BadInput, match="at least 16 tokens, .* has 2"):
        prune_files(tmp_path / "m", tmp_path / "out2", calibration=tmp_path / "short.txt")


def test_trim_keeps_outputs_within_its_tolerance(folders, tmp_path):
    at, _ = folders
    name = "*layers.0.mlp.*"
    report = trim_files(at / "llama", tmp_path / "a", calibration=IDS, epsilon=0.2, only=name)
    for row in report.layers:
        assert row.facts["feasible"]
        assert row.error <= 0.205
        assert 0 < row.facts["kept"] < 1
    for words, call in (
        ("above 0 and below 1", lambda: trim_files(at / "llama", tmp_path / "c", calibration=IDS, epsilon=0)),
        ("got none", lambda: trim_files(at / "llama", tmp_path / "c", calibration=None)),
    ):
        with pytest.raises(BadInput, match=words):
            call()


def test_magnitude_is_torchs_own_choice():
    from torch.nn.utils import prune

    from pondera.compress import magnitude_prune, masks_of

    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)) for _ in "12")
    theirs.load_state_dict(ours.state_dict())
    magnitude_prune(ours, 0.3)
    prune.global_unstructured(
        [(theirs[0], "weight"), (theirs[2], "weight")], prune.L1Unstructured, amount=84 - round(0.3 * 84)
    )
    masks = masks_of(ours)
    assert torch.equal(masks["0.weight"], theirs[0].weight_mask.bool())
    assert torch.equal(masks["2.weight"], theirs[2].weight_mask.bool())
