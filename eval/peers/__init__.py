"""The same work in PyTorch, to be timed in the same run; the only place of eval that may import torch."""
