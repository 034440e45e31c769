"""Train language models on sequences too long for one GPU.

Importing this package loads neither torch nor any other heavy library; its parts load what they need.
"""

__version__ = "0.1.0"
