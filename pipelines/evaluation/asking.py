"""The actor that holds the model and answers batches of conversations, one file a batch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.records import ANSWERS


class Answerer:
    """Called with batches as `evaluate.plan` makes them, each as JSON."""

    def __init__(self, model: str, output: str, settings: dict, traced: dict, counter):
        import torch  # only actors need it and the model; the driver would wait seconds for them

        from owl_model.answering import load

        torch.set_num_threads(max(1, int(settings["cpus_per_actor"])))
        with storage.local_folder(model) as here:
            self.owl, self.processor = load(here)
        self.output, self.traced, self.counter = output, traced, counter
        self.options = json.loads(traced["decoding"])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        tokens = 0
        for text in batch["batch"]:
            given = json.loads(text)
            rows = [{**row, "condition": given["condition"], **self.traced} for row in self.answer(given["items"])]
            table = pa.Table.from_pylist(rows, schema=ANSWERS)
            storage.write_parquet(f"{self.output}/answers/{given['name']}.parquet", table)
            self.counter.advance.remote(len(given["items"]), given["name"])
            tokens += sum(row["answer_tokens"] for row in rows)
        return {"tokens": [tokens]}

    def answer(self, items: list[list[dict]]) -> list[dict]:
        """Rows of all turns. A conversation goes on with the model's own answers."""
        spoken: list[list[dict]] = [[] for _ in items]
        pictures: list[list[str]] = [[] for _ in items]
        rows = []
        for number in range(max(len(turns) for turns in items)):
            due = [index for index, turns in enumerate(items) if number < len(turns)]
            for index in due:
                spoken[index] += items[index][number]["messages"]
                pictures[index] += items[index][number]["pictures"]
            turns = [items[index][number] for index in due]
            made = self.attempt(turns, [spoken[index] for index in due], [pictures[index] for index in due])
            for index, turn, fields in zip(due, turns, made, strict=True):
                rows.append(
                    {
                        "id": turn["id"],
                        "type": turn["type"],
                        "unit": turn["unit"] or turn["id"],
                        "prompt": written(spoken[index]),
                        "pictures": pictures[index].copy(),
                        "facts": json.dumps(turn["facts"]),
                        **fields,
                    }
                )
                spoken[index].append({"role": "assistant", "content": fields["answer"]})
        return rows

    def attempt(self, turns: list[dict], spoken: list[list[dict]], pictures: list[list[str]]) -> list[dict[str, Any]]:
        """Answers together or, where one of them fails, each by itself; a failure is a row with its error."""
        try:
            return self.reply(turns, spoken, pictures)
        except Exception as error:
            if len(turns) > 1:
                parts = zip(turns, spoken, pictures, strict=True)
                return [row for turn, said, shown in parts for row in self.attempt([turn], [said], [shown])]
            told = f"{type(error).__name__}: {error}"
            return [{"answer": "", "answer_tokens": 0, "prompt_tokens": 0, "log_likelihoods": None, "error": told}]

    def reply(self, turns: list[dict], spoken: list[list[dict]], pictures: list[list[str]]) -> list[dict[str, Any]]:
        from owl_model.answering import answer, choice_log_likelihoods

        images = [[storage.read_bytes(path) for path in paths] for paths in pictures]
        sizes = [len(self.processor.encode(said, prompt=True).ids) for said in spoken]
        if self.options.get("answers") == "likelihood":
            choices = [turn["choices"] for turn in turns]
            likely = choice_log_likelihoods(self.owl, self.processor, spoken, images, choices)
            texts = [names[int(np.argmax(values))] for names, values in zip(choices, likely, strict=True)]
            tokens = [0] * len(turns)
        else:
            texts = answer(self.owl, self.processor, spoken, images, **self.options)
            likely = [None] * len(turns)
            tokens = [len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return [
            {"answer": text, "answer_tokens": count, "prompt_tokens": size, "log_likelihoods": values, "error": None}
            for text, count, size, values in zip(texts, tokens, sizes, likely, strict=True)
        ]


def written(messages: list[dict]) -> str:
    """A conversation for people to read, pictures as <image>."""

    def words(content: str | list[dict]) -> str:
        if isinstance(content, str):
            return content
        return " ".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in content)

    if len(messages) == 1:
        return words(messages[0]["content"])
    return "\n".join(f"{message['role']}: {words(message['content'])}" for message in messages)
