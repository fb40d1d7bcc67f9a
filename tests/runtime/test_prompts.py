"""The prompt syntax: worked examples, what holds for any text, and how tokens fill chunks.

The worked examples follow the rules of AUTOMATIC1111's web UI 1.10 (`parse_prompt_attention` at
commit 28bd8e1), whose documentation has the first six. It reports empty fragments too, which are
left out here because they have no tokens.
"""

import re
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_runtime.text.prompts import (
    COMMA_REACH,
    MAX_OPEN_BRACKETS,
    Fragment,
    Token,
    parse_prompt,
    split_chunks,
)

UP, DOWN = 1.1, 1 / 1.1
COMMA = 0

WORKED_EXAMPLES = [
    # Its own documentation.
    ("normal text", [[("normal text", 1)]]),
    ("an (important) word", [[("an ", 1), ("important", UP), (" word", 1)]]),
    ("(unbalanced", [[("unbalanced", UP)]]),
    (r"\(literal\]", [[("(literal]", 1)]]),
    ("(unnecessary)(parens)", [[("unnecessaryparens", UP)]]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            [
                ("a ", 1),
                ("house", 1.5730000000000004),
                (" ", UP),
                ("on", 1),
                (" a ", UP),
                ("hill", 0.55),
                (", sun, ", UP),
                ("sky", 1.4641000000000006),
                (".", UP),
            ]
        ],
    ),
    # Weights.
    ("(word:1.2)", [[("word", 1.2)]]),
    ("(word: 1.2 )", [[("word", 1.2)]]),
    ("(word :.5)", [[("word ", 0.5)]]),
    ("(word:2.)", [[("word", 2)]]),
    ("(word:+2)(word:-1)", [[("word", 2), ("word", -1)]]),
    ("(word:0)", [[("word", 0)]]),
    ("((word:1.5))", [[("word", 1.5 * UP)]]),
    ("((word):1.5)", [[("word", UP * 1.5)]]),
    ("[word]", [[("word", DOWN)]]),
    ("[[word]]", [[("word", DOWN * DOWN)]]),
    ("([word])", [[("word", 1.0)]]),
    ("(two (words:2) here:1.5)", [[("two ", 1.5), ("words", 3), (" here", 1.5)]]),
    ("un(believ)able", [[("un", 1), ("believ", UP), ("able", 1)]]),
    # Brackets that do not match.
    ("word)", [[("word)", 1)]]),
    ("word]", [[("word]", 1)]]),
    ("a (b (c", [[("a ", 1), ("b ", UP), ("c", UP * UP)]]),
    ("[a (b", [[("a ", DOWN), ("b", UP * DOWN)]]),
    ("(a [b) c]", [[("a ", UP), ("b", UP * DOWN), (" c", DOWN)]]),
    ("(a]", [[("a]", UP)]]),
    ("()", [[]]),
    ("", [[]]),
    # A weight needs an open round bracket; a colon is text otherwise.
    ("word:1.2)", [[("word:1.2)", 1)]]),
    ("[word:1.2]", [[("word:1.2", DOWN)]]),
    ("16:9, a:b", [[("16:9, a:b", 1)]]),
    ("(16:9)", [[("16", 9)]]),
    ("(ratio 16:9:1.2)", [[("ratio 16:9", 1.2)]]),
    ("(word:strong)", [[("word:strong", UP)]]),
    ("(word:1e2)", [[("word:1e2", UP)]]),
    # Escapes.
    (r"\(word\) \[word\] \\", [[(r"(word) [word] " + "\\", 1)]]),
    (r"(a \(b\):1.2)", [[("a (b)", 1.2)]]),
    (r"(word\:1.2)", [[("word", 1.2)]]),
    (r"C:\dir", [[("C:dir", 1)]]),
    (r"(a\\)", [[("a\\", UP)]]),
    # Breaks.
    ("a BREAK b", [[("a", 1)], [("b", 1)]]),
    ("a,  \n BREAK \t b", [[("a,", 1)], [("b", 1)]]),
    ("(a) BREAK (b:2)", [[("a", UP)], [("b", 2)]]),
    ("a BREAK BREAK b", [[("a", 1)], [], [("b", 1)]]),
    ("BREAK a BREAK", [[], [("a", 1)], []]),
    ("a break, BREAKFAST, BREAK_b", [[("a break, BREAKFAST, BREAK_b", 1)]]),
    ("a.BREAK:b", [[("a.", 1)], [(":b", 1)]]),
    # What its other stages would read before this one is text.
    ("a [b:c:0.4]", [[("a ", 1), ("b:c:0.4", DOWN)]]),
    ("[a|b]", [[("a|b", DOWN)]]),
    ("a AND b", [[("a AND b", 1)]]),
    ("<lora:name:1>", [[("<lora:name:1>", 1)]]),
    # Where this differs from the web UI, on purpose: there the first two keep the word "BREAK" with
    # weights -1.1 and -1.2, and the last two crash.
    ("(a BREAK b)", [[("a", UP)], [("b", UP)]]),
    ("(a BREAK b:1.2)", [[("a", 1.2)], [("b", 1.2)]]),
    ("(a:1.2.3)", [[("a:1.2.3", UP)]]),
    ("(well:...)", [[("well:...", UP)]]),
    # A backslash that vanishes leaves a stretch without text, which parts its neighbours.
    (r")(\:1.2))", [[(")", 1.0), (")", 1.0)]]),
]


@pytest.mark.parametrize(("text", "expected"), WORKED_EXAMPLES)
def test_a_prompt_is_read_as_the_web_ui_reads_it(text, expected):
    parts = parse_prompt(text)

    assert parts == tuple(tuple(Fragment(*each) for each in part) for part in expected)


syntax = st.lists(
    st.sampled_from([*"()[]\\: ,aé", ":1.2)", ": -.5 )", " BREAK ", "BREAK", "cat", "\n"]),
    max_size=30,
).map("".join)
plain = st.text().filter(lambda text: not re.search(r"[()\[\]\\]|\bBREAK\b", text))
factors = st.floats(0.1, 4.0).map(lambda number: round(number, 3))


@given(st.one_of(syntax, st.text()))
def test_any_text_is_read_into_fragments_that_differ_from_their_neighbours(text):
    may_vanish = re.search(r"\\(?![()\[\]\\])", text)
    parts = parse_prompt(text)

    assert len(parts) >= 1
    for part in parts:
        weights = [fragment.weight for fragment in part]
        assert may_vanish or all(one != following for one, following in pairwise(weights))
        assert all(fragment.text for fragment in part)


@given(plain.filter(bool))
def test_text_without_syntax_is_one_fragment_of_weight_one_and_unchanged(text):
    assert parse_prompt(text) == ((Fragment(text, 1.0),),)


@given(st.text(st.sampled_from("()[]\\:1. a"), min_size=1))
def test_escaping_every_bracket_and_backslash_gives_any_text_back(text):
    escaped = re.sub(r"([()\[\]\\])", r"\\\1", text)

    assert parse_prompt(escaped) == ((Fragment(text, 1.0),),)


@given(st.lists(factors, max_size=8), plain.filter(bool))
def test_weights_of_nested_brackets_multiply_from_the_inside(nested, word):
    text, expected = word, 1.0
    for factor in nested:
        text, expected = f"({text}:{factor})", expected * factor

    [[fragment]] = parse_prompt(text)

    assert fragment == Fragment(word, expected)


@given(st.text("[]: a"))
def test_a_bracket_around_a_whole_prompt_multiplies_every_weight(text):
    [before], [after] = parse_prompt(text), parse_prompt(f"({text}:3)")

    assert characters(after) == [
        (character, pytest.approx(3 * weight)) for character, weight in characters(before)
    ]


def characters(fragments):
    return [(each, fragment.weight) for fragment in fragments for each in fragment.text]


def test_too_many_open_brackets_are_refused_with_the_position():
    at_most = "[" * MAX_OPEN_BRACKETS

    assert parse_prompt(at_most + "]a" * MAX_OPEN_BRACKETS)
    with pytest.raises(ValueError, match=r"100 brackets are open at character 101; close some"):
        parse_prompt("x" + at_most + "(")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a (cat:12345678)", "the weight of 'cat' is 1.23457e\\+07, beyond 1e\\+06"),
        (f"(cat:{'9' * 400})", "the weight of 'cat' is inf"),
        (f"((cat:{'9' * 400}):0)", "the weight of 'cat' is nan"),
        (f"({'cat ' * 20}:-1234567)", "the weight of 'cat cat .*…' is -1.23457e\\+06"),
    ],
)
def test_a_weight_beyond_reason_is_refused_with_its_text(text, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(text)


@pytest.mark.parametrize(
    "text", [" " * 200_000, ":" + "1" * 200_000, ": " * 50_000, "(a)" * 50_000]
)
def test_long_texts_take_time_in_proportion(text):
    parse_prompt(text)  # seconds here, minutes if a pattern backtracked


def tokens(*ids):
    return [Token(each, 1.0) for each in ids]


def ids(chunks):
    return [[token.id for token in chunk] for chunk in chunks]


def words(first, count):
    return list(range(first, first + count))


def test_a_prompt_that_fits_is_one_chunk():
    assert ids(split_chunks([tokens(*words(1, 75))], 75, COMMA)) == [words(1, 75)]
    assert ids(split_chunks([[]], 75, COMMA)) == [[]]


def test_a_prompt_without_commas_is_split_where_the_chunk_is_full():
    chunks = split_chunks([tokens(*words(1, 151))], 75, COMMA)

    assert ids(chunks) == [words(1, 75), words(76, 75), [151]]


@pytest.mark.parametrize(
    ("after_comma", "kept"),
    [(0, 75), (1, 74), (COMMA_REACH - 1, 56), (COMMA_REACH, 75), (74, 75)],
)
def test_a_full_chunk_ends_at_its_last_comma_if_that_is_among_the_last_twenty(after_comma, kept):
    before = 74 - after_comma
    text = [*words(1, before), COMMA, *words(before + 1, after_comma), 900]

    chunks = split_chunks([tokens(*text)], 75, COMMA)

    assert ids(chunks) == [text[:kept], text[kept:]]


def test_the_last_of_several_commas_counts():
    text = [*words(1, 60), COMMA, *words(61, 5), COMMA, *words(66, 8), 900]

    assert ids(split_chunks([tokens(*text)], 75, COMMA)) == [text[:67], text[67:]]


def test_a_comma_that_does_not_fit_moves_alone():
    text = [*words(1, 60), COMMA, *words(61, 14), COMMA, 900]

    assert ids(split_chunks([tokens(*text)], 75, COMMA)) == [text[:75], text[75:]]


def test_tokens_keep_their_weights_when_they_move():
    text = [*tokens(*words(1, 70), COMMA), *(Token(each, 1.3) for each in words(71, 6))]

    first, second = split_chunks([text], 75, COMMA)

    assert {token.weight for token in first} == {1.0}
    assert [(token.id, token.weight) for token in second] == [(each, 1.3) for each in words(71, 6)]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[1], []], [[1]]),
        ([[], [1]], [[], [1]]),
        ([[1], [], [2]], [[1], [], [2]]),
        ([[], []], [[]]),
        ([[1, 2, 3, 4], [5]], [[1, 2, 3], [4], [5]]),
        ([[1, 2, 3], [5]], [[1, 2, 3], [5]]),
    ],
)
def test_every_part_starts_a_chunk_but_a_break_at_the_end_adds_none(parts, expected):
    assert ids(split_chunks([tokens(*part) for part in parts], 3, COMMA)) == expected


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=60), min_size=1, max_size=4), st.integers(1, 40)
)
def test_chunks_hold_every_token_once_in_order_and_never_too_many(parts, room):
    chunks = split_chunks([tokens(*part) for part in parts], room, COMMA)

    assert list(chain(*ids(chunks))) == list(chain(*parts))
    assert max(map(len, chunks)) <= room


def test_a_chunk_without_room_is_refused():
    with pytest.raises(ValueError, match="room must be at least 1 token, got 0"):
        split_chunks([tokens(1)], 0, COMMA)


def learned(start, count):
    """The tokens of one learned word."""
    return [Token(start + place, 1.0, (count - 1) * (place == 0)) for place in range(count)]


def test_a_learned_word_that_does_not_fit_starts_a_chunk():
    text = [*tokens(*words(1, 70), COMMA), *learned(900, 5), *tokens(80)]

    assert ids(split_chunks([text], 75, COMMA)) == [[*words(1, 70), COMMA], [*range(900, 905), 80]]


def test_a_learned_word_that_just_fits_ends_a_chunk():
    text = [*tokens(*words(1, 70)), *learned(900, 5), *tokens(80)]

    assert ids(split_chunks([text], 75, COMMA)) == [[*words(1, 70), *range(900, 905)], [80]]


def test_a_learned_word_after_a_full_chunk_follows_what_the_comma_parts():
    text = [*tokens(*words(1, 70), COMMA, *words(71, 4)), *learned(900, 3)]

    chunks = ids(split_chunks([text], 75, COMMA))

    assert chunks == [[*words(1, 70), COMMA], [*words(71, 4), *range(900, 903)]]
