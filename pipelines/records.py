"""The Arrow schemas that pass between the pipelines: the only hand-offs.

A curated dataset is a folder: ``shards/*.arrow`` (CURATED), ``ledger/*.parquet`` (LEDGER), ``selection/*.parquet``
(SELECTION), ``thumbnails/*.arrow`` (THUMBNAILS), ``scores/*.parquet`` (SCORES), ``markers/*.json``,
``manifest.json``, ``report.html``. Evaluation writes ANSWERS.
"""

from __future__ import annotations

import pyarrow as pa

PART = pa.struct([("type", pa.string()), ("text", pa.string())])
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))]))
"""A conversation in OpenAI's shape, with every content a list of parts."""

CURATED = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.large_binary()),  # encoded bytes; null where the conversation has no picture
        ("more_images", pa.list_(pa.large_binary())),  # the second picture and on, in reading order
        ("width", pa.int32()),  # of `image`, as stored
        ("height", pa.int32()),
        ("caption", pa.list_(pa.string())),
        ("messages", MESSAGES),  # null for captions
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("source", pa.string()),  # raw shard and byte offset, "pairs-00003.tar@51200"
    ]
)

LEDGER = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("verdict", pa.string()),  # "kept" or "dropped"
        ("reason", pa.string()),  # null where kept
        ("detail", pa.string()),  # what the reason was read from, for people
        ("words", pa.int32()),  # the statistics, as far as the sample got: of the first caption
        ("characters", pa.int32()),
        ("letters", pa.float32()),  # share of letters and spaces
        ("repetition", pa.float32()),  # share of the commonest word
        ("capitals", pa.float32()),  # share of capitals among the letters
        ("non_words", pa.float32()),  # share of words that are none
        ("contacts", pa.string()),  # the first kind of address or number in it
        ("language", pa.string()),  # ISO 639-1, where the recipe asks
        ("bytes", pa.int64()),  # of the first picture's file, and so on
        ("format", pa.string()),
        ("width", pa.int32()),  # as the file declares
        ("height", pa.int32()),
        ("animated", pa.bool_()),
        ("entropy", pa.float32()),  # bits of grey
        ("sharpness", pa.float32()),  # variance of the Laplacian, as stored
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("image_text", pa.float32()),  # the given scorers' scores: the best caption's cosine with the picture
        ("aesthetic", pa.float32()),
        ("unsafe", pa.float32()),  # a probability, as is the next
        ("watermark", pa.float32()),
        ("captions", pa.list_(pa.string())),  # as they were found
        ("url", pa.string()),
        ("row", pa.int32()),  # row in the curated shard; null where it never got there
    ]
)

SCORES = pa.schema(
    [
        ("row", pa.int32()),
        *(LEDGER.field(name) for name in ("image_text", "aesthetic", "unsafe", "watermark")),
        ("embedding", pa.list_(pa.float16())),  # of the picture, where a CLIP was given
    ]
)
"""What the given scorers made of one curated shard."""

THUMBNAIL = 16
THUMBNAILS = pa.schema([("thumbnail", pa.binary(3 * THUMBNAIL**2))])
"""16×16 RGB of each curated row, in its order: tells near duplicates from mere likeness. All zero where there is no
picture."""

FETCHED = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),  # as the list has it; null where there is none
        ("final_url", pa.string()),  # the last one asked, after redirects
        ("status", pa.int32()),  # of the last answer; null where there was none
        ("reason", pa.string()),  # null where fetched
        ("detail", pa.string()),
        ("bytes", pa.int64()),  # of the picture
        ("seconds", pa.float32()),  # of the requests, without waits between them
    ]
)
"""What became of each URL of a list."""

SELECTION = pa.schema([("row", pa.int32()), ("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
"""Rows of one curated shard that later decisions leave out."""

ANSWERS = pa.schema(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("unit", pa.string()),  # what it shares with other questions, such as a picture
        ("condition", pa.string()),  # "picture", "wrong picture" or "no picture"
        ("prompt", pa.string()),  # the whole conversation as the model was given it, pictures as <image>
        ("pictures", pa.list_(pa.string())),  # paths, in reading order
        ("prompt_tokens", pa.int32()),
        ("answer", pa.string()),  # "" where it failed
        ("answer_tokens", pa.int32()),  # 0 where choices were compared
        ("log_likelihoods", pa.list_(pa.float64())),  # of each choice, where they were compared
        ("error", pa.string()),  # null where it did not fail
        ("facts", pa.string()),  # JSON: what the metric knows of the question
        ("score", pa.float64()),  # null where nobody has graded it
        ("benchmark", pa.string()),  # name and version of prompt and metric
        ("model", pa.string()),
        ("model_sha256", pa.string()),
        ("split_sha256", pa.string()),  # of all questions, with their facts
        ("decoding", pa.string()),  # JSON
    ]
)
"""One row an answer, with all that its score can be traced to."""


def to_arrow_messages(messages: list[dict]) -> list[dict]:
    """OpenAI-shaped messages → values of the MESSAGES type."""
    return [{"role": m["role"], "content": [arrow_part(p) for p in parts(m["content"])]} for m in messages]


def parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def arrow_part(part: dict) -> dict:
    return {"type": part["type"], "text": part.get("text")}


def from_llava(conversations: list[dict]) -> list[dict]:
    """LLaVA's ``{"from": "human" | "gpt", "value": "… <image> …"}`` → messages."""
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    messages = []
    for turn in conversations:
        content: list[dict] = []
        for index, text in enumerate(turn["value"].split("<image>")):
            if index:
                content.append({"type": "image"})
            if text.strip():
                content.append({"type": "text", "text": text.strip()})
        messages.append({"role": roles[turn["from"]], "content": content})
    return messages


def caption_messages(caption: str) -> list[dict]:
    """A caption is a conversation too: a picture, and what is said of it."""
    return [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": caption}]


def images_in(messages: list[dict]) -> int:
    return sum(part["type"] == "image" for message in messages for part in parts(message["content"]))
