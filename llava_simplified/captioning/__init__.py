"""Caption images: files of records, folders, shards, or a single image."""
