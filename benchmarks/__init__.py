"""One file per claim: what is measured, how, and whether the claim holds.

A benchmark is a module of this package that says ``NEEDS_GPU``; its docstring is the claim. ``python -m benchmarks
NAME`` measures and writes ``results/NAME.json``, of which the README's tables are made.
"""
