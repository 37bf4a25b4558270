"""What an entry must not be, unless a reason is given for it.

AMD's entries are listed, not judged: nothing has run there yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .architectures import ARCHITECTURES
from .entries import Entry

RANK = ("", "mma", "wgmma", "tcgen05")
# Bytes that cost nothing to speak of outside loops. Configurations are chosen with the Triton that
# wrote the ledger's files: another one may spill so many anywhere.
FEW = 32


@dataclass(frozen=True)
class Reason:
    """Why entries of a kernel, whose call and dtype match a pattern, may break a rule."""

    rule: str
    why: str
    kernel: str = "*"
    call: str = "*"  # "call, dtype", with * and ? as in file names
    target: str = "*"
    outside_loops: bool = False  # of spills: few bytes, which no loop touches

    def covers(self, rule: str, entry: Entry) -> bool:
        return (
            rule == self.rule
            and fnmatchcase(entry.kernel, self.kernel)
            and fnmatchcase(f"{entry.call}, {entry.dtype}", self.call)
            and fnmatchcase(entry.target, self.target)
            and not (self.outside_loops and (entry.in_loops or entry.spills > FEW))
        )


PASSING = "8 or 16 bytes too much where tiles pass from tensor memory through registers"
MEASURED = "faster on an H100 than tiles that fit (bench/results/nvidia-h100/attention-tiles.json)"
BESIDE = "ptxas spills a few bytes where that lets one program more run on a multiprocessor"
REASONS = (
    Reason(
        "spills", "a few bytes, stored before the loops and loaded after them", outside_loops=True
    ),
    *(
        Reason("spills", f"{times} times {MEASURED}", kernel, call, "sm_90")
        for times, kernel, call in (
            (1.05, "forward_kernel", "128, bf16"),
            (1.02, "forward_kernel", "128, causal, bf16"),
            (1.26, "grad_query_kernel", "128, everything, bf16"),
            (1.45, "grad_key_value_kernel", "128, causal, dropout, bf16"),
            (1.20, "grad_key_value_kernel", "256, causal, dropout, bf16"),
        )
    ),
    *(
        Reason(
            "spills",
            "8 bytes where sequences are packed and every option is on",
            kernel,
            "128, everything, bf16",
            "sm_90",
        )
        for kernel in ("forward_kernel", "grad_key_value_kernel")
    ),
    *(
        Reason(
            "spills",
            "every option at once beside rows of 256: no smaller tile has tensor cores' products",
            "grad_key_value_kernel",
            "256, everything, bf16",
            target,
        )
        for target in ("sm_90", "sm_100")
    ),
    Reason(
        "spills",
        "addresses of four tensors' tiles are kept through four loops, beside rows of 256 in TF32",
        "grad_bias_kernel",
        "256, *, tf32",
        "sm_80",
    ),
    Reason(
        "spills",
        "ten numbers of a thread, stored before the loops and loaded after them",
        "grad_query_kernel",
        "256, everything, fp32",
        "sm_90",
    ),
    Reason("spills", BESIDE, "grad_key_value_kernel", "256, causal, fp32", "sm_86"),
    Reason("spills", BESIDE, "grad_query_kernel", "128, everything, fp32", "sm_86"),
    Reason("spills", BESIDE, "grad_bias_kernel", "*, fp32", "sm_86"),
    Reason(
        "spills",
        "contiguous images: each element's address is its own and takes two registers",
        "weight_grad_kernel",
        "3 -> 64, 4x4, bf16",
        "sm_86",
    ),
    Reason("spills", PASSING, "conv_kernel", "64 -> ?[26], 3x3, channels_last, tf32", "sm_100"),
    Reason("spills", PASSING, "weight_grad_kernel", "16 -> 64, 3x3, channels_last, bf16", "sm_100"),
    Reason("spills", PASSING, "weight_grad_kernel", "64 -> 32, 1x1, channels_last, *", "sm_100"),
    Reason(
        "spills",
        PASSING,
        "weight_grad_kernel",
        "128 -> 128, 3x3, channels_last, none, *, bf16",
        "sm_100",
    ),
)


def broken(entry: Entry) -> dict[str, str]:
    """The rules that an entry breaks, by name, and how; reasons aside."""
    architecture = ARCHITECTURES[entry.target]
    if architecture.amd:
        return {}
    found = {}
    if entry.spills:
        loops = f", {entry.in_loops} times in loops" if entry.in_loops else ""
        found["spills"] = f"spills {entry.spills} bytes of a thread's registers{loops}"
    if entry.shared > architecture.shared:
        found["shared"] = f"{entry.shared} bytes of shared memory of {architecture.shared}"
    if entry.wants and entry.wants not in entry.matrix_counts:
        found["matrix"] = f"{entry.matrix or 'no matrix instruction'} where {entry.wants} is due"
    if entry.tf32 and entry.dtype != "tf32":
        found["tf32"] = "TF32 although torch's flags do not allow it"
    return found


def narrow(entry: Entry) -> bool:
    """Whether no load of an NVIDIA kernel is 128 bits wide.

    No rule for all kernels: whose rows allow it, only their author knows.
    """
    return not ARCHITECTURES[entry.target].amd and entry.load < 128


def complaints(
    entries: Iterable[Entry], reasons: Sequence[Reason] = REASONS, spare: int = 0
) -> list[str]:
    """A line for each rule that an entry breaks without a reason; `spare` bytes may be spilled."""
    return [
        f"{_words(entry)}: {how}"
        for entry, rule, how in _breaches(entries)
        if _reason(entry, rule, reasons) is None
        and not (rule == "spills" and entry.spills <= spare)
    ]


def excuses(entries: Iterable[Entry]) -> list[str]:
    """A line for each rule that an entry breaks, with the reason."""
    return [
        f"{_words(entry)}: {how}: {reason.why}"
        for entry, rule, how in _breaches(entries)
        if (reason := _reason(entry, rule, REASONS)) is not None
    ]


def _breaches(entries: Iterable[Entry]) -> Iterator[tuple[Entry, str, str]]:
    for entry in entries:
        for rule, how in broken(entry).items():
            yield entry, rule, how


def _reason(entry: Entry, rule: str, reasons: Sequence[Reason]) -> Reason | None:
    return next((reason for reason in reasons if reason.covers(rule, entry)), None)


def _words(entry: Entry) -> str:
    return f"{entry.kernel} ({entry.op} {entry.call}, {entry.dtype}, {entry.step}) {entry.target}"
