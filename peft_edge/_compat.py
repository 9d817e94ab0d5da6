"""Private interfaces of torch, PEFT and timm that this package uses, in one place.

Each entry says why the public interface is not enough and with which version it was last seen. `tests/test_compat.py`
has a test for each, which fails when an upgrade removes or changes it.
"""

from __future__ import annotations

# --- functional and lean: tensors, autograd ---------------------------------------------------------------------------


# --- tuners: PEFT's injection, hotswap, mixed models ------------------------------------------------------------------


# --- profiling: dispatch modes, pytrees, autograd's graph -------------------------------------------------------------


# --- the rest: data, training, hub, export, study ---------------------------------------------------------------------
