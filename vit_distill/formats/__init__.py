"""One file per checkpoint format; all give and take the parameter tree of core.vit.VisionTransformer."""
