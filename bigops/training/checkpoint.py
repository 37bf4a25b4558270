"""Checkpoints: all that a run needs to go on exactly as if it had never stopped."""

import io
import os
import zipfile
from dataclasses import asdict
from typing import Any

import torch

from bigops.training.outputs import InputError, write_whole
from bigops.training.recipes import RECIPES, Recipe

_FORMAT = "bigops training checkpoint"
_VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], recipe: Recipe, state: dict[str, Any]) -> None:
    """Write `state` and the recipe that led to it; an older file stays until this one is whole."""
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "model_name": recipe.name,
        "recipe": asdict(recipe),
        "state": state,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole("checkpoint", path, buffer.getvalue())


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[Recipe, dict[str, Any]]:
    """Read a recipe and its state; only tensors and plain values are unpickled.

    Raises:
        InputError: the file is missing, unreadable, truncated, or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load does not look at the checksums it wrote
        if broken is not None:
            raise zipfile.BadZipFile(broken)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = error.strerror or "damaged"
        raise InputError(f"resume: {path} cannot be read ({reason})") from error
    except Exception as error:  # damaged files raise many types
        raise InputError(f"resume: {path} is damaged or not a checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(f"resume: {path} is not a checkpoint of bigops train")
    if content.get("version") != _VERSION:
        raise InputError(
            f"resume: {path} has format version {content.get('version')}, this bigops reads "
            f"{_VERSION}"
        )
    try:
        recipe = RECIPES[content["model_name"]](**content["recipe"])
        return recipe, dict(content["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"resume: {path} is damaged or of another bigops") from error
