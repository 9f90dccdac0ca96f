"""From URLs and caption files to records and shards of images."""
