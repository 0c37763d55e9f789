"""How well and how fast, as commands and as rooms.

The commands are the modules here: `main` (the benchmark), `tree`, `acceptance`, `speed`, `assisted`, and `images.main`.
The rooms are `measure` (timing), `text` and `images` (what is measured), `report` (pages for people) and `peers` (the
same work in PyTorch).
"""
