"""From records on disk to batches for a model: the images, the tokens, and the order of the examples.

records, rows      captions and conversations in JSON, JSONL and Parquet files
shards             images in tar archives and Parquet files
names              which image a name means
images             untrusted bytes -> RGB pixels
transforms         RGB pixels -> the input of a vision tower
dataset            records -> examples
packing, samplers  which examples share a sequence, and in which order they are drawn
collate            examples -> batches
"""
