"""What was asked of the loop."""

from flax import struct
from jaxtyping import Array, Int

from decoding.sampling import SamplingParameters
from decoding.verify import Typical
from models.encoder_decoder import Memory


@struct.dataclass
class Request:
    """What was asked, per batch row; read only.

    Attributes:
      prompt_length: tokens of the prompt.
      limit: most tokens in the end, prompt included.
      stops: K token sequences that end a text, right-aligned in L places, padded on the left with -1.
      keys: typed PRNG keys.
      sampling: sampling parameters.
      memory: the prompt as an encoder has read it, before anything else; the target's own text is then behind its begin
        token, which is all of the prompt that counts above. None for a decoder alone.
      attention: how the target attends to its cache (`models.layout.Layout.attention`).
      typical: lossy typical acceptance in place of the tree's own rule.
    """

    prompt_length: Int[Array, "B"]
    limit: Int[Array, "B"]
    stops: Int[Array, "B K L"]
    keys: Array
    sampling: SamplingParameters
    memory: Memory | None = None
    attention: str = struct.field(pytree_node=False, default="dense")
    typical: Typical | None = None
