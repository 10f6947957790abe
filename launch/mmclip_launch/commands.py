"""The commands of `mmclip`: all stages of mmclip_dist, `quickstart`, which runs them one after another, `doctor` and `launch`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mmclip_dist.cli import TRAINING, app
from mmclip_dist.commands.options import Overrides, RecipeName, local_folder
from mmclip_dist.errors import masked

Urls = list[str] | None


@app.command(rich_help_panel=TRAINING)
def quickstart(
    out: Annotated[Path, typer.Option(parser=local_folder, metavar="FOLDER", help="Folder for all output.")] = Path(
        "runs/quickstart"
    ),
    paired: Annotated[Urls, typer.Option(help="Packed set with reports; may be repeated.")] = None,
    unpaired: Annotated[Urls, typer.Option(help="Packed set without reports; may be repeated.")] = None,
    evaluation: Annotated[Urls, typer.Option("--eval", help="Packed, labelled set; may be repeated.")] = None,
    overrides: Overrides = None,
) -> None:
    """The whole job on this machine: pack, entities, warm-up, attention, MMCLIP training, a control, zero-shot, report.

    Without sets it draws synthetic radiographs. Run it again to go on where it stopped.
    """
    from mmclip_launch.quickstart import Job
    from mmclip_launch.quickstart import quickstart as start

    summary = start(
        Job(out, tuple(paired or ()), tuple(unpaired or ()), tuple(evaluation or ()), tuple(overrides or ()))
    )
    table = Table("quick start", "")
    for stage in summary["stages"]:
        table.add_row(stage["name"], f"{stage['seconds']:.0f} s")
    for term, values in summary["loss"].items():
        table.add_row(f"loss, {term}", f"{values['first']:.3f} to {values['last']:.3f}")
    for name, shot in (
        ("MMCLIP", summary["zero_shot"]),
        ("contrastive alone, same time", summary["control"]["zero_shot"]),
    ):
        low, high = shot["auc_macro_ci95"]
        table.add_row(f"zero-shot macro AUC, {name}", f"{shot['auc_macro']:.3f}  (95% {low:.3f} to {high:.3f})")
    table.add_row("report", summary["report"])
    Console().print(table)


@app.command(rich_help_panel=TRAINING)
def doctor(
    hostfile: Annotated[Path | None, typer.Option(help="Hosts to look at, over ssh; by default this machine.")] = None,
    data: Annotated[str | None, typer.Option(help="A split, SET/train: may each host read it, and how fast?")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(parser=local_folder, metavar="FOLDER", help="The run folder: do all hosts see it?")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster's job server, http://HOST:8265.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at the machines of a run before it starts: versions, GPUs, network, storage, disks, clocks. Exit code 1 on errors."""
    import json
    from dataclasses import asdict

    from mmclip_launch.doctor import examine, local_hosts
    from mmclip_launch.findings import Finding, error, errors
    from mmclip_launch.hosts import over_ssh, read_hostfile
    from mmclip_launch.ray_cluster import judge_cluster

    found: list[Finding] = []

    def tell(findings: Iterable[Finding]) -> None:
        for finding in findings:
            found.append(finding)
            if not as_json:
                print(finding, flush=True)  # now: the next may take long

    try:
        hosts = read_hostfile(hostfile) if hostfile else local_hosts()
        tell(examine(hosts, run_dir, data, by_ssh=over_ssh(hosts)))
        tell(judge_cluster(address) if address else ())
    except (ValueError, OSError) as fault:
        found.append(error("arguments", "", str(fault), ""))
        raise
    finally:
        if as_json:
            print(masked(json.dumps([asdict(finding) for finding in found], indent=2)))
    if errors(found):
        raise typer.Exit(1)


launch_app = typer.Typer(no_args_is_help=True, help="Start a run on a cluster. --dry-run prints what would be done.")
app.add_typer(launch_app, name="launch", rich_help_panel=TRAINING)
Nodes = Annotated[int, typer.Option(min=1, help="Machines.")]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs of each machine.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]


@launch_app.command("deepspeed")
def launch_deepspeed(
    recipe: RecipeName,
    overrides: Overrides = None,
    hostfile: Annotated[Path | None, typer.Option(help="Hosts, reached by ssh; by default this machine.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Only the first hosts of the file.")] = None,
    dry_run: DryRun = False,
) -> None:
    """By DeepSpeed's launcher, here or on the hosts of a hostfile, which are looked at first. Run it again to go on."""
    from mmclip_launch.hosts import first_hosts, read_hostfile
    from mmclip_launch.submit import job_of, start_deepspeed

    hosts = read_hostfile(hostfile) if hostfile else None
    start_deepspeed(job_of(recipe, overrides or ()), first_hosts(hosts, nodes), dry=dry_run)


@launch_app.command("slurm")
def launch_slurm(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus: Gpus = 8,
    option: Annotated[Urls, typer.Option(help="For sbatch, such as --option=--partition=gpu; may be repeated.")] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="A job array: one run for each line of this file, key=value ...")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """By sbatch; queued again after preemption and time limits. Nodes share run_dir; runs of a sweep are run_dir/1, 2, ..."""
    from mmclip_launch.submit import job_of, submit_slurm

    job = job_of(recipe, overrides or ())
    raise typer.Exit(submit_slurm(job, nodes=nodes, gpus=gpus, options=option or (), sweep=sweep, dry=dry_run))


@launch_app.command("k8s")
def launch_k8s(
    recipe: RecipeName,
    image: Annotated[str, typer.Option(help="Container image with a tag that never moves, or a digest.")],
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus: Gpus = 8,
    dry_run: DryRun = False,
) -> None:
    """As an indexed Job on Kubernetes, one pod a node; run_dir=/runs/NAME. What the namespace needs: launch/README.md."""
    from mmclip_launch.submit import job_of, submit_kubernetes

    raise typer.Exit(submit_kubernetes(job_of(recipe, overrides or ()), image, nodes=nodes, gpus=gpus, dry=dry_run))


@launch_app.command("ray-job")
def launch_ray_job(
    words: Annotated[
        list[str],
        typer.Argument(metavar="-- STAGE SET/SPLIT", help="-- entities|attention SET/train ..., as after `mmclip`."),
    ],
    address: Annotated[str, typer.Option(envvar="RAY_ADDRESS", help="The cluster's job server, http://HOST:8265.")],
    more: Annotated[
        list[Path] | None, typer.Option("--with", help="A file or folder below this one that travels, too; may be repeated.")
    ] = None,
    exclude: Annotated[Urls, typer.Option(help="Leave such files out of --with, as '*.png'; may be repeated.")] = None,
    pip: Annotated[Path | None, typer.Option(help="Requirements, each NAME==VERSION, that the nodes install.")] = None,
    dry_run: DryRun = False,
) -> None:
    """An offline stage on a Ray cluster, with this code and the files that its words name. Ctrl-C leaves it running. Run it again
    to go on."""
    from mmclip_launch.ray_submission import submit_ray

    raise typer.Exit(submit_ray(address, words, more=more or (), excludes=exclude or (), pip=pip, dry=dry_run))
