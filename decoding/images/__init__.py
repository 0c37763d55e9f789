"""How images come out: the scale-by-scale loop of VAR, CoDe's two models in turn, edits of given images."""
