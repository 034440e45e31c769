"""Plain arithmetic about a run: who holds which rows, what is computed, moved and kept. Imports no torch."""
