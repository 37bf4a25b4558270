"""Every wait, fence and barrier of the CUDA C++ kernels, and what becomes of a kernel without it.

    python tests/cuda_mutations.py [WORDS]    the table of all, or of those whose names have a word

`sites()` finds them in csrc/cuda by what they are called, so a new one is found too. `PROGRAMS` say
how kernels are run on the CPU model: with few sizes of tiles, which compile in two seconds, over
cases in which rings go round, tiles outnumber blocks and sequences are empty, in three orders of
threads. What is not needed says so in the kernel's source, on its own line or just above:

    // redundant: why
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from attention_cuda import Case, forward
from attention_cuda_backward import backward

from bigops import simt
from bigops.check import Comparison

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"

# ---- What is removed

# What the device header and CUDA call what waits, fences or meets. wgmma_pin is no instruction.
WORDS = (
    r"mbarrier_wait|mbarrier_arrive\w*|fence_\w+|named_barrier_\w+|wgmma_(?:fence|commit|wait)|"
    r"bulk_(?:commit|wait\w*)|cp_async_(?:commit|wait)|__sync\w+|__threadfence\w*"
)
# Who waits for a flag in global memory.
WRAPPER = r"\bvoid (\w+)\([^{;]*?\) (?:const )?\{|\bconst auto (\w+) = \[&\](?:\([^)]*\))? \{"
POLL = r"while \(atomicAdd\("


@dataclass(frozen=True)
class Site:
    """text[start:end] of a file is a call that synchronises, or a loop that polls."""

    file: str
    start: int
    end: int
    line: int
    call: str  # in one line
    number: int  # of this call in the file
    redundant: str | None

    def __str__(self) -> str:
        return f"{self.file}-{self.call}-{self.number}"


def bare(text: str) -> str:
    """The text with blanks for its comments, and one for each line's end."""

    def blanks(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    return re.sub(r"//[^\n]*|/\*.*?\*/", blanks, text, flags=re.DOTALL).replace("\n", " ")


def closing(code: str, opening: int) -> int:
    """The place behind what closes the bracket at `opening`."""
    pair = {"(": ")", "{": "}"}[code[opening]]
    depth = 0
    for i in range(opening, len(code)):
        depth += (code[i] == code[opening]) - (code[i] == pair)
        if depth == 0:
            return i + 1
    raise ValueError(f"a bracket is not closed: {code[opening : opening + 60]}")


def calls(code: str, names: str) -> Iterator[tuple[int, int]]:
    """Where functions of these names are called, not defined; loops that poll; flags being set."""
    pattern = rf"(?<!void )(?<!bool )(?:\bthis->|\bdevice::|\b)(?:{names})(?:<[^>]*>)?\("
    for match in re.finditer(pattern, code):
        if not code[: match.start()].endswith(("->", "::", ".")):
            yield match.start(), closing(code, match.end() - 1)
    for match in re.finditer(POLL, code):
        head = closing(code, code.index("(", match.start()))
        body = len(code) - len(code[head:].lstrip())
        end = closing(code, body) if code[body] == "{" else code.index(";", body) + 1
        yield match.start(), end
    for match in re.finditer(r"\batomicAdd\(", code):
        end = closing(code, match.end() - 1)
        alone = code[: match.start()].rstrip().endswith((";", "{", "}", ")"))
        if alone and re.search(r", 1u?\)$", code[match.start() : end]):
            yield match.start(), end


def wrappers(code: str) -> set[str]:
    """Functions that do nothing but synchronise: their calls count like what they call."""
    found: set[str] = set()
    while True:
        names = "|".join([WORDS, *found])
        more = set()
        for match in re.finditer(WRAPPER, code):
            low, high = match.end(), closing(code, match.end() - 1) - 1
            body, inside = code[low:high], list(calls(code[low:high], names))
            for start, end in reversed(inside):
                body = body[:start] + " " * (end - start) + body[end:]
            rest = re.sub(r"const int \w+ =[^;]*;|if \([^;]*?\) (?=[ ;{])|[;{}]", "", body)
            if inside and not rest.strip():
                more.add(match[1] or match[2])
        if more <= found:
            return found
        found |= more


def redundant(text: str, start: int, end: int) -> str | None:
    """What the comment on its line, or the comment that ends just above, says."""
    low = text.rfind("\n", 0, start) + 1
    lines = text[:low].splitlines()
    above = []
    while lines and lines[-1].strip().startswith("//"):
        above.insert(0, lines.pop().strip().removeprefix("//").strip())
    beside = text[end : text.find("\n", end)].partition("//")[2].strip()
    for comment in (beside, " ".join(above)):
        if (found := re.search(r"\bredundant: (.+)", comment)) is not None:
            return found[1]
    return None


def sites_of(file: str, text: str) -> Iterator[Site]:
    code = bare(text)
    names = "|".join([WORDS, *sorted(wrappers(code))])
    counts: dict[str, int] = {}
    for start, end in sorted(calls(code, names)):
        call = re.sub(r"\s+", " ", code[start:end]).replace("device::", "")
        counts[call] = counts.get(call, 0) + 1
        line = text.count("\n", 0, start) + 1
        yield Site(file, start, end, line, call, counts[call], redundant(text, start, end))


@functools.cache
def sites() -> tuple[Site, ...]:
    folder = CSRC / "cuda"
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cu")]
    texts = {str(path.relative_to(folder)): path.read_text() for path in files}
    return tuple(site for file, text in texts.items() for site in sites_of(file, text))


# ---- What runs it

Said = str | None  # what was wrong, in words
Trial = Callable[[simt.Module, str], Said]


def judged(findings: Sequence[simt.Finding], compared: Iterable[Comparison]) -> Said:
    for finding in findings:
        return str(finding)
    return next((f"wrong: {c}" for c in compared if not c.ok), None)


HOW: dict[str, object] = {"seed": 3, "patience": 5.0}


@dataclass(frozen=True)
class Forward:
    case: Case
    more: tuple[object, ...]  # what the launcher takes besides

    def __call__(self, module: simt.Module, order: str) -> Said:
        findings: list[simt.Finding] = []

        def run(*args: object) -> None:
            findings.extend(module.call("forward", *args, *self.more, order=order, **HOW))

        return judged(findings, forward(self.case, run)[0])


@dataclass(frozen=True)
class Backward:
    case: Case
    deterministic: bool
    more: tuple[object, ...] = ()

    def __call__(self, module: simt.Module, order: str) -> Said:
        findings: list[simt.Finding] = []

        def run(*args: object) -> None:
            how = {"order": order, "same_bits": self.deterministic, **HOW}
            findings.extend(module.call("backward", *args, *self.more, **how))

        def workspace_bytes(*args: object) -> int:
            count = torch.zeros(1, dtype=torch.int64)
            module.call("workspace_bytes", *args, *self.more, count)
            return int(count)

        how = {"deterministic": self.deterministic}
        return judged(findings, backward(self.case, run, workspace_bytes, **how)[0])


def norm(module: simt.Module, order: str) -> Said:
    grad, out, sizes = torch.randn(70001), torch.zeros(()), torch.zeros(2, dtype=torch.int64)
    module.call("workspaces", 1, grad.numel(), sizes[:1], sizes[1:])
    workspace = torch.full((int(sizes[1]),), 0xA5, dtype=torch.uint8)
    for finding in module.call("norm", [grad], 1, out, workspace, order=order, **HOW):
        return str(finding)
    right = torch.allclose(out.double(), grad.double().norm(), rtol=1e-6)
    return None if right else f"wrong: {out}"


@dataclass(frozen=True)
class Program:
    """A file of tests/cuda, and of what it instantiates only `tiles`, each with what is tried."""

    source: str
    tiles: tuple[tuple[str, tuple[Trial, ...]], ...]

    @functools.cached_property
    def files(self) -> frozenset[str]:
        """Those of csrc/cuda that it includes."""
        found: set[Path] = set()
        waiting = [TESTS / "cuda" / self.source]
        while waiting:
            path = waiting.pop()
            for name in re.findall(r'#include "([^"]+)"', path.read_text()):
                file = path.parent.joinpath(name).resolve()
                if file not in found and file.is_relative_to(CSRC / "cuda"):
                    found.add(file)
                    waiting.append(file)
        return frozenset(str(file.relative_to(CSRC / "cuda")) for file in found)


def packed(heads: int, size: int, *lengths: tuple[int, int]) -> Case:
    return Case(heads=heads, kv_heads=heads // 2, size=size, lengths=lengths, causal=True)


def window(size: int, queries: int, keys: int, left: int) -> Case:
    return Case(2, 2, 1, queries, keys, size, window=(left, 0))


MANY = (packed(4, 64, (5, 5), (0, 7), (130, 300), (70, 33), (1, 0)), window(64, 300, 520, 200))
FEW = (packed(2, 64, (5, 5), (0, 7), (130, 150), (70, 33), (1, 0)), window(64, 140, 200, 100))
WIDE = (packed(2, 256, (0, 7), (70, 133), (1, 0)), window(256, 130, 140, 100))


def forwards(cases: Iterable[Case], *more: object) -> tuple[Trial, ...]:
    return tuple(Forward(case, more) for case in cases)


def backwards(cases: Iterable[Case], *more: object) -> tuple[Trial, ...]:
    return tuple(Backward(case, fixed, more) for fixed in (False, True) for case in cases)


DRAWN = torch.empty(4, dtype=torch.int32)
PROGRAMS = (
    Program(
        "attention_forward_sm90.cu",
        (("64, 64, 2, 2", forwards(MANY, DRAWN)), ("64, 64, 2, 1", forwards(MANY, DRAWN))),
    ),
    Program(
        "attention_backward_sm90.cu",
        (("64, 128, false", backwards(MANY)), ("256, 64, false", backwards(WIDE))),
    ),
    Program(
        "attention_forward_sm80.cu",
        (("64, 4, 2, 64, 3", forwards(MANY, 0)), ("64, 4, 1, 64, 2", forwards(MANY, 0))),
    ),
    Program(
        "attention_backward_sm80.cu",
        (("64, 32, 64, 4, 2", backwards(FEW, 0)), ("64, 32, 32, 4, 1", backwards(FEW, 0))),
    ),
    Program("adam.cu", (("", (norm,)),)),
)


def program_of(site: Site) -> Program:
    """The first that includes it."""
    return next(program for program in PROGRAMS if site.file in program.files)


def compiled(program: Program, tiles: str, site: Site | None, folder: Path) -> simt.Module:
    """The program without the site, all its kernels with tiles of this one size and in bf16."""
    tree = folder / "csrc"
    shutil.copytree(CSRC / "cuda", tree / "cuda")
    for name in ("simt", "view.h", "adam_rule.h", "step_rule.h"):
        (tree / name).symlink_to(CSRC / name)
    if site is not None:
        path = tree / "cuda" / site.file
        text = path.read_text()
        gone = re.sub(r"[^\n]", "", text[site.start : site.end])
        nothing = "" if text[site.start : site.end].startswith("while") else "(void)0"
        path.write_text(text[: site.start] + nothing + gone + text[site.end :])
    for path in tree.joinpath("cuda").glob("attention*.cu"):
        text = path.read_text().replace("device::f16", "device::bf16")
        path.write_text(re.sub(r"\b(\w+wardTiles<T), [^>]*>", rf"\1, {tiles}>", text))
    source = folder / f"mutation{os.getpid()}.cu"
    text = (TESTS / "cuda" / program.source).read_text()
    source.write_text(text.replace("../../csrc/", "csrc/"))
    return simt.compile(source, "race", flags=["-w"])


def verdict(program: Program, site: Site | None) -> Said:
    """What was found first; None: nothing. Most is found in the first order of threads."""
    modules: dict[str, simt.Module] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for order in simt.ORDERS:
                for tiles, trials in program.tiles:
                    if tiles not in modules:
                        place = Path(folder) / str(len(modules))
                        modules[tiles] = compiled(program, tiles, site, place)
                    for trial in trials:
                        torch.manual_seed(0)
                        try:
                            said = trial(modules[tiles], order)
                        except RuntimeError as error:
                            said = str(error)
                        if said is not None:
                            return f"{said} [{order}]"
        finally:
            for module in modules.values():
                for made in module.file.parent.glob(f"{module.source.stem}-*"):
                    made.unlink(missing_ok=True)
    return None


# ---- All of them

LIMIT = 300  # seconds


def verdicts(asked: Sequence[tuple[Program, Site | None]]) -> Iterator[tuple[int, Said]]:
    """Of each its number and what was found, each in a process of its own, two at a time."""
    running: dict[int, tuple[int, Path]] = {}
    waiting = list(range(len(asked)))
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < 2:
                number = waiting.pop(0)
                answer = Path(folder) / str(number)
                child = os.fork()
                if child == 0:
                    signal.alarm(LIMIT)
                    try:
                        answer.write_text(json.dumps(verdict(*asked[number])))
                    except BaseException as error:
                        answer.write_text(json.dumps(f"error: {error!r}"))
                    os._exit(0)
                running[child] = number, answer
            child, status = os.wait()
            number, answer = running.pop(child)
            if answer.exists():
                yield number, json.loads(answer.read_text())
            else:
                yield number, f"ended by {signal.Signals(os.WTERMSIG(status)).name}"


def main() -> None:
    torch.set_num_threads(1)
    named: dict[str, tuple[Program, Site | None]] = {p.source: (p, None) for p in PROGRAMS}
    named |= {str(site): (program_of(site), site) for site in sites()}
    if sys.argv[1:] == ["--json"]:  # names come in, verdicts go out
        names = json.load(sys.stdin)
        found = {names[i]: said for i, said in verdicts([named[name] for name in names])}
        json.dump(found, sys.stdout)
        return
    words = sys.argv[1:]
    chosen = [name for name in named if not words or any(word in name for word in words)]
    asked = [named[name] for name in chosen]
    for i, said in verdicts(asked):
        program, site = asked[i]
        where = f"{site.file}:{site.line} {site.call}" if site else f"{program.source} as it is"
        why = f" [redundant: {site.redundant}]" if site and site.redundant else ""
        print(f"{where}{why}\n    {said or 'nothing found'}", flush=True)


if __name__ == "__main__":
    main()
