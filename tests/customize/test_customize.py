"""One image to an adapter, on tiny pipelines of the shapes people use; stopped, gone on with, saved, loaded, refused."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pondera.adapters import TLoraConfig, at_timestep
from pondera.customize import customize, export, load_base, load_customized
from pondera.customize._extras import masks_of, rate_share, read_log
from pondera.customize._train import worded
from pondera.errors import BadInput

from .pipelines import PIPELINES

IMAGE = Image.effect_mandelbrot((40, 32), (-2, -1, 1, 1), 50)
SMALL = {"steps": 2, "r": 4, "resolution": 32, "per_prompt": 2, "sampling_steps": 2}


def pixels(pipe):
    pipe.set_progress_bar_config(disable=True)
    more = {"use_resolution_binning": False} if "Sana" in type(pipe).__name__ else {}
    return pipe(
        "a sks dog on the moon", num_inference_steps=2, height=32, width=32, output_type="np",
        generator=torch.Generator().manual_seed(0), **more,
    ).images  # fmt: skip


@pytest.mark.parametrize("kind", PIPELINES)
def test_trained_saved_loaded_and_sampled(kind, tmp_path):
    PIPELINES[kind]().save_pretrained(tmp_path / "base")
    IMAGE.save(tmp_path / "dog.png")
    done = customize(
        tmp_path / "base", tmp_path / "dog.png", "sks dog", tmp_path / "out", prompts=["a {} on the moon"],
        **{**SMALL, "rate": 1e-2, "optimizer": "adamw"},
    )  # fmt: skip
    assert len(done.losses) == 2
    assert torch.isfinite(done.losses).all()
    assert [p.name for p in done.samples["a sks dog on the moon"]] == ["00-0.png", "00-1.png"]
    assert Image.open(tmp_path / "out" / "grid.png").size == (256, 128)
    assert "2 steps" in done.summary()
    note = json.loads((tmp_path / "out" / "customization.json").read_text())
    assert note["name"] == "sks dog"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "customization.json", "grid.png", "losses.csv", "page.html",
        "pytorch_lora_weights.safetensors", "samples", "step-00001",
    ]  # fmt: skip

    plain, masked, lora = PIPELINES[kind](), PIPELINES[kind](), PIPELINES[kind]()
    before = pixels(plain)
    load_customized(masked, tmp_path / "out")
    after = pixels(masked)
    assert numpy.abs(after - before).max() > 1e-4
    lora.load_lora_weights(tmp_path / "out")  # diffusers' own door: no mask, as at t = 0
    denoiser = getattr(masked, "transformer", None) or masked.unet
    with at_timestep(denoiser, 0):
        assert numpy.abs(pixels(lora) - pixels(masked)).max() < 1e-3


def test_the_pipeline_given_is_the_pipeline_trained(tmp_path):
    pipe = PIPELINES["sd15"]()
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    customize(pipe, IMAGE, "sks dog", tmp_path / "out", **{**SMALL, "rate": 1e-2})
    again = load_customized(PIPELINES["sd15"](), tmp_path / "out")
    assert numpy.abs(pixels(pipe) - pixels(again)).max() < 1e-5
    after = {k.replace(".base_layer", ""): v for k, v in pipe.unet.state_dict().items() if "pondera" not in k}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not pipe.unet.training


def test_a_unet_alone_as_a_peft_model(tmp_path):
    pipe = PIPELINES["sd15"]()
    customize(pipe, IMAGE, "sks dog", tmp_path / "out", **{**SMALL, "rate": 1e-2})
    alone = peft.PeftModel.from_pretrained(PIPELINES["sd15"]().unet, tmp_path / "out")
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 32)
    assert torch.allclose(alone(x, 20, text).sample, pipe.unet(x, 20, text).sample, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"gradient_checkpointing": True}, {"batch": 3}, {"optimizer": "adamw8bit"}]
)
def test_options_train_too(options, tmp_path):
    done = customize(PIPELINES["sd15"](), [IMAGE, IMAGE.rotate(90)], "sks dog", tmp_path / "out", **SMALL, **options)
    assert torch.isfinite(done.losses).all()


def test_gradient_checkpointing_trains_the_same_adapter(tmp_path):
    for name, on in (("a", False), ("b", True)):
        customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / name, **SMALL, gradient_checkpointing=on)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_the_span_of_timesteps_is_kept_to(tmp_path):
    from pondera.adapters.t_lora import Clock

    seen = []
    before = Clock.__call__

    def watched(self, *args):
        before(self, *args)
        seen.extend(self.now.tolist())

    Clock.__call__ = watched
    try:
        customize(
            PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "o", **{**SMALL, "steps": 20}, timesteps=(800, 1000)
        )
    finally:
        Clock.__call__ = before
    assert len(seen) == 20
    assert all(800 <= t < 1000 for t in seen)
    assert len(set(seen)) > 10


def test_another_adapter_of_peft(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"])
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", adapter=config, **{**SMALL, "rate": 1e-2})
    pipe, other = load_customized(PIPELINES["sd15"](), tmp_path / "out"), PIPELINES["sd15"]()
    other.load_lora_weights(tmp_path / "out")
    assert numpy.abs(pixels(pipe) - pixels(other)).max() < 1e-5


KILLED = """
import contextlib, os, signal, sys
sys.path.insert(0, {tests!r})
from PIL import Image
from pipelines import PIPELINES
from pondera.customize import _train as module

@contextlib.contextmanager
def fatal(show, steps, begun):
    count = [begun]
    def advance(loss):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance

module._bar = fatal
image = Image.effect_mandelbrot((40, 32), (-2, -1, 1, 1), 50)
module.customize(PIPELINES["sd15"](), image, "sks dog", {out!r}, steps=7, save_every=2, r=4, resolution=32)
"""


def test_killed_and_called_again_it_ends_in_the_same_adapter(tmp_path):
    words = {"steps": 7, "save_every": 2, "r": 4, "resolution": 32}
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "whole", **words)
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path / "cut"))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    with pytest.raises(BadInput, match=r"stopped run with other settings \(steps\)"):
        customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "cut", **{**words, "steps": 8})
    done = customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "cut", **words)
    assert (done.resumed_at, len(done.losses)) == (4, 3)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(p.name.startswith((".", "unfinished")) for p in (tmp_path / "cut").iterdir())


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "a", **SMALL)
    torch.manual_seed(4)
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "b", **SMALL)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert before is not None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image": "no.png"}, "no.png is not an image: there is no such file"),
        ({"image": __file__}, "test_customize.py is not an image that can be read"),
        ({"image": 3}, "paths or PIL images, got int"),
        ({"image": []}, "at least one image, got none"),
        ({"name": " "}, "needs a name"),
        ({"template": "a photo"}, "template needs one {}"),
        ({"steps": 0}, "steps of at least 1, got 0"),
        ({"rate": 0.0}, "rate above 0"),
        ({"precision": "int8"}, "precision is one of no, bf16, fp16"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 training needs a GPU"),
        ({"resolution": 30}, "multiple of 4"),
        ({"timesteps": (900, 2000)}, "0 <= first < last <= 1000"),
        ({"adapter": TLoraConfig(r=64)}, "r from 1 to"),
        ({"adapter": TLoraConfig(r=4, target_modules=["nothing"])}, "nothing"),
    ],
)
def test_refused_before_anything_is_written(change, says, tmp_path):
    words = {"base": PIPELINES["sd15"](), "image": IMAGE, "name": "sks dog", "out": tmp_path / "out", **SMALL, **change}
    with pytest.raises((BadInput, ValueError), match=says.replace("{", r"\{").replace("(", r"\(")):
        customize(**words)
    assert not (tmp_path / "out").exists()


def test_refused_bases(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["x", "Y"]}'
    )
    for base, says in (
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path / "empty", "has no model_index.json"),
        (tmp_path / "broken", "is not a pipeline that loads"),
        (torch.nn.Linear(2, 2), "must be a diffusers pipeline or its folder, got Linear"),
    ):
        with pytest.raises(BadInput, match=says):
            load_base(base)


def test_refused_folders(tmp_path):
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", **SMALL)
    with pytest.raises(BadInput, match="already holds a finished customization"):
        customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", **SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear to me")
    with pytest.raises(BadInput, match="is not empty"):
        customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "mine", **SMALL)
    with pytest.raises(BadInput, match="is a file"):
        customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "mine" / "thesis.txt", **SMALL)
    with pytest.raises(BadInput, match="holds no finished customization"):
        load_customized(PIPELINES["sd15"](), tmp_path / "mine")
    with pytest.raises(BadInput, match="does not fit"):
        load_customized(PIPELINES["sdxl"](), tmp_path / "out")


def test_a_diverged_run_says_so(tmp_path):
    pipe = PIPELINES["sd15"]()
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(float("nan"))
    with pytest.raises(BadInput, match="the loss became nan at step 0"):
        customize(pipe, IMAGE, "sks dog", tmp_path / "out", **SMALL)


# -- what people bring -------------------------------------------------------------------------------------------------


def test_a_photo_is_learnt_as_the_camera_was_held_and_on_white(tmp_path):
    from pondera.customize._denoisers import images_of

    upright = Image.new("RGB", (40, 60), "white")
    upright.paste("red", (0, 0, 40, 30))  # red above
    fallen = upright.transpose(Image.Transpose.ROTATE_90)
    exif = fallen.getexif()
    exif[0x0112] = 6  # held so that it must be turned a quarter to the right
    fallen.save(tmp_path / "phone.png", exif=exif)
    (turned,), (edge,) = images_of(tmp_path / "phone.png", 8)
    assert edge == 40
    assert (turned[1, 0] < -0.9).all(), "red on top, as it was seen"
    assert (turned[1, -1] > 0.9).all()
    hidden = Image.new("RGBA", (16, 16), (255, 0, 0, 0))  # red that nobody sees
    hidden.paste((0, 0, 255, 255), (4, 4, 12, 12))
    hidden.save(tmp_path / "cut-out.png")
    (shown,), _ = images_of(tmp_path / "cut-out.png", 16)
    assert (shown[:, 0, 0] == 1).all(), "white"
    assert shown[:, 8, 8].tolist() == [-1, -1, 1]
    palette = hidden.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    (shown,), _ = images_of(palette, 16)
    assert (shown[:, 0, 0] > 0.98).all()


@pytest.mark.parametrize(
    ("prompt", "drawn"),
    [
        ("a {} on the moon", "a sks dog on the moon"),
        ("a {name} on the moon", "a sks dog on the moon"),
        ("the moon", "the moon"),
    ],
)
def test_the_name_stands_where_a_prompt_says(prompt, drawn):
    assert worded(prompt, "sks dog") == drawn


def test_wrong_prompts_are_refused_before_training(tmp_path):
    for prompt in ("a {nam} on the moon", "a {", "a {0}"):
        with pytest.raises(BadInput, match="no other braces"):
            customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", prompts=[prompt], **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_draws_again(tmp_path):
    first = customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", prompts=["a {}"], **SMALL)
    again = customize(
        PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", prompts=["a {}", "the {name} on the moon"], **SMALL
    )
    assert again.resumed_at == again.steps
    assert list(again.samples) == ["a sks dog", "the sks dog on the moon"]
    assert Image.open(tmp_path / "out" / "grid.png").size == (256, 256)
    one, two = (Image.open(done.samples["a sks dog"][0]) for done in (first, again))
    assert numpy.abs(numpy.asarray(one, float) - numpy.asarray(two, float)).max() <= 1
    with pytest.raises(BadInput, match=r"with other settings \(steps\)"):
        customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", prompts=["a {}"], **{**SMALL, "steps": 3})


def test_the_same_pipeline_twice(tmp_path):
    pipe = PIPELINES["sd15"]()
    customize(pipe, IMAGE, "sks dog", tmp_path / "a", **{**SMALL, "rate": 1e-2})
    customize(pipe, IMAGE.rotate(90), "sks dog", tmp_path / "b", **{**SMALL, "rate": 1e-2})
    customize(PIPELINES["sd15"](), IMAGE.rotate(90), "sks dog", tmp_path / "c", **{**SMALL, "rate": 1e-2})
    b, c = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "bc")
    assert all(torch.equal(b[k], c[k]) for k in b), "as on a fresh one"


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_a_pipeline_that_carries_a_lora(kind, tmp_path):
    """It is trained on top of the LoRA: as on a pipeline that it was fused into by diffusers."""
    settings = {**SMALL, "rate": 1e-2, "optimizer": "adamw", "precision": "no"}
    customize(
        PIPELINES[kind](), IMAGE, "sks dog", tmp_path / "style",
        adapter=peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]), **settings,
    )  # fmt: skip
    fused, carries = PIPELINES[kind](), PIPELINES[kind]()
    for pipe in (fused, carries):
        pipe.load_lora_weights(tmp_path / "style")
    fused.fuse_lora()
    fused.unload_lora_weights()
    for name, pipe in (("a", fused), ("b", carries)):
        customize(pipe, IMAGE, "sks dog", tmp_path / name, **settings)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    assert numpy.abs(pixels(carries) - pixels(fused)).max() < 1e-4


def test_half_precision_files_alone_are_a_base(tmp_path):
    pipe = PIPELINES["sd15"]()
    pipe.save_pretrained(tmp_path / "base", variant="fp16")
    assert not list((tmp_path / "base" / "unet").glob("diffusion_pytorch_model.safetensors"))
    done = customize(tmp_path / "base", IMAGE, "sks dog", tmp_path / "out", **SMALL)
    assert torch.isfinite(done.losses).all()


def test_a_base_by_the_hubs_name_comes_from_its_cache(tmp_path, monkeypatch):
    import huggingface_hub

    seen = {}

    def snapshot(name, *, local_files_only, **_):
        seen[name] = local_files_only
        if name == "some/base":
            return str(tmp_path / "base")
        raise huggingface_hub.errors.LocalEntryNotFoundError("not there")

    PIPELINES["sd15"]().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert type(load_base("some/base")).__name__ == "StableDiffusionPipeline"
    assert seen == {"some/base": True}, "nothing is downloaded unasked"
    with pytest.raises(BadInput, match="not in the hub's cache; download=True"):
        load_base("some/other")
    with pytest.raises(BadInput, match="cannot be brought from the hub"):
        load_base("some/other", download=True)
    assert seen["some/other"] is False


def test_single_files_want_their_config(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    (tmp_path / "x.ckpt").write_bytes(b"no")
    PIPELINES["sd15"]().save_pretrained(tmp_path / "base")
    for call, words in (
        (lambda: load_base(tmp_path / "x.safetensors"), r"is a single file: give config"),
        (lambda: load_base(tmp_path / "x.ckpt", config=tmp_path / "base"), r"only \.safetensors"),
        (lambda: load_base(tmp_path / "x.safetensors", config=tmp_path), "no model_index.json"),
        (
            lambda: load_base(tmp_path / "x.safetensors", config=tmp_path / "base"),
            "does not load as StableDiffusionPipe",
        ),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_vae_encodes_in_float32_whatever_its_own_precision():
    from pondera.customize._denoisers import trainable

    pipe = PIPELINES["sdxl"]()
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    exact, _ = trainable(pipe, 32).encode(image)
    pipe.vae.half()
    weights = {n: p.clone() for n, p in pipe.vae.named_parameters()}
    half, _ = trainable(pipe, 32).encode(image)
    assert half.dtype == torch.float32
    assert torch.allclose(half, exact, atol=5e-3)
    assert pipe.vae.dtype == torch.float16
    assert all(torch.equal(p, weights[n]) for n, p in pipe.vae.named_parameters())


def test_sdxl_is_told_how_large_the_photo_was():
    from pondera.customize._denoisers import trainable

    made = trainable(PIPELINES["sdxl"](), 32)
    assert made.prompt("a sks dog", 640)["time_ids"].tolist() == [[640, 640, 0, 0, 32, 32]]


def test_flux_has_its_own_recipe(tmp_path, monkeypatch):
    from pondera.customize import _train as module

    PIPELINES["flux"]().save_pretrained(tmp_path / "base")
    drawn = {}
    monkeypatch.setattr(module, "draw_samples", lambda *a, **k: drawn.update(k) or {})
    customize(tmp_path / "base", IMAGE, "sks dog", tmp_path / "flux", prompts=["a {}"], steps=2, resolution=32)
    note = json.loads((tmp_path / "flux" / "customization.json").read_text())
    assert (note["optimizer"], note["rate"], note["clip"], note["precision"]) == ("prodigy", 1.0, 1.0, "bf16")
    assert (note["adapter"]["r_min"], note["adapter"]["start"]) == (1, "lora")
    assert (drawn["guidance"], drawn["steps"]) == (3.5, 28)
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "sd", prompts=["a {}"], steps=2, resolution=32)
    note = json.loads((tmp_path / "sd" / "customization.json").read_text())
    assert (note["optimizer"], note["rate"], note["clip"], note["precision"]) == ("adamw", 1e-4, 0.0, "no")
    assert (drawn["guidance"], drawn["steps"]) == (5.0, 25)


def test_gradients_are_clipped_and_prodigy_moves(tmp_path):
    free = customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "a", optimizer="prodigy", **SMALL)
    assert torch.isfinite(free.losses).all()
    start = load_file(tmp_path / "a" / "adapter_model.safetensors")
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "b", optimizer="prodigy", **{**SMALL, "steps": 12})
    moved = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert any(not torch.equal(start[k], moved[k]) for k in start)
    for words in ({"clip": -1.0}, {"optimizer": "sgd"}):
        with pytest.raises(BadInput, match="clip of at least 0|optimizer is one of adamw, adamw8bit, prodigy"):
            customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "c", **SMALL, **words)


# -- along the way -----------------------------------------------------------------------------------------------------


def rows(folder):
    return read_log(folder)


def test_kept_adapters_load_and_do_not_change_the_run(tmp_path):
    words = {**SMALL, "steps": 6, "rate": 1e-2, "prompts": ["a {}"]}
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "a", keep_every=2, **words)
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "b", keep_every=0, **words)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a), "what is drawn on the way is not drawn from the run's draws"
    assert [p.name for p in sorted((tmp_path / "a").glob("step-*"))] == ["step-00002", "step-00004"]
    assert not list((tmp_path / "b").glob("step-*"))
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "c", **{**words, "steps": 4})
    c = load_file(tmp_path / "c" / "adapter_model.safetensors")
    kept = load_file(tmp_path / "a" / "step-00004" / "adapter_model.safetensors")
    assert all(torch.equal(kept[k], c[k]) for k in c), "the adapter of a run that ends there"
    early, late = (load_customized(PIPELINES["sd15"](), tmp_path / n) for n in ("a/step-00002", "a"))
    assert numpy.abs(pixels(early) - pixels(late)).max() > 1e-6
    assert Image.open(tmp_path / "a" / "step-00002" / "grid.png").size == (128, 128)


def test_the_log_has_each_draw_once_even_after_a_stop(tmp_path):
    class Stopped(Exception):
        pass

    def stop(step, loss):
        if step == 5:
            raise Stopped

    words = {**SMALL, "steps": 7, "save_every": 2, "accumulate": 2}
    with pytest.raises(Stopped):
        customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "cut", on_step=stop, **words)
    done = customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "cut", **words)
    assert done.resumed_at == 4
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "whole", **words)
    cut, whole = rows(tmp_path / "cut"), rows(tmp_path / "whole")
    assert [r["step"] for r in cut] == [s for s in range(7) for _ in "12"]
    assert [(r["timestep"], r["loss"]) for r in cut] == [(r["timestep"], r["loss"]) for r in whole]


def test_a_callback_sees_each_step_and_may_end_the_run(tmp_path):
    seen = []
    done = customize(
        PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", on_step=lambda *a: seen.append(a) or len(seen) == 3,
        **{**SMALL, "steps": 9},
    )  # fmt: skip
    assert [s for s, _ in seen] == [1, 2, 3]
    assert (done.steps, len(done.losses)) == (3, 3)
    load_customized(PIPELINES["sd15"](), tmp_path / "out")


def test_the_page_opens_offline_and_shows_the_run(tmp_path):
    customize(
        PIPELINES["sd15"](),
        IMAGE,
        "sks <dog>",
        tmp_path / "out",
        prompts=["a {}"],
        keep_every=20,
        **{**SMALL, "steps": 40},
    )
    page = (tmp_path / "out" / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "after 20 steps" in page
    assert "at the end" in page
    assert "<svg" in page
    assert "sks &lt;dog&gt;" in page
    assert "://" not in page.replace("http://www.w3.org", "")


def test_tensorboard_gets_the_losses(tmp_path):
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", log=f"tensorboard:{tmp_path / 'board'}", **SMALL)
    assert list((tmp_path / "board").glob("events*"))
    with pytest.raises(BadInput, match="'tensorboard:FOLDER' or 'wandb'"):
        customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "x", log="comet", **SMALL)


# -- what else it can be given -----------------------------------------------------------------------------------------


def test_gradients_of_several_draws_are_averaged(tmp_path):
    """Two draws of one are one step on their mean: as a batch of two of the same draws would be."""
    from pondera.customize._denoisers import trainable

    pipe = PIPELINES["sd15"]()
    customize(
        pipe, IMAGE, "sks dog", tmp_path / "a", accumulate=2, adapter=peft.LoraConfig(r=2, target_modules=["to_q"]),
        **{**SMALL, "steps": 1, "rate": 1e-3},
    )  # fmt: skip
    log = rows(tmp_path / "a")
    assert len(log) == 2
    assert log[0]["timestep"] != log[1]["timestep"]
    note = json.loads((tmp_path / "a" / "customization.json").read_text())
    assert note["accumulate"] == 2
    assert trainable(pipe, 32).kind == "sd"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_takes_its_course(schedule, tmp_path):
    customize(
        PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", schedule=schedule, warmup=2, **{**SMALL, "steps": 6}
    )
    rates = [r["rate"] / 1e-4 for r in rows(tmp_path / "out")]
    assert rates == pytest.approx([rate_share(schedule, s, 6, 2) for s in range(6)], rel=1e-4)
    assert rates[:2] == pytest.approx([0.5, 1.0])
    assert (rates[-1] < 0.3) == (schedule != "constant")


def test_min_snr_weighs_as_its_equations_say():
    from pondera.customize._denoisers import min_snr_weight, trainable

    made = trainable(PIPELINES["sd15"](), 32)
    kept = made.pipe.scheduler.alphas_cumprod
    t = torch.tensor([0, 400, 999])
    snr = kept[t] / (1 - kept[t])
    assert torch.allclose(min_snr_weight(made, t, 5.0), torch.minimum(snr, torch.tensor(5.0)) / snr, rtol=1e-4)
    latents, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    condition = {k: v.expand(3, *v.shape[1:]) for k, v in made.prompt("a sks dog").items()}
    weight = torch.tensor([1.0, 0.0, 2.0])
    each = [made.loss(latents[i : i + 1], noise[i : i + 1], t[i : i + 1], made.prompt("a sks dog")) for i in range(3)]
    with torch.no_grad():
        assert made.loss(latents, noise, t, condition, weight).item() == pytest.approx(
            float((each[0] + 2 * each[2]) / 3), rel=1e-4
        )
    with pytest.raises(BadInput, match="straight lines"):
        min_snr_weight(trainable(PIPELINES["flux"](), 32), t, 5.0)


@pytest.mark.parametrize("kind", ["sd15", "flux", "sd3", "sana"])
def test_the_loss_counts_within_the_mask_alone(kind):
    from pondera.customize._denoisers import trainable

    made = trainable(PIPELINES[kind](), 32)
    latents = made.encode(torch.rand(1, 3, 32, 32) * 2 - 1)[0].detach()
    noise, t, told = torch.randn(latents.shape), torch.tensor([300]), made.prompt("a sks dog")
    whole, half = torch.ones(1, 1, *latents.shape[-2:]), torch.zeros(1, 1, *latents.shape[-2:])
    half[..., : latents.shape[-1] // 2] = 1
    with torch.no_grad():
        plain, all_of_it, part, rest = (
            made.loss(latents, noise, t, told, None, m).item() for m in (None, whole, half, 1 - half)
        )
    assert all_of_it == pytest.approx(plain, rel=1e-5)
    assert (part + rest) / 2 == pytest.approx(plain, rel=1e-4)
    assert part != pytest.approx(rest, rel=1e-3)


def test_masks_given_and_of_transparency(tmp_path):
    cut_out = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    cut_out.paste((0, 0, 255, 255), (0, 0, 16, 32))
    like = torch.zeros(1, 4, 16, 16)
    found = masks_of("alpha", [cut_out], like, 32)
    assert found[0, 0].sum() == 16 * 8
    assert found[0, 0, :, :8].all()
    white = Image.new("L", (32, 32), 0)
    white.paste(255, (0, 0, 16, 32))
    assert torch.equal(masks_of(white, [IMAGE], like, 32), found)
    done = customize(PIPELINES["sd15"](), cut_out, "sks dog", tmp_path / "out", mask="alpha", **SMALL)
    assert torch.isfinite(done.losses).all()
    for given, words in (
        ("alpha", "opaque"),
        ([white, white], "2 for 1"),
        (Image.new("L", (32, 32)), "black all over"),
    ):
        with pytest.raises(BadInput, match=words):
            customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "x", mask=given, **SMALL)


def test_prior_preservation_draws_the_class_once_and_trains_on_it(tmp_path):
    words = {**SMALL, "rate": 1e-2, "class_prompt": "a photo of a dog", "class_count": 3}
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "a", **words)
    drawn = sorted((tmp_path / "a" / "class").glob("*.png"))
    assert len(drawn) == 3
    assert all(numpy.isfinite(r["prior"]) for r in rows(tmp_path / "a"))
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "b", class_images=tmp_path / "a" / "class", **words)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a), "the same images, given"
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "c", **{**SMALL, "rate": 1e-2})
    c = load_file(tmp_path / "c" / "adapter_model.safetensors")
    assert any(not torch.equal(a[k], c[k]) for k in a)
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match="has no images"):
        customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "d", class_images=tmp_path / "none", **words)


def test_a_base_in_four_bits_trains(tmp_path):
    done = customize(PIPELINES["sdxl"](), IMAGE, "sks dog", tmp_path / "out", four_bits=True, **{**SMALL, "steps": 3})
    assert torch.isfinite(done.losses).all()
    load_customized(PIPELINES["sdxl"](), tmp_path / "out")


# -- for other programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPELINES)
def test_exported_in_16_bits_it_is_the_plain_lora(kind, tmp_path):
    settings = {**SMALL, "rate": 1e-2, "optimizer": "adamw", "precision": "no"}
    customize(PIPELINES[kind](), IMAGE, "sks dog", tmp_path / "out", **settings)
    done = export(tmp_path / "out", tmp_path / "x.safetensors", base=PIPELINES[kind](), dtype="bfloat16")
    assert done.bytes == (tmp_path / "x.safetensors").stat().st_size
    assert all(v.dtype == torch.bfloat16 for v in load_file(tmp_path / "x.safetensors").values())
    one, other = PIPELINES[kind](), PIPELINES[kind]()
    one.load_lora_weights(tmp_path / "out")
    other.load_lora_weights(tmp_path, weight_name="x.safetensors")
    assert numpy.abs(pixels(one) - pixels(other)).max() < 5e-3
    assert len(done.difference) == 5
    assert "at t = 50" in done.summary()


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_kohyas_keys_go_and_come_back(kind, tmp_path):
    customize(PIPELINES[kind](), IMAGE, "sks dog", tmp_path / "out", **{**SMALL, "rate": 1e-2})
    export(tmp_path / "out", tmp_path / "k.safetensors", form="kohya", dtype="float32")
    keys = list(load_file(tmp_path / "k.safetensors"))
    assert all(k.startswith("lora_unet_") for k in keys)
    assert {k.partition(".")[2] for k in keys} == {"lora_down.weight", "lora_up.weight", "alpha"}
    one, other = PIPELINES[kind](), PIPELINES[kind]()
    one.load_lora_weights(tmp_path / "out")
    other.load_lora_weights(tmp_path, weight_name="k.safetensors")
    assert numpy.abs(pixels(one) - pixels(other)).max() < 1e-4


def test_what_the_mask_is_worth_is_measured(tmp_path):
    """All components at every timestep are exact at the clean end alone; those of t = 900 are nearer at the noisy end."""
    customize(PIPELINES["sd15"](), IMAGE, "sks dog", tmp_path / "out", **{**SMALL, "steps": 6, "rate": 1e-2})
    every, noisy = (
        export(tmp_path / "out", tmp_path / f"{t}.safetensors", at=t, base=PIPELINES["sd15"](), dtype="float32")
        for t in (0, 900)
    )
    assert every.difference[850] > noisy.difference[850]
    assert (every.rank, noisy.rank) == (8, 4)
    half = export(tmp_path / "out", tmp_path / "half.safetensors", strength=0.5, dtype="float32")
    a, b = (load_file(tmp_path / f"{n}.safetensors") for n in ("0", "half"))
    assert all(torch.allclose(b[k], a[k] * (0.5 if "lora_B" in k else 1)) for k in a)
    weak, full = load_customized(PIPELINES["sd15"](), tmp_path / "out", strength=0.0), PIPELINES["sd15"]()
    assert numpy.abs(pixels(weak) - pixels(full)).max() < 1e-6
    assert half.difference == {}


def test_refused_exports(tmp_path):
    settings = {**SMALL, "optimizer": "adamw", "precision": "no"}
    customize(PIPELINES["flux"](), IMAGE, "sks dog", tmp_path / "out", **settings)
    x = tmp_path / "x.safetensors"
    for call, words in (
        (lambda: export(tmp_path / "out", x, form="gguf"), "form diffusers, kohya, comfyui"),
        (lambda: export(tmp_path / "out", x, dtype="int8"), "float16, bfloat16, float32"),
        (lambda: export(tmp_path / "out", tmp_path / "x.bin"), r"\.safetensors file"),
        (lambda: export(tmp_path, x), "no finished customization"),
        (lambda: export(tmp_path / "out", x, form="kohya"), "UNets only"),
        (lambda: export(tmp_path / "out", x, at=1001), "from 0 to 1000"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not x.exists()


# -- bases of other forms ----------------------------------------------------------------------------------------------

RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
          "skip_connection": "conv_shortcut"}  # fmt: skip
OF_VAE = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}


def as_one_file(pipe):
    """The weights of a small Stable Diffusion 1.5 under the names of a checkpoint as CompVis wrote them."""
    found, unet, vae = {}, pipe.unet.state_dict(), pipe.vae.state_dict()

    def take(new, old, source, names=None):
        for k, v in source.items():
            if not k.startswith(old):
                continue
            rest = k.removeprefix(old)
            if names is not None:
                for theirs, ours in names.items():
                    if rest.startswith(ours + "."):
                        found[new + theirs + rest.removeprefix(ours)] = v
                        break
            else:
                found[new + rest] = v

    u = "model.diffusion_model."
    take(f"{u}time_embed.0", "time_embedding.linear_1", unet)
    take(f"{u}time_embed.2", "time_embedding.linear_2", unet)
    take(f"{u}input_blocks.0.0", "conv_in", unet)
    take(f"{u}out.0", "conv_norm_out", unet)
    take(f"{u}out.2", "conv_out", unet)
    for i in (0, 1):  # two levels of one layer
        take(f"{u}input_blocks.{1 + 2 * i}.0.", f"down_blocks.{i}.resnets.0.", unet, RESNET)
        take(f"{u}input_blocks.{1 + 2 * i}.1.", f"down_blocks.{i}.attentions.0.", unet)
        take(f"{u}input_blocks.{2 + 2 * i}.0.op.", f"down_blocks.{i}.downsamplers.0.conv.", unet)
        for j in (0, 1):
            take(f"{u}output_blocks.{2 * i + j}.0.", f"up_blocks.{i}.resnets.{j}.", unet, RESNET)
            take(f"{u}output_blocks.{2 * i + j}.1.", f"up_blocks.{i}.attentions.{j}.", unet)
    take(f"{u}output_blocks.1.2.conv.", "up_blocks.0.upsamplers.0.conv.", unet)
    for i in (0, 1):
        take(f"{u}middle_block.{2 * i}.", f"mid_block.resnets.{i}.", unet, RESNET)
    take(f"{u}middle_block.1.", "mid_block.attentions.0.", unet)
    f = "first_stage_model."
    for side, blocks in (("encoder", "down"), ("decoder", "up")):
        for name in ("conv_in", "conv_out"):
            take(f"{f}{side}.{name}", f"{side}.{name}", vae)
        take(f"{f}{side}.norm_out", f"{side}.conv_norm_out", vae)
        for i in (0, 1):
            there = i if side == "encoder" else 1 - i
            for j in (0, 1):
                take(f"{f}{side}.{blocks}.{there}.block.{j}.", f"{side}.{blocks}_blocks.{i}.resnets.{j}.", vae, OF_VAE)
            scale = "downsample" if side == "encoder" else "upsample"
            take(f"{f}{side}.{blocks}.{there}.{scale}.conv.", f"{side}.{blocks}_blocks.{i}.{scale}rs.0.conv.", vae)
            take(f"{f}{side}.mid.block_{i + 1}.", f"{side}.mid_block.resnets.{i}.", vae, OF_VAE)
        own = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        take(f"{f}{side}.mid.attn_1.", f"{side}.mid_block.attentions.0.", vae, own)
    for k in [k for k in found if ".attn_1." in k and k.endswith("weight") and ".norm." not in k]:
        found[k] = found[k][:, :, None, None]
    take(f"{f}quant_conv", "quant_conv", vae)
    take(f"{f}post_quant_conv", "post_quant_conv", vae)
    take("cond_stage_model.transformer.", "", pipe.text_encoder.state_dict())
    if not any(k.startswith("cond_stage_model.transformer.text_model.") for k in found):
        for k in [k for k in found if k.startswith("cond_stage_model.transformer.")]:
            found[k.replace("transformer.", "transformer.text_model.", 1)] = found.pop(k)
    return {k: v.contiguous() for k, v in found.items()}


def test_a_single_file_is_a_base_with_the_folder_that_says_what_to_build(tmp_path):
    from safetensors.torch import save_file

    pipe = PIPELINES["sd15"]()
    pipe.save_pretrained(tmp_path / "config")
    save_file(as_one_file(pipe), tmp_path / "one.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        for file in (tmp_path / "config" / part).glob("*.safetensors"):
            file.unlink()  # the config needs no weights
    loaded = load_base(tmp_path / "one.safetensors", config=tmp_path / "config")
    assert numpy.abs(pixels(loaded) - pixels(PIPELINES["sd15"]())).max() < 1e-5
    done = customize(
        tmp_path / "one.safetensors", IMAGE, "sks dog", tmp_path / "out", config=tmp_path / "config", **SMALL
    )
    assert torch.isfinite(done.losses).all()


def test_flux_2s_loss_is_that_of_its_pipelines_own_parts():
    """Its text encoder is too large to build here: the conditioning is given, the rest is the real thing, small."""
    from types import SimpleNamespace

    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    from pondera.adapters import TLoraConfig
    from pondera.customize._denoisers import trainable

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=True,
    ).eval()  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=32, layers_per_block=1,
    ).eval()  # fmt: skip
    pipe = Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)
    pipe.encode_prompt = lambda prompt, device: (torch.ones(1, 3, 16), torch.zeros(1, 3, 4))
    made = trainable(pipe, 32)
    assert made.kind == "flux2"
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, _ = made.encode(image)
        assert torch.allclose(mean, pipe._encode_vae_image(image, None), atol=1e-5), "as its pipeline encodes an image"
    transformer.add_adapter(TLoraConfig(r=4, r_min=1, start="lora", target_modules=made.targets), "custom")
    noise, t = torch.randn_like(mean), torch.tensor([499])
    loss = made.loss(mean, noise, t, made.prompt("a sks dog"))
    loss.backward()
    assert any(p.grad is not None for p in transformer.parameters() if p.requires_grad)
    seen = {}
    hook = transformer.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    made.loss(mean, noise, t, made.prompt("a sks dog"))
    hook.remove()
    halfway = pipe._pack_latents((mean + noise) / 2)
    assert torch.allclose(seen["hidden_states"], halfway, atol=1e-6)
    assert seen["timestep"].item() == 0.5
    assert SimpleNamespace(**seen).img_ids.shape[-1] == 4
