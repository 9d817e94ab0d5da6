"""Save, load, check and publish adapters, on disk and on the Hugging Face Hub."""

from peft_edge.hub.adapter_files import save_adapter
from peft_edge.hub.pretrained import load_pretrained
from peft_edge.hub.push import push_adapter, push_update

__all__ = ["load_pretrained", "push_adapter", "push_update", "save_adapter"]
