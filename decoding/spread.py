"""One request that several processes answer together: each decodes its rows on devices of its own, all get the whole.

Rows are independent and keyed by their own seeds (`decoding/generate.py`), so which process decodes a row changes
nothing of it. A process that is alone calls what it would have called anyway.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from decoding.arguments import per_row, seed_per_row
from decoding.generate import Generation, generate
from decoding.images.generate import Generated, Stage, Tokenizer, generate_images
from models import processes
from models.formats.target import Target

_PER_ROW = ("max_new_tokens", "sampling")


def generate_together(target: Target, prompts: Sequence[Any], *, seeds: Any = 0, **options: Any) -> Generation:
    """`generate`, each process its share of the rows; what a drafter learnt (`memory`) stays where it was learnt.

    Args:
      target: on devices of this process.
      prompts: of all processes, the same everywhere, as all other arguments are.
      seeds: one per prompt, or a first one from which they count up.
      **options: of `generate`; neither `memory` nor `on_tokens`.
    """
    if processes.count() == 1:
        return generate(target, prompts, seeds=seeds, **options)
    mine = processes.share(range(len(prompts)))
    own = {name: per_row(options[name], len(prompts), name) for name in _PER_ROW if name in options}
    own |= {"seeds": seed_per_row(seeds, len(prompts))}
    made = None
    if mine:
        own = {name: [values[row] for row in mine] for name, values in own.items()}
        made = generate(target, [prompts[row] for row in mine], **options | own)
        made = dataclasses.replace(made, memory=None)
    parts = [part for part in processes.gathered(made) if part is not None]
    return Generation(
        tokens=processes.whole([part.tokens for part in parts]),
        writers=processes.whole([part.writers for part in parts]),
        stats=processes.whole([part.stats for part in parts]),
        prefill_seconds=max(part.prefill_seconds for part in parts),
        decode_seconds=max(part.decode_seconds for part in parts),
        memory=None,
        texts=processes.whole([part.texts for part in parts]),
        augmentations=processes.whole([part.augmentations for part in parts]),
        augment_seconds=max(part.augment_seconds for part in parts),
    )


def generate_images_together(
    tokenizer: Tokenizer, stages: Sequence[Stage], labels: Sequence[int], *, seeds: int = 0, **options: Any
) -> Generated:
    """`generate_images`, each process its share of the images; seconds are those of the slowest.

    Args:
      tokenizer: on devices of this process, as the models of `stages`, each with one drawing for all images.
      stages: in turn.
      labels: of all images, the same in every process.
      seeds: of the first image, from which they count up.
      **options: of `generate_images`; not `kept`.
    """
    if processes.count() == 1:
        return generate_images(tokenizer, stages, labels, seeds=seeds, **options)
    mine = processes.share(range(len(labels)))
    made = None
    if mine:
        own_seeds = [seeds + image for image in mine]
        made = generate_images(tokenizer, stages, [labels[image] for image in mine], seeds=own_seeds, **options)
    parts = [part for part in processes.gathered(made) if part is not None]
    return Generated(
        pixels=np.stack(processes.whole([part.pixels for part in parts])),
        indices=[np.stack(processes.whole(scale)) for scale in zip(*(part.indices for part in parts), strict=True)],
        f_hat=np.stack(processes.whole([part.f_hat for part in parts])),
        stage_seconds=tuple(max(times) for times in zip(*(part.stage_seconds for part in parts), strict=True)),
        decode_seconds=max(part.decode_seconds for part in parts),
    )
