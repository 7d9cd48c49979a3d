"""The registered model, as MLflow loads it from code: ``mlflow.pyfunc.load_model("models:/<name>@<alias>")``.

MLflow runs this file, with ``pipeline`` beside it, where the project is not installed. It is no part of the pipeline.
"""

from __future__ import annotations

import mlflow
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from pipeline import checkpoint, device, storage
from pipeline.stages import serving
from pipeline.stages.serving import RequestError, Settings

_TOGETHER = 8  # prompts that are answered in one batch


class Compressed(PythonModel):
    """A built checkpoint that answers instructions."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load and verify the checkpoint, onto a GPU if there is one."""
        folder = context.artifacts["checkpoint"]
        storage.verify(folder, "build")
        compute = device.choose("auto", "auto")
        self.model = checkpoint.load_final(folder, compute.device, compute.dtype)
        self.tokenizer = checkpoint.load_tokenizer(folder)

    # Of the type hints that MLflow reads, that of a DataFrame alone leaves all inputs as they are, without a warning.
    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, object] | None = None
    ) -> list[str]:
        """Answer each prompt.

        Args:
            context: Unused.
            model_input: One of the forms of ``serving.prompts``.
            params: See ``serving.Settings``. MLflow fills in the defaults, and drops unknown ones with a warning.

        Returns:
            The answers, a text each.

        Raises:
            MlflowException: The input or a param cannot be answered; a server says so with status 400.
        """
        limit = self.model.config.max_position_embeddings
        try:
            settings = serving.settings(params, limit)
            rows = [self.tokenizer.encode(prompt) for prompt in serving.prompts(model_input)]
            for number, row in enumerate(rows):
                if len(row) + settings.max_new_tokens > limit:
                    raise RequestError(
                        f"prompt {number} has {len(row)} tokens: with max_new_tokens {settings.max_new_tokens} that is "
                        f"more than the {limit} that the model can hold"
                    )
        except RequestError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        answers: list[str] = []
        for start in range(0, len(rows), _TOGETHER):
            answers += self._answers(rows[start : start + _TOGETHER], settings)
        return answers

    def _answers(self, rows: list[list[int]], settings: Settings) -> list[str]:
        """Return the continuations of token rows, padded on the left so that all end at the same position."""
        length = max(map(len, rows))
        padding = self.tokenizer.pad_token_id
        tokens = torch.tensor([[padding] * (length - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        drawn = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        # bitsandbytes would compile its CPU kernels anew for every length, seconds each.
        with torch.inference_mode(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(settings.seed)
            out = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=padding,
                **({"stop_strings": settings.stop, "tokenizer": self.tokenizer} if settings.stop else {}),
                **(drawn if settings.temperature else {"do_sample": False}),
            )
        return [self._text(row, settings.stop) for row in out[:, length:]]

    def _text(self, tokens: torch.Tensor, stop: list[str]) -> str:
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        ends = [text.find(mark) for mark in stop if mark in text]
        return text[: min(ends)] if ends else text


mlflow.models.set_model(Compressed())
