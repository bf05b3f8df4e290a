# SPDX-License-Identifier: Apache-2.0
"""The training loop, on one device or many through accelerate."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from wedlm.algorithm.objective import LossTotals
from wedlm.attention.dual_stream import choose_training_backend
from wedlm.train import deepspeed
from wedlm.train.batch import NUM_GROUPS, TrainBatch, collate_sequences, without_loss
from wedlm.train.checkpoint import latest_checkpoint, load_checkpoint, read_state, remove_unfinished, save_checkpoint
from wedlm.train.config import RENAMED, TrainConfig
from wedlm.train.data import prefetch
from wedlm.train.interrupt import Interrupt
from wedlm.train.metrics import Meter, Records, rewind
from wedlm.train.optimizer import learning_rate, make_optimizer
from wedlm.train.optional_deps import require
from wedlm.train.parallel import clip_gradients, make_accelerator, seed_forward, sum_over_processes
from wedlm.train.setup import Setup, save_result
from wedlm.train.step import TrainingModel, prepare_layers

# Optimiser batches that are read, noised and collated ahead of the device.
_PREFETCH = 3


class _Done(NamedTuple):
    """A step whose figures are still on the device."""

    step: int
    loss: Tensor
    norm: Tensor
    statistics: Tensor
    micro_batches: list[TrainBatch]


def _check_packages(config: TrainConfig) -> None:
    """Check for packages before anything is loaded, not when a package is first used."""
    wanted = {
        "peft": ("lora_rank", config.lora_rank and config.lora_rows == "all"),
        "tensorboard": ("tensorboard", config.tensorboard),
    }
    for package, (setting, on) in {**wanted, "wandb": ("use_wandb", config.use_wandb)}.items():
        if on:
            require(package, setting)


class Trainer:
    """One run. ``run`` trains to the end, continuing from the latest checkpoint under ``output_dir`` if there
    is one."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        _check_packages(config)
        self.directory = Path(config.output_dir)
        self.accelerator = make_accelerator(config.bf16, config.deepspeed_zero_stage)
        self.device: torch.device = self.accelerator.device
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.backend = choose_training_backend(config.attention_backend, self.device)
        self.setup = Setup.load(config, self.accelerator)
        self.data = self.setup.train_data
        self.compiled = self.device.type == "cuda" if config.compile is None else config.compile
        prepare_layers(self.setup.transformer, self.compiled, config.activation_checkpointing)
        teacher_model = self.setup.teacher_model
        if teacher_model is not None:
            prepare_layers(teacher_model.to(self.device), self.compiled, checkpoint_activations=False)
        # Factors for masked rows bring a mask embedding with them.
        own_mask = self.setup.embeddings_frozen and config.objective == "wedlm" and config.lora_rows == "all"
        model = TrainingModel(
            self.setup.transformer,
            self.backend,
            self.setup.mask_token_id,
            own_mask,
            config.distill_text,
            teacher_model,
            config.distill_masked,
        )
        optimizer = make_optimizer(model, config, self.device)
        if deepspeed.uses_zero(self.accelerator):
            deepspeed.configure(self.accelerator, config.bf16, config.per_device_train_batch_size, config.max_grad_norm)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.sequences_per_forward = config.per_device_train_batch_size * self.accelerator.num_processes
        self.sequences_per_step = self.sequences_per_forward * config.gradient_accumulation_steps
        self.num_steps = config.max_steps or self._steps_of_epochs()
        self.records = Records(config, self.directory, self.num_steps, self.accelerator.is_main_process)
        self.meter = Meter(self.accelerator)

    def _steps_of_epochs(self) -> int:
        part, whole = math.modf(self.config.num_train_epochs)
        sequences = sum(self.data.sequences_in_epoch(epoch) for epoch in range(int(whole)))
        sequences += round(part * self.data.sequences_in_epoch(int(whole))) if part else 0
        return max(sequences // self.sequences_per_step, 1)

    def run(self) -> Path:
        """Train; returns the directory of the finished model."""
        if self.accelerator.is_main_process:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.directory)
        self.accelerator.wait_for_everyone()
        start = self.records.start = self._resume()
        if self.accelerator.is_main_process:
            text = yaml.safe_dump(self.config.model_dump(), sort_keys=False)
            (self.directory / "training_config.yaml").write_text(text, encoding="utf-8")
            rewind(self.directory, start)
        with self.records:
            self._log_setup(start)
            self._train(start)
        if start < self.num_steps:
            self._save(self.num_steps)
        return save_result(self.setup, self.accelerator, self.model, self.directory / "final")

    def _resume(self) -> int:
        checkpoint = latest_checkpoint(self.directory)
        if checkpoint is None:
            return 0
        if not self.config.resume:
            raise ValueError(f"output_dir holds {checkpoint.name}; expected an empty directory, or resume true")
        state = read_state(checkpoint)
        self._check_identity(checkpoint, state["run"])
        load_checkpoint(checkpoint, self.model, self.optimizer)
        self.meter.restore(state["meter"])
        return int(state["step"])

    def _check_identity(self, checkpoint: Path, made_with: Mapping[str, Any]) -> None:
        made_with = {RENAMED.get(name, name): value for name, value in made_with.items()}
        for name, value in self._identity().items():
            if made_with.get(name) != value:
                raise ValueError(
                    f"{checkpoint} was made with {name} {made_with.get(name)!r}, this run has {value!r}; expected the "
                    "same, or another output_dir"
                )

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to equal an unbroken one, in the form that JSON keeps."""
        records = {"logging_steps", "save_steps", "save_total_limit", "eval_steps", "output_dir", "cache_dir", "resume"}
        speed = {"per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "compile"}
        speed |= {"deepspeed_zero_stage", "trainable_messages"}  # the latter is in the data's fingerprint
        ends = {"num_train_epochs", "max_steps", "save_dtype", "merge_lora", "tensorboard", "train_data"}
        kept = self.config.model_dump(exclude=records | speed | ends)
        settings = {name: value for name, value in kept.items() if not name.startswith(("wandb", "use_wandb"))}
        return {
            **settings,
            "data": self.data.fingerprint,
            "sequences_per_step": self.sequences_per_step,
            "num_steps": self.num_steps,
        }

    def _log_setup(self, start: int) -> None:
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        self.records.log(
            f"{trained / 1e6:,.1f} M parameters trained on {self.accelerator.num_processes} x {self.device.type}, "
            f"attention {self.backend}{', compiled' if self.compiled else ''}, precision "
            f"{'bf16' if self.config.bf16 else 'float32'}, mask token {self.setup.mask_token_id}"
        )
        if self.config.deepspeed_zero_stage and not deepspeed.uses_zero(self.accelerator):
            self.records.log("deepspeed_zero_stage shares nothing out: that is done on several GPUs")
        for line in self.data.describe():
            self.records.log(line)
        if start:
            self.records.log(f"resumed after step {start}")

    def _train(self, start: int) -> None:
        config, meter = self.config, self.meter
        last: _Done | None = None
        self.model.train()
        batches_ahead = closing(prefetch(self._optimiser_batches(start), _PREFETCH))
        with Interrupt(self.accelerator.num_processes == 1) as interrupt, batches_ahead as batches:
            for step, micro_batches in enumerate(batches, start):
                done = self._step(step, micro_batches)
                # Looking at a loss waits for the device, so the check is one step behind.
                self._check(last)
                last = done
                meter.add(done.loss, done.statistics, sum(batch.num_clean_tokens for batch in micro_batches))
                count = step + 1
                ended = count == self.num_steps
                logs = count % config.logging_steps == 0 or ended
                saves = (count % config.save_steps == 0 or interrupt.asked) and not ended
                validates = config.eval_steps and (count % config.eval_steps == 0 or ended)
                if logs or saves or validates:
                    self._check(last)
                    last = None
                if logs:
                    figures = meter.flush()
                    rate = learning_rate(step, self.num_steps, config)
                    self.records.log_metrics(
                        count, {**figures, "learning_rate": rate, "gradient_norm": float(done.norm)}
                    )
                with meter.paused():
                    if validates:
                        self._validate(count)
                    if saves:
                        self._save(count)
                self.records.update_progress(count)
                if interrupt.asked and saves:
                    raise KeyboardInterrupt

    def _optimiser_batches(self, start: int) -> Iterator[list[TrainBatch]]:
        """This process's micro-batches of each step from ``start`` on. Runs in another thread."""
        per_device, index = self.config.per_device_train_batch_size, self.accelerator.process_index
        for step in range(start, self.num_steps):
            micro_batches = []
            for micro in range(self.config.gradient_accumulation_steps):
                first = step * self.sequences_per_step + micro * self.sequences_per_forward + index * per_device
                indices = range(first, first + per_device)
                sequences = [self.data.sequence(i) for i in indices]
                micro_batches.append(collate_sequences(sequences, indices, self.config, self.setup.mask_token_id))
            yield micro_batches

    def _step(self, step: int, micro_batches: list[TrainBatch]) -> _Done:
        config, accelerator = self.config, self.accelerator
        totals = self._totals(micro_batches)
        loss = torch.zeros((), device=self.device)
        statistics = torch.zeros(NUM_GROUPS, 3, device=self.device)
        seed_forward(config.seed, step, accelerator)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.num_steps, config)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with self._gradients_meet(last):
                losses = self.model(batch.to(self.device, totals, config.effective_ar_weight, config.entropy_weight))
                # Gradients are averaged over processes, the loss is a sum over them.
                loss_here = losses.loss * accelerator.num_processes
                if deepspeed.uses_zero(accelerator):
                    deepspeed.backward(accelerator, loss_here, last)
                else:
                    accelerator.backward(loss_here)
            loss += losses.loss.detach()
            statistics += losses.statistics
        norm = clip_gradients(accelerator, self.model, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return _Done(step, loss, norm, statistics, micro_batches)

    def _gradients_meet(self, last: bool) -> AbstractContextManager[Any]:
        """Make processes exchange gradients once per step, with its last micro-batch."""
        waits = not last and not deepspeed.uses_zero(self.accelerator)
        return self.accelerator.no_sync(self.model) if waits else nullcontext()

    def _totals(self, micro_batches: list[TrainBatch]) -> LossTotals:
        own = [batch.totals() for batch in micro_batches]
        sums = torch.tensor([sum(t.weight for t in own), sum(t.num_ar for t in own)], dtype=torch.float64)
        return LossTotals(*sum_over_processes(self.accelerator, sums).tolist())

    def _check(self, done: _Done | None) -> None:
        """Stop at a loss or gradient that is not finite, and save the batch; the last checkpoint stays as it is."""
        if done is None or bool(torch.isfinite(done.loss + done.norm)):
            return
        rank = self.accelerator.process_index
        path = self.directory / f"bad_batch_step{done.step}_rank{rank}.safetensors"
        tensors = {
            f"{index}.{name}": getattr(batch, name).contiguous()
            for index, batch in enumerate(done.micro_batches)
            for name in ("tokens", "positions", "document", "block", "prediction", "loss_rows", "target", "weight")
        }
        save_file(tensors, path)
        raise FloatingPointError(
            f"step {done.step}: the loss is {float(done.loss)} and the gradient norm {float(done.norm)}; expected "
            f"finite numbers. The batch is saved in {path}; the last checkpoint is unaffected"
        )

    def _validate(self, step: int) -> None:
        """The losses on the held-out documents, under the same noise each time.

        Both kinds of noise are measured, whichever trains, so that runs compare: "eval" has the AR loss and random
        noise, "eval_suffix" suffix noise.
        """
        kinds = {"eval": self.config.model_copy(update={"suffix_noise": 0.0})}
        if self.config.objective == "wedlm":
            kinds["eval_suffix"] = self.config.model_copy(update={"suffix_noise": 1.0})
        self.model.eval()
        for kind, config in kinds.items():
            self.records.log_metrics(step, self._validation_metrics(config), kind)
        self.model.train()

    @torch.no_grad()
    def _validation_metrics(self, config: TrainConfig) -> dict[str, Any]:
        """Processes share the sequences. All take part in every forward, so the last one is padded with sequences
        without a loss."""
        data = self.setup.validation_data
        assert data is not None
        meter = Meter(self.accelerator)
        own, index = config.per_device_train_batch_size, self.accelerator.process_index
        count = data.sequences_in_epoch(0)
        for start in range(0, count, self.sequences_per_forward):
            indices = range(start + index * own, start + (index + 1) * own)
            sequences = [data.sequence(i) if i < count else without_loss(data.sequence(0)) for i in indices]
            batch = collate_sequences(sequences, indices, config, self.setup.mask_token_id)
            losses = self.model(batch.to(self.device, LossTotals(1.0, 1.0), 1.0))
            meter.add(losses.loss, losses.statistics, batch.num_clean_tokens)
        figures = meter.flush()
        return {name: figures[name] for name in figures if name.startswith(("ar_", "masked_", "loss_", "accuracy_"))}

    def _save(self, step: int) -> None:
        state = {"run": self._identity(), "meter": self.meter.state()}
        main, keep = self.accelerator.is_main_process, self.config.save_total_limit
        save_checkpoint(self.directory, step, self.model, self.optimizer, state, main, keep)
        self.accelerator.wait_for_everyone()
