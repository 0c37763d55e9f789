"""How good images are: `samples` reads and writes the files, `features` runs the network, `metrics` compares."""
