"""New domains without labels: folders, data sets and pictures become contexts of a trained model."""

from __future__ import annotations

from cn_hf.adaptation.adapt import adapt

__all__ = ["adapt"]
