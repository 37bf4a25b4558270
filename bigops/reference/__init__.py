"""What is right: each op in plain torch, a dozen lines, any dtype, twice differentiable."""

import torch

# The first call of MKL's vector maths (torch.log, exp) must be one thread's: if several make it,
# the part of one is off by 5e-5 (seen with torch 2.13 in a third of all processes).
torch.ones(1, device="cpu").log()
