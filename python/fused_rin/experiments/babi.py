"""The bAbI tasks (Weston et al. 2015, v1.2, 1,000 questions each): a story, a question, a word as the answer.

As in arXiv 1801.06105: all statements of a story up to the question are joined into one sequence of words.
Answers of several words ("apple,milk") count as one class. Sequences are padded on the left, with word 0,
whose embedding is zero, so that the last state is that of the last word.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .data import read_babi
from .errors import UserError
from .tasks import Batch, Classification, Device


class Question(NamedTuple):
    story: list[str]
    question: list[str]
    answer: str


def parse(text: str) -> list[Question]:
    """The questions of one file, each with all the statements before it in its story."""
    questions: list[Question] = []
    story: list[str] = []
    for line in text.splitlines():
        number, _, rest = line.partition(" ")
        if number == "1":
            story = []
        if "\t" in rest:
            question, answer, *_ = rest.split("\t")
            questions.append(Question(list(story), _words(question), answer.strip()))
        else:
            story += _words(rest)
    return questions


class Babi(Classification):
    """One of the 20 tasks. A batch's inputs are story [T, B] and question [Q, B]: word numbers, 0 on the left."""

    vocabulary: int  # the padding included

    def __init__(self, number: int, folder: Path, seed: int = 0, device: Device = "cpu"):
        if not 1 <= number <= 20:
            raise UserError(f"babi_task must be between 1 and 20, got {number}")
        files = read_babi(folder)
        train, test = (
            parse(next(text for name, text in files.items() if name.startswith(f"qa{number}_") and part in name))
            for part in ("_train", "_test")
        )
        words = sorted({word for item in (*train, *test) for word in (*item.story, *item.question)})
        answers = sorted({item.answer for item in (*train, *test)})
        numbers = {word: index for index, word in enumerate(words, 1)}
        lengths = [max(len(item[field]) for item in (*train, *test)) for field in (0, 1)]
        self.vocabulary = len(words) + 1

        def encode(items: list[Question]) -> tuple[Tensor, ...]:
            padded = (
                [[0] * (length - len(item[field])) + [numbers[word] for word in item[field]] for item in items]
                for field, length in enumerate(lengths)
            )
            return (*map(torch.tensor, padded), torch.tensor([answers.index(item.answer) for item in items]))

        super().__init__(encode(train), encode(test), len(answers), seed, device)

    def _batch(self, data: tuple[Tensor, ...], rows: Tensor | slice) -> Batch:
        story, question, answer = (values[rows] for values in data)
        return Batch((story.t().contiguous(), question.t().contiguous()), answer)


def _words(sentence: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+", sentence.lower())
