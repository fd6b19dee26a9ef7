"""One image to a custom diffusion model: train an adapter (T-LoRA by default) on a pipeline, save it, sample with it."""

import contextlib
import copy
import hashlib
import inspect
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from pondera._safetensors import appearing_file
from pondera.errors import BadInput, needs_extra

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WHO, ADAPTER = "customize", "custom"
_LATEST = "unfinished"  # folder of the checkpoint a stopped run goes on from
_KEYS = "base_model.model."  # PEFT's prefix of saved tensors


@dataclass(frozen=True)
class Defaults:
    """What is taken for a kind of base where nothing is said; `source` says whose it is."""

    steps: int
    r: int
    r_min: int | None
    optimizer: str
    rate: float
    clip: float | None
    precision: str
    guidance: float
    sampling_steps: int
    start: str
    source: str


_SDXL = "the authors' README for SD-XL: AdamW at 1e-4, no clipping, 800 steps, rank 64 and half of it at least"
_FLUX = (
    "the authors' FLUX trainer: Prodigy at 1, clipped at 1, 1,000 steps, rank 32 and 1 at least, bfloat16, guidance 3.5"
)
DEFAULTS = {
    "sdxl": Defaults(800, 64, None, "adamw", 1e-4, None, "no", 5.0, 25, "ortho", _SDXL),
    "sd": Defaults(800, 64, None, "adamw", 1e-4, None, "no", 5.0, 25, "ortho", f"no run of theirs; {_SDXL}"),
    "pixels": Defaults(800, 64, None, "adamw", 1e-4, None, "no", 5.0, 25, "ortho", f"no run of theirs; {_SDXL}"),
    "flux": Defaults(1000, 32, 1, "prodigy", 1.0, 1.0, "bf16", 3.5, 28, "lora", _FLUX),
    "flux2": Defaults(1000, 32, 1, "prodigy", 1.0, 1.0, "bf16", 4.0, 28, "lora", f"no run of theirs; {_FLUX}"),
    "sd3": Defaults(1000, 32, 1, "prodigy", 1.0, 1.0, "bf16", 7.0, 28, "lora", f"no run of theirs; {_FLUX}"),
    "sana": Defaults(1000, 32, 1, "prodigy", 1.0, 1.0, "bf16", 4.5, 20, "lora", f"no run of theirs; {_FLUX}"),
}


@dataclass(frozen=True)
class Customized:
    """What `customize` did.

    folder: where everything lies. steps: optimizer steps in all. resumed_at: the step a stopped run went on from, 0 for
    a run in one go. losses: one a step of this run. trainable: trained numbers. seconds: of training, this run. samples:
    the images drawn, one list a prompt.
    """

    folder: Path
    steps: int
    resumed_at: int
    losses: Tensor
    trainable: int
    seconds: float
    samples: dict[str, list[Path]] = field(default_factory=dict)

    def summary(self) -> str:
        """In plain words."""
        gone_on = f", going on from step {self.resumed_at}" if self.resumed_at else ""
        drawn = sum(len(v) for v in self.samples.values())
        half = max(len(self.losses) // 2, 1)
        first, last = (float(x.mean()) if len(x) else math.nan for x in (self.losses[:half], self.losses[half:]))
        return (
            f"{self.steps} steps on {self.trainable:,} numbers in {self.seconds:.0f} s{gone_on}; loss {first:.4f} in the first"
            f" half, {last:.4f} in the second; {drawn} samples; all in {self.folder}"
        )

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page of the run, one HTML file that opens offline; by default into its folder."""
        from pondera.report._customization import write

        return write(self.folder, path or self.folder / "page.html")


def customize(
    base: Any,
    image: Any,
    name: str,
    out: str | Path,
    *,
    template: str = "a photo of {}",
    prompts: Sequence[str] = (),
    adapter: Any | None = None,
    r: int | None = None,
    r_min: int | None = None,
    steps: int | None = None,
    optimizer: str | None = None,
    rate: float | None = None,
    clip: float | None = None,
    batch: int = 1,
    timesteps: tuple[int, int] | None = None,
    resolution: int | None = None,
    precision: str | None = None,
    gradient_checkpointing: bool = False,
    accumulate: int = 1,
    schedule: str = "constant",
    warmup: int = 0,
    min_snr: float | None = None,
    mask: Any | None = None,
    class_prompt: str | None = None,
    class_images: str | Path | None = None,
    class_count: int = 100,
    prior_weight: float = 1.0,
    four_bits: bool = False,
    seed: int = 0,
    save_every: int = 100,
    keep_every: int | None = None,
    per_prompt: int = 4,
    sampling_steps: int | None = None,
    guidance: float | None = None,
    device: str | torch.device | None = None,
    config: str | Path | None = None,
    download: bool = False,
    log: str | None = None,
    on_step: Callable[[int, float], object] | None = None,
    progress: bool = False,
) -> Customized:
    """Teach a diffusion pipeline one concept from one image.

    What it leaves in `out`: ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT's format; `load_customized`
    puts them back on a pipeline), ``pytorch_lora_weights.safetensors`` (T-LoRA without its mask, or a LoRA, which any
    diffusers pipeline loads by ``load_lora_weights(out)``), ``customization.json`` (what was asked), ``losses.csv``,
    ``page.html`` (the run to look at: samples along training, losses, settings), and with prompts ``samples/`` and
    ``grid.png``. Each ``step-00200/`` is the adapter as it was then, with a grid of its own, and loads as `out` does: whether
    400 or 800 steps is a choice made by looking.

    A run stopped at any moment goes on where its last checkpoint was when called again in the same words, and ends in the
    same adapter as a run in one go. A finished one, called again in the same words with prompts, draws them with the
    adapter there is.

    Args:
        base: a diffusers pipeline, or where one lies, as `load_base` takes it: a folder, a single file with its `config`, an
            id of the hub (from the cache; `download` brings it). Shapes of Stable Diffusion 1.5, SD-XL, FLUX, and the small
            base of `pondera.customize.glyphs`. A pipeline given as an object is left with the trained adapter on it; a
            customization it had is taken off first, and a LoRA it carries is fused into its weights, as diffusers'
            ``fuse_lora`` does, and trained on.
        image: path or PIL image; a list if there are a few of the same concept. The centre square is used, upright as the
            camera was held; what is transparent is put on white.
        name: the concept's name in prompts, a rare word and a class: "sks dog".
        out: folder to write; new, or one where the same run was stopped.
        template: the training prompt, ``{}`` stands for the name.
        prompts: what to draw when trained; ``{}`` or ``{name}`` stands for the name.
        adapter: a PEFT configuration; by default `TLoraConfig` with `r` and `r_min` on the layers of the paper.
        r, r_min, steps, optimizer, rate, clip, precision, guidance, sampling_steps: by the kind of base, as its authors
            have them, where they are not given. Stable Diffusion, SD-XL and the small base: rank 64, at least half of it,
            800 steps of AdamW at 1e-4 with decay 1e-4, no clipping, full precision; samples in 25 steps at guidance 5.0
            (README for SD-XL). FLUX: rank 32, at least 1, 1,000 steps of Prodigy at 1 with gradients clipped at 1, bfloat16,
            28 steps at 3.5 (their FLUX trainer). Ranks are lowered to the smallest adapted layer. optimizer: "adamw",
            "adamw8bit" (bitsandbytes', its state in 8 bits) or "prodigy" (pytorch_optimizer's; decoupled decay 1e-4, bias
            correction, safeguard warm-up). clip: largest norm of
            the gradients, 0 for none. precision: "no", "bf16" or "fp16" (a GPU only): autocast; the adapter itself stays
            in float32, and so does the VAE's encoder.
        batch: 1 (theirs).
        timesteps: train on t in this span only, of 0..T-1; all by default.
        resolution: pixels of the square training image; by default what the denoiser was built for.
        gradient_checkpointing: keep fewer activations, compute them twice.
        accumulate: draws of noise a step, of `batch` each, whose gradients are averaged.
        schedule, warmup: "constant" (theirs), "linear" or "cosine" to 0, after so many steps of rising.
        min_snr: gamma of Min-SNR weights of the timesteps (5 in its paper, arXiv 2303.09556); of UNets only.
        mask: where the subject is: an image (or one for each), white on it, or "alpha" for images that are transparent around
            it. The loss counts there alone, as the authors' FLUX trainer does on request.
        class_prompt: trains along on images of the class, "a photo of a dog", so that it stays what it was (prior preservation,
            DreamBooth): those in the folder `class_images`, else `class_count` drawn by the base first, into ``out/class``.
            Their loss counts `prior_weight` times (1; theirs where it is on).
        four_bits: hold the denoiser's own weights as NF4 (bitsandbytes), as QLoRA does; it stays so on a pipeline given.
        seed: of the adapter's start, the noise and the timesteps.
        save_every: steps between checkpoints that a stopped run goes on from.
        keep_every: steps between the adapters that are kept, a quarter of all by default; 0 keeps none.
        per_prompt: images a prompt.
        device: by default a GPU if there is one.
        config, download: of a base that is a single file, and of one of the hub.
        log: also log to "tensorboard:FOLDER", or to "wandb" (whose package must be there).
        on_step: called with the number of steps done and the loss after each; what it returns True for ends the run there.
        progress: show a bar.

    Returns: `Customized`; its ``.summary()`` says it in words.
    Raises:
        BadInput: a base that is not a pipeline that can be trained, something that is not an image, an `out` that holds
            another or a finished customization, settings that make no sense. Nothing is written then.
    Paper: Soboleva et al. 2025, arXiv 2507.05964.

    >>> from tempfile import mkdtemp
    >>> from PIL import Image
    >>> from pondera.customize.glyphs import base
    >>> picture = Image.new("RGB", (16, 16), "orange")
    >>> done = customize(base(), picture, "sks glyph", mkdtemp() + "/out", template="a {}", r=4, steps=2)
    >>> done.steps, done.folder.joinpath("adapter_model.safetensors").exists()
    (2, True)
    """
    from pondera.customize import _extras as extras
    from pondera.customize._denoisers import images_of, min_snr_weight, pick, trainable

    asked_for = [worded(prompt, name) for prompt in prompts]
    _check(name, template, batch=batch, accumulate=accumulate, save_every=save_every, per_prompt=per_prompt)
    if schedule not in extras.SCHEDULES:
        raise BadInput(f"schedule is one of {', '.join(extras.SCHEDULES)}, got {schedule!r}")
    if min_snr is not None and not 0 < min_snr < math.inf:
        raise BadInput(f"customize needs min_snr above 0, got {min_snr!r}")
    tell = extras.logger(log, name)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if precision is not None and precision not in PRECISIONS:
        raise BadInput(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp16" and where.type == "cpu":
        raise BadInput("fp16 training needs a GPU; on a CPU use precision 'bf16' or 'no'")
    pipe = load_base(base, PRECISIONS[precision or _usual_precision(base)], config=config, download=download)
    settle(pipe)
    made = trainable(pipe, resolution)
    usual = DEFAULTS[made.kind]
    steps = usual.steps if steps is None else steps
    optimizer, clip = optimizer or usual.optimizer, usual.clip if clip is None else clip
    rate = (usual.rate if optimizer == usual.optimizer else RATES.get(optimizer, 0.0)) if rate is None else rate
    precision = precision or usual.precision
    _check_training(steps, optimizer, rate, clip)
    pixels, edges = images_of(image, made.side)
    horizon = int(pipe.scheduler.config.num_train_timesteps)
    span = timesteps or (0, horizon)
    if not 0 <= span[0] < span[1] <= horizon:
        raise BadInput(f"timesteps needs 0 <= first < last <= {horizon}, got {span}")
    if r_min is None and r is None:
        r_min = usual.r_min
    chosen = adapter if adapter is not None else _default_adapter(made, usual.r if r is None else r, r_min)
    if chosen.target_modules is None:
        chosen.target_modules = set(made.targets)

    folder = Path(out)
    asked = {
        "name": name, "template": template, "steps": steps, "optimizer": optimizer, "rate": rate, "clip": clip or 0.0,
        "batch": batch, "timesteps": list(span), "side": made.side, "precision": precision, "seed": seed,
        "base": type(pipe).__name__, "image": hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16],
        **_said(
            accumulate=(accumulate, 1), schedule=(schedule, "constant"), warmup=(warmup, 0), min_snr=(min_snr, None),
            mask=(_of_mask(mask), None), class_prompt=(class_prompt, None), prior_weight=(prior_weight, 1.0),
            four_bits=(four_bits, False),
        ),
        "adapter": _plain({k: v for k, v in chosen.to_dict().items() if v is not None and k != "revision"}),
    }  # fmt: skip
    sampling: dict[str, Any] = {
        "per_prompt": per_prompt, "steps": sampling_steps or usual.sampling_steps, "side": made.side, "seed": seed,
        "guidance": usual.guidance if guidance is None else guidance,
    }  # fmt: skip
    if _claim(folder, asked, bool(asked_for)):
        load_customized(pipe, folder)
        samples = draw_samples(pipe.to(where), asked_for, folder, **sampling)
        count = sum(x.numel() for n, x in made.denoiser.named_parameters() if "pondera" in n or "lora" in n)
        done = Customized(folder, steps, steps, torch.zeros(0), count, 0.0, samples)
        done.report()
        return done

    pipe.to(where)
    denoiser = made.denoiser
    denoiser.requires_grad_(False)
    many = list(image) if isinstance(image, (list, tuple)) else [image]
    with torch.no_grad():
        mean, deviation = made.encode(pixels.to(where))
        told = [made.prompt(template.format(name), edge) for edge in edges]
        conditions = [{k: v.to(where) for k, v in one.items()} for one in told]
    inside = None if mask is None else extras.masks_of(mask, many, mean, made.side).to(where)
    if min_snr is not None:
        min_snr_weight(made, torch.zeros(1, dtype=torch.long), min_snr)
    if four_bits:
        extras.in_four_bits(denoiser)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, part, None) is not None:
            getattr(pipe, part).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser.add_adapter(chosen, ADAPTER)
    if gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    mover = _optimizer(optimizer, trained, rate)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    _begin(folder, asked)
    prior = None
    if class_prompt is not None:
        drawing = {"num_inference_steps": sampling["steps"], "guidance_scale": sampling["guidance"]}
        denoiser.disable_adapters()
        with torch.no_grad():
            paths = extras.class_images(
                pipe, class_prompt, folder, class_count, class_images, drawing | _size(pipe, made.side)
            )
            seen, sides = images_of(paths, made.side)
            law = [made.encode(one[None].to(where)) for one in seen]
            also = made.prompt(class_prompt, sides[0])
        denoiser.enable_adapters()
        for p in trained:  # disabling froze them
            p.requires_grad_(True)
        prior = (
            torch.cat([m for m, _ in law]),
            torch.cat([d for _, d in law]),
            {k: v.to(where) for k, v in also.items()},
        )
    draw, draw_class = Generator().manual_seed(seed), Generator().manual_seed(seed + 1)
    begun = _go_on(folder, denoiser, mover, scaler, draw, draw_class)

    losses = torch.full((steps - begun,), math.nan)
    base_rates = [group["lr"] for group in mover.param_groups]
    every = max(1, steps // 4) if keep_every is None else keep_every
    started, denoiser_mode = time.perf_counter(), denoiser.training

    def one_loss(latents: Tensor, t: Tensor, noise: Tensor, condition: dict[str, Tensor], within: Any) -> Tensor:
        weight = None if min_snr is None else min_snr_weight(made, t, min_snr)
        with _autocast(where, precision):
            return made.loss(latents, noise, t, condition, weight, within)

    def drawn(rows: Tensor, from_: tuple[Tensor, Tensor], g: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, timesteps and noise of some images."""
        t = torch.randint(*span, (len(rows),), generator=g).to(where)
        noise, wobble = (
            torch.randn(len(rows), *from_[0].shape[1:], generator=g).to(where, from_[0].dtype) for _ in range(2)
        )
        return from_[0][rows] + from_[1][rows] * wobble, t, noise

    denoiser.train()
    book = extras.LossLog(folder, begun, tell)
    _aside(pipe, made.name, where)
    with _bar(progress, steps, begun) as advance:
        for step in range(begun, steps):
            share = extras.rate_share(schedule, step, steps, warmup)
            for group, whole in zip(mover.param_groups, base_rates, strict=True):
                group["lr"] = whole * share
            mover.zero_grad(set_to_none=True)
            value = 0.0
            for _ in range(accumulate):
                rows = torch.randint(len(mean), (batch,), generator=draw)
                latents, t, noise = drawn(rows, (mean, deviation), draw)
                loss = one_loss(latents, t, noise, pick(conditions, rows), None if inside is None else inside[rows])
                kept = math.nan
                total = loss
                if prior is not None:
                    others = torch.randint(len(prior[0]), (batch,), generator=draw_class)
                    latents, t2, noise = drawn(others, prior[:2], draw_class)
                    of_class = one_loss(
                        latents, t2, noise, pick([prior[2]], torch.zeros(batch, dtype=torch.long)), None
                    )
                    kept, total = float(of_class.detach()), loss + prior_weight * of_class
                seen_loss = float(loss.detach())
                value += seen_loss / accumulate
                if not math.isfinite(seen_loss) or (prior is not None and not math.isfinite(kept)):
                    raise BadInput(
                        f"the loss became {seen_loss} at step {step}: lower the rate ({rate:g}) or use another precision "
                        f"({precision}); the last checkpoint is kept in {folder}"
                    )
                scaler.scale(total / accumulate if accumulate > 1 else total).backward()
                book.add(
                    step=step, timestep=float(t.float().mean()), loss=seen_loss, prior=kept, rate=rate * share,
                    seconds=time.perf_counter() - started,
                )  # fmt: skip
            if clip:
                scaler.unscale_(mover)
                torch.nn.utils.clip_grad_norm_(trained, clip)
            scaler.step(mover)
            scaler.update()
            losses[step - begun] = value
            advance(value)
            at = step + 1
            stop = on_step is not None and on_step(at, value) is True
            if every and at % every == 0 and at < steps and not stop:
                _keep(
                    folder / f"step-{at:05d}", pipe, made, chosen, {**asked, "at_step": at}, asked_for, sampling, where
                )
            if at % save_every == 0 and at < steps and not stop:
                _checkpoint(folder, denoiser, mover, scaler, (draw, draw_class), at)
            if stop:
                steps, losses = at, losses[: at - begun]
                break
    book.close()
    seconds = time.perf_counter() - started
    denoiser.train(denoiser_mode)
    if gradient_checkpointing:
        denoiser.disable_gradient_checkpointing()

    count = sum(p.numel() for p in trained)
    note = {"loss_of_last_quarter": _mean(losses[-max(steps // 4, 1) :]), "ended_at": steps, "trainable": count}
    _save(folder, made.name, denoiser, chosen, {**asked, **note})
    shutil.rmtree(folder / _LATEST, ignore_errors=True)
    pipe.to(where)
    samples = draw_samples(pipe, asked_for, folder, **sampling)
    done = Customized(folder, steps, begun, losses, count, seconds, samples)
    done.report()
    return done


def load_customized(pipe: Any, folder: str | Path, *, adapter_name: str = ADAPTER, strength: float = 1.0) -> Any:
    """Put a customization back on a pipeline of the same base, mask and all; returns the pipeline.

    Args:
        pipe: the pipeline, changed.
        folder: of a finished customization, or one of its ``step-...``.
        adapter_name: of the adapter on the denoiser.
        strength: the change is taken so many times; also later, by ``denoiser.set_adapters([adapter_name], [strength])``.
            With how many components it is sampled follows the mask; `pondera.adapters.at_timestep` holds that of one timestep.
    Raises: BadInput: if `folder` holds no finished customization or its tensors do not fit the pipeline.
    """
    import peft
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    import pondera.adapters  # noqa: F401  PEFT must know our methods before it reads the configuration
    from pondera.customize._denoisers import trainable

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise BadInput(f"{folder} holds no finished customization: adapter_config.json and adapter_model.safetensors")
    made = trainable(pipe)
    config = peft.PeftConfig.from_pretrained(folder)
    try:
        made.denoiser.add_adapter(config, adapter_name)
        found: Any = set_peft_model_state_dict(
            made.denoiser, load_file(folder / "adapter_model.safetensors"), adapter_name=adapter_name
        )
    except (RuntimeError, ValueError) as e:
        raise BadInput(f"the customization in {folder} does not fit this {type(pipe).__name__}: {e}") from e
    if found.unexpected_keys:
        raise BadInput(f"the customization in {folder} has tensors this pipeline lacks: {found.unexpected_keys[:3]}")
    made.denoiser.requires_grad_(False)
    if strength != 1.0:
        made.denoiser.set_adapters([adapter_name], [float(strength)])
    return pipe


def load_base(
    base: Any, dtype: torch.dtype = torch.float32, *, config: str | Path | None = None, download: bool = False
) -> Any:
    """A diffusers pipeline from where it lies.

    Args:
        base: a pipeline (given back as it is); a folder of one, of full or only of half-precision files (``fp16``); a single
            .safetensors checkpoint; or an id of the hub, "org/name", from its local cache.
        dtype: of its weights.
        config: for a single file, a folder of a pipeline of the same kind, its weights not needed: it says what is built.
        download: get what the cache lacks from the hub.
    Raises: BadInput: in one sentence, for what is none of these or does not load.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise BadInput(f"customize needs the extra: pip install 'pondera[diffusion]' ({error})") from None
    if isinstance(base, DiffusionPipeline):
        return base
    if not isinstance(base, str | Path):
        raise BadInput(f"base must be a diffusers pipeline or its folder, got {type(base).__name__}")
    kind = {} if dtype == torch.float32 else {"torch_dtype": dtype}
    if Path(base).is_file():
        return _single_file(Path(base), config, kind)
    folder = _located(base, download)
    index = folder / "model_index.json"
    if not index.is_file():
        raise BadInput(f"base {folder} is not a pipeline: it has no model_index.json")
    try:
        if json.loads(index.read_text()).get("_class_name") == "GlyphPipeline":
            from pondera.customize.glyphs import GlyphPipeline

            return GlyphPipeline.from_pretrained(folder, **kind)
        variant = {"variant": "fp16"} if _only_half(folder) else {}
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True, **kind, **variant)
    except Exception as e:  # whatever a broken folder makes diffusers, transformers or safetensors raise
        raise BadInput(
            f"base {folder} is not a pipeline that loads: {type(e).__name__}: {str(e).splitlines()[0]}"
        ) from e


def _located(base: str | Path, download: bool) -> Path:
    """The folder of a base, for an id of the hub that in its cache."""
    if Path(base).is_dir():
        return Path(base)
    name = Path(base).as_posix()
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) or Path(base).parent.exists():
        raise BadInput(f"base {base} is not a pipeline: there is no such folder")
    from huggingface_hub import snapshot_download

    try:
        skip = ["*.ckpt", "*.bin", "*.msgpack", "*.onnx*"]
        return Path(snapshot_download(name, local_files_only=not download, ignore_patterns=skip))
    except Exception as e:  # not in the cache, no network, no such id, no access
        if download:
            raise BadInput(f"base {name} cannot be brought from the hub: {' '.join(str(e).split())[:200]}") from None
        raise BadInput(
            f"base {name} is no folder here and not in the hub's cache; download=True (--download) brings it, or "
            f"`hf download {name}`"
        ) from None


def _only_half(folder: Path) -> bool:
    """Whether a part's weights are there in files called fp16 alone."""
    for part in (p for p in folder.iterdir() if p.is_dir()):
        half = [*part.glob("*.fp16.safetensors"), *part.glob("*.fp16-*.safetensors")]
        if half and len(half) == len(list(part.glob("*.safetensors"))):
            return True
    return False


def _single_file(path: Path, config: str | Path | None, kind: dict[str, Any]) -> Any:
    import diffusers

    if path.suffix != ".safetensors":
        raise BadInput(f"base {path} is a file, and only .safetensors files are read")
    if config is None:
        raise BadInput(
            f"base {path} is a single file: give config (--config) the folder of a pipeline of its kind, which says what to "
            "build"
        )
    index = Path(config) / "model_index.json"
    if not index.is_file():
        raise BadInput(f"config {config} is not the folder of a pipeline: it has no model_index.json")
    name = json.loads(index.read_text()).get("_class_name", "")
    made = getattr(diffusers, str(name), None)
    if made is None or not hasattr(made, "from_single_file"):
        raise BadInput(f"config {config} names {name or 'no class'}, which diffusers does not read from a single file")
    try:
        return made.from_single_file(str(path), config=str(config), local_files_only=True, **kind)
    except Exception as e:  # whatever a file that does not fit makes diffusers raise
        raise BadInput(
            f"base {path} does not load as {name}: {type(e).__name__}: {str(e).splitlines()[0][:200]}"
        ) from e


def _usual_precision(base: Any) -> str:
    """The precision that a base's kind has by default, told from its folder before it is loaded; full where it cannot be."""
    try:
        name = json.loads((Path(base) / "model_index.json").read_text()).get("_class_name", "")
    except (OSError, ValueError, TypeError):
        name = type(base).__name__
    known = ("Flux", "StableDiffusion3", "Sana")
    return DEFAULTS["flux"].precision if str(name).startswith(known) else "no"


def draw_samples(
    pipe: Any,
    prompts: Sequence[str],
    folder: Path,
    *,
    per_prompt: int,
    steps: int,
    guidance: float,
    side: int,
    seed: int,
) -> dict[str, list[Path]]:
    """Draw `per_prompt` images a prompt into folder/samples, and all of them, a row a prompt, into folder/grid.png."""
    from diffusers.utils import make_image_grid

    if not prompts:
        return {}
    (folder / "samples").mkdir(exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    size = _size(pipe, side)
    found: dict[str, list[Path]] = {}
    pictures = []
    for row, prompt in enumerate(prompts):
        generator = Generator().manual_seed(seed + row)
        images = pipe(
            prompt, num_inference_steps=steps, guidance_scale=guidance, num_images_per_prompt=per_prompt,
            generator=generator, **size,
        ).images  # fmt: skip
        pictures += images
        found[prompt] = [folder / "samples" / f"{row:02d}-{i}.png" for i in range(per_prompt)]
        for image, path in zip(images, found[prompt]):
            image.save(path)
    shown = [p if min(p.size) >= 64 else p.resize((p.width * 4, p.height * 4), 0) for p in pictures]
    make_image_grid(shown, rows=len(prompts), cols=per_prompt).save(folder / "grid.png")
    return found


def _size(pipe: Any, side: int) -> dict[str, Any]:
    """What a pipeline is told so that it draws squares of this side."""
    size: dict[str, Any] = {} if not hasattr(pipe, "vae") else {"height": side, "width": side}
    if "use_resolution_binning" in inspect.signature(type(pipe).__call__).parameters:
        size["use_resolution_binning"] = False  # the size is what was trained on
    return size


# -- inside -----------------------------------------------------------------------------------------------------------


RATES = {"adamw": 1e-4, "adamw8bit": 1e-4, "prodigy": 1.0}  # of an optimizer that is not the base's usual one


def worded(prompt: str, name: str) -> str:
    """A prompt with the concept's name where ``{}`` or ``{name}`` stands; one without either stays.

    >>> worded("a {name} on the moon", "sks dog")
    'a sks dog on the moon'
    """
    if not isinstance(prompt, str):
        raise BadInput(f"customize takes prompts as text, got {type(prompt).__name__}")
    left = re.sub(r"\{(name)?\}", "", prompt)
    if "{" in left or "}" in left:
        raise BadInput(f"a prompt has {{}} or {{name}} where the name stands, and no other braces; got {prompt!r}")
    return re.sub(r"\{(name)?\}", lambda _: name, prompt)


def settle(pipe: Any) -> None:
    """Take a customization off a pipeline, and fuse a LoRA it carries into its weights: what is left are plain layers."""
    for part in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, part, None)
        held = dict(getattr(model, "peft_config", None) or {})
        if model is None or not held:
            continue
        if ADAPTER in held:
            model.delete_adapters(ADAPTER)
            held.pop(ADAPTER)
        from peft.tuners.tuners_utils import BaseTunerLayer

        for path, layer in [*model.named_modules()]:
            if not isinstance(layer, BaseTunerLayer):
                continue
            if held:
                try:
                    layer.merge()  # those that are active, at their weights
                except (BadInput, ValueError, NotImplementedError, AttributeError) as error:
                    raise BadInput(
                        f"the pipeline carries the adapter {', '.join(held)}, which cannot be fused to be trained on: {error}"
                    ) from None
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        model._hf_peft_config_loaded = False


def _optimizer(kind: str, trained: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    if kind == "adamw8bit":
        with needs_extra("customize with AdamW in 8 bits", "adapters"):
            import bitsandbytes as bnb  # type: ignore[import-untyped]
        small: torch.optim.Optimizer = bnb.optim.AdamW8bit(trained, lr=rate, betas=(0.9, 0.999), weight_decay=1e-4)
        return small
    with needs_extra("customize with Prodigy", "diffusion"):
        from pytorch_optimizer import Prodigy
    made: torch.optim.Optimizer = Prodigy(
        trained, lr=rate, betas=(0.9, 0.999), weight_decay=1e-4, weight_decouple=True, bias_correction=True,
        safeguard_warmup=True,
    )  # fmt: skip
    return made


def _said(**settings: tuple[Any, Any]) -> dict[str, Any]:
    """Settings that are not as they are when nothing is said, so that runs of before go on."""
    return {k: v for k, (v, usual) in settings.items() if v != usual}


def _of_mask(mask: Any) -> str | None:
    """What tells one mask from another."""
    if mask is None or isinstance(mask, str):
        return mask
    many = list(mask) if isinstance(mask, (list, tuple)) else [mask]
    parts = [
        Path(m).read_bytes() if isinstance(m, (str, Path)) and Path(m).is_file() else str(m).encode() for m in many
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _aside(pipe: Any, denoiser: str, where: torch.device) -> None:
    """The parts that are not trained wait on the CPU: their work is done, latents and prompts are kept."""
    if where.type == "cpu":
        return
    for name, part in pipe.components.items():
        if name != denoiser and isinstance(part, torch.nn.Module):
            part.to("cpu")
    torch.cuda.empty_cache()


def _keep(
    at: Path, pipe: Any, made: Any, config: Any, note: dict[str, Any], prompts: Sequence[str], sampling: dict[str, Any],
    where: torch.device,
) -> None:  # fmt: skip
    """The adapter as it is now, in a folder of its own, with a grid: one image a prompt. Nothing is drawn from the run's draws."""
    if (at / "customization.json").exists():
        return
    at.mkdir(exist_ok=True)
    _save(at, made.name, made.denoiser, config, note)
    if not prompts:
        return
    made.denoiser.eval()
    pipe.to(where)
    with torch.random.fork_rng(), torch.no_grad():
        draw_samples(pipe, prompts, at, **{**sampling, "per_prompt": 1})
    _aside(pipe, made.name, where)
    made.denoiser.train()


def _check(name: str, template: str, **counts: object) -> None:
    if not name.strip():
        raise BadInput("customize needs a name for the concept, such as 'sks dog'; got an empty one")
    if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
        raise BadInput(f"template needs one {{}} where the name stands, got {template!r}")
    for what, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(f"customize needs {what} of at least 1, got {value!r}")


def _check_training(steps: int, optimizer: str, rate: float, clip: float | None) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BadInput(f"customize needs steps of at least 1, got {steps!r}")
    if optimizer not in RATES:
        raise BadInput(f"optimizer is one of {', '.join(RATES)}, got {optimizer!r}")
    if not rate > 0 or not math.isfinite(rate):
        raise BadInput(f"customize needs a rate above 0, got {rate!r}")
    if clip is not None and not 0 <= clip < math.inf:
        raise BadInput(f"customize needs a clip of at least 0, got {clip!r}")


def _default_adapter(made: Any, r: int, r_min: int | None) -> Any:
    """T-LoRA as in the paper; FLUX gets the vanilla start, which the paper uses there. r is cut to the smallest layer."""
    from torch import nn

    from pondera.adapters import TLoraConfig

    sides = [
        min(m.in_features, m.out_features)
        for n, m in made.denoiser.named_modules()
        if isinstance(m, nn.Linear) and any(n == t or n.endswith("." + t) for t in made.targets)
    ]
    if not sides:
        raise BadInput(f"{type(made.denoiser).__name__} has no layers named {', '.join(made.targets)}")
    rank = min(r, *sides)
    start = DEFAULTS[made.kind].start
    least = None if r_min is None else min(r_min, rank)
    return TLoraConfig(r=rank, r_min=least, start=start, target_modules=list(made.targets))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in sorted(value.items())}
    if isinstance(value, set | tuple | list):
        return sorted((_plain(v) for v in value), key=str) if isinstance(value, set) else [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(getattr(value, "value", value))


def _claim(folder: Path, asked: dict[str, Any], draws: bool) -> bool:
    """Refuse a folder that holds something else; whether it holds this very customization, finished, to draw with."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"out {folder} is a file, a folder was needed")
    if (folder / "customization.json").exists():
        before = json.loads((folder / "customization.json").read_text())
        other = sorted(k for k in asked if before.get(k) != asked[k])
        if draws and not other:
            return True
        why = f"with other settings ({', '.join(other)})" if other else "(name prompts to draw with it)"
        raise BadInput(f"{folder} already holds a finished customization {why}; name another folder, or remove it")
    note = folder / _LATEST / "asked.json"
    if note.exists():
        before = json.loads(note.read_text())
        other = sorted(k for k in asked if before.get(k) != asked[k])
        if other:
            raise BadInput(
                f"{folder} holds a stopped run with other settings ({', '.join(other)}); call it in the same words to go "
                "on, or name another folder"
            )
    elif folder.is_dir() and any(p.name != _LATEST and not p.name.startswith(".") for p in folder.iterdir()):
        raise BadInput(f"out {folder} is not empty and holds no customization; name a new folder")
    return False


def _begin(folder: Path, asked: dict[str, Any]) -> None:
    """Make the folder, and note in it what was asked, so that a run stopped at any moment can be called again."""
    (folder / _LATEST).mkdir(parents=True, exist_ok=True)
    if not (folder / _LATEST / "asked.json").exists():
        _put(folder / _LATEST / "asked.json", json.dumps(asked).encode())


def _state(denoiser: Any) -> dict[str, Tensor]:
    from peft.utils import get_peft_model_state_dict

    found = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    return {k: v.detach().to("cpu").contiguous() for k, v in found.items()}


def _checkpoint(
    folder: Path, denoiser: Any, optimizer: Any, scaler: Any, draws: tuple[Generator, Generator], step: int
) -> None:
    """Everything a stopped run needs, in a file that is replaced whole."""
    state = {"step": step, "adapter": _state(denoiser), "optimizer": optimizer.state_dict()}
    state |= {"draw": draws[0].get_state(), "draw_class": draws[1].get_state()}
    state["scaler"] = scaler.state_dict()  # empty where it is off
    with appearing_file(folder / _LATEST / "state.pt", WHO) as file:
        torch.save(state, file)


def _go_on(folder: Path, denoiser: Any, optimizer: Any, scaler: Any, draw: Generator, draw_class: Generator) -> int:
    """Load the checkpoint of a stopped run, if there is one; the step to go on from."""
    from peft.utils import set_peft_model_state_dict

    path = folder / _LATEST / "state.pt"
    if not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True)
    except Exception as e:
        raise BadInput(f"the checkpoint {path} cannot be read ({e}); remove it to begin again") from e
    set_peft_model_state_dict(denoiser, state["adapter"], adapter_name=ADAPTER)
    optimizer.load_state_dict(state["optimizer"])
    if state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    draw.set_state(state["draw"])
    if "draw_class" in state:
        draw_class.set_state(state["draw_class"])
    return int(state["step"])


def _save(folder: Path, part: str, denoiser: Any, config: Any, note: dict[str, Any]) -> None:
    """The adapter in PEFT's format, as plain LoRA factors where it has them, and last the note that says it is whole."""
    from safetensors.torch import save

    from pondera.adapters.t_lora import TLoraConfig, plain_lora

    state = _state(denoiser)
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(folder)
    factors: dict[str, Tensor] = {}
    if isinstance(config, TLoraConfig):
        factors = {k: v.to("cpu") for k, v in plain_lora(denoiser, adapter_name=ADAPTER).items()}
    elif str(getattr(config.peft_type, "value", config.peft_type)) == "LORA" and config.lora_alpha == config.r:
        factors = state
    named = {f"{part}.{k}": v.contiguous() for k, v in factors.items()}
    _put(folder / "adapter_model.safetensors", save({_KEYS + k: v for k, v in state.items()}, {"format": "pt"}))
    if named:
        _put(folder / "pytorch_lora_weights.safetensors", save(named, {"format": "pt"}))
    _put(folder / "customization.json", (json.dumps(note, indent=1) + "\n").encode())


def _put(path: Path, content: bytes) -> None:
    with appearing_file(path, WHO) as file:
        file.write(content)


def _mean(x: Tensor) -> float | None:
    x = x[torch.isfinite(x)]
    return round(float(x.mean()), 6) if len(x) else None


def _autocast(where: torch.device, precision: str) -> Any:
    return contextlib.nullcontext() if precision == "no" else torch.autocast(where.type, PRECISIONS[precision])


@contextlib.contextmanager
def _bar(show: bool, steps: int, begun: int) -> Any:
    if not show:
        yield lambda loss: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        "training",
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bars:
        task = bars.add_task("training", total=steps, completed=begun, loss="-")
        recent: list[float] = []

        def advance(loss: float) -> None:
            recent.append(loss)
            bars.update(task, advance=1, loss=f"{sum(recent[-20:]) / len(recent[-20:]):.4f}")

        yield advance
