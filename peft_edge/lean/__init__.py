"""Train in little memory: lean frozen layers, and training on stored features of a frozen prefix."""

from peft_edge.lean.feature_cache import FeatureCache, FrozenPrefix
from peft_edge.lean.prepare import lean_summary, prepare_model_for_lean_training, undo_lean_training

__all__ = ["FeatureCache", "FrozenPrefix", "lean_summary", "prepare_model_for_lean_training", "undo_lean_training"]
