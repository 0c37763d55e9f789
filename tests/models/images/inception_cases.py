"""Random Inception parameters that hide nothing, and the same under the names of the torch port."""

from typing import Any

import jax
import numpy as np

from models.formats.storage import leaves_by_path
from models.images import inception

NAMES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}


def random_params(seed: int = 0) -> dict[str, Any]:
    """Every tensor random, variances small, so that the 1e-3 beside them shows; activations stay of order one."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape) -> np.ndarray:
        name = path[-1].key
        if name == "kernel":
            return rng.normal(size=shape.shape, scale=np.sqrt(2 / np.prod(shape.shape[:-1]))).astype(np.float32)
        low, high = {"scale": (0.07, 0.13), "variance": (0.005, 0.02)}.get(name, (-0.2, 0.2))
        return rng.uniform(low, high, shape.shape).astype(np.float32)

    return jax.tree.map_with_path(leaf, inception.param_shapes())


def port_tensors(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the port's state dict would hold."""
    tensors = {"fc.bias": np.random.default_rng(9).normal(size=1008).astype(np.float32)}
    for path, leaf in leaves_by_path(params).items():
        *module, name = path.split("/")
        if module == ["fc"]:
            tensors["fc.weight"] = leaf.T
        else:
            tensors[".".join([*module, NAMES[name]])] = leaf.transpose(3, 2, 0, 1) if name == "kernel" else leaf
    return tensors
