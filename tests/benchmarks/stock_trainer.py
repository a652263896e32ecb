"""A stock transformers Trainer on one CPU, with which the benchmarks of training compare."""

import tempfile

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments


def train(model: nn.Module, batches: list[dict], callback: TrainerCallback, learning_rate: float, warmup: int) -> None:
    """Train on the given batches, one step for each, with a learning rate that falls linearly after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=1,  # one item of the dataset is a whole batch
            max_steps=len(batches),
            learning_rate=learning_rate,
            warmup_steps=warmup,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0,
            remove_unused_columns=False,
        )
        Trainer(
            model, arguments, train_dataset=batches, data_collator=lambda items: items[0], callbacks=[callback]
        ).train()
