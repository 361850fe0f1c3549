"""Batches read and decoded while they are used, for data too large to hold: a Dataset, or a stream of one.

Same protocol, order rules and parts per process as ``batches``. What comes out does not depend on ``num_workers``: of a
Dataset, worker processes decode whole parts of batches, which torch's DataLoader hands over in order; a stream has one
reading order, so one process reads it, and decodes in ``num_workers`` threads.

Shapes: N images in all, n of a batch on this process, C channels, H and W height and width, T contexts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import torch
import torch.utils.data
from torch import Tensor

from cn_hf.data.batches import Batch, Batches, BatchOptions, check_balanceable
from cn_hf.data.order import stream_seed
from cn_hf.errors import CnHfError, ConfigError, DatasetError, DatasetFileError
from cn_hf.reading.access import CONTEXT_COLUMN, features_of, raw_batches, raw_features, with_features
from cn_hf.reading.decoded import OnError, check_on_error, image_shape
from cn_hf.reading.fingerprint import dataset_fingerprint, stream_fingerprint
from cn_hf.reading.images import accepts_image_size, check_image_options, decode_image, stack_arrays, unreadable
from cn_hf.reading.loading import (
    check_context_feature,
    check_labels,
    find_image_column,
    find_label_column,
    label_names,
    read_context_ids,
)
from cn_hf.reading.workers import iterate

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["StreamedBatches"]


class StreamedBatches(Batches):
    """Batches of images that are decoded anew in every epoch.

    Args:
        dataset: A Dataset, or an IterableDataset. Shuffling a stream shuffles its shards, and rows within a buffer;
            ``index`` then counts rows as they came.
        image_column: None: the one there is.
        label_column: None: the one there is.
        decode_size: One number or (height, width) to resize to; None: as stored, and then all must be of one size.
        image_mode: "RGB" or "L".
        on_error: "raise" at an image that cannot be read, or "skip" it, which leaves its batch smaller; rows skipped
            in the last pass are in ``skipped``.
        num_rows: Of the stream, where known; None: they are counted in a pass over its labels when first needed. Not
            for a Dataset, which knows.
        shuffle_buffer: Rows of a stream (encoded) that shuffling holds in memory.
        num_workers: See the module; 0 decodes in this process.
        batch_size: Images of a global batch.
        options: The others of ``Batches``; a stream takes no ``balance_contexts``.

    Raises:
        DatasetError: A column is missing, or the dataset is empty. While iterating: a label is out of range, images
            differ in size and no size was given, or the stream has not ``num_rows`` rows.
        DatasetFileError: While iterating: an image cannot be read (its row is named), or a worker process died.
        ConfigError: A value is out of range.
    """

    @accepts_image_size
    def __init__(
        self,
        dataset: Any,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        decode_size: int | Sequence[int] | None = None,
        image_mode: str = "RGB",
        on_error: OnError = "raise",
        num_rows: int | None = None,
        shuffle_buffer: int = 10_000,
        num_workers: int = 0,
        batch_size: int,
        **options: Unpack[BatchOptions],
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        check_on_error(on_error)
        if num_workers < 0 or shuffle_buffer < 1:
            raise ConfigError(
                f"num_workers must be 0 or more and shuffle_buffer 1 or more; got {num_workers}, {shuffle_buffer}"
            )
        is_stream = isinstance(dataset, datasets.IterableDataset)
        if not is_stream and len(dataset) == 0:
            raise DatasetError("the dataset has no rows, so there are no images to make batches of")
        if not is_stream and num_rows is not None:
            raise ConfigError("num_rows is for streams; a Dataset knows its length")
        self.dataset = dataset
        self.is_stream = is_stream
        self.shuffle_buffer = shuffle_buffer
        self.num_workers = num_workers
        self.skipped: tuple[int, ...] = ()
        self._num_rows = num_rows if is_stream else len(dataset)
        self._image_shape: tuple[int, ...] | None = None
        self._decoder = _PartDecoder(dataset, image_column, label_column, decode_size, image_mode, on_error)
        self._balanced_ids = self._read_balanced_ids() if self.balance_contexts else None

    @property
    def num_rows(self) -> int:
        """Images of the dataset, N."""
        if self._num_rows is None:
            column = self._decoder.label_column
            self._num_rows = sum(len(rows) for rows, _ in raw_batches(self.dataset, [column], 1000))
        return self._num_rows

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this epoch from number ``start`` on, this process's part of each."""
        self.skipped = ()
        for part in self._parts():
            if isinstance(part, CnHfError):
                raise part
            self.skipped += part.skipped
            labels, rows, places = map(torch.from_numpy, (part.labels, part.rows, part.places))
            context_ids = None if part.context_ids is None else torch.from_numpy(part.context_ids)
            if self.mixing is not None:
                self.mixing.check(labels, context_ids)
            pixels = self._pixels(part)
            yield self._batch(
                pixels.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                None if context_ids is None else context_ids.to(self.device, non_blocking=True),
                rows.to(self.device, non_blocking=True),
                number=part.number,
                places=places,
                total=part.total,
            )

    def fingerprint(self) -> str:
        """Hex digest of a Dataset's labels, contexts and a sample of its images, or of a stream's first rows."""
        decoder = self._decoder
        if self.is_stream:
            return stream_fingerprint(self.dataset, decoder.columns, decoder.image_column, self.num_rows)
        return dataset_fingerprint(self.dataset, decoder.image_column, decoder.label_column)

    def _read_balanced_ids(self) -> Tensor | None:
        if self.is_stream:
            raise ConfigError(
                "balance_contexts draws rows by their context, and a stream comes in its own order; load the dataset "
                "instead (streaming=False), or interleave one stream per context (datasets.interleave_datasets)"
            )
        context_ids = read_context_ids(self.dataset)
        check_balanceable(context_ids)
        return context_ids

    def _pixels(self, part: _Part) -> Tensor:
        """The part's pixels (n, C, H, W), once they are known to have the size of those before; n = 0 for no image."""
        if self._image_shape is None:
            shape: Sequence[int]
            if part.pixels is None:
                decoder = self._decoder
                shape = image_shape(
                    self.dataset, decoder.image_column, decode_size=decoder.size, image_mode=decoder.mode
                )
            else:
                shape = part.pixels.shape[1:]
            self._image_shape = tuple(shape)
        if part.pixels is None:
            return torch.empty((0, *self._image_shape), dtype=torch.uint8)
        if tuple(part.pixels.shape[1:]) != self._image_shape:
            raise DatasetError(
                f"images differ in size: row {int(part.rows[0])} is {tuple(part.pixels.shape[1:])} (C, H, W), earlier "
                f"ones are {self._image_shape}; give an image size"
            )
        return part.pixels

    def _parts(self) -> Iterator[_Part | CnHfError]:
        if self.start and self.start == len(self):
            return
        if self.is_stream:
            source: torch.utils.data.Dataset[_Part | CnHfError] = _StreamParts(self)
            workers, numbers = min(self.num_workers, 1), None
        else:
            source = _IndexedParts(self, torch.split(self._order(self._balanced_ids), self.batch_size))
            numbers = range(self.start, len(self))
            workers = min(self.num_workers, len(numbers))
        pin_memory = self.device.type == "cuda"
        yield from iterate(source, num_workers=workers, sampler=numbers, pin_memory=pin_memory)


class _Part(NamedTuple):
    """This process's part of global batch ``number`` of ``total`` rows; None for pixels where it has no image.

    The few numbers of each image are arrays, which a worker sends along; a tensor takes a connection each.
    """

    pixels: Tensor | None
    labels: npt.NDArray[np.int64]
    context_ids: npt.NDArray[Any] | None  # int64 (n,) or float32 weights (n, T)
    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    skipped: tuple[int, ...]
    number: int
    total: int


class _PartDecoder:
    """From this process's undecoded rows of a global batch to tensors. Goes to worker processes."""

    def __init__(
        self,
        dataset: Any,
        image_column: str | None,
        label_column: str | None,
        decode_size: int | Sequence[int] | None,
        image_mode: str,
        on_error: OnError,
    ) -> None:
        self.image_column = find_image_column(dataset, image_column)
        self.label_column = find_label_column(dataset, label_column)
        names = label_names(dataset, self.label_column)
        self.num_classes = None if names is None else len(names)
        self.size = check_image_options(image_mode, decode_size)
        self.mode = image_mode
        self.skip = on_error == "skip"
        self.columns = [self.image_column, self.label_column]
        context = features_of(dataset).get(CONTEXT_COLUMN)
        if context is not None:
            check_context_feature(context)
            self.columns.append(CONTEXT_COLUMN)
        self.num_contexts = context.num_classes if isinstance(context, datasets.ClassLabel) else None
        self.has_weights = not isinstance(context, datasets.ClassLabel | datasets.Value)

    def part(
        self,
        columns: Mapping[str, Sequence[Any]],
        rows: Sequence[int],
        *,
        first_place: int,
        number: int,
        total: int,
        threads: ThreadPoolExecutor | None = None,
    ) -> _Part | CnHfError:
        """Decode; an error comes back as a value, since one raised in a worker arrives wrapped in its traceback.

        Args:
            columns: Undecoded values of this process's rows.
            rows: Their places in the dataset.
            first_place: Place of the first in the global batch.
            number: Of the batch in this epoch.
            total: Rows of the global batch.
            threads: Decode in these.
        """
        try:
            labels = _integers(columns[self.label_column], rows, self.label_column, self.num_classes)
            context_ids = self._context_ids(columns, rows)
            decoded = list((threads.map if threads else map)(self._decode, columns[self.image_column], rows))
            arrays = [array for array in decoded if array is not None]
            good = [place for place, array in enumerate(decoded) if array is not None]
            good_rows = [rows[place] for place in good]
            return _Part(
                pixels=stack_arrays(arrays, good_rows) if good else None,
                labels=labels[good],
                context_ids=None if context_ids is None else context_ids[good],
                rows=np.array(good_rows, dtype=np.int64),
                places=np.array(good, dtype=np.int64) + first_place,
                skipped=tuple(row for row, array in zip(rows, decoded, strict=True) if array is None),
                number=number,
                total=total,
            )
        except CnHfError as error:
            return error

    def _decode(self, value: object, row: int) -> npt.NDArray[np.uint8] | None:
        """Pixels (H, W, C); None where the image is to be skipped."""
        try:
            return decode_image(value, self.mode, self.size)
        except DatasetFileError as error:
            if self.skip:
                return None
            raise unreadable(row, self.image_column, str(error)) from error

    def _context_ids(self, columns: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> npt.NDArray[Any] | None:
        if CONTEXT_COLUMN not in self.columns:
            return None
        values = columns[CONTEXT_COLUMN]
        if self.has_weights:
            return torch.tensor(values, dtype=torch.float32).numpy()
        return _integers(values, rows, CONTEXT_COLUMN, self.num_contexts)


def _integers(
    values: Sequence[int | None], rows: Sequence[int], column: str, count: int | None
) -> npt.NDArray[np.int64]:
    """All there, and in 0 to ``count`` - 1."""
    if None in values:
        raise DatasetError(f"row {rows[list(values).index(None)]} has no {column!r}")
    integers = np.asarray(values, dtype=np.int64)
    check_labels(integers, rows, column, count)
    return integers


class _IndexedParts(torch.utils.data.Dataset["_Part | CnHfError"]):
    """Parts of a Dataset's batches, by the batch's number."""

    def __init__(self, owner: StreamedBatches, batches: Sequence[Tensor]) -> None:
        raw = with_features(owner.dataset.with_format(None), raw_features(owner.dataset.features))
        self.decoder = owner._decoder
        self.raw = raw.select_columns(self.decoder.columns)
        self.batches = [batch.numpy() for batch in batches]
        self.part_of = owner._part_of()

    def __getitem__(self, number: int) -> _Part | CnHfError:
        rows = self.batches[number]
        part = self.part_of(len(rows))
        mine = rows[part].tolist()
        return self.decoder.part(self.raw[mine], mine, first_place=part.start, number=number, total=len(rows))


class _StreamParts(torch.utils.data.IterableDataset["_Part | CnHfError"]):
    """Parts of a stream's batches, in order, read by one process."""

    def __init__(self, owner: StreamedBatches) -> None:
        stream = owner.dataset
        if owner.shuffle:
            seed = stream_seed(owner.seed, owner.epoch) % 2**32
            stream = stream.shuffle(seed=seed, buffer_size=owner.shuffle_buffer)
        self.stream = stream
        self.decoder = owner._decoder
        self.batch_size = owner.batch_size
        self.drop_last = owner.drop_last
        self.num_rows = owner._num_rows
        self.start = owner.start
        self.part_of = owner._part_of()
        self.num_threads = owner.num_workers

    def __iter__(self) -> Iterator[_Part | CnHfError]:
        threads = ThreadPoolExecutor(self.num_threads) if self.num_threads else None
        count = 0
        try:
            batches = raw_batches(self.stream, self.decoder.columns, self.batch_size)
            for number, (rows, columns) in enumerate(batches):
                count += len(rows)
                if self.drop_last and len(rows) < self.batch_size:
                    break
                if number < self.start:
                    continue
                part = self.part_of(len(rows))
                mine = {name: values[part] for name, values in columns.items()}
                yield self.decoder.part(
                    mine, rows[part], first_place=part.start, number=number, total=len(rows), threads=threads
                )
            if self.num_rows is not None and count != self.num_rows:
                yield DatasetError(f"the stream has {count} rows, but num_rows is {self.num_rows}")
        finally:
            if threads is not None:
                threads.shutdown(wait=True, cancel_futures=True)
