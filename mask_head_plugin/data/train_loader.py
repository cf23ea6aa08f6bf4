"""Training batches that are the same in a resumed run, because batch k depends only on seed and k.

detectron2 groups samples by aspect ratio after the workers have loaded them, and draws
augmentations from the current state of each worker's generators. Its batches therefore depend on
the number of workers and differ in a resumed run. Here, the main process composes batches of
indices, and each sample is augmented with generators that are seeded by its position in the run. No
state needs to be saved: to continue at iteration k, the first k lists of indices are skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..config import ConfigError
from ..image_file_mapper import ImageFileMapper
from ..image_files import ImageFileError
from ..messages import first_line, listed
from .copy_paste import CopyPasteMapper, check_copy_paste

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Mapper = Callable[[Record], Any]

MAX_DECLINED = 100
"""Maximum number of images in a row that a mapper may decline by returning None."""

FILES_LISTED = 20


def seed_generators(*key: int) -> None:
    """Seeds the global generators of Python, NumPy and torch (all devices) from a key.

    Args:
        key: non-negative integers, such as seed, iteration and rank.
    """
    seed = _seed_python_and_numpy(key)
    # Each call of torch.manual_seed would queue another seeding of CUDA for later.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Restores the state of the CPU's global random generators at the end of the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_cpu_generators(*key: int) -> None:
    """Seeds the CPU's generators in the same way as seed_generators."""
    torch.default_generator.manual_seed(_seed_python_and_numpy(key))


def _seed_python_and_numpy(key: Sequence[int]) -> int:
    """Seeds the generators of Python and NumPy and returns a seed for torch."""
    words = np.random.SeedSequence(key).generate_state(4, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(words[1:3].view(np.uint32))
    return int(words[3])


class ImageNamingMapper:
    """Wraps a mapper so that each of its errors becomes one line that names the image."""

    def __init__(self, mapper: Mapper) -> None:
        """
        Args:
            mapper: converts a record to the model's input.
        """
        self._mapper = mapper

    def __call__(self, record: Record) -> Any:
        """Maps a record.

        Raises:
            ConfigError: if the mapper raises any error.
        """
        described = describe(record)  # the mapper may change the record
        try:
            return self._mapper(record)
        except ImageFileError as error:
            raise ConfigError(
                f"{described} {error.reason}; repair it, or remove it from the data set"
            ) from error
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{described} cannot be loaded: {reason}; repair it, or remove it from the data set"
            ) from error


def describe(record: Record) -> str:
    """Returns the file and the id of an image for messages."""
    return f"{record.get('file_name', 'a record')} (image_id {record.get('image_id')!r})"


class TrainLoader:
    """Yields an endless series of batches of mapped samples, starting at any iteration.

    The samples of a batch, their order and their augmentation depend on seed, iteration, rank and
    number of processes, but not on workers or on earlier batches.

    Unlike in detectron2's loader, an error in the mapper names the sample's file, regardless of the
    number of workers. If the mapper declines a sample (returns None), another image is drawn with
    the sample's own generator.
    """

    def __init__(self, cfg: CfgNode, mapper: Mapper | None = None) -> None:
        """
        Args:
            cfg: provides DATASETS, DATALOADER, INPUT and SOLVER.IMS_PER_BATCH, as in detectron2,
                and INPUT.COPY_PASTE.
            mapper: converts a record to the model's input; None means ImageFileMapper.

        Raises:
            ConfigError: if no image is left to train on, or DATASETS.TRAIN cannot be resumed.
        """
        check_copy_paste(cfg)
        try:
            with kept_generators():  # from_config creates a sampler, which draws random numbers
                parts = build_detection_train_loader.from_config(
                    cfg, mapper or ImageFileMapper(cfg)
                )
        except AssertionError as error:  # raised by get_detection_dataset_dicts
            raise ConfigError(
                f"DATASETS.TRAIN {list(cfg.DATASETS.TRAIN)} cannot be trained on: {error} "
                "tools/check_dataset.py shows why"
            ) from error
        if isinstance(parts["dataset"], IterableDataset):
            raise ConfigError(
                f"DATASETS.TRAIN {list(cfg.DATASETS.TRAIN)} is an IterableDataset, whose order "
                "cannot be resumed; override build_train_loader to use detectron2's loader"
            )
        self._cfg = cfg
        records: Sequence[Record] = parts["dataset"]
        self._mapper = parts["mapper"]
        self._num_workers: int = parts["num_workers"]
        self._batch_size, rest = divmod(parts["total_batch_size"], comm.get_world_size())
        if rest:
            raise ConfigError(
                f"SOLVER.IMS_PER_BATCH {parts['total_batch_size']} cannot be divided among "
                f"{comm.get_world_size()} processes"
            )
        self._groups = _aspect_groups(records) if parts["aspect_ratio_grouping"] else None
        # Serialized so that workers share the memory.
        self._records = (
            DatasetFromList(records, copy=False) if isinstance(records, list) else records
        )
        self._seed, self._start = 0, 0

    def go_to(self, seed: int, iteration: int) -> None:
        """Sets the seed and the iteration at which the next iterator starts."""
        self._seed, self._start = seed, iteration

    def __iter__(self) -> Iterator[list[Any]]:
        # from_config takes no seed: detectron2's samplers draw theirs from NumPy's generator.
        with kept_generators():
            seed_cpu_generators(self._seed)
            parts = build_detection_train_loader.from_config(
                self._cfg, self._mapper, dataset=self._records
            )
        batches = _Batches(parts["sampler"], self._batch_size, self._groups, self._start)
        mapper: Mapper = ImageNamingMapper(self._mapper)
        probability = self._cfg.INPUT.COPY_PASTE.PROBABILITY
        if probability:
            mapper = CopyPasteMapper(mapper, self._records, probability)
        loader = DataLoader(
            _Samples(self._records, mapper, self._seed, comm.get_rank()),
            batch_sampler=batches,
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            # Otherwise each new loader would draw from torch's global generator.
            generator=torch.Generator().manual_seed(self._seed),
        )
        return self._checked(iter(loader), batches)

    def _checked(self, loaded: Iterator[list[Any]], batches: _Batches) -> Iterator[list[Any]]:
        """Yields batches; raises a ConfigError if a worker died or could not load a sample."""
        while True:
            try:
                batch = next(loaded)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                places = list(itertools.chain.from_iterable(batches.pending))
                files = [describe(self._records[place.index]) for place in places]
                raise ConfigError(
                    f"a data loader worker died in iteration {places[0].iteration} "
                    f"({first_line(error)}) while these files were loaded: "
                    f"{listed(files, FILES_LISTED)}. If memory ran out, lower "
                    f"DATALOADER.NUM_WORKERS; otherwise check these files"
                ) from error
            batches.pending.popleft()
            for sample in batch:
                if isinstance(sample, _Failure):
                    logger.error("%s", sample.details)
                    raise ConfigError(sample.message)
            yield batch


@dataclass(frozen=True)
class _Place:
    """A sample's position in the run, and its index in the data set."""

    iteration: int
    slot: int
    index: int


@dataclass(frozen=True)
class _Failure:
    """Takes the place of a sample that could not be loaded.

    It contains text instead of the exception, because not every exception can be pickled.
    """

    message: str
    details: str


class _Batches(Sampler[list[_Place]]):
    """Yields an endless series of batches: lists of places, each from one aspect-ratio group."""

    def __init__(
        self, sampler: Sampler[int], batch_size: int, groups: list[bool] | None, start: int
    ) -> None:
        self.pending: deque[list[_Place]] = deque()  # given to workers but not yet loaded
        self._sampler, self._batch_size, self._groups = sampler, batch_size, groups
        self._start = start

    def __iter__(self) -> Iterator[list[_Place]]:
        lists = enumerate(self._index_lists())
        for iteration, indices in itertools.islice(lists, self._start, None):
            places = [_Place(iteration, slot, index) for slot, index in enumerate(indices)]
            self.pending.append(places)
            yield places

    def _index_lists(self) -> Iterator[list[int]]:
        buckets: dict[bool, list[int]] = {False: [], True: []}
        for index in self._sampler:
            bucket = buckets[self._groups[index] if self._groups else False]
            bucket.append(index)
            if len(bucket) == self._batch_size:
                yield bucket[:]
                bucket.clear()


class _Samples(Dataset[Any]):
    """A data set of mapped samples, indexed by their place in the run."""

    def __init__(self, records: Sequence[Record], mapper: Mapper, seed: int, rank: int) -> None:
        self._records, self._mapper, self._seed, self._rank = records, mapper, seed, rank

    def __getitems__(self, places: list[_Place]) -> list[Any]:
        with kept_generators():  # once per batch, because it takes longer than seeding
            return [self[place] for place in places]

    def __getitem__(self, place: _Place) -> Any:
        seed_cpu_generators(self._seed, place.iteration, self._rank, place.slot)
        index = place.index
        for _ in range(MAX_DECLINED):
            record = self._records[index]
            try:
                sample = self._mapper(record)
            except ConfigError as error:
                return _Failure(str(error), traceback.format_exc())
            if sample is not None:
                return sample
            index = int(np.random.randint(len(self._records)))
        message = f"the mapper declined {MAX_DECLINED} images in a row, the last one "
        return _Failure(message + describe(record), "")


def _aspect_groups(records: Sequence[Record]) -> list[bool]:
    """Returns, for each record, whether its image is wider than tall, as detectron2 groups them."""
    for record in records:
        if not ("width" in record and "height" in record):
            raise ConfigError(
                f"{describe(record)} has no width and height, which "
                f"DATALOADER.ASPECT_RATIO_GROUPING needs; add them, or set that key to False"
            )
    return [record["width"] > record["height"] for record in records]
