"""How tokens come out: trees, sampling, verification, caches in motion, and the jitted loop.

Begin at `loop`, where a decoding step is five functions; `generate` is what callers use. `drafters` propose, `policies`
make trees of a draft network's scores, `verify` judges them. `images` has loops of its own.
"""
