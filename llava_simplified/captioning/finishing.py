"""Finish the texts of generated rows, and write the sidecar files.

    generated rows --finish--> rows, with the plan of each sidecar file --> journal
                                                                              |
                                                               write --> sidecar files

The caller appends the finished rows to its journal before it calls `write`. When a job continues, the caller passes the
rows of the journal to `resume`. The module `sidecars` explains why a killed job then loses nothing and repeats nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from llava_simplified.captioning.caption_text import (
    FinishedCaption,
    TextOptions,
    field_names,
    finish_caption,
    image_fields,
)
from llava_simplified.captioning.sidecars import (
    SidecarError,
    SidecarOptions,
    SidecarWriter,
    read_tags,
)

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class CaptionFinisher:
    """Finishes the captions of a job, and writes its sidecar files.

    Args:
        text: How captions are finished.
        sidecars: Where and how sidecar files are written; None for none.
        image_folder: Folder that the image names are relative to.
        images: Names of all images, to find images that would share a sidecar file; not used without sidecar files.

    Attributes:
        kept: Images that already have a sidecar file, which is not changed.
        counts: Number of sidecar files that were "written", or had been "changed" by another program.
    """

    def __init__(
        self,
        text: TextOptions,
        sidecars: SidecarOptions | None,
        image_folder: str,
        images: Iterable[str] = (),
    ) -> None:
        self.kept: list[str] = []
        self.counts: Counter[str] = Counter()
        self._text = text
        self._image_folder = image_folder
        self._needs_tags = "tags" in field_names(text.template)
        self._writer: SidecarWriter | None = None
        if sidecars is not None:
            self._writer = SidecarWriter(sidecars, image_folder, images)

    def admit(
        self, images: Iterable[tuple[int, str]], max_images: int | None = None
    ) -> tuple[list[int], list[Row]]:
        """Select the images to caption. With sidecar files, leave out images that keep their file or cannot have one.

        Args:
            images: Index and name of each image without a caption.
            max_images: Stop after this number of images, not counting those that keep their file; None for all images.

        Returns:
            The indices of the images to caption, and a row with the reason for each image that fails.
        """
        if self._writer is None:
            return [index for index, _ in images], []
        admitted: list[int] = []
        failures: list[Row] = []
        conflicts: list[str] = []
        for index, image in images:
            # Images that keep their file do not count. Otherwise, a second run with the same limit would find only such
            # images.
            if max_images is not None and len(admitted) + len(failures) >= max_images:
                break
            if self._writer.is_kept(image):
                self.kept.append(image)
                # The file exists, but it is the caption of only one of the images that share it.
                conflict = self._writer.conflict(image)
                if conflict:
                    conflicts.append(conflict)
                continue
            # Find images that cannot have a file before the model spends time on them.
            problem = self._writer.problem(image)
            if problem:
                failures.append(_failure(index, image, problem))
            else:
                admitted.append(index)
        if conflicts:
            logger.warning(
                "Images that keep a sidecar file together with another image: %s, for example: %s.",
                f"{len(conflicts):,}",
                conflicts[0],
            )
        return admitted, failures

    def finish_text(self, image: str, caption: str) -> FinishedCaption:
        """Finish one caption.

        Raises:
            SidecarError: The template has {tags}, and the file with the tags cannot be read.
        """
        # Reading a file for every image takes time, so read it only if the template contains {tags}.
        tags = ""
        if self._needs_tags and image:
            tags = read_tags(image, self._image_folder)
        fields = image_fields(image, self._image_folder, tags)
        return finish_caption(caption, self._text, fields)

    def finish(self, rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
        """Finish the captions of generated rows, and plan their sidecar files.

        Returns:
            The rows for the journal, and one row with the reason for each record that cannot be written.
        """
        finished: list[Row] = []
        # Index of the record -> row. A record with several captions fails only once.
        failures: dict[int, Row] = {}
        for row in rows:
            try:
                new_row = self._finish_row(row)
            except SidecarError as error:
                failures[row["index"]] = _failure(row["index"], row["image"], str(error))
                continue
            # None: another program has written the file while the image was captioned.
            if new_row is None:
                self.kept.append(row["image"])
            else:
                finished.append(new_row)
        return finished, list(failures.values())

    def write(self, rows: Iterable[Row]) -> list[Row]:
        """Write the sidecar files of rows that are in the journal.

        Returns:
            A row with the reason for each file that cannot be written.
        """
        failures: list[Row] = []
        for row in rows:
            try:
                is_written = self._write_row(row, resumed=False)
            except SidecarError as error:
                failures.append(_failure(row["index"], row["image"], str(error)))
                continue
            if not is_written:
                reason = (
                    "another program changed the sidecar file while the image was being captioned; "
                    "it was not overwritten"
                )
                failures.append(_failure(row["index"], row["image"], reason))
        return failures

    def resume(self, rows: Iterable[Row]) -> list[Row]:
        """Write the sidecar files that a killed job had recorded in its journal, but not written.

        Files that the user or another program has changed since then are not overwritten.

        Returns:
            A row with the reason for each file that cannot be written.
        """
        failures: list[Row] = []
        for row in rows:
            try:
                if not self._write_row(row, resumed=True):
                    self.counts["changed"] += 1
            except SidecarError as error:
                failures.append(_failure(row["index"], row["image"], str(error)))
        return failures

    def kept_texts(self) -> dict[str, str]:
        """Return the texts of the sidecar files that were kept, by image."""
        if self._writer is None:
            return {}
        return {image: self._writer.existing_text(image) for image in self.kept}

    def describe(self) -> str:
        """Return a sentence on the number of sidecar files; empty for a job without them."""
        if self._writer is None:
            return ""
        parts = [f"{self.counts['written']:,} written"]
        if self.kept:
            parts.append(f"{len(self.kept):,} existed and were kept (--existing skip)")
        if self.counts["changed"]:
            parts.append(
                f"{self.counts['changed']:,} were changed by another program and not overwritten"
            )
        return f"Sidecar files: {', '.join(parts)}."

    def _finish_row(self, row: Row) -> Row | None:
        """Return a row with its finished caption; None if the image keeps an existing sidecar file."""
        image: str = row["image"] or ""  # None in a record without images
        caption, ended_by = self.finish_text(image, row["pred_output"])
        row = {**row, "pred_output": caption}
        if ended_by:
            row["ended_by"] = ended_by
        if self._writer is None:
            return row
        # An empty file would look like a caption to the next run, which would then skip the image.
        if not caption:
            raise SidecarError("the model generated no text, so no file was written")
        plan = self._writer.plan(image, caption)
        return None if plan is None else {**row, "sidecar": plan}

    def _write_row(self, row: Row, *, resumed: bool) -> bool:
        """Write the sidecar file of a row, if it has one; return False if another program has changed the file."""
        if self._writer is None or "sidecar" not in row:
            return True
        is_written = self._writer.write(
            row["image"], row["pred_output"], row["sidecar"], resumed=resumed
        )
        self.counts["written"] += is_written
        return is_written


def count_shortened(rows: Iterable[Row]) -> Counter[str]:
    """Count the shortened captions by reason: "loop" or "max_words"."""
    return Counter(row["ended_by"] for row in rows if row.get("ended_by"))


def _failure(index: int, image: str | None, reason: str) -> Row:
    return {"index": index, "image": image, "error": f"{image}: {reason}"}
