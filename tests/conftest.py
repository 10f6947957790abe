"""Shared by all tests: a small packed set, a tokenizer, and the folder of real radiographs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

# Without a card Triton kernels run in Python. Triton reads this when it is first imported, its own library included, so it
# stands before every import that may lead there; processes that tests start inherit it.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own, 15, starves its workers beside the other test processes

from mmclip_shards.datasets.synthetic.set import pack_synthetic
from mmclip_shards.manifest import Manifest, load_manifest, save_manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import encode_npy
from mmclip_shards.writer import write_shard
from transformers import PreTrainedTokenizerBase

from mmclip_dist.config import Config, load_config
from mmclip_dist.data.tokenizer import save_tokenizer, tokenizer_of_sets
from tests.object_store import faulty, s3  # noqa: F401 (fixtures)

# A shell that runs tests in the background has them ignore Ctrl-C, and all that they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)

REAL_DATA = Path(os.environ.get("MMCLIP_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

PAPER = (  # every sample is masked, and the text encoder runs twice: what most tests of the objective compare to
    "attmim.mode=feature",
    "attmim.share=1",
    "entmlm.share=1",
    "entmlm.input=encoder",
    "entmlm.probability=0.5",
)
TINY = (
    *PAPER,
    "model.image={size: 32, patch: 8, width: 32, depth: 1, heads: 2}",
    "model.text={width: 32, depth: 1, heads: 2, max_tokens: 48}",
    "model.embed=16",
    "attmim.decoder={depth: 1, width: 32, heads: 2}",
    "entmlm.decoder={depth: 1, width: 32, heads: 2}",
    "data.streams=4",
    "data.shuffle_block=8",
    "optim.global_batch=8",
    "optim.stop_at=null",
    "threads=1",
)


TRAIN = ("optim.steps=12", "checkpoint.every=4", "log_every=2", "optim.lr=0.1", "checkpoint.keep=5")


def wait_for(condition: Callable[[], bool], timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


LONGEST_FIRST = (
    "cluster/test_two_hosts.py", "cluster/test_ray_hosts.py", "cluster/test_slurm.py",
    "test_end_to_end.py", "test_broken_runs.py", "engine/test_optimizer.py", "test_training.py", "test_faults.py",
    "offline/test_stage.py", "plan/test_layouts.py", "shards/test_object_store.py",
)  # fmt: skip
"""Files that take long. They start first, so that at the end no process waits for one of them. A process is given its next file
when two tests of the last one are left: those should be short."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for machines: `slowest {"total_s": ..., "tests": [[test, seconds], ...]}`, set-up and tear-down included."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] += report.duration
    slowest = [[name, round(value, 1)] for name, value in seconds.most_common(20) if value >= 1]
    terminalreporter.write_line(f"slowest {json.dumps({'total_s': round(seconds.total(), 1), 'tests': slowest})}")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def patient_key(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never touch the user's own key."""
    os.environ["MMCLIP_PATIENT_KEY"] = "the key of the tests, not secret"


@dataclass(frozen=True)
class Sets:
    """Packed synthetic sets with sidecars: every finding word of a report is an entity, every grid counts up."""

    folder: Path

    @property
    def paired(self) -> str:
        return str(self.folder / "paired" / "train")

    @property
    def unpaired(self) -> str:
        return str(self.folder / "unpaired" / "train")

    @property
    def test(self) -> str:
        return str(self.folder / "paired" / "test")

    @property
    def tokenizer(self) -> str:
        return str(self.folder / "tokenizer")

    def sidecar(self, kind: str, of: str = "paired") -> str:
        return str(self.folder / "sidecars" / of / kind)

    def config(self, *overrides: str, run_dir: str = "unused") -> Config:
        return load_config("quickstart", [*self.overrides(run_dir), *overrides])

    def overrides(self, run_dir: str | Path) -> list[str]:
        sources = [
            {
                "url": self.paired,
                "entities": self.sidecar("entities"),
                "attention": self.sidecar("attention"),
                "weight": 2,
            },
            {"url": self.unpaired, "attention": self.sidecar("attention", "unpaired")},
        ]
        return [
            *TINY,
            f"run_dir={run_dir}",
            f"data.sources={json.dumps(sources)}",
            f"model.text.tokenizer={self.tokenizer}",
        ]


def _entities(members: dict[str, bytes]) -> dict[str, bytes]:
    report = (json.loads(members["json"])["report"] or {}).get("text", "")
    spans = []
    for word in ("effusion", "heart", "lung", "consolidation", "pneumothorax"):
        start = report.lower().find(word)
        if start >= 0:
            span = {"start": start, "end": start + len(word), "text": report[start : start + len(word)]}
            spans.append(span | {"label": "FINDING", "negated": False})
    return {"entities.json": json.dumps(spans).encode()}


def _attention(members: dict[str, bytes]) -> dict[str, bytes]:
    return {"attention.npy": encode_npy(torch.arange(16.0).reshape(4, 4).half().numpy())}


def write_sidecar(base: str, out: str, kind: str, make: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
    """A sidecar of `base` at `out`, made without Ray."""
    manifest = load_manifest(base)
    reader = ShardReader(base, manifest)
    shards = tuple(
        write_shard(out, number, [(key, make(members)) for key, members in reader.samples(number)])
        for number in range(len(manifest.shards))
    )
    save_manifest(
        out,
        Manifest(
            kind=kind, dataset=manifest.dataset, split=manifest.split, shards=shards, config_hash="test",
            base={shard.path: shard.sha256 for shard in manifest.shards},
            checkpoint="0" * 64 if kind == "attention" else None,
        ),
    )  # fmt: skip


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A new folder that `make` fills, once for all processes of this session. Those that ask later wait for it."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # a process was killed in the middle
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """No test changes them."""
    return Sets(once(tmp_path_factory, "sets", _make_sets))


def _make_sets(folder: Path) -> None:
    splits = {"paired": {"train": 0.7, "test": 0.3}, "unpaired": {"train": 1.0}}
    for name, count in (("paired", 80), ("unpaired", 24)):
        pack_synthetic(
            str(folder / name), count, seed=1, size=40, splits=splits[name], unpaired=name == "unpaired", samples_per_shard=16
        )
    made = Sets(folder)
    write_sidecar(made.paired, made.sidecar("entities"), "entities", _entities)
    write_sidecar(made.paired, made.sidecar("attention"), "attention", _attention)
    write_sidecar(made.unpaired, made.sidecar("attention", "unpaired"), "attention", _attention)
    save_tokenizer(tokenizer_of_sets([made.paired, made.unpaired], 600), folder / "tokenizer")


STEPS = 36
LONG = (f"optim.steps={STEPS}", "checkpoint.every=4", "log_every=1", "optim.lr=0.1", "checkpoint.keep=20", "data.workers=1")
"""A run that tests interrupt, and of which `unbroken` is the same without."""


@pytest.fixture(scope="session")
def unbroken(sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """ZeRO stage -> the run folder of two ranks that nothing interrupts (`LONG`), with every checkpoint and log row. No test
    changes it: a run with optim.stop_at is compared to the checkpoint of that step."""
    from tests.launched import run_training

    def train(stage: int, folder: Path) -> None:
        run_training([*sets.overrides(folder / "run"), *LONG, f"zero_stage={stage}"], folder)

    return lambda stage: once(tmp_path_factory, f"unbroken-{stage}", partial(train, stage)) / "run"


@pytest.fixture(scope="session")
def tokenizer(sets: Sets) -> PreTrainedTokenizerBase:
    from mmclip_dist.data.tokenizer import load_tokenizer

    return load_tokenizer(sets.tokenizer)


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not (REAL_DATA / "covid_cxr" / "pairs.csv").is_file():
        pytest.skip(f"REAL RADIOGRAPHS ARE NOT TESTED: there are none in {REAL_DATA}; set MMCLIP_REAL_DATA to their folder")
    return REAL_DATA

@pytest.fixture(scope="session")
def untrained(sets: Sets, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint of random weights, of step 3."""
    from mmclip_dist.checkpoint.folder import Meta, checkpoint_path
    from mmclip_dist.checkpoint.model_files import write_model
    from mmclip_dist.model.build import build_model

    torch.manual_seed(0)
    folder, diseases = tmp_path_factory.mktemp("untrained"), load_manifest(sets.test).labels
    checkpoint_path(folder, 3).mkdir(parents=True)
    model = build_model(sets.config(), tokenizer, diseases)
    write_model(checkpoint_path(folder, 3), model, tokenizer, sets.config(), Meta(3, 1, 1, diseases, ()))
    return folder
