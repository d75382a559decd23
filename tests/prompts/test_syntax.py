from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbento.errors import InvalidParameter
from sdbento.prompts.syntax import LoraTag, Span, extract_loras, parse_attention, schedule


def weights(text: str) -> list[tuple[str | None, float]]:
    return [(span.text, round(span.weight, 4)) for span in parse_attention(text)]


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("", []),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 0.9091)]),
        ("[(red)]", [("red", 1.0)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: 1.3 )", [("red", 1.3)]),
        ("(red:-0.5)", [("red", -0.5)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(a (red:1.5) cat:0.5)", [("a ", 0.5), ("red", 0.75), (" cat", 0.5)]),
        (r"\(red\)", [("(red)", 1.0)]),
        (r"\[a\] \\", [("[a] \\", 1.0)]),
        ("a) b", [("a) b", 1.0)]),
        ("(a b", [("a b", 1.1)]),
        ("a:b (c:d)", [("a:b ", 1.0), ("c:d", 1.1)]),
        ("(red:1000)", [("red:1000)", 1.1)]),
        ("1:2", [("1:2", 1.0)]),
        ("a BREAK b", [("a", 1.0), (None, 1.0), ("b", 1.0)]),
        ("(a BREAK b)", [("a", 1.1), (None, 1.0), ("b", 1.1)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("a \n BREAK  BREAK b", [("a", 1.0), (None, 1.0), (None, 1.0), ("b", 1.0)]),
        ("(" * 160 + "x" + ":100)" * 159 + ":0)", [("x", 0.0)]),
        ("(" * 2000 + "x", [("x", 100.0)]),
    ],
)
def test_attention_is_read_as_automatic1111_reads_it(
    text: str, spans: list[tuple[str | None, float]]
) -> None:
    assert weights(text) == spans


# Mostly syntax, which plain random text hardly ever contains.
PROMPTS = st.text(max_size=60) | st.lists(
    st.sampled_from([*"()[]:|\\ \n", "0", "0.5", "12", "9" * 400, "-1", "BREAK", "a", "red cat"]),
    max_size=40,
).map("".join)


@given(PROMPTS)
def test_every_text_is_accepted(text: str) -> None:
    spans = parse_attention(text)
    assert all(span.text is None or abs(span.weight) <= 100 for span in spans)


@given(PROMPTS, st.integers(1, 150))
def test_a_schedule_begins_at_once_and_changes_the_text_at_steps_that_there_are(
    text: str, num_steps: int
) -> None:
    pairs = schedule(text, num_steps)
    steps = [step for step, _ in pairs]
    assert steps[0] == 0 and steps == sorted(set(steps)) and steps[-1] < num_steps
    assert all(one != other for (_, one), (_, other) in itertools.pairwise(pairs))


@given(PROMPTS | st.from_regex(r"a <lora:[^<>]{0,9}(:[^<>]{0,9}){0,3}> b", fullmatch=True))
def test_tags_are_read_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidParameter):
        _, tags = extract_loras(text)
        assert all(abs(tag.weight) <= 100 for tag in tags)


@given(st.text(alphabet=st.characters(blacklist_characters="()[]\\:"), max_size=60))
def test_text_without_syntax_is_returned_unchanged(text: str) -> None:
    spans = parse_attention(text.replace("BREAK", ""))
    assert spans in ([], [Span(text.replace("BREAK", ""))])


HARD = ["((((", "(a", "(a:1.1)", ":1", "[a:", "\\", "[a:b:0.5]", "<lora:", " ", "[(:", "[", "([:"]
HARD += ["[" * 1000 + "a" + ":b:0.5]" * 1000, "(a:" + "1" * 9990, "[a:" + "1" * 9990]
HARD += ["".join(f"[a:b:{step}]" for step in range(150)) + "x" * 9000]


@pytest.mark.timeout(30)  # less than a second; quadratic would be minutes
@pytest.mark.parametrize("hard", HARD, ids=lambda hard: hard[:12])
def test_long_prompts_take_time_in_proportion_to_their_length(hard: str) -> None:
    text = hard * (50_000 // len(hard))
    parse_attention(text)
    schedule(text, 150)
    extract_loras(text)


@pytest.mark.parametrize(
    ("text", "rest", "tags"),
    [
        ("a cat", "a cat", []),
        ("a  cat", "a  cat", []),
        ("a <lora:style> cat", "a cat", [LoraTag("style", 1.0, 1.0)]),
        ("<lora:style:0.8>", "", [LoraTag("style", 0.8, 0.8)]),
        ("<lora:style:0.8:0.5>", "", [LoraTag("style", 0.5, 0.8)]),
        ("<lora:style:0.8:te=0.5>", "", [LoraTag("style", 0.8, 0.5)]),
        ("<lora:style:te=0.5:unet=0.9>", "", [LoraTag("style", 0.9, 0.5)]),
        ("<lora:my/style v2:-1>", "", [LoraTag("my/style v2", -1.0, -1.0)]),
        (
            "<lora:a:1> x <LORA:b:2>",
            "x",
            [LoraTag("a", 1.0, 1.0), LoraTag("b", 2.0, 2.0)],
        ),
    ],
)
def test_lora_tags_are_taken_out_of_the_text(text: str, rest: str, tags: list[LoraTag]) -> None:
    assert extract_loras(text) == (rest, tags)


@pytest.mark.parametrize(
    "tag",
    ["<lora:>", "<lora:x:abc>", "<lora:x:nan>", "<lora:x:101>", "<lora:x:1:2:3>", "<lora:x:a=1>"],
)
def test_a_tag_that_cannot_be_read_is_named(tag: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        extract_loras(f"a {tag} cat")
    assert tag in caught.value.message
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a cat", [(0, "a cat")]),
        ("a [red:green:0.3] cat", [(0, "a red cat"), (6, "a green cat")]),
        ("[a:b:8]", [(0, "a"), (8, "b")]),
        ("[a:b:1.0]", [(0, "a")]),
        ("x[ y:0.5]", [(0, "x"), (10, "x y")]),
        ("x[ y::0.5]", [(0, "x y"), (10, "x")]),
        ("[a:b:0]", [(0, "b")]),
        ("[a:b:50]", [(0, "a")]),
        ("[[a:b:0.25]:c:0.5]", [(0, "a"), (5, "b"), (10, "c")]),
        ("[(a:1.2):b:0.5]", [(0, "(a:1.2)"), (10, "b")]),
        ("[(a:1.2):(b:1.3):0.5]", [(0, "(a:1.2)"), (10, "(b:1.3)")]),
        ("[b:(a:1.2):0.5]", [(0, "b"), (10, "(a:1.2)")]),
        ("x[ (a:1.2):0.5]", [(0, "x"), (10, "x (a:1.2)")]),
        ("([a:b:0.5]:1.2)", [(0, "(a:1.2)"), (10, "(b:1.2)")]),
        ("[[a:b:0.5]]", [(0, "[a]"), (10, "[b]")]),
        ("[a:[b:c:0.75]:0.5]", [(0, "a"), (10, "b"), (15, "c")]),
        ("[sad :( face:happy:0.5]", [(0, "sad :( face"), (10, "happy")]),
        ("[a:b:0.33]", [(0, "a"), (6, "b")]),
        ("[a:b: 8 ]", [(0, "a"), (8, "b")]),
        (f"[a:b:{'9' * 400}]", [(0, "a")]),
        ("[a:b:0.5", [(0, "[a:b:0.5")]),
        ("(a:b:0.5]", [(0, "(a:b:0.5]")]),
        ("[word] [a:b]", [(0, "[word] [a:b]")]),
        (r"\[a:b:0.5]", [(0, r"\[a:b:0.5]")]),
    ],
)
def test_an_edited_prompt_is_a_text_for_every_stretch_of_steps(
    text: str, pairs: list[tuple[int, str]]
) -> None:
    assert schedule(text, 20) == pairs
