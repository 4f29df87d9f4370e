from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo.data import Augment, Batches, Split
from nemo.data.batches import shift_and_mirror
from tests.oracles import augment as oracle

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def split_of(count: int, height: int = 6, width: int = 5) -> Split:
    """Noise, labelled by position, so that labels tell the order."""
    random = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, height, width), generator=random, dtype=torch.uint8)
    return Split(images, torch.arange(count))


def everything(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@settings(max_examples=25, deadline=None)
@given(crop=st.integers(0, 5), seed=st.integers(0, 1000))
def test_shift_and_mirror_is_the_literal_one(crop: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    images = split_of(4).images
    top, left = torch.randint(0, 2 * crop + 1, (2, 4), generator=random)
    mirrored = torch.rand(4, generator=random) < 0.5
    fast = shift_and_mirror(images, top, left, mirrored, crop)
    for i in range(4):
        slow = oracle.augment(images[i], int(top[i]), int(left[i]), bool(mirrored[i]), crop)
        assert torch.equal(fast[i], slow)


@pytest.mark.parametrize("augment", [Augment(True, 2), Augment(True), Augment(crop=3), None])
def test_an_epoch_is_the_literal_one(augment: Augment | None) -> None:
    split = split_of(9)
    batches = Batches(split, MEAN, STD, 4, shuffle=True, augment=augment, seed=3)
    images, labels = everything(batches)
    plan, done = batches._plan(0), augment or Augment()
    assert sorted(labels.tolist()) == list(range(9))
    for image, label in zip(images, labels.tolist(), strict=True):
        mirrored = plan.mirrored is not None and bool(plan.mirrored[label])
        top, left = int(plan.top[label]), int(plan.left[label])
        pixels = oracle.augment(split.images[label], top, left, mirrored, done.crop)
        slow = oracle.normalise(pixels, MEAN, STD)
        torch.testing.assert_close(image.double(), slow, rtol=0, atol=2e-6)


def test_every_shift_and_both_sides_occur() -> None:
    batches = Batches(split_of(500), MEAN, STD, 10, shuffle=True, augment=Augment(True, 2))
    plan = batches._plan(0)
    assert set(plan.top.tolist()) == set(plan.left.tolist()) == set(range(5))
    assert plan.mirrored is not None
    assert 0.4 < plan.mirrored.double().mean() < 0.6
    assert not torch.equal(plan.top, plan.left)


def test_plain_batches_are_in_order_and_normalised() -> None:
    split = split_of(7)
    images, labels = everything(Batches(split, MEAN, STD, 3))
    assert labels.tolist() == list(range(7))
    assert images.dtype == torch.float32
    slow = torch.stack([oracle.normalise(image, MEAN, STD) for image in split.images])
    torch.testing.assert_close(images.double(), slow, rtol=0, atol=2e-6)


def test_augmentation_without_shuffling_keeps_the_order() -> None:
    batches = Batches(split_of(7), MEAN, STD, 3, augment=Augment(True, 2))
    assert everything(batches)[1].tolist() == list(range(7))


def test_a_resumed_training_sees_what_it_would_have_seen() -> None:
    def make() -> Batches:
        return Batches(split_of(30), MEAN, STD, 8, shuffle=True, augment=Augment(True, 2), seed=5)

    running, epochs = make(), []
    for epoch in range(4):
        torch.rand(epoch)  # whatever else draws from the global generator
        running.set_epoch(epoch)
        epochs.append(everything(running))
    resumed = make()
    resumed.set_epoch(3)
    for straight, again in zip(epochs[3], everything(resumed), strict=True):
        assert torch.equal(straight, again)
    assert not torch.equal(epochs[2][1], epochs[3][1])


def test_seeds_differ_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    orders = {
        tuple(everything(Batches(split_of(30), MEAN, STD, 8, shuffle=True, seed=seed))[1].tolist())
        for seed in range(5)
    }
    assert len(orders) == 5
    assert torch.equal(before, torch.get_rng_state())


def test_an_image_is_augmented_alike_whatever_the_batch_size() -> None:
    passes = [
        everything(Batches(split_of(30), MEAN, STD, size, shuffle=True, augment=Augment(True, 2)))
        for size in (4, 30)
    ]
    assert torch.equal(passes[0][0], passes[1][0])


def test_the_parts_of_several_processes_make_up_each_batch() -> None:
    """With 7 images after three batches of 8, 3 processes have 2, 2 and 3 of the last."""
    options = {"shuffle": True, "augment": Augment(True, 1), "seed": 5}
    whole = list(Batches(split_of(31), MEAN, STD, 8, **options))
    parts = [list(Batches(split_of(31), MEAN, STD, 8, **options, part=(k, 3))) for k in range(3)]
    assert [len(batch[-1][0]) for batch in parts] == [2, 2, 3]
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([images for images, _ in shares]), images)
        assert all(torch.equal(own, labels) for _, own in shares)


def test_a_last_batch_that_not_all_processes_share_joins_the_one_before() -> None:
    batches = Batches(split_of(18), MEAN, STD, 8, part=(0, 4))
    assert batches.bounds == [(0, 8), (8, 18)]
    with pytest.raises(ValueError, match="3 images in batches of 8: accepted: 4 or more of each f"):
        Batches(split_of(3), MEAN, STD, 8, part=(0, 4))


def test_the_split_is_left_untouched() -> None:
    split = split_of(6)
    copy = split.images.clone()
    everything(Batches(split, MEAN, STD, 2, shuffle=True, augment=Augment(True, 1)))
    everything(Batches(split, MEAN, STD, 2))
    assert torch.equal(split.images, copy)


@pytest.mark.parametrize(
    ("count", "shuffle", "sizes"),
    [
        (9, False, [4, 4, 1]),
        (9, True, [4, 5]),
        (10, True, [4, 4, 2]),
        (8, True, [4, 4]),
        (3, True, [3]),
        (1, False, [1]),
    ],
)
def test_sizes_of_batches(count: int, shuffle: bool, sizes: list[int]) -> None:
    batches = Batches(split_of(count), MEAN, STD, 4, shuffle=shuffle)
    assert [len(labels) for _, labels in batches] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize(
    ("count", "size", "shuffle"), [(0, 4, False), (1, 4, True), (5, 1, True), (5, 0, False)]
)
def test_what_cannot_be_batched(count: int, size: int, shuffle: bool) -> None:
    with pytest.raises(ValueError, match=f"{count} images in batches of {size}: accepted: "):
        Batches(split_of(count), MEAN, STD, size, shuffle=shuffle)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_memory_format(channels_last: bool, shuffle: bool) -> None:
    options = {"channels_last": channels_last, "shuffle": shuffle}
    batches = Batches(split_of(8), MEAN, STD, 4, augment=Augment(True, 1), **options)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert all(images.is_contiguous(memory_format=wanted) for images, _ in batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_batches() -> None:
    here, there = (
        everything(
            Batches(
                split_of(20), MEAN, STD, 8, shuffle=True, augment=Augment(True, 2), device=device
            )
        )
        for device in ("cpu", "cuda")
    )
    assert torch.equal(here[1], there[1].cpu())
    torch.testing.assert_close(here[0], there[0].cpu(), rtol=0, atol=1e-6)


def labelled(labels: list[int]) -> Split:
    return Split(split_of(len(labels)).images, torch.tensor(labels))


def test_images_of_a_class_come_so_many_at_a_time() -> None:
    """21 of class 0, 8 of 1, 11 of 2: five, two and two groups of 4, then 1 and 3 that are left."""
    split = labelled([0, 1, 2, 0, 2] * 3 + [0] * 15 + [1] * 5 + [2] * 5)
    batches = Batches(split, MEAN, STD, 12, shuffle=True, seed=1, per_class=4)
    drawn = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        order = batches._plan(epoch).order
        labels = torch.cat([labels for _, labels in batches])
        assert sorted(order.tolist()) == list(range(40))
        assert torch.equal(labels, split.labels[order])
        groups = labels[:36].view(9, 4)
        assert (groups == groups[:, :1]).all()
        assert sorted(groups[:, 0].tolist()) == [0] * 5 + [1] * 2 + [2] * 2
        assert sorted(labels[36:].tolist()) == [0, 2, 2, 2]
        drawn.append(order)
    assert not torch.equal(*drawn)


def test_an_epoch_of_so_many_steps_begins_where_the_one_before_ended() -> None:
    """11 images in batches of 4 are 3 batches; two epochs of 4 are two passes and two batches."""
    options = {"shuffle": True, "augment": Augment(True, 1), "seed": 5}
    passes = Batches(split_of(11), MEAN, STD, 4, **options)
    expected = []
    for number in range(3):
        passes.set_epoch(number)
        expected += list(passes)
    batches = Batches(split_of(11), MEAN, STD, 4, **options, steps=4)
    assert len(batches) == 4
    seen = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        seen += list(batches)
    assert len(seen) == 8
    for (images, labels), (own, own_labels) in zip(seen, expected, strict=False):
        assert torch.equal(images, own)
        assert torch.equal(labels, own_labels)
