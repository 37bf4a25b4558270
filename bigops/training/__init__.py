"""Train the reference models on real handwritten digits; what `bigops train` runs.

    from bigops.training import CNNRecipe, train

    run = train(CNNRecipe(epochs=5))
    print(run.losses[-1], run.accuracy)

`train_twins` trains a model and the same of torch's own layers side by side.
"""

from bigops.training.checkpoint import load_checkpoint
from bigops.training.data import Digits, load_digits, patches
from bigops.training.loop import Evaluation, TrainingRun, train, train_twins, usable_device
from bigops.training.outputs import InputError, check_writable, save_curve, save_json
from bigops.training.recipes import RECIPES, CNNRecipe, Recipe, TransformerRecipe

__all__ = [
    "RECIPES",
    "CNNRecipe",
    "Digits",
    "Evaluation",
    "InputError",
    "Recipe",
    "TrainingRun",
    "TransformerRecipe",
    "check_writable",
    "load_checkpoint",
    "load_digits",
    "patches",
    "save_curve",
    "save_json",
    "train",
    "train_twins",
    "usable_device",
]
