"""Training in little memory and with few operations.

What is frozen keeps only what the backward pass needs, and what comes before the first trained layer is computed once.
"""

from peft_edge.lean.feature_cache import FeatureCache, FrozenPrefix
from peft_edge.lean.prepare import lean_summary, prepare_model_for_lean_training, undo_lean_training

__all__ = ["FeatureCache", "FrozenPrefix", "lean_summary", "prepare_model_for_lean_training", "undo_lean_training"]
