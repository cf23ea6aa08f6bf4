"""TrainLoader: batch k depends only on (seed, k), and errors name the image."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import small_config
from detectron2.data import DatasetCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from mask_head_plugin import ConfigError
from mask_head_plugin.data import TrainLoader, seed_generators
from mask_head_plugin.data.train_loader import MAX_DECLINED, kept_generators, seed_cpu_generators

NAME = "test_train_loader"
SIZES = [(40, 30), (30, 40), (50, 30), (30, 30), (20, 60), (60, 20), (70, 20)]  # width, height


@pytest.fixture(autouse=True, scope="module")
def _data_set():
    records = [
        {
            "file_name": f"image_{k}.png",
            "image_id": 100 + k,
            "width": width,
            "height": height,
            "annotations": [{"iscrowd": 0, "category_id": k % 2}],
        }
        for k, (width, height) in enumerate(SIZES)
    ]
    DatasetCatalog.register(NAME, lambda: records)
    yield
    DatasetCatalog.remove(NAME)


def draw(record):
    """Maps a record to random numbers from every generator that augmentations may use."""
    numbers = (random.random(), np.random.rand(), torch.rand(1).item())
    return record["image_id"] - 100, numbers


def loader(*opts: str, mapper=draw) -> TrainLoader:
    data = ["DATASETS.TRAIN", f"('{NAME}',)", "SOLVER.IMS_PER_BATCH", "2", *opts]
    return TrainLoader(small_config("Base-Small.yaml", *data), mapper)


def batches(source: TrainLoader, seed: int, iteration: int, count: int) -> list:
    source.go_to(seed, iteration)
    return list(itertools.islice(source, count))


UNGROUPED = ("DATALOADER.ASPECT_RATIO_GROUPING", "False")


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), start=st.integers(0, 40), grouped=st.booleans())
def test_batches_from_any_iteration_equal_those_of_the_whole_run(seed, start, grouped):
    source = loader(*(() if grouped else UNGROUPED))
    assert batches(source, seed, start, 3) == batches(source, seed, 0, start + 3)[start:]


def test_different_seeds_give_different_batches():
    assert batches(loader(), 1, 0, 4) != batches(loader(), 2, 0, 4)


def test_a_sample_is_augmented_differently_in_each_pass():
    seen = [numbers for batch in batches(loader(), 0, 0, 50) for _, numbers in batch]
    assert len(set(seen)) == 100


def test_processes_augment_the_same_position_differently(monkeypatch):
    """Each process gets a different part of the order and different random numbers."""
    comm = "detectron2.utils.comm"
    monkeypatch.setattr(f"{comm}.get_world_size", lambda: 2)
    monkeypatch.setattr(f"{comm}.all_gather", lambda x: [x, x])  # shares the sampler's seed
    found = []
    for rank in range(2):
        monkeypatch.setattr(f"{comm}.get_rank", lambda rank=rank: rank)
        found.append(batches(loader(*UNGROUPED, "SOLVER.IMS_PER_BATCH", "4"), 1, 0, 7))
    numbers = [[x for batch in each for _, x in batch] for each in found]
    assert not set(numbers[0]) & set(numbers[1])
    both = [index for pair in zip(*found, strict=True) for batch in pair for index, _ in batch]
    assert Counter(both) == dict.fromkeys(range(7), 4), (
        "together, the processes must use all images equally often"
    )


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda x: [x, x])
    with pytest.raises(ConfigError, match="IMS_PER_BATCH 3 cannot be divided among 2"):
        loader("SOLVER.IMS_PER_BATCH", "3")


def test_a_pass_contains_each_image_once():
    indices = [index for batch in batches(loader(*UNGROUPED), 5, 0, 7) for index, _ in batch]
    assert sorted(indices[:7]) == sorted(indices[7:]) == list(range(7))


def test_the_images_of_a_batch_are_all_wide_or_all_not():
    found = [[index for index, _ in batch] for batch in batches(loader(), 3, 0, 60)]
    wide = [[SIZES[index][0] > SIZES[index][1] for index in batch] for batch in found]
    assert all(len(set(each)) == 1 for each in wide)
    counts = Counter(index for batch in found for index in batch)
    assert max(counts.values()) - min(counts.values()) <= 2, (
        "all images must be used almost equally often"
    )


def test_workers_do_not_change_the_batches():
    assert batches(loader("DATALOADER.NUM_WORKERS", "2"), 8, 1, 4) == batches(loader(), 8, 1, 4)


def test_repeated_sampling_can_be_resumed():
    sampler = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    source = loader(*sampler, "DATALOADER.REPEAT_THRESHOLD", "0.9")
    assert batches(source, 4, 5, 3) == batches(source, 4, 0, 8)[5:]
    assert batches(source, 4, 0, 8) != batches(source, 5, 0, 8)


def test_loading_does_not_change_the_random_generators():
    seed_generators(1)
    expected = draw({"image_id": 0})[1]
    seed_generators(1)
    batches(loader(), 0, 0, 3)
    assert draw({"image_id": 0})[1] == expected


def test_generators_are_restored_after_an_error():
    seed_generators(2)
    expected = draw({"image_id": 0})[1]
    seed_generators(2)
    with pytest.raises(KeyError), kept_generators():
        seed_cpu_generators(3)
        raise KeyError
    assert draw({"image_id": 0})[1] == expected


def fail_on_image_4(record):
    if record["image_id"] == 104:
        raise OSError("image file is truncated")
    return draw(record)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_error_names_an_image_that_cannot_be_loaded(workers):
    source = loader("DATALOADER.NUM_WORKERS", workers, mapper=fail_on_image_4)
    message = r"^image_4\.png \(image_id 104\) cannot be loaded: OSError: image file is truncated; "
    with pytest.raises(ConfigError, match=message + "repair it, or remove it"):
        batches(source, 0, 0, 7)


def die_on_image_4(record):
    if record["image_id"] == 104:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(record)


def test_a_killed_worker_ends_the_run_and_the_error_names_the_images():
    source = loader("DATALOADER.NUM_WORKERS", "1", mapper=die_on_image_4)
    with pytest.raises(ConfigError, match=r"worker .*died.*image_4\.png.*lower DATALOADER\.NUM_WO"):
        batches(source, 0, 0, 7)


def test_a_declined_image_is_replaced_in_the_same_way_in_every_run():
    source = loader(*UNGROUPED, mapper=lambda x: None if x["image_id"] == 104 else draw(x))
    found = batches(source, 0, 0, 14)
    assert all(index != 4 for batch in found for index, _ in batch)
    assert all(len(batch) == 2 for batch in found)
    assert batches(source, 0, 9, 5) == found[9:]


def test_a_mapper_that_declines_all_images_is_an_error():
    with pytest.raises(ConfigError, match=rf"declined {MAX_DECLINED} images.*image_\d\.png"):
        batches(loader(mapper=lambda _: None), 0, 0, 1)


def test_records_without_a_size_and_endless_data_sets_are_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(())

    for name, make, message in (
        ("test_sizeless", lambda: [{"file_name": "a.png", "image_id": 1}], r"a\.png .*no width"),
        ("test_endless", Endless, "is an IterableDataset"),
    ):
        DatasetCatalog.register(name, make)
        with pytest.raises(ConfigError, match=message):
            loader("DATASETS.TRAIN", f"('{name}',)")
        DatasetCatalog.remove(name)
