"""img2dataset as its README runs it, in its own virtual environment; started by bench_download.py."""

import sys

from img2dataset import download

if __name__ == "__main__":
    source, output, threads, resize, shard, timeout = sys.argv[1:]
    smaller = {
        "resize_mode": "keep_ratio",
        "image_size": int(resize),
        "resize_only_if_bigger": True,
    }
    raw = {"resize_mode": "no", "disable_all_reencoding": True}
    download(
        url_list=source,
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        save_additional_columns=["row"],
        output_folder=output,
        output_format="webdataset",
        number_sample_per_shard=int(shard),
        processes_count=2,
        thread_count=int(threads),
        timeout=int(timeout),
        retries=0,
        **(smaller if int(resize) else raw),
    )
