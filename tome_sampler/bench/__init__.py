"""How fast is merging, how fast could it be, and how fast are others: methods measured in turn on the same model."""
