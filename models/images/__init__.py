"""Next-scale image models: the multi-scale VQ-VAE, the VAR transformer, their files.

`config` says what a model is, `vqvae` turns images into codes and back, `var` predicts codes, `files` keeps both in
directories, and `released` reads the published checkpoints. Images are NHWC, floats in [-1, 1].
"""
