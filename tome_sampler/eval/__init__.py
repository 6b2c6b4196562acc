"""``tome-sampler eval``: how much of the picture each way of merging keeps, and what it gains, picture by picture."""
