"""Our Inception graph against a torch build of it from the facts of the public port, every tensor random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.images import inception
from models.layers import call
from tests.models.images.inception_cases import port_tensors, random_params

torch = pytest.importorskip("torch")
F = torch.nn.functional

pytestmark = pytest.mark.parity


class Peer:
    """The graph as torch functions of a flat state dict, with torch's own paddings."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}

    def unit(self, x, name: str, stride: int = 1, padding=0):
        t = {key: self.tensors[f"{name}.{key}"] for key in ("conv.weight", "bn.weight", "bn.bias")}
        mean, variance = (self.tensors[f"{name}.bn.running_{key}"] for key in ("mean", "var"))
        x = F.conv2d(x, t["conv.weight"], stride=stride, padding=padding)
        return F.relu(F.batch_norm(x, mean, variance, t["bn.weight"], t["bn.bias"], eps=1e-3))

    def branch(self, x, *units):
        for name, *options in units:
            x = self.unit(x, name, *options)
        return x

    @staticmethod
    def mean_pool(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def a(self, x, m: str):
        ones = self.unit(x, f"{m}.branch1x1")
        fives = self.branch(x, (f"{m}.branch5x5_1",), (f"{m}.branch5x5_2", 1, 2))
        dbl = f"{m}.branch3x3dbl"
        threes = self.branch(x, (f"{dbl}_1",), (f"{dbl}_2", 1, 1), (f"{dbl}_3", 1, 1))
        return torch.cat([ones, fives, threes, self.unit(self.mean_pool(x), f"{m}.branch_pool")], 1)

    def b(self, x, m: str):
        dbl = f"{m}.branch3x3dbl"
        threes = self.branch(x, (f"{dbl}_1",), (f"{dbl}_2", 1, 1), (f"{dbl}_3", 2))
        return torch.cat([self.unit(x, f"{m}.branch3x3", 2), threes, F.max_pool2d(x, 3, stride=2)], 1)

    def c(self, x, m: str):
        row, column = (0, 3), (3, 0)
        ones = self.unit(x, f"{m}.branch1x1")
        one, dbl = f"{m}.branch7x7", f"{m}.branch7x7dbl"
        sevens = self.branch(x, (f"{one}_1",), (f"{one}_2", 1, row), (f"{one}_3", 1, column))
        paddings = zip((2, 3, 4, 5), (column, row, column, row), strict=True)
        doubles = self.branch(x, (f"{dbl}_1",), *((f"{dbl}_{i}", 1, padding) for i, padding in paddings))
        return torch.cat([ones, sevens, doubles, self.unit(self.mean_pool(x), f"{m}.branch_pool")], 1), ones

    def d(self, x, m: str):
        seven = f"{m}.branch7x7x3"
        threes = self.branch(x, (f"{m}.branch3x3_1",), (f"{m}.branch3x3_2", 2))
        sevens = self.branch(
            x, (f"{seven}_1",), (f"{seven}_2", 1, (0, 3)), (f"{seven}_3", 1, (3, 0)), (f"{seven}_4", 2)
        )
        return torch.cat([threes, sevens, F.max_pool2d(x, 3, stride=2)], 1)

    def e(self, x, m: str, pool):
        single = self.unit(x, f"{m}.branch3x3_1")
        double = self.branch(x, (f"{m}.branch3x3dbl_1",), (f"{m}.branch3x3dbl_2", 1, 1))
        pairs = [(single, f"{m}.branch3x3_2"), (double, f"{m}.branch3x3dbl_3")]
        halves = [self.unit(y, f"{n}{k}", 1, p) for y, n in pairs for k, p in (("a", (0, 1)), ("b", (1, 0)))]
        return torch.cat([self.unit(x, f"{m}.branch1x1"), *halves, self.unit(pool(x), f"{m}.branch_pool")], 1)

    def __call__(self, x):
        x = self.branch(x, ("Conv2d_1a_3x3", 2), ("Conv2d_2a_3x3",), ("Conv2d_2b_3x3", 1, 1))
        x = self.branch(F.max_pool2d(x, 3, stride=2), ("Conv2d_3b_1x1",), ("Conv2d_4a_3x3",))
        x = F.max_pool2d(x, 3, stride=2)
        for letter in "bcd":
            x = self.a(x, f"Mixed_5{letter}")
        x = self.b(x, "Mixed_6a")
        ones = {}
        for letter in "bcde":
            x, ones[letter] = self.c(x, f"Mixed_6{letter}")
        x = self.e(self.d(x, "Mixed_7a"), "Mixed_7b", self.mean_pool)
        x = self.e(x, "Mixed_7c", lambda y: F.max_pool2d(y, 3, stride=1, padding=1))
        pool = F.adaptive_avg_pool2d(x, 1).flatten(1)
        spatial = ones["d"][:, :7].permute(0, 2, 3, 1).flatten(1)
        return pool, spatial, pool @ self.tensors["fc.weight"].T


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params()


@pytest.mark.parametrize("side", [pytest.param(107, marks=pytest.mark.slow), inception.SIZE])
def test_graph_is_the_port(params: dict, side: int) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = [y.numpy() for y in Peer(port_tensors(params))(torch.from_numpy(x.transpose(0, 3, 1, 2)))]
    ours = jax.jit(lambda p, x: call(inception.Inception(), p, x))(params, jnp.asarray(x))
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert np.std(b) > 0.01, "values this alike would hide a mistake"
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max(), err_msg=name)


def test_pytorch_fid_has_the_same_network(params: dict) -> None:
    """Runs where pytorch-fid 0.3.0 is installed, which requirements-parity.txt says why it leaves out."""
    module = pytest.importorskip(
        "pytorch_fid.inception", reason="needs pytorch-fid, and the torchvision that was built with this torch"
    )
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in port_tensors(params).items()}
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(module, "load_state_dict_from_url", lambda *_, **__: tensors)
        network = module.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    x = np.random.default_rng(1).uniform(-1, 1, (1, 3, 299, 299)).astype(np.float32)
    with torch.no_grad():
        theirs = network(torch.from_numpy(x))[0].flatten(1).numpy()
    ours = jax.jit(lambda p, x: call(inception.Inception(), p, x))(params, jnp.asarray(x.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(ours.pool, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
