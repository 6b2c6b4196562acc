"""``tome-sampler inspect``: what merging sees in a model, step by step, and the settings that follow from it."""
