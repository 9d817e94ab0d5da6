"""Adapters on the disk and on the Hub: save, load, describe, push."""

from peft_edge.hub.loading import load_pretrained
from peft_edge.hub.push import push_adapter, push_update
from peft_edge.hub.saving import save_adapter

__all__ = ["load_pretrained", "push_adapter", "push_update", "save_adapter"]
