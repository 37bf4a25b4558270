"""README's programs run as they stand: every python block, on its own."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text() if README.exists() else ""
BLOCKS = [
    pytest.param(match[1], id=f"line{TEXT[: match.start()].count(chr(10)) + 1}")
    for match in re.finditer(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "load_digits" in code:
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "words",
    [
        ("CNN(", "torch.optim.SGD(", "lr=0.01", "cross_entropy("),
        ("Transformer(", "Adam(", "lr=0.001", "cross_entropy("),
    ],
    ids=["CNN", "Transformer"],
)
def test_the_main_program_is_there(words: tuple[str, ...]) -> None:
    programs = [
        block.values[0] for block in BLOCKS if all(word in block.values[0] for word in words)
    ]
    assert len(programs) == 1
    assert 8 <= len(programs[0].splitlines()) <= 20
