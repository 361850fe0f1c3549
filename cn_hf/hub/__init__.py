"""Checkpoints: save a patched model to a folder, load it from a folder or the Hub."""

from cn_hf.hub.checkpoint import from_pretrained, save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
