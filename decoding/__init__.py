"""How tokens come out: trees, sampling, verification, caches in motion, and the jitted loop."""
