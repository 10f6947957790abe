"""Whether a sidecar belongs to a packed set. Stale and short sidecars are refused."""

from __future__ import annotations

from mmclip_shards.manifest import Manifest

REBUILD = {
    "entities": "mmclip entities {base} --out {sidecar}",
    "attention": "mmclip attention {base} --checkpoint CHECKPOINT --out {sidecar}",
}
"""The command that makes a sidecar, by kind."""


def check_sidecar(kind: str, base_url: str, base: Manifest, url: str, sidecar: Manifest) -> None:
    """ValueError, with the command that mends it, unless `sidecar` is of this kind and complete, made from the shards of `base`.

    base, sidecar: the manifests at `base_url` and `url`.
    """
    command = REBUILD[kind].format(base=base_url, sidecar=url)
    if sidecar.kind != kind:
        raise ValueError(f"{url} holds {sidecar.kind}, not {kind}; rebuild it with `{command}`")
    wanted = {shard.path: shard.sha256 for shard in base.shards}
    if sidecar.base != wanted:
        raise ValueError(
            f"the {kind} sidecar {url} was made from other shards than {base_url}; rebuild it: `{command}`"
        )
    if [shard.samples for shard in sidecar.shards] != [shard.samples for shard in base.shards]:
        raise ValueError(
            f"the {kind} sidecar {url} holds {sidecar.samples} of {base.samples} samples; rebuild it: `{command}`"
        )
