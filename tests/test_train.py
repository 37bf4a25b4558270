"""`bigops train`: it learns, it resumes exactly, and bad input leaves everything as it was."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bigops import training
from bigops.check import compare
from bigops.cli import main
from bigops.training import (
    CNNRecipe,
    Digits,
    InputError,
    Recipe,
    TransformerRecipe,
    load_checkpoint,
    train,
    train_twins,
)

pytest.importorskip("sklearn")

CNN = CNNRecipe(epochs=3, batch_size=16, seed=3)
TRANSFORMER = TransformerRecipe(
    epochs=3, batch_size=16, seed=3, d_model=16, heads=2, layers=1, ff=16, dropout=0.1
)
RECIPES = pytest.mark.parametrize("recipe", [CNN, TRANSFORMER], ids=lambda recipe: recipe.name)
pytestmark = pytest.mark.filterwarnings("ignore::bigops.FallbackWarning")

whole = training.load_digits(3)
few = Digits(
    whole.train_images[:60], whole.train_labels[:60], whole.test_images[:40], whole.test_labels[:40]
)


few_in_float64 = replace(
    few, train_images=few.train_images.double(), test_images=few.test_images.double()
)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigops.training.loop.load_digits", lambda seed: few)


def _same_run(one: training.TrainingRun, other: training.TrainingRun) -> None:
    assert one.losses == other.losses
    assert one.evaluations == other.evaluations
    state = other.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.model.state_dict().items())


def test_digits_are_split_by_class_and_by_seed() -> None:
    assert whole.train_images.shape == (1437, 1, 28, 28)
    assert whole.test_images.shape == (360, 1, 28, 28)
    assert whole.train_images.mean().abs() < 1e-4
    share = whole.test_labels.bincount() / whole.train_labels.bincount()
    assert share.max() - share.min() < 0.02
    again, other = training.load_digits(3), training.load_digits(4)
    assert torch.equal(whole.train_images, again.train_images)
    assert not torch.equal(whole.test_labels, other.test_labels)


def test_patches_are_tiles_in_reading_order() -> None:
    image = torch.arange(28.0 * 28).view(1, 1, 28, 28)
    tokens = training.patches(image)
    assert tokens.shape == (1, 49, 16)
    for row, column in ((0, 0), (0, 6), (3, 2), (6, 6)):
        tile = image[0, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(tokens[0, 7 * row + column], tile.flatten())


def test_cnn_learns_real_digits() -> None:
    some = replace(
        whole, train_images=whole.train_images[:400], train_labels=whole.train_labels[:400]
    )
    run = train(CNNRecipe(epochs=5, batch_size=8), data=some)
    assert len(run.losses) == len(run.step_seconds) == 5 * 50
    assert run.accuracy > 0.7
    assert run.evaluations[-1].loss < run.evaluations[0].loss / 2


@RECIPES
def test_one_recipe_gives_one_run_and_disturbs_nobody(recipe: Recipe) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train(recipe, data=few)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    _same_run(first, train(recipe, data=few))
    assert train(replace(recipe, seed=4), data=few).losses != first.losses


def test_every_epoch_has_an_order_of_its_own() -> None:
    run = train(replace(CNN, epochs=2, lr=1e-30), data=few)
    assert run.losses[:4] != run.losses[4:]
    assert run.evaluations[0] == run.evaluations[1]


@RECIPES
def test_twins_have_one_curve(recipe: Recipe) -> None:
    """Losses from one seed, by the error rule against the twin trained in float64."""
    recipe = replace(recipe, epochs=2, **({} if recipe is CNN else {"dropout": 0.0}))
    ours, plain = train_twins(recipe, data=few)
    assert plain.recipe.plain
    assert not ours.recipe.plain
    # Alone or alternating with its twin, a run is the same run.
    _same_run(ours, train(recipe, data=few))
    _same_run(plain, train(replace(recipe, plain=True), data=few))
    wide = train(_in_float64(plain.recipe), data=few_in_float64).losses
    losses = (torch.tensor(run.losses) for run in (ours, plain))
    assert compare("losses", *losses, torch.tensor(wide, dtype=torch.float64)).ok


def _in_float64(recipe: Recipe) -> Recipe:
    """A recipe whose model has the very same initial values, in float64."""
    kind = type(recipe)
    wide = type("Wide", (kind,), {"build": lambda self: kind.build(self).double()})
    return wide(**asdict(recipe))


@RECIPES
def test_resumed_equals_never_stopped(recipe: Recipe, tmp_path: Path) -> None:
    never = train(recipe, data=few)
    file = tmp_path / "run.pt"
    train(replace(recipe, epochs=1), data=few, checkpoint=file)
    train(replace(recipe, epochs=2), data=few, resume=file, checkpoint=file)
    torch.manual_seed(99)
    _same_run(never, train(recipe, data=few, resume=file))


KILLED = """
import os, signal, sys
import torch
from bigops.training import loop, outputs
from bigops.training import *

torch.set_num_threads({threads})
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

whole = load_digits(3)
few = Digits(whole.train_images[:60], whole.train_labels[:60],
             whole.test_images[:40], whole.test_labels[:40])
def on_step(done, total, loss):
    if {where!r} == "in a step" and done == 6:
        die()
    if {where!r} == "in writing" and done == 8:
        outputs.os.fsync = die
train({recipe!r}, data=few, checkpoint=sys.argv[1], on_step=on_step)
"""


@pytest.mark.parametrize(
    ("recipe", "where"), [(TRANSFORMER, "in a step"), (CNN, "in writing")], ids=["step", "write"]
)
def test_killed_and_resumed_equals_never_killed(recipe: Recipe, where: str, tmp_path: Path) -> None:
    """Killed in the second of three epochs, of four steps each."""
    file = tmp_path / "run.pt"
    code = KILLED.format(threads=torch.get_num_threads(), where=where, recipe=recipe)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(file)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(load_checkpoint(file)[1]["evaluations"]) == 1
    resumed = train(recipe, data=few, resume=file, checkpoint=file)
    _same_run(train(recipe, data=few), resumed)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("plain", [False, True])
def test_command_writes_what_it_was_asked_for(
    plain: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve, record, file = (tmp_path / name for name in ("curve.png", "run.json", "run.pt"))
    words = ["train", "transformer", "--epochs", "2", "--d-model", "16", "--heads", "2"]
    words += ["--curve", str(curve), "--json", str(record), "--checkpoint", str(file)]
    assert main(words + ["--plain"] * plain) == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("epoch  2/2", "accuracy", "precision", "recall", "ms a step")
    )
    assert curve.read_bytes().startswith(b"\x89PNG")
    written = json.loads(record.read_text())
    assert written["recipe"] == {
        "plain": plain,
        "epochs": 2,
        "batch_size": 32,
        "lr": 0.001,
        "seed": 0,
        "d_model": 16,
        "heads": 2,
        "layers": 2,
        "ff": 128,
        "dropout": 0.0,
    }
    assert len(written["losses"]) == len(written["step_seconds"]) == 4
    assert {"loss", "accuracy", "precision", "recall"} == set(written["evaluations"][1])
    # The settings come from the checkpoint; only the number of epochs is new.
    more = ["train", "transformer", "--resume", str(file), "--epochs", "3", "--json", str(record)]
    assert main(more) == 0
    longer = json.loads(record.read_text())
    assert longer["losses"][:4] == written["losses"]
    assert longer["recipe"] == {**written["recipe"], "epochs": 3}
    assert len(load_checkpoint(file)[1]["losses"]) == 6


BAD = [
    ("--epochs 0", "epochs"),
    ("--batch-size 0", "batch_size"),
    ("--lr nan", "lr"),
    ("--lr -0.1", "lr"),
    ("--lr 0", "lr"),
    ("--lr inf", "lr"),
    ("--lr 1e30", "lr"),
    ("--seed -1", "seed"),
    ("--device nonsense", "device"),
    ("--device meta", "device"),
    ("--device cuda:99", "device"),
    ("--checkpoint {tmp}", "checkpoint"),
    ("--checkpoint {tmp}/no/run.pt", "checkpoint"),
    ("--curve {tmp}/no/curve.png", "curve"),
    ("--json {tmp}/no/run.json", "json"),
    ("--resume {tmp}/none.pt", "resume"),
    ("--resume {tmp}", "resume"),
    ("--resume {tmp}/truncated.pt", "resume"),
    ("--resume {tmp}/flipped.pt", "resume"),
    ("--resume {tmp}/empty.pt", "resume"),
    ("--resume {tmp}/text.pt", "resume"),
    ("--resume {tmp}/other.pt", "resume"),
    ("--resume {tmp}/wrong.pt", "resume"),
    ("--resume {tmp}/transformer.pt", "resume"),
    ("--resume {tmp}/good.pt --lr 0.5", "resume"),
    ("--resume {tmp}/good.pt --epochs 1", "epochs"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("checkpoints")
    good = tmp / "good.pt"
    train(replace(CNN, epochs=2), data=few, checkpoint=good)
    train(replace(TRANSFORMER, epochs=1), data=few, checkpoint=tmp / "transformer.pt")
    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0x40
    (tmp / "flipped.pt").write_bytes(flipped)
    (tmp / "truncated.pt").write_bytes(content[: len(content) * 2 // 3])
    (tmp / "empty.pt").write_bytes(b"")
    (tmp / "text.pt").write_text("not a checkpoint\n")
    torch.save({"weights": torch.zeros(3)}, tmp / "other.pt")
    wrong = torch.load(good, weights_only=True)
    wrong["state"]["model"]["conv1.weight"] = torch.zeros(1)
    torch.save(wrong, tmp / "wrong.pt")
    return tmp


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(("words", "name"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_line_and_changes_nothing(
    words: str, name: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in checkpoints.iterdir()}
    assert main(["train", "cnn", *words.format(tmp=checkpoints).split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bigops train: {name}")
    assert err.count("\n") == 1
    assert "Error" not in err
    assert {path: path.read_bytes() for path in checkpoints.iterdir()} == before


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["train", "lenet"],
        ["train", "cnn", "--lr", "x"],
        ["train", "cnn", "--heads", "2"],
    ],
)
def test_wrong_words_end_with_status_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(
    ("module", "package"),
    [("sklearn.metrics", "scikit-learn"), ("matplotlib", "matplotlib"), ("rich", "rich")],
)
def test_a_missing_extra_is_said_in_one_line(
    module: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", "cnn", "--epochs", "1", "--curve", str(tmp_path / "curve.png")]) == 2
    assert capsys.readouterr().err == (
        f'bigops train: {package} is not installed: pip install "bigops[bench]"\n'
    )
    assert not list(tmp_path.iterdir())


def test_unreadable_data_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def damaged() -> None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr("sklearn.datasets.load_digits", damaged)
    assert main(["train", "cnn"]) == 2
    assert capsys.readouterr().err.startswith("bigops train: data: scikit-learn's digits cannot")


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.pt"
    train(replace(CNN, epochs=1), data=few, checkpoint=file)
    old = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"checkpoint: .*run\.pt cannot be written"):
        train(CNN, data=few, resume=file, checkpoint=file)
    assert file.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(seed: int) -> Digits:
        raise KeyboardInterrupt

    monkeypatch.setattr("bigops.training.loop.load_digits", interrupted)
    assert main(["train", "cnn", "--checkpoint", str(tmp_path / "run.pt")]) == 130
    assert "--resume" in capsys.readouterr().err


def test_the_loss_of_a_diverging_run_is_never_recorded(tmp_path: Path) -> None:
    losses: list[float] = []
    with pytest.raises(InputError, match="lr: the loss is"):
        train(
            replace(CNN, lr=1e6),
            data=few,
            on_step=lambda done, total, loss: losses.append(loss),
        )
    assert all(math.isfinite(loss) for loss in losses)
