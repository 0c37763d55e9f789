"""How well and how fast text is decoded: prompts, the benchmark, draft-tree budgets, accuracy of heads."""
