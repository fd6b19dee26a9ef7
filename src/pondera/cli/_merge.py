"""`pondera merge`: several models in safetensors files into one, file to file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pondera.errors import BadInput

if TYPE_CHECKING:
    from pondera.merge import MergeReport


class _Merge(TyperGroup):
    """`pondera merge FILE.yml` is short for `pondera merge recipe FILE.yml`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].lower().endswith((".yml", ".yaml")):
            args = ["recipe", *args]
        return super().resolve_command(ctx, args)


merge = typer.Typer(
    cls=_Merge,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Merge models in safetensors files into one; all but match in little memory whatever their size. "
    "`pondera merge recipe.yml -o OUT` merges as a file says, in mergekit's form.",
)

FORMS = ".safetensors, .safetensors.index.json, a folder with one of them, or an id in the hub's local cache."
Out = Annotated[
    Path,
    typer.Option(
        "-o",
        "--out",
        help="The .safetensors file to write; or a new folder where the first model is none, and with --shard-size.",
    ),
]
ShardSize = Annotated[
    str | None, typer.Option(help="Write shards of at most this size and an index: 5GB, 500MB; a folder's are 50GB.")
]
Dtype = Annotated[str | None, typer.Option(help="Write numbers as this: bfloat16, float16, float32.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace the folder of an old model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole report, tensor by tensor, as JSON.")]
Pretrained = Annotated[Path, typer.Argument(help=f"The pretrained model: {FORMS}")]
FineTuned = Annotated[Path, typer.Argument(help="The model fine-tuned from it.")]
Alpha = Annotated[float, typer.Option(help="The way to the fine-tuned model, 0 to 1.")]


@merge.command()
def fuse(
    models: Annotated[list[Path], typer.Argument(help=f"Models fine-tuned from one base: {FORMS}")],
    to: Out,
    weights: Annotated[
        str | None, typer.Option(help="Weights that add up to one: 0.5,0.3,0.2; equal if left out.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="A name left out of the result, such as head; repeatable.")
    ] = None,
    shard_size: ShardSize = None,
    dtype: Dtype = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Average models fine-tuned on different tasks, as a better start for a new one."""
    from pondera.merge import fuse_files

    given = None if weights is None else _numbers(weights)
    _print(fuse_files(models, to, given, drop=drop or (), shard_size=shard_size, dtype=dtype, replace=replace), as_json)


@merge.command()
def stock(
    pretrained: Pretrained,
    finetuned: Annotated[
        list[Path], typer.Argument(help="Two or more models fine-tuned from it, alike but for the seed.")
    ],
    to: Out,
    filter_wise: Annotated[
        bool, typer.Option("--filter-wise", help="One angle for each row, not each tensor.")
    ] = False,
    shard_size: ShardSize = None,
    dtype: Dtype = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Model Stock: as good as a soup of many fine-tuned models, from two and the pretrained one."""
    from pondera.merge import model_stock_files

    _print(
        model_stock_files(
            pretrained, finetuned, to, filter_wise=filter_wise, shard_size=shard_size, dtype=dtype, replace=replace
        ),
        as_json,
    )


@merge.command()
def wise(
    pretrained: Pretrained,
    finetuned: FineTuned,
    to: Out,
    alpha: Alpha = 0.5,
    shard_size: ShardSize = None,
    dtype: Dtype = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """WiSE-FT: interpolate between a pretrained and a fine-tuned model, for data that shift."""
    from pondera.merge import wise_ft_files

    _print(
        wise_ft_files(pretrained, finetuned, to, alpha, shard_size=shard_size, dtype=dtype, replace=replace), as_json
    )


@merge.command()
def bang(
    pretrained: Pretrained,
    finetuned: FineTuned,
    to: Out,
    alpha: Alpha = 0.5,
    head: Annotated[list[str] | None, typer.Option(help="The classifier to scale, such as head; repeatable.")] = None,
    scale: Annotated[float, typer.Option(help="Factor on the fine-tuned classifier; below 1 calms it.")] = 1.0,
    shard_size: ShardSize = None,
    dtype: Dtype = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """BANG: WiSE-FT with a fine-tuned model that is not too sure of itself.

    BANG calms the model while it is fine-tuned, with pondera.merge.bang_loss; its merge is then the same as `wise`. For a
    model fine-tuned in the ordinary way name its --head, and the --scale that pondera.merge.balancing_scale finds on
    held-out data.
    """
    from pondera.merge import bang_files

    _print(
        bang_files(
            pretrained,
            finetuned,
            to,
            alpha,
            head=head or (),
            scale=scale,
            shard_size=shard_size,
            dtype=dtype,
            replace=replace,
        ),
        as_json,
    )


@merge.command()
def match(
    a: Annotated[Path, typer.Argument(help=f"The model that stays: {FORMS}")],
    b: Annotated[Path, typer.Argument(help="The model whose units are reordered to fit it.")],
    to: Out,
    spec: Annotated[Path | None, typer.Option(help="JSON file of which units may change places.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Or a task (a file with build() and data()) whose model is traced for that.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="0.5: the average; 1: the reordered model itself.")] = 0.5,
    restarts: Annotated[int, typer.Option(help="Starts of the search; the best is kept.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the orders the search takes.")] = 0,
    shard_size: ShardSize = None,
    dtype: Dtype = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Weight matching: average two models trained from different seeds, the units of one put in order first.

    Both models are held in memory for the match. Nets with batch norm need their statistics estimated again afterwards.
    """
    from torch import Generator

    from pondera.merge import PermutationSpec, match_files, trace_permutations

    if (spec is None) == (task is None):
        raise BadInput("match needs to know which units may change places: give either --spec or --task")
    if spec is not None:
        if not spec.is_file():
            raise BadInput(f"there is no file {spec}")
        known = PermutationSpec.from_json(spec.read_text(encoding="utf-8"))
    else:
        from pondera.lab import load_task

        loaded = load_task(str(task))
        train, _ = loaded.data()
        known = trace_permutations(loaded.build().eval(), loaded.inputs(tuple(t[:8] for t in train)))
    draw = Generator().manual_seed(seed)
    found, report = match_files(
        a,
        b,
        to,
        known,
        alpha=alpha,
        restarts=restarts,
        generator=draw,
        shard_size=shard_size,
        dtype=dtype,
        replace=replace,
    )
    if not as_json:
        print(found.summary())
    _print(report, as_json)


@merge.command()
def recipe(
    file: Annotated[
        Path, typer.Argument(help="YAML in mergekit's form; linear, model_stock, wise_ft or bang as merge_method.")
    ],
    to: Out,
    shard_size: ShardSize = None,
    dtype: Dtype = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Merge as a recipe file says; paths in it are seen from the current folder."""
    from pondera.merge import merge_recipe

    _print(merge_recipe(file, to, shard_size=shard_size, dtype=dtype, replace=replace), as_json)


def _print(report: "MergeReport", as_json: bool) -> None:
    print(json.dumps(report.to_json()) if as_json else report.summary())


def _numbers(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise BadInput(f"--weights takes numbers with commas between, got {text!r}") from None
