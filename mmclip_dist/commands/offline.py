"""The offline stages on Ray: `mmclip entities`, `mmclip attention`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from mmclip_shards.storage import join

from mmclip_dist.commands.options import Precision, Split, Workers

Address = Annotated[
    str | None, typer.Option(help="Ray cluster; by default the job's own or RAY_ADDRESS, else one is started here.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Progress as one JSON object a line.")]
LostS = Annotated[
    float, typer.Option(min=1, help="Seconds to wait for another host, once all are lost that had room for a worker.")
]
MaxBad = Annotated[float, typer.Option(min=0, max=1, help="Share of unreadable samples that may get empty rows; 0: none.")]


def entities(
    base: Split,
    out: Annotated[str | None, typer.Option(help="Sidecars; by default BASE/entities.")] = None,
    model: Annotated[str, typer.Option(help="`lexicon`, or an installed spaCy or scispaCy model.")] = "lexicon",
    language: Annotated[str | None, typer.Option(help="Of the reports: en or es; by default that of the data set.")] = None,
    linker: Annotated[str | None, typer.Option(help="scispaCy's knowledge base for concepts: umls, mesh, ...")] = None,
    workers: Workers = 2,
    max_bad_fraction: MaxBad = 1e-3,
    lost_s: LostS = 600,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Find the medical entities of every report, on Ray."""
    from mmclip_dist.offline.entities import entities_stage
    from mmclip_dist.offline.lexicon import language_of
    from mmclip_dist.offline.stage import progress_line, run_stage

    stage = entities_stage(base, out or join(base, "entities"), model, language or language_of(base), linker)
    with cluster(address):
        report = progress_line("shards", as_json=as_json)
        manifest = run_stage(stage, workers=workers, report=report, max_bad_fraction=max_bad_fraction, lost_s=lost_s)
    print(f"{stage.out}: entities of {manifest.samples} samples")


def labels(
    base: Split,
    out: Annotated[str, typer.Option(help="The table: a key and CheXpert's 14 observations a row.")] = "labels.csv",
) -> None:
    """Label every report with CheXpert's 14 observations, by rules. `mmclip pack --labels-from-reports` puts them into a set."""
    from mmclip_dist.commands.progress import progress_bar
    from mmclip_dist.offline.labels import label_set

    with progress_bar("label", "reports") as report:
        counts = label_set(base, out, report)
    for name, (present, uncertain, absent) in counts.items():
        print(f"{name}: {present} present, {uncertain} uncertain, {absent} absent")
    print(f"{out}: labels by rules; how they agree with people: mmclip_dist/bench/results/labeller.md")


def attention(
    base: Split,
    checkpoint: Annotated[str, typer.Option(help="A checkpoint folder, or a run folder or a mirror's URL for its newest one.")],
    entities: Annotated[str | None, typer.Option(help="Entity sidecars, whose words guide the scores.")] = None,
    out: Annotated[str | None, typer.Option(help="Sidecars; by default BASE/attention.")] = None,
    workers: Workers = 2,
    gpus: Annotated[
        float, typer.Option(min=0, help="GPUs of each process; by default it runs on the CPU. 0.5: two share a card.")
    ] = 0,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of each process; those of a card's decode ahead of it.")] = 1,
    precision: Annotated[
        Precision | None, typer.Option(help="By default that of the checkpoint's training on a card, fp32 on the CPU.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    max_bad_fraction: MaxBad = 1e-3,
    lost_s: LostS = 600,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Score how strongly each patch responds to the report, on Ray."""
    from mmclip_dist.offline.attention import attention_stage
    from mmclip_dist.offline.stage import progress_line, run_stage

    out = out or join(base, "attention")
    stage = attention_stage(base, out, checkpoint, entities, gpus, cpus=cpus, precision=precision, batch=batch)
    with cluster(address):
        report = progress_line("shards", as_json=as_json)
        manifest = run_stage(stage, workers=workers, report=report, max_bad_fraction=max_bad_fraction, lost_s=lost_s)
    print(f"{stage.out}: attention scores of {manifest.samples} samples")


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Join the Ray cluster, and leave it at the end."""
    import ray

    from mmclip_dist.offline.stage import connect

    connect(address)
    try:
        yield
    finally:
        ray.shutdown()
