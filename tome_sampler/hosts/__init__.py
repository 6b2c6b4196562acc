"""Where the seam meets models: one module per kind of host. None of them knows how tokens are matched."""
