"""The plain way to run a trial: lm-eval's own language model, transformers' Trainer with PEFT, LoftQ by full SVD."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

from pipeline import checkpoint
from pipeline.compress import layer_bank, quantize
from pipeline.data import alpaca
from pipeline.data.alpaca import IGNORED, Example
from pipeline.trial import assemble as trials
from pipeline.trial.adapters import lora_config
from pipeline.trial.context import Context


def samples(lm: Any, loaded: Mapping[str, Any], limit: int) -> dict[str, list[dict[str, Any]]]:
    """Score a language model on tasks; return lm-eval's record of each item."""
    for task in loaded.values():
        task._instances = None
    asked = {"tasks": dict(loaded), "groups": {}, "group_map": {}}
    return evaluator.evaluate(lm, asked, limit=limit or None, bootstrap_iters=1)["samples"]


def language_model(model: Any, tokenizer: Any, **options: Any) -> HFLM:
    """Return lm-eval's language model with 16 requests a batch; attention and device as the model has them."""
    given = {"batch_size": 16, "device": str(model.device)} | options
    return HFLM(pretrained=model, tokenizer=tokenizer, **given)


def low_rank(matrix: torch.Tensor, r: int, scale: float) -> quantize.Adapter:
    """Return the adapter nearest to a matrix by its full SVD."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return quantize.Adapter((vh[:r].T * root).T.contiguous(), (u[:, :r] * root).contiguous())


def assemble(context: Context, bits: Sequence[int]) -> PeftModel:
    """Quantize every linear and initialize its adapter by LoftQ with full SVDs, from the pruned model alone."""
    settings, state = context.bank.settings, dict(context.state)
    scale, adapters = settings.scale, {}
    for name, width in context.widths(bits).items():
        weight = base = state[f"{name}.weight"]
        for _ in range(settings.iterations):
            quantized = quantize.dequantize(quantize.quantize(base, width, settings), torch.float32)
            adapter = low_rank(weight.float() - quantized, settings.r, scale)
            base = (weight.float() - scale * adapter.b @ adapter.a).to(weight.dtype)
        state[f"{name}.weight"], adapters[name] = quantized.to(weight.dtype), adapter
    model = _adapted(context, state)
    with torch.no_grad():
        for name, adapter in adapters.items():
            layer: Any = model.get_base_model().get_submodule(name)
            layer.lora_A["default"].weight.copy_(adapter.a)
            layer.lora_B["default"].weight.copy_(adapter.b)
    return model


def from_bank(context: Context, bits: Sequence[int]) -> PeftModel:
    """Return the same model from the layer bank, with PEFT's defaults: adapters in fp32, its dropout, SDPA.

    On a GPU of bitsandbytes' modules, elsewhere of dequantized weights, as a trial has them.
    """
    widths = context.widths(bits)
    model: PeftModel
    if context.device.type == "cuda":
        model = get_peft_model(trials.mixed_model(context, widths), _adapters(context))
    else:
        model = _adapted(context, layer_bank.simulated(context.state, context.bank, widths))
    trials.set_adapters(model, context.bank, widths)
    return model


def _adapted(context: Context, state: dict[str, torch.Tensor]) -> PeftModel:
    model = checkpoint.from_state(context.config, state)
    return get_peft_model(model, _adapters(context))


def _adapters(context: Context) -> LoraConfig:
    return lora_config(context.config, context.bank.settings, context.settings.recover.dropout)


class _Collator:
    """Pads rows on the right to ``length`` tokens, or to the longest of the batch if it is None."""

    def __init__(self, padding: int, length: int | None):
        self.padding, self.length = padding, length

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        made = alpaca.batch(examples, self.padding, whole=False)
        length = self.length or max(len(example.tokens) for example in examples)
        shape = (len(examples), length)
        tokens, labels = torch.full(shape, self.padding), torch.full(shape, IGNORED)
        both = min(length, made.tokens.shape[1])
        tokens[:, :both], labels[:, :both] = made.tokens[:, :both], made.labels[:, :both]
        lengths = torch.tensor([len(example.tokens) for example in examples])
        return {
            "input_ids": tokens,
            "labels": labels,
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        }


def recover(context: Context, model: PeftModel, rows: Sequence[Example], padded: bool) -> None:
    """Train by transformers' Trainer on the rows, once each, and evaluate on the held-out rows; changes the model.

    Args:
        context: Steps, batches, learning rate and schedule are those of its settings.
        model: Wrapped by PEFT.
        rows: As many as the steps take.
        padded: To ``recover.max_length`` as the paper has it; else to the longest of each batch.
    """
    settings, on_cpu = context.settings.recover, context.device.type == "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=len(rows) // settings.batch_size,
            per_device_train_batch_size=settings.micro_batch_size,
            per_device_eval_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=settings.warmup_steps,
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=context.settings.seed,
            use_cpu=on_cpu,
            optim="adamw_torch" if on_cpu else "paged_adamw_32bit",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        padding = context.tokenizer.pad_token_id
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=list(rows),
            eval_dataset=list(context.validation),
            data_collator=_Collator(padding, settings.max_length if padded else None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.evaluate()
