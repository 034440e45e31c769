"""The training loop, the DeepSpeed engine, the mesh of ranks, checkpoints and metrics."""
