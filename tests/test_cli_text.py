"""Tokens to text: answers grow by whole characters and end where they should."""

import pytest
from cli_helpers import TEMPLATE, VOCAB, byte_tokenizer, fast, ids_of
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from jrope.cli.text import Answer, encode


def piece_tokenizer() -> Tokenizer:
    """Like Llama 2's: spaces are letters, the first is lost, bytes where it must be."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", *"abcdefgh", "▁a", "▁ab", "ab", "▁▁"]
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *bytes_, *words])}
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b"), ("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


TOKENIZERS = {"bytes": fast(byte_tokenizer()), "pieces": fast(piece_tokenizer())}
PARTS = st.sampled_from([*"ab  日😀é\n", "\ufffd", "</s>"])
TEXT = st.lists(PARTS, max_size=30).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXT, text=TEXT, size=st.integers(1, 5))
@example(prompt="", text=" a", size=1)
@example(prompt="日" * 9, text="日a", size=1)
def test_answer_is_the_decoded_text(name: str, prompt: str, text: str, size: int):
    tokenizer = TOKENIZERS[name]
    decode = tokenizer.decode
    before, new = (
        tokenizer(x, add_special_tokens=False).input_ids for x in (prompt, text)
    )
    before = before or [1]
    answer = Answer(tokenizer, before)
    parts = [answer.push(new[i : i + size]) for i in range(0, len(new), size)]
    parts.append(answer.end())
    whole = decode([*before, *new], skip_special_tokens=True)
    start = len(decode(before, skip_special_tokens=True))
    assert "".join(parts) == answer.text == whole[start:]
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)
    assert answer.count == len(new) and answer.finish == "length"


def test_answer_looks_back_past_special_tokens_and_half_characters():
    tokenizer = TOKENIZERS["pieces"]
    special = [*tokenizer("a").input_ids, *[1] * 16]  # a space is lost behind nothing
    assert Answer(tokenizer, special).push(tokenizer("a").input_ids) == " a"
    sun = [3 + byte for byte in "日".encode()]  # bytes of a broken run are all broken
    assert Answer(tokenizer, sun * 9).push(sun) == "日"


def test_only_raw_prompts_get_the_tokenizer_s_special_tokens():
    inner = byte_tokenizer()
    bos = ("<s>", VOCAB["<s>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    tokenizer = fast(inner)
    tokenizer.chat_template = TEMPLATE
    ids = [encode(tokenizer, "x", None, chat=c, system=None) for c in (False, True)]
    assert ids == [ids_of("<s>x"), ids_of("<|user|>x<|assistant|>")]


@given(text=st.text("abc", max_size=20), stop=st.text("abc", min_size=1, max_size=3))
def test_answer_ends_before_a_stop_text(text: str, stop: str):
    answer = Answer(TOKENIZERS["bytes"], ids_of("x"), stop_texts=[stop])
    told = "".join(answer.push([token]) for token in ids_of(text)) + answer.end()
    assert told == answer.text == text.partition(stop)[0]
    assert answer.finish == ("stop" if stop in text else "length")
    end = text.find(stop) + len(stop) if stop in text else len(text)
    assert answer.count == end


def test_answer_ends_at_a_stop_id():
    answer = Answer(TOKENIZERS["bytes"], ids_of("x"), stop_ids=ids_of("b"))
    assert answer.push(ids_of("abc")) == "a" and answer.push(ids_of("d")) == ""
    assert (answer.count, answer.finish, answer.end()) == (2, "stop", "")


def test_answer_gives_out_broken_characters_at_the_end():
    answer = Answer(TOKENIZERS["bytes"], ids_of("x"))
    assert answer.push(ids_of("a日")[:-1]) == "a"
    assert answer.end() == "\ufffd"
