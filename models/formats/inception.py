"""The Inception graph's weights from the torch port that FID is computed with, strictly: every tensor has its place."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from models.formats.release import Release, read_release
from models.formats.storage import leaves_by_path
from models.images.inception import CLASSES, Params, param_shapes

# Our names of a convolution's tensors -> the port's.
_TENSORS = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
# What the port's batch norms count and nobody reads.
_UNUSED = r".*\.bn\.num_batches_tracked"


def read_inception(path: str | Path) -> Params:
    """The parameters in a file of the torch port, `pt_inception-2015-12-05-6726825d.pth`.

    Args:
      path: the file, as published or saved again by a newer torch, or as safetensors.

    Raises:
      UserError: there is no such file, it cannot be read, or a tensor is missing, of another shape or unknown.
    """
    return params_of(read_release(path))


def params_of(release: Release) -> Params:
    """The parameters among the tensors of the torch port; every tensor must have its place.

    Raises:
      UserError: a tensor is missing, of another shape or unknown.
    """
    shapes = param_shapes()
    because = "the Inception graph of 2015-12-05"

    def taken(path: str, shape: Sequence[int]) -> Array:
        module, name = path.rsplit("/", 1)
        if module == "fc":
            return jnp.asarray(release.take("fc.weight", shape[::-1], because).T, jnp.float32)
        if name != "kernel":
            return jnp.asarray(release.take(_port_name(module, name), shape, because), jnp.float32)
        height, width, channels_in, channels = shape
        tensor = release.take(_port_name(module, name), (channels, channels_in, height, width), because)
        return jnp.asarray(tensor.transpose(2, 3, 1, 0), jnp.float32)

    leaves = [taken(path, leaf.shape) for path, leaf in leaves_by_path(shapes).items()]
    release.take("fc.bias", (CLASSES,), because)  # Belongs to the file; Inception Score is defined without it.
    release.finish(_UNUSED, because)
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _port_name(module: str, name: str) -> str:
    """`Mixed_5b/branch1x1`, `kernel` -> `Mixed_5b.branch1x1.conv.weight`."""
    return f"{module.replace('/', '.')}.{_TENSORS[name]}"
