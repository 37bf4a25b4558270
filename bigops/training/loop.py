"""The training loop: one trainer that steps, evaluates, and can be put back where it was.

A trainer keeps the state of torch's random generators to itself: it takes it up for a step and
puts the caller's back afterwards. So a run disturbs nobody, two trainers can alternate step by
step without disturbing each other, and a checkpoint that holds this state resumes exactly. The
order of the data is drawn anew for every epoch from (seed, epoch) alone.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bigops.training.checkpoint import load_checkpoint, save_checkpoint
from bigops.training.data import Digits, load_digits
from bigops.training.outputs import InputError, check_writable, require
from bigops.training.recipes import Recipe


@dataclass(frozen=True)
class Evaluation:
    """Held-out data after an epoch; precision and recall are means over the classes."""

    loss: float
    accuracy: float
    precision: float
    recall: float


@dataclass
class TrainingRun:
    """What a run recorded, one loss and one time per step, one evaluation per epoch."""

    recipe: Recipe
    device: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """On held-out data, after the last epoch."""
        return self.evaluations[-1].accuracy

    @property
    def step_ms(self) -> float:
        """Median time of a step: forward, backward and optimizer. The first step warms up."""
        return 1e3 * statistics.median(self.step_seconds[1:] or self.step_seconds)

    @property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(p.numel() for p in self.model.parameters())


class Trainer:
    """A model, its optimizer, its data and its randomness; `epoch()` advances all of them."""

    def __init__(self, recipe: Recipe, data: Digits, device: torch.device) -> None:
        self._recipe = recipe
        self._device = device
        self._rng: dict[str, torch.Tensor] = {}
        with self._randomness():
            torch.manual_seed(recipe.seed)
            model = recipe.build().to(device)
        self._optimizer = recipe.optimizer(model)
        self._train = (recipe.inputs(data.train_images).to(device), data.train_labels.to(device))
        self._test = (recipe.inputs(data.test_images).to(device), data.test_labels.to(device))
        self.run = TrainingRun(recipe, str(device), model)

    def steps_per_epoch(self) -> int:
        return math.ceil(len(self._train[1]) / self._recipe.batch_size)

    def epoch(self) -> Iterator[float]:
        """Go through the training part once, giving each step's loss; then evaluate.

        Raises:
            InputError: the loss is not finite any more.
        """
        order = torch.Generator()
        order.manual_seed((self._recipe.seed << 20) + len(self.run.evaluations))
        rows = torch.randperm(len(self._train[1]), generator=order).to(self._device)
        for batch in rows.split(self._recipe.batch_size):
            yield self._step(self._train[0][batch], self._train[1][batch])
        self.run.evaluations.append(self._evaluate())

    def _step(self, inputs: torch.Tensor, labels: torch.Tensor) -> float:
        model = self.run.model.train()
        with self._randomness():
            start = time.perf_counter()
            self._optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            self._optimizer.step()
            value = loss.item()  # waits for the device, so the time is the step's
            self.run.step_seconds.append(time.perf_counter() - start)
        if not math.isfinite(value):
            raise InputError(
                f"lr: the loss is {value} after step {len(self.run.losses)}; "
                f"choose a smaller one than {self._recipe.lr}"
            )
        self.run.losses.append(value)
        return value

    @torch.no_grad()
    def _evaluate(self) -> Evaluation:
        metrics = require("sklearn.metrics", "scikit-learn")
        model = self.run.model.eval()
        logits = torch.cat([model(part) for part in self._test[0].split(256)])
        truth = self._test[1].cpu().numpy()
        guess = logits.argmax(1).cpu().numpy()
        precision, recall, _, _ = metrics.precision_recall_fscore_support(
            truth, guess, average="macro", zero_division=0
        )
        return Evaluation(
            loss=F.cross_entropy(logits, self._test[1]).item(),
            accuracy=float(metrics.accuracy_score(truth, guess)),
            precision=float(precision),
            recall=float(recall),
        )

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        cuda = self._device.type == "cuda"
        with torch.random.fork_rng(devices=[self._device] if cuda else []):
            if "cpu" in self._rng:
                torch.set_rng_state(self._rng["cpu"])
            if cuda and "cuda" in self._rng:
                torch.cuda.set_rng_state(self._rng["cuda"], self._device)
            yield
            self._rng["cpu"] = torch.get_rng_state()
            if cuda:
                self._rng["cuda"] = torch.cuda.get_rng_state(self._device)

    def state(self) -> dict[str, Any]:
        """Everything that changes from epoch to epoch."""
        return {
            "model": self.run.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rng": self._rng,
            "losses": self.run.losses,
            "step_seconds": self.run.step_seconds,
            "evaluations": [asdict(evaluation) for evaluation in self.run.evaluations],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.run.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rng.update(state["rng"])
        self.run.losses = list(state["losses"])
        self.run.step_seconds = list(state["step_seconds"])
        self.run.evaluations = [Evaluation(**fields) for fields in state["evaluations"]]


def train(
    recipe: Recipe,
    *,
    device: str = "cpu",
    data: Digits | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    on_step: Callable[[int, int, float], None] = lambda done, total, loss: None,
    on_epoch: Callable[[int, Evaluation], None] = lambda epoch, evaluation: None,
) -> TrainingRun:
    """Train a model on handwritten digits.

    Args:
        recipe: `CNNRecipe(...)` or `TransformerRecipe(...)`.
        device: "cpu", "cuda" or "cuda:N".
        data: other digits than `load_digits(recipe.seed)`.
        checkpoint: file to write after every epoch; it is replaced as a whole.
        resume: checkpoint to go on from. Only `epochs` may differ from the recipe it was written
            with; the losses are those of a run that never stopped (on the same device and thread
            count).
        on_step: called with (steps done, steps in all, loss).
        on_epoch: called with (epoch counted from 1, its evaluation).

    Raises:
        InputError: an argument cannot be used, or the loss stopped being finite.

    Example:
        >>> run = train(CNNRecipe(epochs=3))
        >>> len(run.evaluations)
        3
    """
    trainer = Trainer(recipe, data or load_digits(recipe.seed), usable_device(device))
    if checkpoint is not None:
        check_writable("checkpoint", checkpoint)
    if resume is not None:
        _restore(trainer, recipe, resume)
    total = recipe.epochs * trainer.steps_per_epoch()
    while (done := len(trainer.run.evaluations)) < recipe.epochs:
        for loss in trainer.epoch():
            on_step(len(trainer.run.losses), total, loss)
        if checkpoint is not None:
            save_checkpoint(checkpoint, recipe, trainer.state())
        on_epoch(done + 1, trainer.run.evaluations[-1])
    return trainer.run


def train_twins(
    recipe: Recipe,
    *,
    device: str = "cpu",
    data: Digits | None = None,
    on_step: Callable[[int, int, float, float], None] = lambda done, total, ours, plain: None,
) -> tuple[TrainingRun, TrainingRun]:
    """Train the model and its plain twin from one seed, alternating step by step.

    Alternating makes the ratio of their step times fair on a machine whose speed drifts. `on_step`
    is called with (steps done, steps in all, loss, the twin's loss).

    Returns:
        (run of bigops' model, run of the plain one).
    """
    data = data or load_digits(recipe.seed)
    ours, plain = (
        Trainer(replace(recipe, plain=plain), data, usable_device(device))
        for plain in (False, True)
    )
    total = recipe.epochs * ours.steps_per_epoch()
    for _ in range(recipe.epochs):
        for losses in zip(ours.epoch(), plain.epoch(), strict=True):
            on_step(len(ours.run.losses), total, *losses)
    return ours.run, plain.run


def usable_device(name: str) -> torch.device:
    """The torch device called `name`; InputError where this machine has none."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are known here")
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["not usable"])[0]
        raise InputError(f"device: {name!r} cannot be used ({reason})") from error
    return device


def _restore(trainer: Trainer, recipe: Recipe, path: str | os.PathLike[str]) -> None:
    saved, state = load_checkpoint(path)
    if saved.name != recipe.name:
        raise InputError(f"resume: {path} is a checkpoint of {saved.name}, not of {recipe.name}")
    for name, value in asdict(recipe).items():
        before = getattr(saved, name)
        if name != "epochs" and value != before:
            raise InputError(f"resume: {path} was trained with {name} {before}, not {value}")
    try:
        trainer.restore(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"resume: {path} is damaged or of another bigops") from error
    done = len(trainer.run.evaluations)
    if done > recipe.epochs:
        raise InputError(f"epochs: {path} has {done} behind it already, got {recipe.epochs}")
