"""Few-shot distillation of vision transformers: copy blocks, train low-rank adapters, merge, export."""
