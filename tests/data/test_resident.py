import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from masksparsity.data.loader import Normalize, Plan
from masksparsity.data.resident import ResidentLoader

CPU = torch.device("cpu")


def loader(
    images: torch.Tensor, *, batch_size: int, train: bool = True, crop_padding=0, flip=False, **plan
) -> ResidentLoader:
    """Labels are the images' numbers; the normalisation gives the pixel values themselves."""
    channels, width = images.shape[1], images.shape[3]
    return ResidentLoader(
        images,
        torch.arange(len(images)),
        Plan(images=len(images), batch_size=batch_size, train=train, **plan),
        Normalize((0.0,) * channels, (1 / 255,) * channels, width, CPU),
        crop_padding=crop_padding,
        flip=flip,
    )


@given(
    shape=st.tuples(
        st.integers(1, 7), st.sampled_from((1, 3)), st.integers(2, 6), st.integers(2, 5)
    ),
    padding=st.integers(0, 3),
    flip=st.booleans(),
    seed=st.integers(0, 99),
)
def test_augmented_images_are_windows_of_the_padded_ones(shape, padding, flip, seed) -> None:
    images = torch.randint(256, shape, dtype=torch.uint8)
    padded = F.pad(images, [padding] * 4)
    height, width = shape[2:]
    seen = []
    source = loader(images, batch_size=4, crop_padding=padding, flip=flip, seed=seed)
    for batch, labels in source.epoch(seed):
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(batch.to(torch.uint8), labels.tolist(), strict=True):
            windows = padded[label].unfold(1, height, 1).unfold(2, width, 1).flatten(1, 2)
            allowed = [windows, windows.flip(-1)] if flip else [windows]
            assert (torch.cat(allowed, 1) == image[:, None]).all(-1).all(-1).all(0).any()
            seen.append(label)
    assert len(set(seen)) == len(seen) == source.samples


def test_every_offset_and_both_sides_come_up() -> None:
    image = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3) + 1
    source = loader(image.repeat(400, 1, 1, 1), batch_size=400, crop_padding=1, flip=True)
    ((batch, _),) = source.epoch(0)
    assert len(batch.flatten(1).unique(dim=0)) == 2 * 3 * 3


def test_an_image_is_augmented_alike_whatever_rank_and_batch_reads_it() -> None:
    images = torch.randint(256, (24, 3, 6, 6), dtype=torch.uint8)

    def read(**how) -> dict[int, torch.Tensor]:
        batches = loader(images, crop_padding=2, flip=True, seed=3, **how).epoch(5)
        return {n: x for xs, ys in batches for n, x in zip(ys.tolist(), xs, strict=True)}

    alone = read(batch_size=24)
    shared = read(batch_size=4, world=2, rank=0) | read(batch_size=4, world=2, rank=1)
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[n], shared[n]) for n in alone)


def test_evaluation_reads_every_image_in_order_and_as_it_is() -> None:
    images = torch.randint(256, (11, 1, 4, 5), dtype=torch.uint8)
    source = loader(images, batch_size=4, train=False)
    batches = list(source.epoch())
    assert [len(y) for _, y in batches] == [4, 4, 3]
    assert len(source) == 3
    assert torch.equal(torch.cat([x for x, _ in batches]).to(torch.uint8), images)
    assert torch.cat([y for _, y in batches]).tolist() == list(range(11))


def test_a_rank_without_images_has_no_batches() -> None:
    images = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    source = loader(images, batch_size=4, train=False, rank=1, world=2)
    assert list(source.epoch()) == []
    assert len(source) == source.samples == 0


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(loader(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), batch_size=2, flip=True).epoch(1))
    assert torch.equal(torch.get_rng_state(), before)
