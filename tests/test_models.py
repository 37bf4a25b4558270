"""The reference models: bigops' form and the plain form are the same model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigops.check import compare
from bigops.models import CNN, Transformer
from bigops.optim import Adam

SMALL = {
    "in_features": 16,
    "max_length": 49,
    "d_model": 64,
    "num_heads": 4,
    "num_layers": 2,
    "dim_feedforward": 96,
    "dropout": 0.0,
}


def cnn(plain: bool, **options: int) -> nn.Module:
    torch.manual_seed(7)
    return CNN(plain=plain, **options)


def transformer(plain: bool, **options: object) -> nn.Module:
    torch.manual_seed(7)
    return Transformer(plain=plain, **{**SMALL, **options})


def _after_one_step(
    model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    model.train()
    logits = model(inputs)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    found = {"logits": logits.detach(), "loss": loss.detach()}
    found |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    optimizer.step()
    return found | {name: p.detach() for name, p in model.named_parameters()}


def _assert_twins(build, inputs: torch.Tensor, optimizer) -> None:
    """Logits, loss, gradients and stepped parameters, by the error rule against float64."""
    labels = torch.randint(0, 10, (len(inputs),))
    ours, plain = build(plain=False), build(plain=True)
    wide = copy.deepcopy(plain).double()
    got = _after_one_step(ours, inputs, labels, optimizer(ours.parameters()))
    eager = _after_one_step(plain, inputs, labels, optimizer(plain.parameters()))
    truth = _after_one_step(wide, inputs.double(), labels, optimizer(wide.parameters()))
    assert got.keys() == truth.keys()
    failed = [
        result
        for name in truth
        if not (result := compare(name, got[name], eager[name], truth[name])).ok
    ]
    assert not failed


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.mark.parametrize("size", [28, 13, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_cnn_and_its_twin_agree(size: int, channels: int) -> None:
    torch.manual_seed(size)
    inputs = torch.randn(16, channels, size, size)
    _assert_twins(lambda plain: cnn(plain, input_size=size, in_channels=channels), inputs, _sgd)


@pytest.mark.parametrize("length", [49, 5, 1])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_and_its_twin_agree(length: int, norm_first: bool) -> None:
    torch.manual_seed(length)
    inputs = torch.randn(6, length, 16)
    _assert_twins(lambda plain: transformer(plain, norm_first=norm_first), inputs, _sgd)


@pytest.mark.parametrize("build", [cnn, transformer])
def test_same_seed_gives_the_same_values_and_state_dicts_interchange(build) -> None:
    ours, plain = build(plain=False).state_dict(), build(plain=True).state_dict()
    assert list(ours) == list(plain)
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    torch.manual_seed(8)
    other = type(build(plain=False))(**({} if build is cnn else SMALL)).state_dict()
    for form in (False, True):
        model = build(plain=form)
        model.load_state_dict(other)
        assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


def test_transformer_has_the_names_of_torchs_encoder() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2, enable_nested_tensor=False
    )
    ours = transformer(False, norm_first=False).state_dict()
    assert set(encoder.state_dict()) == {name for name in ours if name.startswith("layers.")}
    # A trained encoder of torch's moves in, and gives what it gave.
    model = transformer(False, norm_first=False).eval()
    model.layers.load_state_dict(encoder.layers.state_dict())
    x = torch.randn(3, 9, 64)
    with torch.no_grad():
        want, got = encoder.eval()(x), x
        for layer in model.layers:
            got = layer(got)
        wide = encoder.double()(x.double())
    assert compare("out", got, want, wide).ok


def test_defaults_are_those_of_the_issue() -> None:
    model = CNN()
    assert sum(p.numel() for p in model.parameters()) == 421_642
    with torch.device("meta"):
        base = Transformer()
    layer = base.layers[0]
    assert (len(base.layers), layer.self_attn.num_heads) == (6, 8)
    assert (layer.linear1.in_features, layer.linear1.out_features) == (512, 2048)
    assert layer.dropout.p == layer.self_attn.dropout == base.dropout.p == 0.1


def test_transformer_trains_with_our_adam_as_with_torchs() -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(8, 12, 16), torch.randint(0, 10, (8,))

    def losses(model: nn.Module, kind: type[torch.optim.Optimizer]) -> torch.Tensor:
        optimizer = kind(model.parameters(), lr=0.001)
        found = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs.to(model.position.dtype)), labels)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    ours = losses(transformer(False), Adam)
    plain = losses(transformer(True), torch.optim.Adam)
    wide = losses(transformer(True).double(), torch.optim.Adam)
    assert compare("losses", ours, plain, wide).ok
    assert ours[-1] < ours[0]


@pytest.mark.filterwarnings("ignore::bigops.FallbackWarning")
def test_dropout_means_what_torchs_layer_means() -> None:
    """Attention's probabilities are dropped too, and in training only."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 6, 16)
    ours, plain = transformer(False, dropout=0.5), transformer(True, dropout=0.5)
    wide = copy.deepcopy(plain).double()
    with torch.no_grad():
        got, eager, truth = (
            model.eval()(inputs.to(model.position.dtype)) for model in (ours, plain, wide)
        )
        assert compare("logits", got, eager, truth).ok
        # All other dropout off, so that only attention's is left to make a difference.
        for module in ours.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        ours.train()
        assert not torch.equal(ours(inputs), ours(inputs))


@pytest.mark.parametrize("build", [cnn, transformer])
def test_an_empty_batch_gives_an_empty_result(build) -> None:
    shape = (0, 1, 28, 28) if build is cnn else (0, 49, 16)
    for plain in (False, True):
        model = build(plain=plain)
        logits = model(torch.empty(shape))
        assert logits.shape == (0, 10)
        logits.sum().backward()
        assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: CNN(input_size=3), "input_size"),
        (lambda: CNN()(torch.randn(2, 1, 28, 27)), "images"),
        (lambda: CNN()(torch.randn(1, 28, 28)), "images"),
        (lambda: CNN()(torch.randn(2, 3, 28, 28)), "images"),
        (lambda: Transformer(d_model=10, num_heads=3), "num_heads"),
        (lambda: Transformer(dropout=1.5), "dropout"),
        (lambda: transformer(False)(torch.randn(2, 50, 16)), "tokens"),
        (lambda: transformer(False)(torch.randn(2, 0, 16)), "tokens"),
        (lambda: transformer(False)(torch.randn(2, 49, 15)), "tokens"),
    ],
)
def test_bad_input_is_named(make, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()
