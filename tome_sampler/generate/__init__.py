"""``tome-sampler generate``: pictures of prompts from a checkpoint, merged, plain or both."""
