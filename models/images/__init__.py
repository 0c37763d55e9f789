"""Next-scale image models: the multi-scale VQ-VAE and the VAR transformer, and the networks that judge images.

`config` says what a model is, `vqvae` turns images into codes and back, `var` predicts codes; directories and published
checkpoints are in `models.formats`. Images are NHWC, floats in [-1, 1].
"""
