"""How parameters are learned: one trainer, objectives, data, checkpoints, metrics.

Begin at `trainer`, which reads from top to bottom; `main` is its command, `objectives.objective` says what a method
gives it.
"""
