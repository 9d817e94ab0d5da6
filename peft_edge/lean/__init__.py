"""Training in little memory and with few operations.

What is frozen keeps only what the backward pass needs, and what comes before the first trained layer is computed once.
"""

from peft_edge.lean.prefix import Prefix
from peft_edge.lean.prefix_cache import PrefixCache
from peft_edge.lean.prepare import prepare_model_for_lean_training, undo_lean_training
from peft_edge.lean.summary import lean_summary

__all__ = ["Prefix", "PrefixCache", "lean_summary", "prepare_model_for_lean_training", "undo_lean_training"]
