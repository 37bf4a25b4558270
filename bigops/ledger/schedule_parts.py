"""What the model of schedules (schedule.py) takes GPUs to do: each number with its source.

guide: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions". FA3: Shah et al.
2024, "FlashAttention-3" (arXiv 2407.08608). Luo: Luo et al. 2025, "Dissecting the NVIDIA Hopper
Architecture through Microbenchmarking and Multiple Level Analysis" (2501.12084). Jia: Jia et al.
2018, "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking" (1804.06826). Ernst:
github.com/te42kyfo/gpu-benches. Bekman: github.com/stas00/ml-engineering, "Maximum Achievable
Matmul FLOPS comparison table".
"""

from __future__ import annotations

from dataclasses import dataclass

# Results a clock on a multiprocessor (guide; FA3, section 2.2, counts exponentials alike).
EXPONENTIALS = 16
COMPARISONS = 64  # maxima are these
# Packed conversions, two values each. The guide's row for conversions is 64 on 9.0; older tables
# say 16 for other kinds than this one. Assumed on 8.0 too.
PACKS = 64
SHARED_BYTES = 128  # 32 banks of 4 bytes (guide, "Shared Memory")

# Clocks until a result can be used.
ARITHMETIC_LATENCY = 4  # Jia, table 4.1, for Volta; taken as unchanged
SHUFFLE_LATENCY = 23  # Jia
EXPONENTIAL_LATENCY = 18  # taken from Volta's MUFU, about
PRODUCT_LATENCY = 33  # Luo: mma.m16n8k16; taken for the filling and draining of a wgmma chain too
BARRIER_LATENCY = 30  # assumed: a barrier is a round trip to shared memory (Luo: 29 clocks)
MEMORY_LATENCY = 650  # Ernst, gpu-latency/h100_pcie.txt: 650 clocks from DRAM, 265 from L2

# On Hopper mma.sync reaches 62.9% of the tensor cores' rate on average, wgmma over 95% (Luo).
HOPPER_MMA_SYNC = 0.629


@dataclass(frozen=True)
class Part:
    """A GPU as it is sold. Rates without a unit are of one multiprocessor in one clock."""

    name: str
    target: str  # of `ARCHITECTURES`
    multiprocessors: int
    matrix_rate: int  # FLOP of fp16 or bf16 products, dense (Hopper and Ampere whitepapers)
    mma_sync: float  # the part of it that mma.sync reaches
    fp32: int  # additions, multiplications (guide)
    l2_bytes: float  # read from L2: Ernst, gpu-l2-cache/{h200,a100_80}.txt
    top_clock: float  # GHz: nvidia-smi's maximum
    matrix_tflops: float  # a large bf16 product, measured: what the power limit leaves
    stream_tbs: float = 0.0  # TB/s of an update in place, reads and writes, where measured

    @property
    def peak(self) -> float:
        """TFLOP/s at one GHz."""
        return self.matrix_rate * self.multiprocessors / 1e3

    def clock(self, share: float) -> float:
        """GHz sustained while tensor cores are busy for this share of the time: from the top clock
        in a straight line to that at which they are always busy, where power is the limit."""
        return self.top_clock - share * (self.top_clock - self.matrix_tflops / self.peak)


H100 = Part(
    "H100 SXM", "sm_90", 132, 4096, HOPPER_MMA_SYNC, 128, 37.0,
    top_clock=1.98,
    matrix_tflops=792.1,  # Bekman
)  # fmt: skip
H200 = Part(
    "H200", "sm_90", 132, 4096, HOPPER_MMA_SYNC, 128, 37.0,
    top_clock=1.98,
    matrix_tflops=759.0,  # 8192^3, torch 2.11, measured here 2026-11-26
    stream_tbs=4.16,  # the same run
)  # fmt: skip
A100 = Part(
    "A100 SXM", "sm_80", 108, 2048, 1.0, 64, 35.5,
    top_clock=1.41,
    matrix_tflops=267.9,  # Bekman
)  # fmt: skip


ASSUMPTIONS = (
    f"tensor cores: {H100.matrix_rate} FLOP a clock and multiprocessor on Hopper, "
    f"{A100.matrix_rate} on Ampere (whitepapers); mma.sync reaches {HOPPER_MMA_SYNC:.1%} of it on "
    "Hopper (Luo et al. 2025), wgmma all of it",
    f"vector units: {EXPONENTIALS} exponentials, {H100.fp32} (Ampere {A100.fp32}) additions or "
    f"multiplications, {COMPARISONS} maxima, {PACKS} packed conversions a clock (CUDA C++ "
    "Programming Guide; the last is assumed); a softmax' passes follow each other, each as long as "
    f"its slowest unit or its chain of results, {ARITHMETIC_LATENCY} clocks each (Jia et al. 2018)",
    f"shared memory: {SHARED_BYTES} bytes a clock (the guide); wgmma reads operands beside its "
    "products, ldmatrix before them; nobody waits for copies that arrive",
    f"waits: {BARRIER_LATENCY} clocks a barrier (assumed), {PRODUCT_LATENCY} to drain a product "
    f"(Luo), {MEMORY_LATENCY} for the first loads of an output tile (Ernst, gpu-benches)",
    "overlap: tiles under way meet at random (mean value analysis, Reiser and Lavenberg 1980); "
    "ping-pong's barriers are not credited with a better order, nor the backward pass with what it "
    "overlaps within a tile (FlashAttention-4's figures are met better without): the bound is",
    f"L2: {H100.l2_bytes:g} bytes a clock and multiprocessor on Hopper (Ernst: 9.7 TB/s on an "
    "H200); sums added in L2 cost what reads do; keys are found there",
    f"clock: a straight line from {H100.top_clock} GHz with idle tensor cores to that at which "
    f"busy ones reach what a large product does: {H100.matrix_tflops:g} TFLOP/s on an H100 "
    f"(Bekman), {H200.matrix_tflops:g} on an H200 (measured here 2026-11-26); cards differ",
    "output tiles go to the block that is free first; masks cost nothing but the keys they hide",
)
