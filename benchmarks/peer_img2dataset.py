"""Run img2dataset as its README does, in a separate virtual environment. Started by bench_download.py.

    python peer_img2dataset.py URLS.parquet OUTPUT THREADS SIDE SHARD_SIZE TIMEOUT

SIDE is the maximum length of the shorter side of an image in pixels; with 0, images are not resized or re-encoded.
"""

import sys

from img2dataset import download

if __name__ == "__main__":
    source, output, threads, side, shard_size, timeout = sys.argv[1:]
    resizing = {"resize_mode": "no", "disable_all_reencoding": True}
    if int(side):
        resizing = {
            "resize_mode": "keep_ratio",
            "image_size": int(side),
            "resize_only_if_bigger": True,
        }
    download(
        url_list=source,
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        save_additional_columns=["row"],  # identifies the URL in the results
        output_folder=output,
        output_format="webdataset",
        number_sample_per_shard=int(shard_size),
        processes_count=2,  # shards at a time, as many as `llava download` writes
        thread_count=int(threads),
        timeout=int(timeout),
        retries=0,
        **resizing,
    )
