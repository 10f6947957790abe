"""WebDataset shards for medical image-report pairs: pack a raw data set, read samples back with every byte checked.

    pack(records, dest, dataset=..., splits=..., config_hash=...)   raw records -> one set per split
    @recipe(licence=..., ...) def name(raw): yield Record(...)      another published data set for `mmclip pack NAME`
    ShardWriter(url, ...), index_set(url)                           ready samples; shards of another program
    verify(url), collect_stats(url)                                 check every byte; count what is there
    load_manifest(url), ShardReader(url, manifest), iterate(url)    read by key, or all in order
    as_webdataset(url, sidecars)                                    the source of a `webdataset` pipeline

A URL is a local folder, or anything that fsspec opens (s3://, gs://, memory://). All else in this package may change.
"""

from mmclip_shards.datasets.recipe import Recipe, Skipped, recipe
from mmclip_shards.foreign import Indexed, index_set
from mmclip_shards.images import decode_image
from mmclip_shards.manifest import Manifest, Shard, load_manifest
from mmclip_shards.pack import pack
from mmclip_shards.pipeline import as_webdataset
from mmclip_shards.rawpath import RemotePath
from mmclip_shards.reader import ShardReader, iterate
from mmclip_shards.schema import Box, Record
from mmclip_shards.shardcheck import Finding
from mmclip_shards.stats import SetStats, collect_stats
from mmclip_shards.verify import Verdict, verify
from mmclip_shards.writer import ShardWriter

__version__ = "0.1.0"

__all__ = [
    "Box",
    "Finding",
    "Indexed",
    "Manifest",
    "Recipe",
    "Record",
    "RemotePath",
    "SetStats",
    "Shard",
    "ShardReader",
    "ShardWriter",
    "Skipped",
    "Verdict",
    "as_webdataset",
    "collect_stats",
    "decode_image",
    "index_set",
    "iterate",
    "load_manifest",
    "pack",
    "recipe",
    "verify",
]
