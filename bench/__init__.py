"""Measuring: every op of the table and the reference models, side by side with PyTorch.

`bigops bench` is the command; `timing.py` is the only place that times anything.
"""
