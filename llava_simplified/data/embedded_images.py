"""Images inside Parquet and Arrow files, as on the Hugging Face Hub and in folders of `Dataset.save_to_disk`.

Such an image is named by the file and its row: `train.parquet#7`; if a row has several, also by its position:
`train.parquet#7/1`. The column of images has one of these types:

    struct<bytes, path>          one image per row; if bytes is null, path names a file
    list<struct<bytes, path>>    several images per row
    binary, list<binary>         the bytes alone; only in a column with one of the names in _IMAGE_COLUMN_NAMES

A file with several such columns, or with a column of sounds or videos, is refused: only one column would be read, and a
model would learn to answer questions about the others by guessing.

Rows are read without the bytes of their images if possible. The statistics of a Parquet file show whether all images are
embedded. If some may not be, the bytes are read to find out which ones; if lists have no paths, to count their images.
Arrow files are memory-mapped, so bytes that are not accessed are not read from the disk.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llava_simplified.data.unsupported import is_other_media
from llava_simplified.extras import require_extra

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGE_COLUMN_NAMES = {
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("jpe", "jfif", "heic", "heif"),
    *("image", "images", "img", "picture", "photo", "data", "content", "bytes", "image_bytes"),
}
# Number of rows to read at a time, without and with the bytes of their images (a few hundred kilobytes each).
_BATCH_ROWS = 1024
_BATCH_ROWS_WITH_BYTES = 32
# First bytes of an Arrow file with an index. `datasets` writes streams, which have none.
_ARROW_FILE_MAGIC = b"ARROW1"


class ImageColumn(NamedTuple):
    """A column that contains images.

    Attributes:
        name: Name of the column.
        is_list: Whether each row has a list of images instead of one image.
        has_paths: Whether the column also has the path of each image.
    """

    name: str
    is_list: bool
    has_paths: bool


def find_image_column(schema: pa.Schema, name: str = "the table") -> ImageColumn | None:
    """Return the column of images, or None.

    It is the struct with `bytes` (as in Hugging Face datasets), or else the binary column with a usual name. Other binary
    columns can be hashes or embeddings.

    Args:
        schema: The columns.
        name: The name of the file, for error messages.

    Raises:
        ValueError: Several columns may contain the images, or a column contains sounds, videos or the like.
    """
    structs: list[ImageColumn] = []
    by_name: list[ImageColumn] = []
    other_media: list[str] = []
    for field in schema:
        value_type, is_list = _value_type(field.type)
        members = _member_types(value_type)
        # Compare names of types, because Arrow has several: binary, large_binary, binary_view, fixed_size_binary.
        has_bytes = "binary" in str(members.get("bytes", ""))
        is_file = has_bytes or {"bytes", "path"} <= members.keys()
        if not is_file and not _is_binary(value_type):
            continue
        if is_other_media(field.name):
            other_media.append(field.name)
        elif is_file:
            structs.append(ImageColumn(field.name, is_list, "path" in members))
        elif field.name.lower() in _IMAGE_COLUMN_NAMES:
            by_name.append(ImageColumn(field.name, is_list, has_paths=False))
    if other_media:
        raise ValueError(
            f"{name}: the columns {_list_names(other_media)} contain media other than images, which are not supported. "
            "Remove them from the file."
        )
    columns = structs or by_name
    if len(columns) > 1:
        raise ValueError(
            f"{name}: several columns contain images: {_list_names(column.name for column in columns)}. Keep one of "
            "them, or put the images of a row into one column of lists, 'images'."
        )
    return columns[0] if columns else None


def _list_names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _value_type(data_type: pa.DataType) -> tuple[pa.DataType, bool]:
    """Return the type of one value, and whether a row has a list of them."""
    import pyarrow as pa

    is_list = (
        pa.types.is_list(data_type)
        or pa.types.is_large_list(data_type)
        or pa.types.is_fixed_size_list(data_type)
    )
    if is_list:
        return data_type.value_type, True
    return data_type, False


def _member_types(data_type: pa.DataType) -> dict[str, pa.DataType]:
    """Return the types of a struct's members by name; {} for other types."""
    import pyarrow as pa

    if not pa.types.is_struct(data_type):
        return {}
    members = [data_type.field(index) for index in range(data_type.num_fields)]
    return {member.name: member.type for member in members}


def _is_binary(data_type: pa.DataType) -> bool:
    return "binary" in str(data_type) and not _member_types(data_type)


def text_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns without binary data. Binary columns contain images, hashes or embeddings."""
    column = find_image_column(schema)
    names = [field.name for field in schema if "binary" not in str(field.type)]
    # Exclude the column of images by its name too: if no image is embedded, its type contains no "binary".
    return [name for name in names if column is None or name != column.name]


# ---- rows ----


class ColumnarFile:
    """The rows of a Parquet or Arrow file, read from beginning to end.

    Attributes:
        name: The name of the file, with which the names of its images begin.
        schema: The columns.
        image_column: The column with images, or None.

    Raises:
        ValueError: See `find_image_column`.
    """

    def __init__(self, name: str, schema: pa.Schema) -> None:
        self.name = name
        self.schema = schema
        self.image_column = find_image_column(schema, name)

    def batches(self, names: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, bool]]:
        """Yield batches of rows, and whether it is known that all of their images are embedded.

        Args:
            names: Columns to read. The column of images is added if it must be read.
        """
        raise NotImplementedError

    def rows(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield each row with the columns `names`, and the names of its images as `image` or `images`."""
        start = 0
        for batch, are_embedded in self.batches(names):
            table = batch.select([name for name in batch.schema.names if name in names])
            rows = table.to_pylist()
            # For a table without columns, `to_pylist` returns no rows.
            if not table.num_columns:
                rows = [{} for _ in range(batch.num_rows)]
            if self.image_column is not None:
                self._add_images(rows, batch, start, are_embedded)
            yield from rows
            start += batch.num_rows

    def _add_images(
        self, rows: list[dict[str, Any]], batch: pa.RecordBatch, start: int, are_embedded: bool
    ) -> None:
        """Set `image` or `images` of each row.

        Args:
            rows: The rows of the batch.
            batch: The batch, with the column of images unless all are embedded.
            start: Number of the first row in the file.
            are_embedded: Whether it is known that all images are embedded.
        """
        column = self.image_column
        assert column is not None
        # The number of images in each row, and the names of all images of the batch in one list.
        lengths = [1] * len(rows)
        names: list[str | None] = [None] * len(rows)
        if column.name in batch.schema.names:
            array = batch.column(column.name)
            if column.is_list:
                lengths = [length or 0 for length in array.value_lengths().to_pylist()]
                array = array.flatten()
            names = _paths_without_bytes(array, are_embedded)
        position = 0
        for number, (row, length) in enumerate(zip(rows, lengths), start):
            images: list[str] = []
            for index, name in enumerate(names[position : position + length]):
                if name is None:  # embedded
                    name = f"{self.name}#{number}"
                    if column.is_list:
                        name += f"/{index}"
                # Skip an image that has neither bytes nor a path.
                if name:
                    images.append(name)
            position += length
            if column.is_list:
                row["images"] = images
            elif images:
                row["image"] = images[0]


def _paths_without_bytes(array: pa.Array, are_embedded: bool) -> list[str | None]:
    """Return for each image its path if it is not embedded, "" if there is none, and None if it is embedded."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if are_embedded:
        return [None] * len(array)
    # A column of plain bytes: an image is embedded, or missing.
    if not pa.types.is_struct(array.type):
        return [None if is_valid else "" for is_valid in array.is_valid().to_pylist()]
    # `struct_field` is null where the struct is null.
    have_bytes = pc.is_valid(pc.struct_field(array, "bytes")).to_pylist()
    paths: list[str | None] = [None] * len(array)
    if array.type.get_field_index("path") >= 0:
        paths = pc.struct_field(array, "path").to_pylist()
    names: list[str | None] = []
    for has_bytes, path in zip(have_bytes, paths):
        if has_bytes:
            names.append(None)
        else:
            names.append(path or "")
    return names


class ParquetRows(ColumnarFile):
    """The rows of a Parquet file.

    Args:
        source: A path or an open binary file.
        name: The name of the file.
    """

    def __init__(self, source: Path | IO[bytes], name: str) -> None:
        require_extra("download", "pyarrow", purpose="Reading Parquet files")
        import pyarrow.parquet as pq

        # Pass a buffer size, so that parts of columns are read instead of entire row groups.
        self.file = pq.ParquetFile(source, buffer_size=1 << 20)
        super().__init__(name, self.file.schema_arrow)

    def batches(self, names: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, bool]]:
        """See `ColumnarFile.batches`."""
        columns = list(names)
        are_embedded = True
        batch_rows = _BATCH_ROWS
        if self.image_column is not None:
            are_embedded = self._all_have_bytes()
            leaves = self._image_leaves()
            paths = [leaf for leaf in leaves if leaf.rpartition(".")[2] == "path"]
            if are_embedded and paths:
                # Do not read the bytes. For a list, read the paths, because they show how many images a row has.
                if self.image_column.is_list:
                    columns += paths
            elif self.image_column.is_list or not are_embedded:
                columns += leaves
                # The bytes must be read to find out which rows have an image, or how many images a list has. Read few
                # rows at a time.
                batch_rows = _BATCH_ROWS_WITH_BYTES
        batches = self.file.iter_batches(batch_rows, columns=columns, use_threads=False)
        for batch in batches:
            yield batch, are_embedded

    def _image_leaves(self) -> list[str]:
        """Return the leaf columns of the image column, such as `image.bytes` and `image.path`.

        The last part is the member of the struct, also for a list: `images.list.element.bytes`.
        """
        assert self.image_column is not None
        name = self.image_column.name
        schema = self.file.schema
        paths = [schema.column(index).path for index in range(len(schema))]
        return [path for path in paths if path == name or path.startswith(f"{name}.")]

    def _all_have_bytes(self) -> bool:
        """Return whether the file's statistics prove that every image is embedded; False if they are missing."""
        leaves = self._image_leaves()
        # The statistics of a row group count the missing values of each leaf column.
        with_bytes = [leaf for leaf in leaves if leaf.rpartition(".")[2] != "path"]
        metadata = self.file.metadata
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for index in range(row_group.num_columns):
                column = row_group.column(index)
                if column.path_in_schema not in with_bytes:
                    continue
                statistics = column.statistics
                if statistics is None or not statistics.has_null_count or statistics.null_count:
                    return False
        return True


class ArrowRows(ColumnarFile):
    """The rows of an Arrow file.

    Args:
        path: A local file.

    Raises:
        pyarrow.ArrowException: The file is not an Arrow file.
    """

    def __init__(self, path: Path) -> None:
        require_extra("download", "pyarrow", purpose="Reading Arrow files")
        self._path = path
        super().__init__(path.name, _arrow_schema(path))

    def batches(self, names: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, bool]]:
        """See `ColumnarFile.batches`."""
        for batch in _arrow_batches(self._path):
            # A batch may have any number of rows, and the caller converts its texts to Python objects, so yield slices.
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS), False


def _arrow_schema(path: Path) -> pa.Schema:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return _open_arrow(file, path).schema


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow file, and free the mapped memory after each."""
    import pyarrow as pa

    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _open_arrow(pa.py_buffer(mapped), path)
    is_stream = isinstance(reader, pa.ipc.RecordBatchStreamReader)
    batches = reader
    if not is_stream:
        batches = map(reader.get_batch, range(reader.num_record_batches))
    for batch in batches:
        yield batch
        # The kernel counts every mapped page that was read as memory of the process. Release the pages of this batch.
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def _open_arrow(file: Any, path: Path) -> Any:
    import pyarrow as pa

    with path.open("rb") as stream:
        # Arrow has two formats with one suffix: files, which begin with a magic word and have an index of their
        # batches, and streams, which `datasets` writes.
        has_index = stream.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    return pa.ipc.open_file(file) if has_index else pa.ipc.open_stream(file)


# ---- single images ----


def read_embedded_image(path: Path, key: str) -> bytes:
    """Read one image.

    Args:
        path: A Parquet or Arrow file.
        key: The row, or the row and the position in it: "7" or "7/1".

    Raises:
        ValueError: The row does not exist, or has no such image.
        MissingExtraError: pyarrow is not installed.
    """
    require_extra("download", "pyarrow", purpose=f"Reading {path.suffix} files")
    # Only a row with a list of images has a position.
    row_text, _, position = key.partition("/")
    row = int(row_text)
    if path.suffix == ".arrow":
        value = _find_arrow_image(path, row)
    else:
        value = _find_parquet_image(path, row)
    if position:
        _, is_list = _value_type(value.type)
        if not is_list:
            raise ValueError(f"{path}: row {row} has one image and no list; its name is #{row}")
        values = value.values
        num_images = 0 if values is None else len(values)
        if not 0 <= int(position) < num_images:
            raise ValueError(
                f"{path}: row {row} has no image {position}; it has {num_images}, counted from 0"
            )
        value = values[int(position)]
    # Convert only this image to Python objects, because that copies its bytes.
    image = value.as_py()
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise ValueError(f"{path}: row {row} has no image")
    return data


def _check_row(path: Path, row: int, num_rows: int) -> None:
    if not 0 <= row < num_rows:
        raise ValueError(f"{path}: no row {row}; the file has {num_rows} rows, counted from 0")


def _find_arrow_image(path: Path, row: int) -> Any:
    stat = path.stat()
    column = _arrow_image_column(path, stat.st_mtime_ns, stat.st_size)
    _check_row(path, row, len(column))
    return column[row]


def _find_parquet_image(path: Path, row: int) -> Any:
    """Return the image or the images of a row, as an Arrow scalar."""
    import pyarrow.parquet as pq

    stat = path.stat()
    metadata = pq.read_metadata(path)
    _check_row(path, row, metadata.num_rows)
    group_sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    group_ends = np.cumsum(group_sizes)
    group = int(np.searchsorted(group_ends, row, side="right"))
    row_in_group = row - int(group_ends[group] - group_sizes[group])
    return _read_image_group(path, group, stat.st_mtime_ns, stat.st_size)[row_in_group]


@lru_cache(maxsize=2)
def _read_image_group(path: Path, group: int, _modified_ns: int, _size: int) -> pa.ChunkedArray:
    """Read the image column of one row group.

    The result is cached, because neighboring rows are usually read next. It stays an Arrow array: converting a thousand
    images to Python bytes takes longer than reading them. The file's time and size are arguments so that a changed file
    misses the cache.
    """
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path, memory_map=True)
    name = _name_of_images(path, table.schema_arrow)
    return table.read_row_group(group, columns=[name], use_threads=False).column(0)


@lru_cache(maxsize=64)
def _arrow_image_column(path: Path, _modified_ns: int, _size: int) -> pa.ChunkedArray:
    """Map the image column of an Arrow file into memory. The bytes of an image are read from the disk on access.

    The file's time and size are arguments so that a changed file misses the cache.
    """
    import pyarrow as pa

    reader = _open_arrow(pa.memory_map(str(path)), path)
    name = _name_of_images(path, reader.schema)
    return reader.read_all().column(name)


def _name_of_images(path: Path, schema: pa.Schema) -> str:
    """Return the name of the image column.

    Raises:
        ValueError: No column contains images, or see `find_image_column`.
    """
    column = find_image_column(schema, str(path))
    if column is None:
        raise ValueError(
            f"{path}: no column with images (a struct with 'bytes', or bytes under a name such as 'image')"
        )
    return column.name
