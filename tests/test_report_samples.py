"""Samples for people: what `samples.md` and the report make of the text of rollouts."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ebft.errors import UsageError
from ebft.loops.report import write_samples
from ebft.loops.report_samples import prefix_tail, samples_markdown, visible, visible_pieces
from tests.runs import sample


def test_visible_whitespace():
    assert visible("  a b  c \tx\r\n\n\u00a0y\u200b\x00\u2028") == (
        "··a b··c ⇥x⟨U+000D⟩↵\n↵\n⟨U+00A0⟩y⟨U+200B⟩⟨U+0000⟩⟨U+2028⟩"
    )
    assert visible("end \n") == "end·↵"


@given(st.text(alphabet=st.sampled_from("`~ \t\n\r\x0c\u2028\u00a0a<&>#-\ud800"), max_size=60), st.text(max_size=30))
@example("a fence on the last line\n```", "\n`````")
def test_markdown_blocks_hold_the_texts_whatever_they_are(text, other):
    document = samples_markdown([sample(text, prefix=other), sample(other, prefix=text)])
    document.encode()  # lone surrogates are shown, not written
    blocks = [token.content for token in MarkdownIt().parse(document) if token.type == "fence"]
    tail = [visible(prefix_tail(t)[0]) for t in (other, text)]
    assert blocks == [
        t + "\n" for t in (tail[0], visible(text), visible(text), tail[1], visible(other), visible(other))
    ]
    headings = sum(token.type == "heading_open" for token in MarkdownIt().parse(document))
    assert headings == 1 + 2 + 2


def test_samples_file(tmp_path):
    prefix = "".join(f"line {i}\n" for i in range(30)) + "the end"
    after = [{"text": "good", "reward": 0.75}, {"text": "better", "reward": 1.25}]
    path = write_samples([{**sample("text", prefix=prefix), "after": after}], tmp_path / "samples.md")
    document = path.read_text(encoding="utf-8")
    assert "line 20" not in document
    assert "line 21↵" in document
    left_out = len("".join(f"line {i}\n" for i in range(21)))
    assert f"after {left_out} characters that are left out" in document
    assert "### Before training: mean reward 0.25\n" in document
    assert "### After training: mean reward 1\n" in document
    assert "Rollout 2, reward 1.25:\n\n```text\nbetter\n```\n" in document
    assert [p.name for p in tmp_path.iterdir()] == ["samples.md"]


def test_prefix_without_line_breaks_is_cut_too():
    tail, omitted = prefix_tail("x" * 10_000 + "end")
    assert tail.endswith("end")
    assert len(tail) + omitted == 10_003
    assert omitted > 0


def test_write_samples_names_what_is_wrong(tmp_path):
    with pytest.raises(UsageError, match="sample 1: 'prefix' is 5"):
        write_samples([sample("a"), {"prefix": 5, "target": ""}], tmp_path / "samples.md")
    assert not list(tmp_path.iterdir())


@given(st.lists(st.text(alphabet=" \n\tab\u200b", max_size=4), max_size=6))
def test_visible_pieces_are_the_whole_text_in_pieces(texts):
    assert "".join(visible_pieces(texts)) == visible("".join(texts))
    assert len(visible_pieces(texts)) == len(texts)


def test_pieces_of_characters_that_several_tokens_make_up(tiny_folder):
    from transformers import AutoTokenizer

    from ebft.loops.samples import pieces

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    text = "def é(🙂):  pass\n"
    ids = tokenizer(text)["input_ids"]
    found = pieces(ids, tokenizer)
    assert "".join(found) == text
    assert len(found) == len(ids)
    assert "é" in found
    assert "🙂" in found
    cut = pieces(ids[: ids.index(ids[found.index("🙂")])], tokenizer)  # ends within the character
    assert "".join(cut) == tokenizer.decode(ids[: len(cut)])
