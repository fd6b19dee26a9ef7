"""What training on one image can be given besides: a course of the rate, class images, a mask, a log, a base in four bits."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._files import write_atomically
from pondera.errors import BadInput, needs_extra

SCHEDULES = ("constant", "linear", "cosine")
LOG = "losses.csv"
HEAD = ("step", "timestep", "loss", "prior", "rate", "seconds")
CLASS = "class"  # folder of class images


def rate_share(schedule: str, step: int, steps: int, warmup: int) -> float:
    """Share of the rate at a 0-based step: a linear warm-up, then constant, or falling to 0 by a line or a cosine.

    >>> [rate_share("linear", s, 6, 2) for s in (0, 1, 2, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


class LossLog:
    """`losses.csv`: a row for each draw of timesteps. A run that goes on cuts off what it will do again.

    also: told the same rows, for TensorBoard or Weights & Biases.
    """

    def __init__(self, folder: Path, begun: int, also: Callable[[dict[str, float]], object] | None) -> None:
        self.path, self.also = folder / LOG, also
        rows = [row for row in read_log(folder) if row["step"] < begun]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(HEAD)
        writer.writerows([row[k] for k in HEAD] for row in rows)
        write_atomically(self.path, text.getvalue())
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def add(self, **row: float) -> None:
        self.file.write(",".join(f"{row[k]:.6g}" for k in HEAD) + "\n")
        if self.also is not None:
            self.also(row)

    def close(self) -> None:
        self.file.close()


def read_log(folder: Path) -> list[dict[str, float]]:
    """The rows of a log; one cut off by a kill is left out."""
    path = folder / LOG
    if not path.is_file():
        return []
    found = []
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                found.append({k: float(row[k]) for k in HEAD})
            except (TypeError, ValueError, KeyError):
                continue
    return found


def logger(log: str | None, name: str) -> Callable[[dict[str, float]], object] | None:
    """What else is told of each step: "tensorboard:FOLDER" or "wandb"; None for nothing.

    Raises: BadInput: for another word, or where the package is missing.
    """
    if log is None:
        return None
    kind, _, folder = log.partition(":")
    if kind == "tensorboard" and folder:
        with needs_extra("a log for TensorBoard", "tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        writer: Any = SummaryWriter(folder)

        def tell(row: dict[str, float]) -> None:
            for k in ("loss", "prior", "rate", "timestep"):
                if math.isfinite(row[k]):
                    writer.add_scalar(k, row[k], int(row["step"]))
            writer.flush()

        return tell
    if log == "wandb":
        try:
            import wandb  # type: ignore[import-not-found]
        except ImportError:
            raise BadInput("a log for Weights & Biases needs its package: pip install wandb") from None
        run = wandb.init(project="pondera-customize", name=name)
        return lambda row: run.log({k: v for k, v in row.items() if math.isfinite(v)}, step=int(row["step"]))
    raise BadInput(f"log is 'tensorboard:FOLDER' or 'wandb', got {log!r}")


def masks_of(given: Any, images: Sequence[Any], like: Float[Tensor, "n c h w"], side: int) -> Float[Tensor, "n 1 h w"]:
    """Where the loss counts: 1 on the latents of the subject, a mask an image.

    given: "alpha" (what is not transparent in the images), or as many images as there are to learn, white on the subject.
    A latent counts where any of its pixels is more white than black, as in the authors' FLUX trainer.
    """
    from PIL import Image

    from pondera.customize._denoisers import images_of

    if isinstance(given, str) and given == "alpha":
        shown: list[Any] = []
        for one in images:
            image = one if isinstance(one, Image.Image) else Image.open(one)
            if "A" not in image.getbands() and "transparency" not in image.info:
                raise BadInput("mask='alpha' needs images that are transparent around the subject, got an opaque one")
            shown.append(_upright(image.convert("RGBA"), image).getchannel("A"))
        given = shown
    many = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(many) != len(images):
        raise BadInput(f"customize needs a mask for each image, got {len(many)} for {len(images)}")
    pixels, _ = images_of(many, side)
    white = (pixels.mean(1, keepdim=True) > 0).float()
    found = nn.functional.adaptive_max_pool2d(white, like.shape[-2:])
    if empty := [i for i, m in enumerate(found) if not m.any()]:
        raise BadInput(f"mask {empty[0] + 1} is black all over; the subject has to be white")
    return found


def _upright(image: Any, was: Any) -> Any:
    """Turned as the camera was held; converting loses what says so."""
    from PIL import ImageOps

    if exif := was.getexif():
        image.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(image)


def class_images(
    pipe: Any, prompt: str, folder: Path, count: int, given: str | Path | None, sampling: dict[str, Any], batch: int = 4
) -> list[Path]:
    """Images of the class for prior preservation: those of a folder given, and else drawn by the base into out/class.

    A run that was stopped while it drew goes on with what is there.
    """
    if given is not None:
        known = (".png", ".jpg", ".jpeg", ".webp")
        found = sorted(p for p in Path(given).glob("*") if p.suffix.lower() in known)
        if not found:
            raise BadInput(f"class_images {given} has no images (.png, .jpg, .webp)")
        return found[:count]
    at = folder / CLASS
    at.mkdir(exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    for low in range(0, count, batch):
        missing = [i for i in range(low, min(low + batch, count)) if not (at / f"{i:04d}.png").is_file()]
        if not missing:
            continue
        generator = torch.Generator().manual_seed(10_000 + low)
        for i, image in zip(
            missing, pipe(prompt, num_images_per_prompt=len(missing), generator=generator, **sampling).images
        ):
            image.save(at / f".{i:04d}.png")
            (at / f".{i:04d}.png").replace(at / f"{i:04d}.png")
    return [at / f"{i:04d}.png" for i in range(count)]


def in_four_bits(model: nn.Module) -> int:
    """Hold the linear layers of a frozen denoiser as NF4 (bitsandbytes), in place; how many. As QLoRA holds its base.

    Layers whose sizes the kernels do not take stay.
    """
    with needs_extra("a base in four bits", "adapters"):
        import bitsandbytes as bnb  # type: ignore[import-untyped]
    n = 0
    for path, layer in [*model.named_modules()]:
        if type(layer) is not nn.Linear or layer.out_features % 32 or layer.in_features % 64:
            continue
        held = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype,
            compress_statistics=False, quant_type="nf4",
        )  # fmt: skip
        where = layer.weight.device
        held.weight = bnb.nn.Params4bit(
            layer.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False, module=held
        )
        if layer.bias is not None:
            held.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, held.to(where))
        n += 1
    return n
