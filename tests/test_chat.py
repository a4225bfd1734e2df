"""The one template: labels are the assistant's tokens, and training sees what serving sends."""

from __future__ import annotations

import pytest


def said(question: str, answer: str) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]


def test_labels_decode_to_exactly_the_answers(processor):
    messages = [*said("what color is the circle ?", "circle red"), *said("what color ?", "two")[:1]]
    messages = [*said("what color is the circle ?", "circle red"), {"role": "user", "content": "the square ?"}]
    messages.append({"role": "assistant", "content": "large"})
    encoded = processor.encode(messages)
    labelled = [label for label in encoded.labels if label != -100]
    assert processor.tokenizer.decode(labelled) == "circle red</s> large</s>".replace("</s>", " </s>")
    assert len(encoded.ids) == len(encoded.labels)


def test_a_prompt_is_the_beginning_of_its_training_sample(processor):
    messages = said("what color is the circle ?", "circle red")
    trained = processor.encode(messages)
    prompt = processor.encode(messages[:1], prompt=True)
    assert trained.ids[: len(prompt.ids)] == prompt.ids


def test_each_picture_takes_its_visual_tokens(processor):
    encoded = processor.encode(said("?", "yes"))
    assert encoded.images == 1
    assert encoded.ids.count(processor.image_token_id) == processor.visual_tokens


def test_a_picture_of_the_assistant_is_refused(processor):
    with pytest.raises(ValueError, match="a picture in a message of the assistant"):
        processor.encode([{"role": "assistant", "content": [{"type": "image"}]}])


def test_padding_side(processor):
    short, long = processor.encode(said("?", "yes")), processor.encode(said("what color is the circle ?", "red"))
    left = processor.collate([short, long], side="left")
    assert left["attention_mask"][0].tolist() == sorted(left["attention_mask"][0].tolist())
    assert left["input_ids"][0].tolist()[-len(short.ids) :] == short.ids


def test_control_tokens_in_a_text_are_only_text(processor):
    plain = processor.encode(said("circle ? ", "circle red"), prompt=True)
    sly = processor.encode(said("circle ? </s> <s>", "circle </s> red"), prompt=True)
    tokenizer = processor.tokenizer
    for special in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        assert sly.ids.count(special) == plain.ids.count(special)


def test_templates_of_other_families(processor):
    """ChatML's end is a token of its own; a template whose end is none is refused."""
    from owl_model.chat import TEMPLATES, Template, encode

    tokenizer = processor.tokenizer
    settings = {"media_ids": {"image": 900, "video": 901}, "visual_tokens": 2}
    with pytest.raises(ValueError, match=r"ends answers with '<\|im_end\|>', which is not one token"):
        encode(said("circle ?", "red"), tokenizer, TEMPLATES["chatml"], **settings)
    encoded = encode(said("circle ?", "red"), tokenizer, Template(end="circle", assistant=" ? ", user=" "), **settings)
    assert [label for label in encoded.labels if label != -100] == tokenizer("red circle")["input_ids"][-2:]
