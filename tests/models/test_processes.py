"""Several processes: how they are asked for, when a cluster is seen, and how parts become whole."""

import http.server
import pathlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from decoding import spread
from decoding.images.generate import Generated, Tokenizer
from models import processes
from models.errors import UserError
from models.images.config import VQVAEConfig

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must be HOST:PORT,N,I, as in 10.0.0.1:8476,4,0, or off"),
        ("host,2,0", "must be HOST:PORT,N,I"),
        ("host:80", "got 'host:80'"),
        ("host:80,2", "must be HOST:PORT,N,I"),
        ("host:80,2,-1", "must be HOST:PORT,N,I"),
        ("host:80,two,0", "must be HOST:PORT,N,I"),
        ("http://host:80,2,0", "must be HOST:PORT,N,I"),
        ("host:0,2,0", "PORT must be 1 to 65535, got 0"),
        ("host:70000,2,0", "PORT must be 1 to 65535, got 70000"),
        ("host:80,2,2", "I counts the N processes from 0, got N = 2 and I = 2"),
        ("host:80,0,0", "got N = 0 and I = 0"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_sentence(text: str, complaint: str) -> None:
    with pytest.raises(UserError) as raised:
        processes.start(text)
    told = str(raised.value)
    assert told.startswith("--distributed ") and complaint in told and "\n" not in told


def test_what_can_be_asked_for() -> None:
    assert processes.parse("10.0.0.1:8476,4,3") == ("10.0.0.1:8476", 4, 3)
    assert processes.parse("[fe80::1]:80,1,0") == ("[fe80::1]:80", 1, 0)
    assert processes.parse("off") is None
    processes.start("off")


@pytest.mark.parametrize(
    ("environ", "cluster"),
    [
        ({}, None),
        (SLURM, "SLURM"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None),
    ],
)
def test_clusters_are_read_off_the_environment(environ: dict[str, str], cluster: str | None, monkeypatch) -> None:
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(processes, "_workers", lambda metadata: pytest.fail("asked over the network"))
    assert processes.detected(environ) == cluster


@pytest.mark.parametrize("told", ["a:0:10.0.0.1,b:1:10.0.0.2", "a:0:10.0.0.1"])
def test_a_tpu_worker_asks_its_metadata(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    environ = {"TPU_WORKER_HOSTNAMES": told}
    assert processes.detected(environ) == ("TPU pod" if "," in told else None)
    assert processes.detected({**environ, "JAX_PLATFORMS": "cpu"}) is None

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write(told.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.handle_request).start()
        monkeypatch.setattr(processes, "_has_tpu_chips", lambda: True)
        where = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert processes.detected(where) == ("TPU pod" if "," in told else None)
    assert processes.detected(where) is None, "nobody answers"
    monkeypatch.setattr(processes, "_has_tpu_chips", lambda: False)
    monkeypatch.setattr(processes, "_workers", lambda metadata: pytest.fail("asked where there are no chips"))
    assert processes.detected(where) is None


@pytest.mark.parametrize("index", [0, 1])
def test_who_waits_in_vain_says_so_and_ends(index: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = f"from models import processes\nprocesses.TIMEOUT = 1\nprocesses.start('{address},2,{index}')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    why = f"nobody answers at {address} (" if index else "not all of the others have come"
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"error: process {index} of the 2 at {address} waited 1 s in vain: {why}")


def test_alone_everything_is_ones_own() -> None:
    assert processes.is_first() and processes.count() == 1
    assert processes.share(range(3)) == [0, 1, 2] and processes.gathered("x") == ["x"]
    assert processes.whole([[1, 2]]) == [1, 2] and processes.on_first(lambda: 3) == 3


def test_parts_become_whole_in_the_order_of_the_items() -> None:
    items = list("abcdefg")
    assert processes.whole([items[0::3], items[1::3], items[2::3]]) == items
    assert processes.whole([["a"], [], []]) == ["a"]


class Fake:
    """Two processes in one, whose turns come one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.index, self.made = 0, [None, None]
        monkeypatch.setattr(processes, "count", lambda: 2)
        monkeypatch.setattr(processes, "share", lambda items: list(items[self.index :: 2]))
        monkeypatch.setattr(processes, "gathered", self.gather)

    def gather(self, value: Any) -> list[Any]:
        self.made[self.index] = value
        return self.made

    def run(self, function: Callable[[], Any]) -> Any:
        for self.index in (1, 0):  # What the last one gets is whole.
            made = function()
        return made


def test_images_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(tokenizer, stages, labels, *, seeds, decoded_at_once) -> Generated:
        codes = np.array([[label, seed] for label, seed in zip(labels, seeds, strict=True)])
        pixels = np.broadcast_to(codes[:, :1, None, None], (len(labels), 2, 2, 3)).astype(np.uint8)
        return Generated(pixels, [codes, codes], codes[:, :, None, None] / 2, (float(len(labels)), 0.0), 1.0)

    tokenizer, labels = Tokenizer(VQVAEConfig(), {}), [3, 1, 4, 1, 5]
    expected = fake(tokenizer, (), labels, seeds=range(7, 12), decoded_at_once=2)
    monkeypatch.setattr(spread, "generate_images", fake)
    two = Fake(monkeypatch)
    made = two.run(lambda: spread.generate_images_together(tokenizer, (), labels, seeds=7, decoded_at_once=2))
    assert np.array_equal(made.pixels, expected.pixels) and np.array_equal(made.f_hat, expected.f_hat)
    assert all(np.array_equal(*pair) for pair in zip(made.indices, expected.indices, strict=True))
    assert made.stage_seconds == (3.0, 0.0), "the slowest one's"


# Commands that compute nothing, or that start others which do.
ALONE = {"scripts/fetch_smollm2.py", "scripts/convert.py", "scripts/build_dataset.py", "scripts/pack_drafter.py"}
ALONE |= {"scripts/openings.py", "scripts/restrict_drafter.py", "scripts/questions.py"}
ALONE |= {"eval/seeds.py", "eval/curves.py"}


def test_every_command_that_computes_joins_its_processes() -> None:
    root = pathlib.Path(__file__).resolve().parents[2]
    commands = [path for room in ("train", "eval", "scripts") for path in sorted((root / room).rglob("*.py"))]
    sources = {path.relative_to(root).as_posix(): path.read_text() for path in commands}
    missing = {
        name for name, text in sources.items() if "@exit_on_user_error" in text and "processes.start(" not in text
    }
    assert {name for name in missing if not name.startswith("scripts/accelerator/")} == ALONE
