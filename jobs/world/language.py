"""A scene → what is true of it: captions, and questions with their answers, by type.

A question is only asked where it has one answer. What takes more than one look is answered in steps that end in
"so …", because a small model cannot take them at once (docs/log.md). ``QUESTIONS`` maps a type to the function that
asks it; each returns None where the scene does not allow the question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from jobs.world.scenes import CELLS, COLOURS, KINDS, SIZES, Scene, Shape

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above", "large": "small", "small": "large"}


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


def facts(shape: Shape, *values: str) -> str:
    """Noun first: "circle large red top-left". A language model of a hundred thousand parameters learns within a
    minute to look up what follows a noun, and would need many to look up what stands before it."""
    return " ".join((shape.kind, *values))


def placed(shape: Shape) -> str:
    return facts(shape, shape.size, shape.colour, CELLS[shape.cell])


def counted(number: int, noun: str) -> str:
    return f"{NUMBERS[number]} {noun}" + ("" if number == 1 else "s")


def related(a: Shape, b: Shape) -> list[tuple[str, str]]:
    """How ``a`` lies to ``b``: (relation, its opposite) by columns and by rows."""
    found = []
    if a.column != b.column:
        found.append(("left", "right") if a.column < b.column else ("right", "left"))
    if a.row != b.row:
        found.append(("above", "below") if a.row < b.row else ("below", "above"))
    return found


def captions(scene: Scene, random: Random) -> list[str]:
    """Several true captions: everything with its place; how many and what colour; one relation; the printed word."""
    word = f" word {scene.word} ." if scene.word else ""
    everything = " , ".join(placed(shape) for shape in scene.shapes) + " ." + word
    colours = " , ".join(facts(shape, shape.colour) for shape in scene.shapes) + " ."
    texts = [everything, f"{counted(len(scene.shapes), 'shape')} . {colours}{word}"]
    if len(scene.shapes) == 3:
        a, b = random.sample(scene.shapes, 2)
        texts.append(f"{a.kind} {random.choice(related(a, b))[0]} of {b.kind} .")
    return texts


def attribute(scene: Scene, random: Random) -> Turn | None:
    shape = random.choice(scene.shapes)
    asked = random.choice(["size", "color"])
    return Turn(f"what {asked} is the {shape.kind} ?", facts(shape, shape.size if asked == "size" else shape.colour))


def count(scene: Scene, random: Random) -> Turn | None:
    if random.random() < 0.5:
        return Turn("how many shapes are there ?", NUMBERS[len(scene.shapes)])
    size = random.choice(SIZES)
    names = [shape.kind for shape in scene.having(size=size)]
    return Turn(f"how many {size} shapes are there ?", " , ".join([*names, f"so {NUMBERS[len(names)]}"]))


def position(scene: Scene, random: Random) -> Turn | None:
    shape = random.choice(scene.shapes)
    return Turn(f"where is the {shape.kind} ?", facts(shape, CELLS[shape.cell]))


def relation(scene: Scene, random: Random) -> Turn | None:
    """Where the one is, where the other, and what follows."""
    if len(scene.shapes) < 2:
        return None
    a, b = random.sample(scene.shapes, 2)
    true, false = random.choice(related(a, b))
    first, second = sorted((true, false))
    steps = f"{facts(a, CELLS[a.cell])} , {facts(b, CELLS[b.cell])}"
    return Turn(f"is the {a.kind} {first} or {second} of the {b.kind} ?", f"{steps} , so {true}")


def reading(scene: Scene, random: Random) -> Turn | None:
    return Turn("what is the word ?", f"word {scene.word}") if scene.word else None


def found(scene: Scene, kind: str) -> str:
    """Where a kind of shape is: "circle top-left", or "circle nowhere"."""
    return next((facts(shape, CELLS[shape.cell]) for shape in scene.having(kind=kind)), f"{kind} nowhere")


def yes_no(scene: Scene, random: Random) -> Turn | None:
    """Half yes, half no: is a shape there, or has it this colour."""
    shape = random.choice(scene.shapes)
    if random.random() < 0.5:
        kind = random.choice([shape.kind, random.choice([k for k in KINDS if not scene.having(kind=k)])])
        verdict = "yes" if scene.having(kind=kind) else "no"
        return Turn(f"is there a {kind} ?", f"{found(scene, kind)} , so {verdict}")
    colour = random.choice([shape.colour, random.choice([c for c in COLOURS if c != shape.colour])])
    verdict = "yes" if colour == shape.colour else "no"
    return Turn(f"is the {shape.kind} {colour} ?", f"{facts(shape, shape.colour)} , so {verdict}")


QUESTIONS: dict[str, Callable[[Scene, Random], Turn | None]] = {
    "attribute": attribute,
    "count": count,
    "position": position,
    "relation": relation,
    "reading": reading,
    "yes_no": yes_no,
}


def several_turns(scene: Scene, random: Random, most: int) -> list[Turn]:
    """Up to ``most`` different questions about one scene."""
    asked: dict[str, Turn] = {}
    while not asked:  # a pick may not fit the scene
        for ask in random.choices(list(QUESTIONS.values()), k=2 * most):
            turn = ask(scene, random)
            if turn and len(asked) < most:
                asked[turn.question] = turn
    return list(asked.values())


def compare(first: Scene, second: Scene, random: Random) -> Turn:
    """A question about two pictures, half yes and half no where the pictures allow it: do both show this shape?"""
    kinds = {shape.kind for shape in first.shapes}, {shape.kind for shape in second.shapes}
    both, one = sorted(kinds[0] & kinds[1]), sorted(kinds[0] ^ kinds[1])
    shared = bool(both) and (not one or random.random() < 0.5)
    kind = random.choice(both if shared else one)
    steps = f"{found(first, kind)} , {found(second, kind)}"
    return Turn(f"do both pictures show a {kind} ?", f"{steps} , so {'yes' if shared else 'no'}")


def dialogue(scene: Scene, random: Random) -> list[Turn]:
    """Three turns that lean on each other: "it" is the shape that the turn before named."""
    shape = random.choice(scene.shapes)
    turns = [Turn("how many shapes are there ?", NUMBERS[len(scene.shapes)])]
    turns.append(Turn(f"what size is the {shape.kind} ?", facts(shape, shape.size)))
    follow_ups = [("where is it ?", CELLS[shape.cell]), ("what color is it ?", shape.colour)]
    question, value = random.choice(follow_ups)
    return [*turns, Turn(question, facts(shape, value))]


def text_only(random: Random) -> Turn:
    """A question that needs no picture."""
    a, b = random.randint(0, 3), random.randint(0, 3)
    low, high = random.sample(range(len(NUMBERS)), 2)
    word = random.choice(sorted(OPPOSITES))
    after = random.randint(0, 5)
    return random.choice(
        [
            Turn(f"what is {NUMBERS[a]} plus {NUMBERS[b]} ?", NUMBERS[a + b]),
            Turn(f"which number is larger , {NUMBERS[low]} or {NUMBERS[high]} ?", NUMBERS[max(low, high)]),
            Turn(f"what is the opposite of {word} ?", OPPOSITES[word]),
            Turn(f"which number comes after {NUMBERS[after]} ?", NUMBERS[after + 1]),
        ]
    )
