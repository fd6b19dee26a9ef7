"""`pondera compress`: a model in files made smaller, file to file."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pondera.cli._print import console, escape, new_table

if TYPE_CHECKING:
    from pondera.compress import CompressReport

compress = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make a model in safetensors files smaller, a layer at a time, in the memory of a few layers: by factors, few bits or "
    "zeros. With --calibration the model's outputs are kept, not only its weights.",
)

Model = Annotated[Path, typer.Argument(help="A folder of Hugging Face's, a .safetensors file or an index of shards.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to write, or a .safetensors file for a file.")]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="A text the model should keep doing well on: some thousand words, read by the folder's tokenizer."
    ),
]
Only = Annotated[str, typer.Option(help='Which layers, by a pattern of names: "*mlp*".')]
Head = Annotated[bool, typer.Option("--head", help="The output layer too.")]
ShardSize = Annotated[str | None, typer.Option(help="Write shards of at most this size: 5GB, 500MB.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace the folder of an old model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")]


@compress.command()
def svd(
    model: Model,
    out: Out,
    keep: Annotated[float, typer.Option(help="Numbers kept of each layer, above 0 to 1.")] = 0.8,
    calibration: Calibration = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Multiply the factors again: loads anywhere, and saves no bytes.")
    ] = False,
    only: Only = "*",
    head: Head = False,
    shard_size: ShardSize = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Factor linear layers into two of low rank; pondera.compress.load_compressed reads them."""
    from pondera.compress import svd_files

    common = {"calibration": calibration, "only": only, "head": head, "shard_size": shard_size, "replace": replace}
    _print(svd_files(model, out, keep=keep, merged=merged, **common), out, as_json)


@compress.command()
def quantize(
    model: Model,
    out: Out,
    bits: Annotated[int, typer.Option(help="2 to 8.")] = 4,
    group: Annotated[int, typer.Option(help="Entries of a row that share a scale.")] = 64,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="nf4: bitsandbytes' 4 bits, which transformers loads; packed: any bits, read by load_compressed; dense: loads "
            "anywhere, and saves no bytes. By default nf4 for a folder at 4 bits, else packed.",
        ),
    ] = "",
    calibration: Calibration = None,
    only: Only = "*",
    head: Head = False,
    shard_size: ShardSize = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Hold linear layers in few bits."""
    from pondera.compress import quantize_files

    form = form or ("nf4" if bits == 4 and group == 64 and out.suffix != ".safetensors" else "packed")
    common = {"calibration": calibration, "only": only, "head": head, "shard_size": shard_size, "replace": replace}
    _print(quantize_files(model, out, bits=bits, group=group, form=form, **common), out, as_json)


@compress.command()
def prune(
    model: Model,
    out: Out,
    keep: Annotated[float, typer.Option(help="Share of each row that is kept, above 0 to 1.")] = 0.5,
    pattern: Annotated[str | None, typer.Option(help="Keep 2:4 of every four neighbours, say, instead.")] = None,
    calibration: Calibration = None,
    only: Only = "*",
    head: Head = False,
    shard_size: ShardSize = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Set the least weights to zero: by size, or with calibration by what they do (Wanda)."""
    from pondera.compress import prune_files

    common = {"calibration": calibration, "only": only, "head": head, "shard_size": shard_size, "replace": replace}
    _print(prune_files(model, out, keep=keep, pattern=pattern, **common), out, as_json)


@compress.command()
def trim(
    model: Model,
    out: Out,
    calibration: Annotated[
        Path, typer.Option(help="A text on which each layer's outputs are kept; read by the folder's tokenizer.")
    ],
    epsilon: Annotated[float, typer.Option(help="How far outputs may move, as a share of them.")] = 0.05,
    only: Only = "*",
    head: Head = False,
    shard_size: ShardSize = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Take the sparsest weights that keep each layer's outputs within a tolerance (Net-Trim)."""
    from pondera.compress import trim_files

    common = {"only": only, "head": head, "shard_size": shard_size, "replace": replace}
    _print(trim_files(model, out, calibration=calibration, epsilon=epsilon, **common), out, as_json)


def _print(report: "CompressReport", out: Path, as_json: bool) -> None:
    from pondera._words import size_in_words

    if as_json:
        print(json.dumps(report.to_json()))
        return
    table = new_table(
        "weight", "what", "shape", "numbers held", "size", "was", "error", title=f"{report.method}: {out}"
    )
    for row in report.layers:
        what = ", ".join([row.how, *(f"{k} {_short(v)}" for k, v in row.facts.items())])
        shape = " x ".join(map(str, row.shape))
        sizes = (size_in_words(row.bits / 8), size_in_words(row.was_bits / 8))
        table.add_row(escape(row.name), what, shape, f"{row.numbers:,}", *sizes, f"{row.error:.3f} of {row.of}")
    console().print(table)
    console().print(escape(report.summary()), highlight=False)
    form = report.facts.get("form")
    said = {
        "factors": f"the factors load by pondera.compress.load_compressed({str(out)!r}), not by transformers alone",
        "packed": f"the codes load by pondera.compress.load_compressed({str(out)!r}), not by transformers alone",
        "nf4": "transformers loads it by itself, with bitsandbytes installed",
        "dense": "loads anywhere, and takes as many bytes as before",
    }
    console().print(escape(f"{out} written; {said.get(str(form), '')}"), highlight=False)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
