"""Checkpoint formats: each reader translates its names and layouts into timm's, `canonical` takes them from there."""
