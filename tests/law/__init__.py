"""The law: merging one adapter with weight 1 gives back its delta, for everything that is accepted."""
