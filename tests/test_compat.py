"""Every private interface in `peft_edge/_compat.py` is still there and still does what it is used for."""

from __future__ import annotations

# --- functional and lean: tensors, autograd ---------------------------------------------------------------------------


# --- tuners: PEFT's injection, hotswap, mixed models ------------------------------------------------------------------


# --- profiling: dispatch modes, pytrees, autograd's graph -------------------------------------------------------------


# --- the rest: data, training, hub, export, study ---------------------------------------------------------------------
