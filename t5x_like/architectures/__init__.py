"""Layers joined into networks: token ids in, logits out."""
