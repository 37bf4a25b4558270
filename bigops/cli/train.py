"""`bigops train`: the reference models on real handwritten digits."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from typing import Any

from ..training import (
    RECIPES,
    Evaluation,
    InputError,
    Recipe,
    TrainingRun,
    check_writable,
    load_checkpoint,
    save_curve,
    save_json,
    train,
)
from ..training.outputs import require
from . import UserError

_MODELS = {
    "cnn": "CNN with cross-entropy and SGD",
    "transformer": "Transformer on 4x4 patches with cross-entropy and bigops' Adam",
}
_RECIPE_OPTIONS = {
    "epochs": "times to go through the training part",
    "batch_size": "images a step",
    "lr": "learning rate",
    "seed": "of the split, the initial values, the order of the data and dropout",
    "d_model": "width of the model",
    "heads": "attention heads; they divide the width",
    "layers": "encoder layers",
    "ff": "width of the feed-forward layers",
    "dropout": "rate; above 0, attention takes a slower path in training and says so",
}


def add_parser(subparsers: Any) -> None:
    """Add `train` and its models to the command line."""
    about = "Train a reference model on handwritten digits (scikit-learn's, enlarged to 28x28)."
    parser = subparsers.add_parser("train", help=about, description=about)
    models = parser.add_subparsers(dest="model", metavar="MODEL", required=True)
    for name, text in _MODELS.items():
        _add_model(models.add_parser(name, help=text, description=text + "."), RECIPES[name])


def _add_model(parser: argparse.ArgumentParser, recipe: type[Recipe]) -> None:
    # What is not given is left out of the arguments: a resumed run takes it from its checkpoint.
    for field in fields(recipe):
        if field.name in _RECIPE_OPTIONS:
            parser.add_argument(
                "--" + field.name.replace("_", "-"),
                type=type(field.default),
                default=argparse.SUPPRESS,
                metavar="N" if isinstance(field.default, int) else "X",
                help=f"{_RECIPE_OPTIONS[field.name]} (default: {field.default})",
            )
    parser.add_argument(
        "--plain",
        action="store_true",
        default=argparse.SUPPRESS,
        help="train the twin of torch's own layers and optimizer",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="write all that is needed to go on, every epoch"
    )
    parser.add_argument(
        "--resume",
        metavar="FILE",
        help="go on from a checkpoint with its settings (--epochs may be given anew), exactly as "
        "if the run had never stopped; FILE is written on unless --checkpoint names another",
    )
    parser.add_argument("--curve", metavar="PNG", help="write a picture of loss and accuracy")
    parser.add_argument("--json", metavar="FILE", help="write every loss, time and evaluation")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say; the exit status is 0 when done, 130 when interrupted."""
    try:
        return _run(args)
    except InputError as error:
        raise UserError(str(error)) from error


def _run(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    checkpoint = args.checkpoint or args.resume
    outputs = {"checkpoint": checkpoint, "curve": args.curve, "json": args.json}
    for argument, path in outputs.items():
        if path:
            check_writable(argument, path)
    if args.curve:
        require("matplotlib", "matplotlib")
    try:
        trained = _train(recipe, args.device, checkpoint, args.resume)
    except KeyboardInterrupt:
        again = f"; go on with: bigops train {recipe.name} --resume {checkpoint}"
        print("stopped" + (again if checkpoint else ""), file=sys.stderr)
        return 130
    if args.curve:
        save_curve(args.curve, {_title(recipe): trained})
    if args.json:
        save_json(args.json, trained)
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    kind = RECIPES[args.model]
    given = {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}
    if args.resume is None:
        return kind(**given)
    saved, _ = load_checkpoint(args.resume)
    # train() refuses what does not go with the checkpoint, another model among it.
    return replace(saved, **given) if isinstance(saved, kind) else kind(**given)


def _train(recipe: Recipe, device: str, checkpoint: str | None, resume: str | None) -> TrainingRun:
    require("rich", "rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        Remaining(),
    )

    def on_epoch(epoch: int, held_out: Evaluation) -> None:
        console.print(
            f"epoch {epoch:>2}/{recipe.epochs}  held out: loss {held_out.loss:.4f}  "
            f"accuracy {held_out.accuracy:.4f}  precision {held_out.precision:.4f}  "
            f"recall {held_out.recall:.4f}"
        )

    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(_title(recipe), total=None, loss=float("nan"))
        trained = train(
            recipe,
            device=device,
            checkpoint=checkpoint,
            resume=resume,
            on_step=lambda done, total, loss: progress.update(
                task, completed=done, total=total, loss=loss
            ),
            on_epoch=on_epoch,
        )
    console.print(
        f"{_title(recipe)}: {trained.parameters:,} parameters on {trained.device}, "
        f"{trained.step_ms:.2f} ms a step, held-out accuracy {trained.accuracy:.4f}"
    )
    return trained


def _title(recipe: Recipe) -> str:
    return recipe.name + (", plain" if recipe.plain else "")
