"""The dense model's predictions as the target of recovery."""

from types import SimpleNamespace

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from test_recover import PADDING, adapted, assert_close, examples, gradients, settings, weights

from pipeline import storage
from pipeline.data import alpaca
from pipeline.data.alpaca import IGNORED
from pipeline.device import Compute
from pipeline.trial import loss, recover, teacher, training
from pipeline.trial.recover import Rows
from pipeline.trial.teacher import Teacher

CPU = Compute(torch.device("cpu"), torch.float32)


def dense(**changes):
    """The teacher: another model with the head of ``adapted()``, as pruning leaves the head alone."""
    model = tiny_model(seed=9, **changes)
    model.load_state_dict(
        {
            name: value
            for name, value in tiny_model(**changes).state_dict().items()
            if "embed" in name or "head" in name
        },
        strict=False,
    )
    return model.eval()


def logits_at(model, part):
    """Logits that predict the response tokens, row after row: [n, vocabulary]."""
    return model(input_ids=part.tokens).logits[:, :-1][part.labels[:, 1:] != IGNORED]


def distilled(student, part, predicted):
    """Cross-entropy with whole distributions, [n, vocabulary], through all logits."""
    return -(predicted * logits_at(student, part).log_softmax(-1)).sum()


@pytest.fixture
def asked(monkeypatch):
    """How often the dense model was loaded."""
    calls = []

    def load(folder, *_):
        calls.append(folder)
        return dense()

    monkeypatch.setattr(teacher, "checkpoint", SimpleNamespace(load_base=load))
    return calls


def checkpoint_in(folder):
    with storage.writing(folder) as unfinished:
        (unfinished / "weights").write_text("some")
    return folder


def test_answers_are_the_heads_rows_weighted_by_the_predictions():
    model, rows = dense(), examples(11)
    with torch.no_grad():
        for row, found in teacher.ask(model, rows, PADDING).items():
            predicted = logits_at(model, alpaca.batch([row], PADDING, False)).softmax(-1)
            assert found.shape == (len(row.tokens) - row.response, model.config.hidden_size)
            torch.testing.assert_close(found, predicted @ model.lm_head.weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_whole_distributions(tied, share):
    rows = examples(5)
    part = alpaca.batch(rows, PADDING, False)
    student, wise = adapted(tie_word_embeddings=tied), dense(tie_word_embeddings=tied)
    answers = teacher.ask(wise, rows, PADDING)
    wanted = loss.blended(student, part, torch.cat([answers[row] for row in rows]), share)
    value, count = loss.response_loss(student, part, wanted)
    labels = part.labels[:, 1:]
    with torch.no_grad():
        own = torch.nn.functional.one_hot(labels[labels != IGNORED], VOCABULARY).float()
        predicted = (1 - share) * logits_at(wise, part).softmax(-1) + share * own
    expected = distilled(student, part, predicted)
    assert count == len(predicted)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted_gradients = gradients(student, value), gradients(student, expected)
    assert max(gradient.abs().max() for gradient in wanted_gradients.values()) > 1e-3
    assert_close(found, wanted_gradients, 1e-4)


def test_answers_alone_are_the_loss_of_the_responses():
    rows, student = examples(4), adapted()
    part, answers = alpaca.batch(rows, PADDING, False), teacher.ask(dense(), rows, PADDING)
    wanted = loss.blended(student, part, torch.cat([answers[row] for row in rows]), 1.0)
    value, _ = loss.response_loss(student, part, wanted)
    assert value.item() == pytest.approx(loss.response_loss(student, part)[0].item(), rel=1e-5)


def test_chunks_of_positions_add_up(monkeypatch):
    rows = examples(6)
    part, answers = alpaca.batch(rows, PADDING, False), teacher.ask(dense(), rows, PADDING)
    wanted = torch.cat([answers[row] for row in rows])
    student = adapted()
    whole = gradients(student, loss.response_loss(student, part, wanted)[0])
    monkeypatch.setattr(loss, "LOSS_CHUNK", 7)
    assert_close(gradients(student, loss.response_loss(student, part, wanted)[0]), whole, 1e-5)


def test_dense_model_is_asked_once_and_its_answers_are_kept(tmp_path, asked):
    base, rows = checkpoint_in(tmp_path / "base"), examples(8)
    wise = Teacher(base, tmp_path / "kept", PADDING, CPU)
    first = wise.targets(rows)
    assert wise.targets(rows[:3] + rows[:2]) is first
    later = Teacher(base, tmp_path / "kept", PADDING, CPU).targets(rows)
    assert len(asked) == 1
    assert all(torch.equal(first[row], later[row]) for row in rows)
    Teacher(base, tmp_path / "kept", PADDING, CPU).targets(rows[1:])  # other rows, another file
    assert len(asked) == 2


def test_longer_recovery_asks_for_the_further_rows_alone(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(teacher, "_KEPT", 4)
    base, rows = checkpoint_in(tmp_path / "base"), examples(10)
    Teacher(base, tmp_path / "kept", PADDING, CPU).targets(rows[:4])
    counted, ask = [], teacher.ask
    monkeypatch.setattr(teacher, "ask", lambda model, part, *rest: counted.extend(part) or ask(model, part, *rest))
    found = Teacher(base, tmp_path / "kept", PADDING, CPU).targets(rows)
    assert counted == rows[4:]
    assert all(
        torch.equal(found[row], answer) for row, answer in ask(dense(), rows, PADDING).items() if row in rows[:4]
    )


def test_damaged_answers_are_asked_for_again_and_those_of_another_model_not_read(tmp_path, asked, capsys):
    base, rows = checkpoint_in(tmp_path / "base"), examples(3)
    first = Teacher(base, tmp_path / "kept", PADDING, CPU).targets(rows)
    (file,) = tmp_path.glob("kept/*/answers.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    again = Teacher(base, tmp_path / "kept", PADDING, CPU).targets(rows)
    assert "is damaged; the dense model is asked again" in capsys.readouterr().out
    assert all(torch.equal(first[row], again[row]) for row in rows)
    other = tmp_path / "other"
    with storage.writing(other) as unfinished:
        (unfinished / "weights").write_text("others")
    Teacher(other, tmp_path / "kept", PADDING, CPU).targets(rows)
    assert len(asked) == 3


def test_recovery_moves_the_predictions_towards_the_teachers(tmp_path, asked):
    rows, student = examples(8), adapted()
    wise = Teacher(checkpoint_in(tmp_path / "base"), tmp_path / "kept", PADDING, CPU)
    part, wanted = alpaca.batch(rows, PADDING, False), wise.targets(rows)
    with torch.no_grad():
        predicted = logits_at(dense(), part).softmax(-1)
        before = distilled(student, part, predicted).item()
    chosen = settings(target="teacher", steps=12, learning_rate=0.01, max_length=32, batch_size=4, micro_batch_size=2)
    found = recover.run(student, Rows(rows, rows[:2], PADDING, wise.targets(rows)), chosen, 0)
    with torch.no_grad():
        after = distilled(student.eval(), part, predicted).item()
    assert after < before - 0.5
    assert len(found.losses) == 12 and found.losses[-1] < found.losses[0]
    assert wanted is wise.targets(rows) and len(asked) == 1


def test_first_step_follows_the_gradient_of_the_mean_over_the_batch(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(training, "adamw", lambda weights, rate, _: torch.optim.SGD(weights, lr=rate))
    monkeypatch.setattr(training, "_MAX_NORM", 1e9)
    rows = examples(8)
    wise = Teacher(checkpoint_in(tmp_path / "base"), tmp_path / "kept", PADDING, CPU)
    student = adapted()
    before = weights(student)
    part = alpaca.batch(rows, PADDING, False)
    with torch.no_grad():
        predicted = logits_at(dense(), part).softmax(-1)
    expected = gradients(student, distilled(student, part, predicted) / len(predicted))
    student.zero_grad()
    chosen = settings(target="teacher", steps=1, learning_rate=0.5, max_length=32)
    recover.run(student, Rows(rows, rows[:2], PADDING, wise.targets(rows)), chosen, 0)
    moved = {name: (before[name] - value) / 0.5 for name, value in weights(student).items()}
    assert_close(moved, expected, 1e-4)
