"""Is attention of training right on this device? Its library's kernel beside the dense path, slopes included.

    python -m scripts.accelerator.kernels --out FILE.json

Whole texts and packed documents in bfloat16, in heads of 64 and of 128; `kernel` says what ran, `blocks` where the
library has none for such heads, as splash on a TPU for those of 64. Both paths are compared with the dense one in
float32 on the same numbers: `fused` and `dense` are how far each is off, as a share of the norm, for the output and for
the slopes of queries, keys and values. The exit status is 1 where the kernel is off by more than rounding makes of it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.measure.environment import describe_environment
from eval.report.files import write_json
from models import command_line
from models.attention import ALONE, attend, kernel_for
from models.command_line import at_least
from models.errors import exit_on_user_error
from models.layout import Layout

B, N, K = 2, 8, 2
ROUNDING = 2.0**-5  # Of bfloat16's 2**-8, what sums of its products make of it: 0.02 on a CPU, for values' slopes.
NAMES = ("output", "queries", "keys", "values")


def errors(length: int, head_dim: int, packed: bool) -> dict[str, Any]:
    """How far the kernel and the dense path are off in bfloat16, by what is compared; and which kernel it is."""
    rng = np.random.default_rng(head_dim)
    shapes = (B, length, N, head_dim), (B, K, head_dim, length), (B, K, length, head_dim), (B, length, N * head_dim)
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    documents = [1] * (length // 3) + [2] * (length - length // 3)
    segments = jnp.asarray([documents] * B, jnp.int32) if packed else None

    @jax.jit
    def run(inputs):
        def of(path, dtype):
            layout = Layout.causal(B, length, segments, path)
            *rows, told = (x.astype(dtype) for x in inputs)

            def total(q, k, v):
                out = attend(q, {"k": k, "v": v}, ALONE, layout, scale=head_dim**-0.5)
                return jnp.sum((out * told).astype(jnp.float32)), out

            (_, out), slopes = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*rows)
            return [x.astype(jnp.float32) for x in (out, *slopes)]

        exact = of("dense", jnp.float32)
        return [
            [jnp.linalg.norm(x - y) / jnp.linalg.norm(y) for x, y in zip(of(path, jnp.bfloat16), exact, strict=True)]
            for path in ("fused", "dense")
        ]

    with jax.default_matmul_precision("highest"):
        found = jax.device_get(run(inputs))
    off = [dict(zip(NAMES, map(float, one), strict=True)) for one in found]
    ran = kernel_for(inputs[0], Layout.causal(B, length, segments, "fused"), None, None)
    return {"kernel": ran, "fused": off[0], "dense": off[1]}


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("scripts.accelerator.kernels", __doc__)
    parser.add_argument("--length", type=at_least(3), default=512, help="tokens of a row")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    found = {
        f"{'packed' if packed else 'whole'} {head_dim}": errors(args.length, head_dim, packed)
        for packed in (False, True)
        for head_dim in (64, 128)
    }
    wrong = [name for name, off in found.items() if not max(off["fused"].values()) < ROUNDING]
    write_json({"environment": describe_environment(), "length": args.length, "off": found, "wrong": wrong}, args.out)
    print(f"wrong: {', '.join(wrong) or 'none'}; {found}")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
