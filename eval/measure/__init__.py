"""How long things take: interleaved timing, the parts of a decoding step, the machine's own limits."""
