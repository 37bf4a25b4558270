"""ResNet18 and ResNet50: torchvision's parameters, and the plain twin's results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigops.bench.kinks import batch_away_from_kinks
from bigops.check import compare
from bigops.models import ResNet18, ResNet50

MODELS = pytest.mark.parametrize("kind", [ResNet18, ResNet50])
SAMPLE = {
    ResNet18: {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer1.1.bn2.num_batches_tracked": (),
        "layer2.0.conv1.weight": (128, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer2.0.downsample.1.bias": (128,),
        "layer4.1.conv2.weight": (512, 512, 3, 3),
        "fc.weight": (1000, 512),
        "fc.bias": (1000,),
    },
    ResNet50: {
        "conv1.weight": (64, 3, 7, 7),
        "layer1.0.conv1.weight": (64, 64, 1, 1),
        "layer1.0.conv3.weight": (256, 64, 1, 1),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.2.bn3.running_mean": (256,),
        "layer2.0.conv1.weight": (128, 256, 1, 1),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer3.0.downsample.1.weight": (1024,),
        "layer3.5.conv2.weight": (256, 256, 3, 3),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "fc.weight": (1000, 2048),
    },
}
# Of torchvision.models.resnet18 and resnet50: parameters, entries of the state dict, blocks.
COUNTS = {ResNet18: (11_689_512, 122, (2, 2, 2, 2)), ResNet50: (25_557_032, 320, (3, 4, 6, 3))}


def _twins(
    kind: type[nn.Module], dtype: torch.dtype = torch.float32, num_classes: int = 10
) -> tuple[Any, Any]:
    """Ours and the plain form with the same values, whose normalisations change something."""
    torch.manual_seed(1)
    ours, plain = kind(num_classes), kind(num_classes, plain=True)
    with torch.no_grad():
        for name, value in ours.state_dict().items():
            if "running_mean" in name:
                value.normal_(0, 0.1)
            elif "running_var" in name:
                value.uniform_(0.5, 2)
            elif value.dim() == 1 and "fc" not in name:
                value.add_(torch.randn(value.shape), alpha=0.1)
    plain.load_state_dict(ours.state_dict())
    return ours.to(dtype), plain.to(dtype)


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a training step leaves: loss, gradients, running statistics, updated parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = F.cross_entropy(model.train()(images), labels)
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"grad {name}": p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    return found | {name: value.clone() for name, value in model.state_dict().items()}


@MODELS
def test_parameters_are_torchvisions(kind: type[nn.Module]) -> None:
    with torch.device("meta"):
        model = kind()
        empty = kind(num_classes=7, in_channels=1)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    parameters, entries, blocks = COUNTS[kind]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(shapes) == entries
    assert tuple(len(getattr(model, f"layer{stage}")) for stage in range(1, 5)) == blocks
    assert shapes.items() >= SAMPLE[kind].items()
    assert [name for name, _ in model.named_children()] == [
        "conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc",
    ]  # fmt: skip
    # The 3x3 convolution of a stage's first block takes every second pixel, not a 1x1.
    strides = {name for name, m in model.named_modules() if getattr(m, "stride", 0) == (2, 2)}
    three = "conv1" if kind is ResNet18 else "conv2"
    assert strides == {"conv1"} | {
        f"layer{stage}.0.{name}" for stage in (2, 3, 4) for name in (three, "downsample.0")
    }
    assert empty.conv1.weight.shape == (64, 1, 7, 7)
    assert empty.fc.bias.shape == (7,)


def test_starts_as_torchvisions_does() -> None:
    torch.manual_seed(0)
    model = ResNet18()
    conv = model.layer3[0].conv1.weight  # of 128 channels
    assert conv.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()
    torch.manual_seed(0)
    plain = ResNet18(plain=True)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert all(torch.equal(model.state_dict()[n], v) for n, v in plain.state_dict().items())


@MODELS
def test_a_step_in_float64_is_the_plain_twins(kind: type[nn.Module]) -> None:
    """There no rounding sends a gradient elsewhere at a kink."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    labels = torch.tensor([3, 7])
    ours, plain = (_step(m, images, labels) for m in _twins(kind, torch.float64))
    assert ours.keys() == plain.keys()
    for name, wanted in plain.items():
        torch.testing.assert_close(ours[name], wanted, msg=lambda said, name=name: f"{name} {said}")


def test_a_step_in_float32_is_as_true_as_the_plain_twins() -> None:
    ours, plain = _twins(ResNet18)
    wide = copy.deepcopy(plain).double()
    images, labels = torch.randn(32, 3, 64, 64), torch.arange(2)
    images = images[batch_away_from_kinks(wide, images.double())]
    want = _step(wide, images.double(), labels)
    got, eager = _step(ours, images, labels), _step(plain, images, labels)
    assert got.keys() == want.keys()
    assert got.pop("bn1.num_batches_tracked") == 1
    found = [
        compare(name, value, eager[name], want[name])
        for name, value in got.items()
        if "num_batches_tracked" not in name
    ]
    assert not [result for result in found if not result.ok]


def _definition(values: dict[str, Tensor], images: Tensor, strided: int) -> Tensor:
    """The paper's network by the names of a state dict; the `strided` convolution of a stage's
    first block takes every second pixel."""

    def unit(x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        weight = values[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        mean, var, scale, shift = (
            values[f"{bn}.{name}"].view(1, -1, 1, 1)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = F.max_pool2d(F.relu(unit(images, "conv1", "bn1", 2)), 3, 2, 1)
    for stage in range(1, 5):
        block = 0
        while (at := f"layer{stage}.{block}") + ".conv1.weight" in values:
            step = 2 if stage > 1 and block == 0 else 1
            shortcut = x
            if f"{at}.downsample.0.weight" in values:
                shortcut = unit(x, f"{at}.downsample.0", f"{at}.downsample.1", step)
            last = 3 if f"{at}.conv3.weight" in values else 2
            for i in range(1, last + 1):
                x = unit(x, f"{at}.conv{i}", f"{at}.bn{i}", step if i == strided else 1)
                x = F.relu(x + shortcut if i == last else x)
            block += 1
    return F.linear(x.mean((2, 3)), values["fc.weight"], values["fc.bias"])


@MODELS
def test_it_is_the_papers_network(kind: type[nn.Module]) -> None:
    images = torch.randn(2, 3, 50, 41, dtype=torch.float64)
    for model in _twins(kind, torch.float64):
        wanted = _definition(model.state_dict(), images, 1 if kind is ResNet18 else 2)
        torch.testing.assert_close(model.eval()(images), wanted)


@MODELS
def test_evaluation_and_its_folded_copy_are_as_true_as_the_plain_twins(
    kind: type[nn.Module],
) -> None:
    ours, plain = (model.eval() for model in _twins(kind, num_classes=1000))
    wide = copy.deepcopy(plain).double()
    images = torch.randn(5, 3, 70, 57)
    before = copy.deepcopy(ours.state_dict())
    folded = ours.folded()
    with torch.no_grad():
        want, eager = wide(images.double()), plain(images)
        relaid = images.to(memory_format=torch.channels_last)
        # In channels_last oneDNN's sums have fewer digits.
        relaid_plain = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        relaid_eager = relaid_plain(relaid)
        calls = {
            "ours": ours(images),
            "folded": folded(images),
            "folded twice": folded.folded()(images),
            "plain, folded": plain.folded()(images),
        }
    found = [compare(name, got, eager, want) for name, got in calls.items()]
    with torch.no_grad():
        found.append(compare("channels_last", ours(relaid), relaid_eager, want))
    assert not [result for result in found if not result.ok]
    assert torch.equal(calls["folded"], calls["folded twice"])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_a_folded_copy_is_made_in_evaluation_and_learns_by_itself() -> None:
    ours, plain = _twins(ResNet18, torch.float64)
    folded = ours.train().folded()
    assert ours.training
    assert not folded.training
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    wanted = plain.eval().folded()
    for model in (folded, wanted):
        model(images).square().sum().backward()
    for (name, mine), (_, other) in zip(
        folded.named_parameters(), wanted.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)
    assert all(p.grad is None for p in ours.parameters())


def test_autocast_is_as_true_as_the_plain_twins() -> None:
    ours, plain = _twins(ResNet18)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    wide = copy.deepcopy(plain).double()
    want = F.cross_entropy(wide(images.double()), labels)
    want.backward()
    runs = []
    for model in (ours, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images)
        assert logits.dtype == torch.bfloat16
        F.cross_entropy(logits.float(), labels).backward()
        runs.append({name: p.grad for name, p in model.named_parameters()})
    for name, parameter in wide.named_parameters():
        errors = [(run[name] - parameter.grad).norm() for run in runs]
        assert runs[0][name].dtype == torch.float32
        assert errors[0] <= 2 * errors[1], name


def test_state_dicts_interchange_whatever_their_layout() -> None:
    ours, plain = _twins(ResNet18)
    ours.to(memory_format=torch.channels_last)
    other = {name: value + 1 for name, value in plain.state_dict().items()}
    for model in (ours, plain):
        model.load_state_dict(other)
        assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())
    weight = ours.layer4[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_it_compiles_whole() -> None:
    model = ResNet18(num_classes=3).eval()
    images = torch.randn(1, 3, 33, 33)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ResNet18(num_classes=0), "num_classes"),
        (lambda: ResNet50(in_channels=0), "in_channels"),
        (lambda: ResNet18()(torch.randn(2, 4, 64, 64)), "images"),
        (lambda: ResNet18()(torch.randn(3, 64, 64)), "images"),
        (lambda: ResNet18()(torch.randn(1, 3, 32, 32)), "input"),  # one value a channel
    ],
)
def test_bad_input_is_named(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        make()
