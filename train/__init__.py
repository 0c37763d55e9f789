"""How parameters are learned: one trainer, objectives, data, checkpoints, metrics."""
