"""Convert caption files and lists of URLs to records and shards of images, and clean the records."""
