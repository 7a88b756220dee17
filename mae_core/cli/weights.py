"""The commands on weights files: ``mae convert``, ``inspect``, ``export`` and ``weights list`` and ``get``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mae_core.cli.arguments import BRANCH_OPTION, Branch, DecoderHeads, Heads
from mae_core.errors import UserError, user_errors

catalogue = typer.Typer(no_args_is_help=True, help="Published weights: list them, get them.")
PROGRAMS = {"onnx": ".onnx", "torch-export": ".pt2"}
"""What ``mae export`` writes as one file that runs -> its ending."""
File = Annotated[Path, typer.Argument(help="A weights file, a run, a checkpoint, or a folder of timm or transformers.")]


Target = Annotated[
    str,
    typer.Option(
        "--to",
        help="official, mae_core, timm, huggingface, mmseg, mmpretrain, detectron2, mae_segmentation, torchvision or "
        "deit_3; also huggingface_5 (the names transformers 5 has in memory) and mmseg_beit.",
    ),
]
Out = Annotated[
    Path, typer.Option(help="What to write: a .safetensors or .pth file, or a folder for timm and transformers.")
]
SourceFormat = Annotated[
    str | None, typer.Option("--from", help="Format of the file; recognised by its names when left out.")
]
ImageSize = Annotated[
    tuple[int, int] | None, typer.Option(metavar="H W", help="Resize the positions to images of this size.")
]
PatchSize = Annotated[int | None, typer.Option(help="Resize the patch embedding to patches of this side.")]
InChans = Annotated[int | None, typer.Option(help="Adapt the patch embedding to this many channels.")]
Channels = Annotated[
    str | None,
    typer.Option(help="How channels are adapted: sum, mean_tile or new; default: sum for one channel, else mean_tile."),
]
PatchMethod = Annotated[str, typer.Option(help="How patches are resized: bicubic or pseudo_inverse.")]
Antialias = Annotated[
    bool, typer.Option("--antialias", help="Resize positions as timm does; the official code does not antialias.")
]
Grid = Annotated[
    tuple[int, int] | None,
    typer.Option(
        metavar="ROWS COLS", help="Grid of the positions, if it is not square and the file does not state it."
    ),
]
Reorder = Annotated[
    bool,
    typer.Option("--reorder-positions", help="Put mmpretrain's and MIMDet's row-first positions in official order."),
]
Drop = Annotated[list[str] | None, typer.Option(help="Pattern of tensors to leave out; repeatable.")]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Compare source and result on the same images; if they differ by more than 1e-4, nothing is written.",
    ),
]
ReportFile = Annotated[Path | None, typer.Option(help="Write what became of every tensor, as JSON.")]


def convert(
    source: File,
    to: Target,
    out: Out,
    source_format: SourceFormat = None,
    image_size: ImageSize = None,
    patch_size: PatchSize = None,
    in_chans: InChans = None,
    channels: Channels = None,
    patch_method: PatchMethod = "bicubic",
    antialias: Antialias = False,
    grid: Grid = None,
    reorder_positions: Reorder = False,
    drop: Drop = None,
    heads: Heads = None,
    decoder_heads: DecoderHeads = None,
    branch: Branch = None,
    check: Check = False,
    report: ReportFile = None,
) -> None:
    """Convert weights between formats: every tensor is accounted for, and --check compares the
    features of both.

    Example: mae convert mae_pretrain_vit_base.pth --to mmseg --out backbone.pth --check
    """
    with user_errors():
        from mae_core.atomic import write_json
        from mae_core.weights.resize import Adaptation
        from mae_core.weights.tools.convert import check_as_json, convert_file, summary

        if report is not None and report.exists():
            raise UserError(f"{report} exists; choose another --report")
        adaptation = Adaptation(
            image_size=image_size or None,
            patch_size=patch_size,
            in_chans=in_chans,
            channels=_one_of("--channels", channels, ("sum", "mean_tile", "new")),  # type: ignore[arg-type]
            patch=_one_of("--patch-method", patch_method, ("bicubic", "pseudo_inverse")),  # type: ignore[arg-type]
            antialias=antialias,
            grid=grid or None,
            reorder=reorder_positions,
        )
        account, comparison = convert_file(
            source,
            to,
            out,
            from_format=source_format,
            adaptation=adaptation,
            drop=drop or (),
            heads=heads,
            decoder_heads=decoder_heads,
            check=check,
            branch=branch,
            asked_as=BRANCH_OPTION,
        )
        account.print(of="the target's")
        if report is not None:
            write_json(report, {**account.as_dict(), "check": check_as_json(comparison)})
        typer.echo(summary(account, comparison, out))


def _one_of(option: str, value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise UserError(f"{option} {value} is not known; use {', '.join(known)}")
    return value


def inspect(
    file: File,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
    heads: Heads = None,
    branch: Branch = None,
) -> None:
    """Show what a weights file holds: format, architecture, sizes, target, what it can be used for and what it
    lacks."""
    with user_errors():
        from mae_core.weights.tools.inspect import describe_file, inspect_file

        show = inspect_file if as_json else describe_file
        found = show(file, heads=heads, branch=branch, asked_as=BRANCH_OPTION)
        typer.echo(json.dumps(found, indent=2, default=str) if as_json else found)


def export(
    file: File,
    out: Annotated[Path, typer.Option(help="The file or folder to write.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX: an encoder, or a classifier to its logits.")] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="The same as a program of torch.export (.pt2), for torch alone.")
    ] = False,
    timm: Annotated[bool, typer.Option("--timm", help='A folder for timm.create_model("local-dir:...").')] = False,
    huggingface: Annotated[
        bool, typer.Option("--huggingface", help="A folder for from_pretrained, with a card.")
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Store the weights of a program in 16 bits; it computes in 32.")
    ] = False,
    check: Check = False,
    heads: Heads = None,
    decoder_heads: DecoderHeads = None,
    branch: Branch = None,
) -> None:
    """Write weights for others: a folder of timm or transformers, or an encoder or classifier as ONNX or torch.export.

    Example: mae export runs/mine --onnx --out encoder.onnx
    """
    with user_errors():
        kinds = {"onnx": onnx, "torch-export": torch_export, "timm": timm, "huggingface": huggingface}
        chosen = [name for name, wanted in kinds.items() if wanted]
        if len(chosen) != 1:
            raise UserError("choose what to write: one of --onnx, --torch-export, --timm and --huggingface")
        if ending := PROGRAMS.get(chosen[0]):
            if out.suffix != ending:
                raise UserError(f"--out {out} has to end in {ending} for --{chosen[0]}")
            from mae_core.weights.tools.export import export_as_program

            options: dict[str, Any] = {"heads": heads, "branch": branch, "asked_as": BRANCH_OPTION}
            typer.echo(export_as_program(file, out, half=half, **options))
            return
        if half:
            raise UserError(
                f"--half is for --onnx and --torch-export; a folder of {chosen[0]} holds the numbers of the source"
            )
        from mae_core.weights.tools.convert import convert_file, summary

        if out.suffix:
            raise UserError(f"--out {out} has to be a folder, without a file ending")
        account, comparison = convert_file(
            file,
            chosen[0],
            out,
            heads=heads,
            decoder_heads=decoder_heads,
            check=check,
            branch=branch,
            asked_as=BRANCH_OPTION,
        )
        for note in account.notes:
            typer.echo(f"note: {note}")
        typer.echo(summary(account, comparison, out))


@catalogue.command("list")
def list_weights(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the published weights, of MAE and of others: content, pixel target, hash, licence, URL."""
    from dataclasses import asdict

    from mae_core.weights.catalogue import CATALOGUE, LICENCE, NOTICE

    if as_json:
        typer.echo(json.dumps([asdict(row) for row in CATALOGUE.values()], indent=2))
        return
    for row in CATALOGUE.values():
        typer.echo(f"{row.name}: {row.content}")
        hashed = " begins ".join(row.hashed) if row.hashed else "no hash published"
        typer.echo(f"    target {row.target or 'none'}, {hashed}, {row.licence}, {row.url}")
    typer.echo(f"Where the licence is {LICENCE}: {NOTICE}")


@catalogue.command("get")
def get(
    name: Annotated[str, typer.Argument(help="A name that mae weights list shows.")],
    out: Annotated[Path, typer.Option(help="The folder to put it in.")] = Path(),
    url: Annotated[str | None, typer.Option(help="A mirror of the file.")] = None,
) -> None:
    """Download published weights: an interrupted download continues, and the hash is checked."""
    with user_errors():
        from mae_core.weights.catalogue import CATALOGUE, get_weights

        path = get_weights(name, out, url=url, on_progress=_show_progress)
        row = CATALOGUE[name]
        typer.echo(row.notice, err=True)
        told = " begins ".join(row.hashed) if row.hashed else "no hash is published for it, so it was not checked"
        typer.echo(f"{path} ({told})")


def _show_progress(done: int, total: int) -> None:
    if total and (done == total or done % (64 << 20) < (1 << 20)):
        typer.echo(f"{done >> 20} of {total >> 20} MiB", err=True)
