"""Readers of raw data sets: each turns one layout on disk into `Record`s for `mmclip_shards.pack`."""
