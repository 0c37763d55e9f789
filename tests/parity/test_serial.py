"""Domino's GRU against torch's, weights as a release has them: gates in the order r, z, n, one row per output."""

import jax
import numpy as np
import pytest

from models.heads.serial import SerialHead

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def test_the_gru_is_torchs() -> None:
    torch.manual_seed(0)
    gru = torch.nn.GRU(6, 5, batch_first=True, bias=False)
    project = torch.nn.Sequential(torch.nn.Linear(11, 4, bias=False), torch.nn.SiLU())
    before, hidden = torch.randn(2, 7, 6), torch.randn(2, 7, 6)
    with torch.no_grad():
        expected = project(torch.cat([hidden, gru(before)[0]], dim=-1)).numpy()
    weights = {"input": gru.weight_ih_l0, "state": gru.weight_hh_l0, "down": project[0].weight}
    params = {name: {"kernel": weight.detach().numpy().T} for name, weight in weights.items()}
    head = SerialHead("gru", rank=4, state=5, confidence="none")
    latents = jax.jit(head.latents)(params, hidden.numpy(), before.numpy())
    np.testing.assert_allclose(latents, expected, atol=1e-6)
