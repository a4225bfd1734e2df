"""The world on disk: raw WebDataset shards, an instruction set, a reading corpus, and a held-out set of questions.

    raw/pairs/*.tar         pictures with captions, and the planted bad samples
    raw/instructions/*.tar  conversations about pictures, about two pictures, and about none
    raw/text/*.tar          conversations about scenes told in words: what a language model can read
    heldout/                questions.jsonl and pictures of combinations that appear nowhere above

Every file is a pure function of the settings, so a killed run is simply run again.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from PIL import Image

from jobs.world import language
from jobs.world.drawing import encode, render
from jobs.world.scenes import Scene, draw_scene
from pipelines.curation.export import add_file
from pipelines.settings import Settings

EXTENSIONS = ("jpg", "jpg", "png", "webp")
JUNK = ("IMG_2041.jpg", "### $$$ !!! ###", "buy buy buy buy buy buy", "DSC00017.JPG", "1234 5678 :: 9012 -- 42")


class World(Settings):
    """How much of the picture world to write."""

    pairs: int = 4000
    """Pictures with captions, the planted bad ones not counted."""
    instructions: int = 4000
    """Conversations about pictures."""
    texts: int = 18000
    """Conversations about scenes told in words."""
    questions: int = 300
    """Held-out scenes; each is asked one question of every type that it allows."""
    shards: int = 12
    """Raw shards of pairs; instructions and texts take a third as many."""
    turns: int = 5
    """Most questions in one conversation."""
    seed: int = 1
    """Another seed, another world."""


PLANTED = {
    "image_corrupt": 12,
    "image_truncated": 12,
    "image_small": 10,
    "image_aspect": 8,
    "image_bomb": 2,
    "caption_empty": 10,
    "caption_junk": 10,
    "duplicate_exact": 12,
    "duplicate_near": 12,
    "shard_truncated": 1,
}
"""Bad samples by the reason that the ledger must give."""

Members = list[tuple[str, bytes]]
"""One raw sample: (extension, contents) of each of its files."""


def write_world(folder: Path, world: World, part: str, tick: Callable[[int], None] = lambda n: None) -> None:
    """Writes one part of the world ("pairs", "instructions", "text" or "heldout") below ``folder``; ``tick`` hears
    how many samples were written."""
    third = max(1, world.shards // 3)
    if part == "pairs":
        write_shards(folder / "raw/pairs", part, plant(pairs(world), world), world.shards, tick, cut_last=True)
    elif part == "instructions":
        write_shards(folder / "raw/instructions", part, instructions(world), third, tick)
    elif part == "text":
        write_shards(folder / "raw/text", part, texts(world), third, tick)
    else:
        write_held_out(folder / "heldout", world, tick)


def total_samples(world: World) -> int:
    """How many samples ``write_world`` writes in all its parts: the cut shard loses one, and no other is added."""
    planted = sum(PLANTED.values()) - PLANTED["shard_truncated"]
    return world.pairs + planted + world.instructions + world.texts + world.questions


# --- pictures with captions ------------------------------------------------------------------------------------------


def pairs(world: World) -> list[Members]:
    random = Random(f"{world.seed} pairs")
    samples = []
    for _ in range(world.pairs):
        scene = draw_scene(random, held_out=False)
        extension = random.choice(EXTENSIONS)
        picture = encode(render(scene, random), extension)
        samples.append(caption_members(extension, picture, language.captions(scene, random)))
    return samples


def caption_members(extension: str, picture: bytes, captions: list[str]) -> Members:
    fields = json.dumps({"captions": captions}).encode()
    return [(extension, picture), ("txt", captions[0].encode()), ("json", fields)]


def plant(good: list[Members], world: World) -> list[Members]:
    """Puts the bad samples among the good ones. A duplicate always comes after its original."""
    random = Random(f"{world.seed} planted")
    originals = random.sample(range(1, len(good)), PLANTED["duplicate_exact"] + PLANTED["duplicate_near"])
    exact, near = originals[: PLANTED["duplicate_exact"]], originals[PLANTED["duplicate_exact"] :]
    bad = [sample for reason, number in PLANTED.items() for sample in spoiled(reason, number, random)]
    mixed = good + bad
    order = random.sample(range(1, len(mixed)), len(mixed) - 1)
    copies: dict[int, list[Members]] = {}
    for original in exact:
        copies.setdefault(original, []).append(good[original])
    for number, original in enumerate(near):
        copies.setdefault(original, []).append(reworked(good[original], resize=number % 2 == 0))
    placed: list[Members] = []
    for index in order:
        placed += [mixed[index], *copies.get(index, [])]
    return [*placed, good[0]]  # the last shard will be cut in its last sample: a good one


def spoiled(reason: str, number: int, random: Random) -> Iterator[Members]:
    """Samples that are bad for one reason only."""
    for index in range(number):
        scene = draw_scene(random, held_out=False)
        image, captions = render(scene, random), language.captions(scene, random)
        picture = encode(image, "jpg")
        if reason == "image_corrupt":
            picture = b"\xff\xd8\xff\xe0" + random.randbytes(600)
        elif reason == "image_truncated":
            picture = picture[: len(picture) * 6 // 10]
        elif reason == "image_small":
            picture = encode(image.resize((24, 20)), "jpg")
        elif reason == "image_aspect":
            picture = encode(image.resize((480, 96)), "jpg")
        elif reason == "image_bomb":
            picture = bomb(20_000)
        elif reason == "caption_empty":
            captions = ["", "  \n"][: 1 + index % 2]
        elif reason == "caption_junk":
            captions = [JUNK[index % len(JUNK)]]
        else:
            return  # duplicates and the cut shard are made elsewhere
        yield caption_members("png" if reason == "image_bomb" else "jpg", picture, captions)


def reworked(sample: Members, resize: bool) -> Members:
    """The same picture in other bytes: smaller, or re-encoded."""
    (_, picture), *words = sample
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    if resize:
        image = image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.BICUBIC)
    return [("jpg", encode(image, "jpg", quality=70)), *words]


def bomb(side: int) -> bytes:
    """A PNG of side × side black pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])  # one bit a pixel
    pixels = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# --- conversations ---------------------------------------------------------------------------------------------------


def user(parts: list[dict], question: str) -> dict:
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def conversation(opening: list[dict], turns: list[language.Turn]) -> list[dict]:
    """Messages whose first one opens with ``opening``: pictures, or a scene told in words."""
    messages = []
    for index, turn in enumerate(turns):
        messages.append(user(opening if index == 0 else [], turn.question))
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def compared(first: Scene, second: Scene, random: Random) -> list[language.Turn]:
    turns = [language.compare(first, second, random) for _ in range(4)]
    return list({turn.question: turn for turn in turns}.values())


def draw_conversation(random: Random, most: int, others: float) -> tuple[list[Scene], list[language.Turn]]:
    """Scenes and turns. With probability ``others`` a leaning dialogue, two scenes compared, or no scene at all;
    several questions about one scene otherwise."""
    first, second = draw_scene(random, held_out=False), draw_scene(random, held_out=False)
    if random.random() >= others:
        return [first], language.several_turns(first, random, most)
    kind = random.choice(("dialogue", "comparison", "comparison", "text_only"))
    if kind == "dialogue":
        return [first], language.dialogue(first, random)
    if kind == "comparison":
        return [first, second], compared(first, second, random)
    return [], [language.text_only(random) for _ in range(3)]


def instructions(world: World) -> Iterator[Members]:
    random = Random(f"{world.seed} instructions")
    for _ in range(world.instructions):
        scenes, turns = draw_conversation(random, world.turns, others=0.35)
        pictures = [encode(render(scene, random), "jpg") for scene in scenes]
        messages = conversation([{"type": "image"}] * len(scenes), turns)
        names = ["jpg", "2.jpg"][: len(pictures)]
        yield [*zip(names, pictures, strict=True), ("json", json.dumps({"messages": messages}).encode())]


def texts(world: World) -> Iterator[Members]:
    """Reading: scenes told in words stand where pictures would, so that a language model learns to look things up in
    what it was given. A tenth asks for nothing and is answered by a caption."""
    random = Random(f"{world.seed} texts")
    for _ in range(world.texts):
        if random.random() < 0.1:
            first, second = language.captions(draw_scene(random, held_out=False), random)[:2]
            messages = [{"role": "user", "content": first}]
            messages.append({"role": "assistant", "content": random.choice([first, second])})
        else:
            scenes, turns = draw_conversation(random, world.turns, others=0.3)
            told = [{"type": "text", "text": language.captions(scene, random)[0]} for scene in scenes]
            messages = conversation(told, turns)
        yield [("json", json.dumps({"messages": messages}).encode())]


# --- held out --------------------------------------------------------------------------------------------------------


def write_held_out(folder: Path, world: World, tick: Callable[[int], None]) -> None:
    """One line a question: id, type, pictures, the messages before the answer, and the answer."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    random = Random(f"{world.seed} held out")
    rows = []
    for index in range(world.questions):
        scene, other = draw_scene(random, held_out=True), draw_scene(random, held_out=True)
        names = [f"{index:04d}.png", f"{index:04d}-b.png"]
        for name, shown in zip(names, (scene, other), strict=True):
            (folder / "pictures" / name).write_bytes(encode(render(shown, random), "png"))
        asked: list[tuple[str, list[str], list[language.Turn]]] = []
        for kind, ask in language.QUESTIONS.items():
            if turn := ask(scene, random):
                asked.append((kind, names[:1], [turn]))
        asked.append(("comparison", names, [language.compare(scene, other, random)]))
        asked.append(("dialogue", names[:1], language.dialogue(scene, random)))
        if index % 3 == 0:
            asked.append(("text_only", [], [language.text_only(random)]))
        for kind, pictures, turns in asked:
            messages = conversation([{"type": "image"}] * len(pictures), turns)
            paths = [f"pictures/{name}" for name in pictures]
            row = {"id": f"{index:04d}-{kind}", "type": kind, "pictures": paths, "messages": messages[:-1]}
            rows.append({**row, "answer": turns[-1].answer})
        tick(1)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- tars ------------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, name: str, samples, number: int, tick: Callable[[int], None], cut_last=False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    samples = list(samples)
    size = -(-len(samples) // number)
    for index in range(number):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for offset, members in enumerate(samples[index * size : (index + 1) * size]):
                last = buffer.tell()
                for extension, data in members:
                    add_file(tar, f"{name}-{index * size + offset:06d}.{extension}", data)
            tick(len(samples[index * size : (index + 1) * size]))
        data = buffer.getvalue()
        if cut_last and index == number - 1:
            data = data[: last + 512 + 200]  # the header of the last picture, and 200 bytes of it
        path = folder / f"{name}-{index:05d}.tar"
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(data)
        partial.replace(path)
