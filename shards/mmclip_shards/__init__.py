"""WebDataset shards for medical image-report pairs: pack a raw data set, read samples back with every byte checked."""

__version__ = "0.1.0"
