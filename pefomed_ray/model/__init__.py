"""Architectures, LoRA, adapter bundles, generation. `load_model` opens a base or a bundle."""

from pefomed_ray.model.load import load_model

__all__ = ["load_model"]
