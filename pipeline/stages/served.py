"""The registered model, as MLflow loads it from code: ``mlflow.pyfunc.load_model("models:/<name>@<alias>")``.

MLflow runs this file, with ``pipeline`` beside it, where the project is not installed. It is no part of the pipeline.

One plain ``PythonModel`` answers instructions and chats, so that one registered model and one server do for both.
MLflow's ``ChatModel`` takes a chat only (and is deprecated), and its successor ``ResponsesAgent`` takes another form
than ``messages``. The answer to a chat has ``ChatModel``'s form, and MLflow's server hands ``messages`` on as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from jinja2 import TemplateError
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types.llm import ChatChoice, ChatCompletionResponse, ChatMessage, TokenUsageStats

from pipeline import checkpoint, device, storage
from pipeline.data import chat, prompts
from pipeline.export import dense
from pipeline.stages import serving
from pipeline.stages.serving import Conversation, RequestError, Settings

_TOGETHER = 8  # prompts that are answered in one batch


@dataclass(frozen=True)
class _Answer:
    """What a prompt was answered.

    Attributes:
        text: The answer, without what ends it.
        tokens: Tokens that were generated.
        complete: Whether the model or a stop text ended it, not ``max_new_tokens``.
    """

    text: str
    tokens: int
    complete: bool


class Compressed(PythonModel):
    """A built checkpoint that answers instructions and chats.

    Attributes:
        chats: Whether it was recovered on chats, so that instructions are asked in the model's chat template, too.
    """

    chats = False

    def load_context(self, context: PythonModelContext) -> None:
        """Load and verify the checkpoint, onto a GPU if there is one."""
        folder = context.artifacts["checkpoint"]
        storage.verify(folder, "build")
        compute = device.choose("auto", "auto")
        if compute.device.type == "cpu":
            self.model: Any = dense.read(folder).model(compute)
        else:
            self.model = checkpoint.load_final(folder, compute.device, compute.dtype)
        self.tokenizer = checkpoint.load_tokenizer(folder)
        # What was built by earlier versions does not tell, and was recovered in Alpaca's prompt.
        lineage = Path(folder) / "lineage.json"
        self.chats = lineage.exists() and storage.read_json(lineage, "build").get("prompt") == "chat"
        self.one_at_a_time = threading.Lock()  # a server answers in threads; draws follow the process's one generator

    # Of the type hints that MLflow reads, that of a DataFrame alone leaves all inputs as they are, without a warning.
    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, object] | None = None
    ) -> list[str] | dict[str, object]:
        """Answer each prompt.

        Args:
            context: Unused.
            model_input: One of the forms of ``serving.questions``.
            params: See ``serving.Settings``. MLflow fills in the defaults. It drops unknown ones with a warning, except
                beside ``messages``, where they stand in the input.

        Returns:
            The answers, a text each; for one chat a completion in OpenAI's form.

        Raises:
            MlflowException: The input or a param cannot be answered; a server says so with status 400.
        """
        limit = self.model.config.max_position_embeddings
        try:
            questions, given = serving.questions(model_input, prompts.conversation if self.chats else prompts.prompt)
            settings = serving.settings({**(params or {}), **given}, limit)
            rows = [self._tokens(question) for question in questions]
            for number, row in enumerate(rows):
                if len(row) + settings.max_new_tokens > limit:
                    raise RequestError(
                        f"prompt {number} has {len(row)} tokens: with max_new_tokens {settings.max_new_tokens} that is "
                        f"more than the {limit} that the model can hold"
                    )
        except RequestError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        answers: list[_Answer] = []
        with self.one_at_a_time:
            for start in range(0, len(rows), _TOGETHER):
                answers += self._answers(rows[start : start + _TOGETHER], settings)
        if serving.is_chat(model_input):
            return _completion(answers[0], len(rows[0]))
        return [answer.text for answer in answers]

    def _tokens(self, question: str | Conversation) -> list[int]:
        """Return a prompt's tokens: a chat's by the model's own template, if it has one.

        A model that was recovered on chats is asked as its rows were.
        """
        if isinstance(question, str):
            return list(self.tokenizer.encode(question))
        if self.chats:
            try:
                text = chat.written(question, self.tokenizer, answered=False)
            except chat.ChatError as error:
                raise RequestError(str(error)) from None
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        if not self.tokenizer.chat_template:
            return list(self.tokenizer.encode(serving.flat(question)))
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    question, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}") from None

    def _answers(self, rows: Sequence[Sequence[int]], settings: Settings) -> list[_Answer]:
        """Return the continuations of token rows, padded on the left so that all end at the same position.

        Padding is masked, and positions are counted from each row's first token, so that neighbours change nothing.
        """
        length = max(map(len, rows))
        padding = self.tokenizer.pad_token_id
        tokens = torch.tensor([[padding] * (length - len(row)) + [*row] for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        drawn = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(settings.seed)
            out = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=padding,
                **({"stop_strings": settings.stop, "tokenizer": self.tokenizer} if settings.stop else {}),
                **(drawn if settings.temperature else {"do_sample": False}),
            )
        return [self._answer(row, settings.stop) for row in out[:, length:].tolist()]

    def _answer(self, row: list[int], stop: Sequence[str]) -> _Answer:
        """Return what a row of generated tokens says, up to the end of text or the first stop text."""
        ends = self.model.generation_config.eos_token_id
        ending = {ends} if isinstance(ends, int) else set(ends or ())
        # What ended before its neighbours is padded.
        last = next((place for place, token in enumerate(row) if token in ending), None)
        said = row if last is None else row[: last + 1]
        if last is None and self.tokenizer.pad_token_id in row:
            said = row[: row.index(self.tokenizer.pad_token_id)]
        text = str(self.tokenizer.decode(said, skip_special_tokens=True))
        cuts = [text.find(mark) for mark in stop if mark in text]
        return _Answer(text[: min(cuts)] if cuts else text, len(said), last is not None or bool(cuts))


def _completion(answer: _Answer, asked: int) -> dict[str, object]:
    """Return an answer in the form of OpenAI's chat completions."""
    choice = ChatChoice(
        ChatMessage(role="assistant", content=answer.text), finish_reason="stop" if answer.complete else "length"
    )
    usage = TokenUsageStats(asked, answer.tokens, asked + answer.tokens)
    return ChatCompletionResponse(choices=[choice], usage=usage).to_dict()


mlflow.models.set_model(Compressed())
