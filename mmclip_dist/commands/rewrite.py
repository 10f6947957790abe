"""The commands that make new sets of packed ones: `mmclip reshard`, `mmclip merge`, `mmclip split`, `mmclip filter`; and
`mmclip duplicates`, which says what to leave out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mmclip_dist.commands.options import SetUrl, Workers
from mmclip_dist.commands.pack import Dest, PerShard
from mmclip_dist.commands.progress import progress_bar

if TYPE_CHECKING:
    from mmclip_shards.rewrite import Rewritten


def reshard(
    url: SetUrl,
    dest: Dest,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples of one shard.")],
) -> None:
    """The same samples in shards of another size, with their sidecars. The same command goes on after a kill."""
    from mmclip_shards.rewrite import reshard as run

    with progress_bar("reshard", "samples") as report:
        made = run(url, dest, samples_per_shard=samples_per_shard, progress=report)
    _print(dest, made)


def merge(
    urls: Annotated[list[str], typer.Argument(metavar="SET SET... DEST", help="Sets or folders of splits; then where to write.")],
    dataset: Annotated[str | None, typer.Option(help="Name of the whole; by default the names joined by +.")] = None,
    prefix_keys: Annotated[bool, typer.Option("--prefix-keys", help="Put the data set's name before each key.")] = False,
    samples_per_shard: PerShard = 1024,
) -> None:
    """Several sets in one, split by split. Licence, access and labels of each are kept; no patient may come into two splits."""
    from mmclip_shards.rewrite import merge as run

    if len(urls) < 3:
        raise ValueError("merge takes two sets or more, and last the folder to write to")
    *sources, dest = urls
    with progress_bar("merge", "samples") as report:
        made = run(
            sources, dest, dataset=dataset, prefix_keys=prefix_keys, samples_per_shard=samples_per_shard, progress=report
        )  # fmt: skip
    _print(dest, made)


def split(
    url: SetUrl,
    dest: Dest,
    val: Annotated[float, typer.Option(min=0, max=1, help="Share of the patients for validation.")] = 0.0,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of the patients for the test.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    samples_per_shard: PerShard = 1024,
) -> None:
    """New splits by patient, of one split or of all at URL together. The rest of the patients is for training."""
    from mmclip_shards.rewrite import split_again

    if not 0 < val + test <= 1:
        raise ValueError(f"--val {val:g} and --test {test:g}: together they must be above 0, and at most 1")
    shares = {"train": max(0.0, 1 - val - test), "val": val, "test": test}
    with progress_bar("split", "samples") as report:
        made = split_again(url, dest, splits=shares, seed=seed, samples_per_shard=samples_per_shard, progress=report)
    _print(dest, made)


def filter_(
    url: SetUrl,
    dest: Dest,
    expression: Annotated[
        str | None,
        typer.Argument(metavar="EXPRESSION", help="""As 'view == "PA" and labels["Edema"] == 1'; see shards/README.md."""),
    ] = None,
    leave_out: Annotated[str | None, typer.Option(help="List of `mmclip duplicates --list`: leave its samples out.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what matches.")] = False,
    samples_per_shard: PerShard = 1024,
) -> None:
    """The samples that match an expression. One that lacks a field which decides it is not matched."""
    from mmclip_shards.rewrite import count_matches, select

    with progress_bar("filter", "samples") as report:
        if dry_run:
            counts = count_matches(url, expression, leave_out=leave_out, progress=report)
        else:
            made = select(
                url, dest, expression, leave_out=leave_out, samples_per_shard=samples_per_shard, progress=report
            )  # fmt: skip
    if dry_run:
        for name, (kept, total) in counts.items():
            print(f"{name}: {kept} of {total} samples match")
        return
    _print(dest, made)


def duplicates(
    urls: Annotated[list[str], typer.Argument(metavar="SET...", help="Packed sets, or folders of splits.")],
    distance: Annotated[int, typer.Option(min=0, max=64, help="Bits of 256 in which images may differ.")] = 8,
    list_: Annotated[
        str | None, typer.Option("--list", help="Write which samples could go, for `mmclip filter --leave-out`.")
    ] = None,
    kinds: Annotated[str, typer.Option(help="What the list holds, of images,reports,patients.")] = "images,patients",
    workers: Workers = 1,
) -> None:
    """Count images that are nearly the same, equal reports, and patients in two splits, within and across sets."""
    from mmclip_shards.duplicates import BITS, Groups, check_kinds, find_duplicates, write_list

    chosen = check_kinds(kinds.split(","))
    with progress_bar("duplicates", "shards") as report:
        found = find_duplicates(urls, distance=distance, workers=workers, progress=report)

    def told(groups: Groups) -> str:
        return (
            f"{groups.samples} samples in {groups.groups} groups; of these {groups.across_sets} across sets, "
            f"{groups.across_splits} across splits, {groups.across_patients} across patients"
        )

    print(f"{found.samples} samples of {found.sets} sets; {found.undecodable} cannot be decoded")
    print(f"images that differ in at most {distance} of {BITS} bits: {told(found.images)}")
    print(f"equal reports: {told(found.reports)}")
    for (one, other), count in found.patients.items():
        print(f"WRONG: {count} patients are in {one} and in {other}, two splits")
    if not found.patients:
        print("no patient is in two splits")
    for note in found.notes:
        print(f"note: {note}")
    if list_ is not None:
        print(f"{list_}: {write_list(list_, found, chosen)} samples that could go")


def _print(dest: str, made: Rewritten) -> None:
    from mmclip_shards.storage import join

    for name, manifest in made.manifests.items():
        print(f"{join(dest, name)}: {manifest.samples} samples in {len(manifest.shards)} shards; {_terms(manifest.licence)}")
    for note in made.notes:
        print(f"note: {note}")


def _terms(licence: str | None) -> str:
    return f"licence: {licence or 'not stated'}"
