"""WebDataset shards for medical image-report pairs: pack a raw data set, read any sample back with its bytes checked."""
