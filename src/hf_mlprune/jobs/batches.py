"""Batches of rows of like length, in an order that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

#: So many batches are sorted by length together.
POOL = 50


class LengthSampler(Sampler[int]):
    """All rows in an order that follows from seed and epoch alone; neighbours are of like length.

    transformers' own draws from the global generator, so that a run that is resumed within an epoch sees
    other batches than a straight one.

    Args:
        lengths: of the rows.
        batch_size: rows of a batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = torch.as_tensor(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate as an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        batches: list[torch.Tensor] = []
        for pool in torch.split(order, POOL * self.batch_size):
            by_length = pool[self.lengths[pool].argsort(descending=True, stable=True)]
            batches += torch.split(by_length, self.batch_size)
        # The first batch is of the longest rows: what does not fit into memory is known at once.
        rest = torch.randperm(max(0, len(batches) - 1), generator=generator) + 1
        # A batch that is not full stays last: behind it all others would begin within one.
        full = [place for place in rest.tolist() if len(batches[place]) == self.batch_size]
        partial = [place for place in rest.tolist() if len(batches[place]) < self.batch_size]
        for place in [0, *full, *partial][: len(batches)]:
            yield from batches[place].tolist()


class LengthTrainer(Trainer):
    """The stock Trainer with batches of a :class:`LengthSampler`."""

    def get_train_dataloader(self) -> DataLoader[object]:
        """See :class:`LengthSampler`."""
        lengths = [len(row) for row in self.train_dataset["input_ids"]]
        size = self.args.per_device_train_batch_size
        loader: DataLoader[object] = DataLoader(
            self.train_dataset,
            batch_size=size,
            sampler=LengthSampler(lengths, size, self.args.seed),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)  # type: ignore[no-any-return]
