"""The compile ledger: what becomes of every Triton kernel on GPUs that are not here.

A call's launches are recorded on CPU tensors (`launches.py`) and compiled in processes of their own
(`compiling.py`); what came out is read from the machine code (`machine_code.py`), judged
(`rules.py`) and kept in readable files beside the kernels (`entries.py`).
"""
