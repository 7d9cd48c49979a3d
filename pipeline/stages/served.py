"""The registered model, as MLflow loads it from code: ``mlflow.pyfunc.load_model("models:/<name>@<alias>")``.

MLflow runs this file, with ``pipeline`` beside it, where the project is not installed. It is no part of the pipeline.
"""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd
import torch

from pipeline import checkpoint, device, storage
from pipeline.data import alpaca


class Compressed(mlflow.pyfunc.PythonModel):
    """A built checkpoint that answers instructions."""

    def load_context(self, context: Any) -> None:
        """Load and verify the checkpoint, onto a GPU if there is one."""
        folder = context.artifacts["checkpoint"]
        storage.verify(folder, "build")
        compute = device.choose("auto", "auto")
        self.model = checkpoint.load_final(folder, compute.device, compute.dtype)
        self.tokenizer = checkpoint.load_tokenizer(folder)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """Answer instructions, greedily.

        Args:
            context: Unused.
            model_input: One column of instructions; MLflow makes it of a list of strings.
            params: ``max_new_tokens``; MLflow fills in what the model's signature has.
        """
        assert params is not None
        answers = []
        for text in model_input.iloc[:, 0]:
            tokens = torch.tensor([self.tokenizer.encode(alpaca.prompt(text))], device=self.model.device)
            # bitsandbytes would compile its CPU kernels anew for every length, seconds each.
            with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
                out = self.model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=params["max_new_tokens"],
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            answers.append(self.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True))
        return answers


mlflow.models.set_model(Compressed())
