"""How much memory a training run takes, answered by arithmetic before a GPU is taken. Imports no torch."""
