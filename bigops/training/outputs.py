"""What training leaves behind: files that are whole or not there, a picture, a record."""

import importlib
import io
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigops.training.loop import TrainingRun


class InputError(ValueError):
    """What the user gave cannot be used; one line that names the argument."""


def require(module: str, package: str) -> Any:
    """Import a module of the optional `bench` extra.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f'{package} is not installed: pip install "bigops[bench]"') from error


def check_writable(argument: str, path: str | os.PathLike[str]) -> None:
    """Find out before hours of work, not after, that a file cannot be written.

    Raises:
        InputError: `path` is a folder, or its folder does not exist or takes no new file.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise InputError(f"{argument}: {path} is a folder")
    if not target.parent.is_dir():
        raise InputError(f"{argument}: there is no folder {target.parent}")
    if not os.access(target if _is_stream(target) else target.parent, os.W_OK):
        raise InputError(f"{argument}: {path} cannot be written")


def write_whole(argument: str, path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file that takes the place of `path` only once it is complete and on the disk.

    Whatever was there stays until then, through a crash or a kill too. The temporary name is
    fixed, so a killed run leaves at most one stray file, which the next run overwrites. A device
    or pipe, such as /dev/stdout, is written directly: it cannot be replaced.

    Raises:
        InputError: the disk is full, or the file system refuses.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(target.name + ".tmp")
    try:
        if _is_stream(target):
            target.write_bytes(content)
            return
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{argument}: {path} cannot be written ({error.strerror})") from error


def _is_stream(path: Path) -> bool:
    return path.exists() and not stat.S_ISREG(path.stat().st_mode)


def save_json(path: str | os.PathLike[str], run: "TrainingRun") -> None:
    """Write everything a run recorded, with the recipe that gives it again."""
    record = {
        "model": run.recipe.name,
        "recipe": asdict(run.recipe),
        "device": run.device,
        "parameters": run.parameters,
        "losses": run.losses,
        "step_seconds": run.step_seconds,
        "evaluations": [asdict(evaluation) for evaluation in run.evaluations],
    }
    write_whole("json", path, json.dumps(record, indent=1).encode() + b"\n")


def save_curve(path: str | os.PathLike[str], runs: Mapping[str, "TrainingRun"]) -> None:
    """Draw loss over steps, and held-out accuracy over epochs, of named runs as a PNG."""
    figures = require("matplotlib.figure", "matplotlib")
    figure = figures.Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, run) in enumerate(runs.items()):
        # A later run is dashed, so that twins whose curves coincide are both seen.
        colour, style = f"C{index}", "-" if index == 0 else "--"
        per_epoch = len(run.losses) / len(run.evaluations)
        ends = [per_epoch * (epoch + 1) for epoch in range(len(run.evaluations))]
        held_out = [evaluation.loss for evaluation in run.evaluations]
        accuracy = [100 * evaluation.accuracy for evaluation in run.evaluations]
        left.plot(run.losses, style, color=colour, linewidth=0.8, alpha=0.6, label=name)
        left.plot(
            ends, held_out, "o" + style, color=colour, markersize=4, label=f"{name}, held out"
        )
        right.plot(range(1, len(accuracy) + 1), accuracy, "o" + style, color=colour, label=name)
    left.set(xlabel="step", ylabel="cross-entropy")
    right.set(xlabel="epoch", ylabel="held-out accuracy, %")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole("curve", path, picture.getvalue())
