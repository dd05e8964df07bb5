"""Which text applies at which step."""

from __future__ import annotations

import pytest

from hires.errors import RequestError
from hires.prompts.script import PLAIN_STEP, Prompts, Step, step_at, write_script

STAGES = [("base", 4), ("refine 1", 2)]


def test_a_plain_prompt_is_two_texts() -> None:
    script = write_script(Prompts(positive="a", negative="b", syntax="a1111"), STAGES)
    assert [text.text for text in script.texts] == ["a", "b"] and script.plain
    assert [text.text for text in write_script(Prompts(positive="", negative=""), STAGES).texts] == ["", ""]
    assert script.steps("unknown") == (PLAIN_STEP,)


def test_a_schedule_names_the_text_of_every_step() -> None:
    script = write_script(Prompts(positive="[a:b:0.5]", negative="[c|d]", syntax="a1111"), STAGES)
    assert [text.text for text in script.texts] == ["a", "c", "d", "b"] and not script.plain
    positives = [step.positive[0][0] for step in script.steps("base")]
    assert positives == [0, 0, 3, 3] and [step.negative for step in script.steps("base")] == [1, 2, 1, 2]
    assert [step.positive[0][0] for step in script.steps("refine 1")] == [3, 3]


def test_and_keeps_the_weights() -> None:
    script = write_script(Prompts(positive="a AND b:0.5 # not this", syntax="a1111"), STAGES)
    assert set(script.steps("base")) == {Step(((0, 1.0), (2, 0.5)), 1)}
    assert [text.text for text in script.texts] == ["a", "", "b"]
    with pytest.raises(RequestError, match="prompt_l: cannot stand beside AND"):
        write_script(Prompts(positive="a AND b", positive_l="c", syntax="a1111"), STAGES)


@pytest.mark.parametrize("syntax", ["comfyui", "none"])
def test_other_syntaxes_have_neither(syntax: str) -> None:
    script = write_script(Prompts(positive="[a:b:0.5] AND c # d", syntax=syntax), STAGES)
    assert script.plain and script.texts[0].text == "[a:b:0.5] AND c # d"


def test_clip_ls_own_text_goes_with_it() -> None:
    script = write_script(Prompts(positive="a", positive_l="[b:c:2]", negative_l="d", syntax="a1111"), STAGES)
    assert [(text.text, text.text_l) for text in script.texts] == [("a", "b"), ("", "d"), ("a", "c")]


def test_evaluations_within_a_step_belong_to_it() -> None:
    levels = [10.0, 5.0, 2.0, 0.0]
    assert [step_at(levels, sigma) for sigma in (12.0, 10.0, 7.0, 5.0, 2.0, 0.5)] == [0, 0, 0, 1, 2, 2]
