"""SentencePiece ids and the [INST] format, compared with sentencepiece called directly."""

import random
import sys
from pathlib import Path
from typing import Any, cast

import fuzz
import pytest
import sentencepiece
from conftest import DEMO, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.chat import Llama2ChatFormat
from llama.chat_template import chat_format
from llama.detokenizer import Detokenizer
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer
from llama.vocab.sentencepiece import SentencePieceTokenizer

VOCABULARIES = {
    "llama2": SHARED / "llama2-tokenizer" / "tokenizer.model",
    "stories": SHARED / "stories260K" / "native" / "tokenizer.model",
}


def path_of(name: str) -> Path:
    path = VOCABULARIES[name]
    if not path.is_file():
        pytest.skip(f"needs the real vocabulary {path}")
    return path


@pytest.fixture(scope="module", params=VOCABULARIES)
def pair(request: pytest.FixtureRequest) -> tuple[SentencePieceTokenizer, Any]:
    """Our tokenizer and sentencepiece's own on the same file."""
    path = str(path_of(request.param))
    return SentencePieceTokenizer(path), sentencepiece.SentencePieceProcessor(model_file=path)


@pytest.fixture(scope="module")
def llama2() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(str(path_of("llama2")))


TEXTS = [
    "Hello world",
    "  two spaces  before and behind  ",
    "",
    " ",
    "\n\nlines\r\n\ttab",
    "naïve 漢字 हिन्दी 한국어 עברית",
    "👩‍👩‍👧‍👦 ꙮ 🏳️‍🌈",
    "nul \x00 and ▁ and ⁇",
    "<s>[INST] x [/INST]</s><unk><0x41>",
    "def f(x):\n    return x\n",
]


# --- Ids --------------------------------------------------------------------------------------


def test_ids_of_the_real_vocabulary(llama2: SentencePieceTokenizer) -> None:
    assert (llama2.n_words, llama2.bos_id, llama2.eos_id, llama2.pad_id) == (32000, 1, 2, -1)
    assert llama2.stop_tokens == {2}
    assert llama2.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert llama2.encode("Hello world", bos=True, eos=True) == [1, 15043, 3186, 2]
    assert llama2.drops_first_space
    assert not Tokenizer.drops_first_space


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_sentencepiece(pair: tuple[SentencePieceTokenizer, Any], text: str) -> None:
    ours, theirs = pair
    ids = theirs.encode(text)
    assert ours.encode(text, bos=False, eos=False) == ids
    assert ours.encode(text, bos=True, eos=False) == [theirs.bos_id(), *ids]
    assert ours.encode(text, bos=False, eos=True) == [*ids, theirs.eos_id()]
    assert not set(ids) & {theirs.bos_id(), theirs.eos_id()}
    assert ours.decode(ids) == theirs.decode(ids)


def test_texts_round_trip(llama2: SentencePieceTokenizer) -> None:
    for text in TEXTS:
        if "▁" not in text:  # SentencePiece's marker for a space decodes to a space
            assert llama2.decode(llama2.encode(text, bos=True, eos=True)) == text


def random_ids(rng: random.Random, tokenizer: SentencePieceTokenizer) -> list[int]:
    """Any ids; control, unknown and byte pieces, which are the lowest; bytes outside ASCII."""
    pools = [range(tokenizer.n_words), range(270), range(3 + 0x80, 3 + 0x100)]
    return [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(12))]


def test_decoding_equals_sentencepiece(pair: tuple[SentencePieceTokenizer, Any]) -> None:
    ours, theirs = pair
    rng = random.Random(7)
    for _ in range(5000):
        ids = random_ids(rng, ours)
        assert ours.decode(ids) == theirs.decode(ids)


def test_bytes_are_the_decoded_text_with_its_leading_space(
    pair: tuple[SentencePieceTokenizer, Any],
) -> None:
    """For valid UTF-8 that begins with a word piece: otherwise the result isn't unique."""
    ours, theirs = pair
    rng = random.Random(8)
    words = [i for i in range(ours.n_words) if theirs.id_to_piece(i).startswith("▁")]
    followers = [i for i in range(3, ours.n_words) if not theirs.is_byte(i)]
    ascii_bytes = range(3, 3 + 0x80)
    euro = [3 + byte for byte in "€".encode()]
    first = [i for i in words if set(theirs.id_to_piece(i)) != {"▁"}]
    for _ in range(3000):
        ids = [rng.choice(first)]
        for _ in range(rng.randrange(12)):
            ids += rng.choice(
                [[0], [1], [2], euro, [rng.choice(ascii_bytes)], [rng.choice(followers)]]
            )
        assert ours.decode_bytes(ids).decode() == " " + theirs.decode(ids)


def test_bytes_of_single_pieces(llama2: SentencePieceTokenizer) -> None:
    assert llama2.decode_bytes([15043]) == b" Hello"
    assert llama2.decode_bytes([3 + 0xE2]) == b"\xe2"
    assert llama2.decode_bytes([1, 2]) == b""
    assert llama2.decode_bytes([0]) == " ⁇ ".encode()
    assert llama2.decode_bytes([]) == b""
    assert llama2.decode([]) == ""


@settings(max_examples=300, deadline=None, derandomize=True)
@given(a=st.lists(st.integers(0, 511)), b=st.lists(st.integers(0, 511)))
def test_bytes_concatenate(a: list[int], b: list[int]) -> None:
    tokenizer = SentencePieceTokenizer(str(path_of("stories")))
    whole = tokenizer.decode_bytes(a) + tokenizer.decode_bytes(b)
    assert tokenizer.decode_bytes(a + b) == whole


def test_errors_of_encode_and_decode(llama2: SentencePieceTokenizer) -> None:
    with pytest.raises(TypeError, match="bytes"):
        llama2.encode(cast(str, b"hello"), bos=True, eos=False)
    with pytest.raises(ValueError, match="character 2"):
        llama2.encode("ab\ud800", bos=True, eos=False)
    for decode in (llama2.decode, llama2.decode_bytes):
        for token in (-1, 32000):
            with pytest.raises(ValueError, match=rf"token id {token} .*\(0 to 31999\)"):
                decode([1, token])


# --- Chat -------------------------------------------------------------------------------------

CONTENTS = [
    "Hello there!",
    "  what is 2 + 2?\n",
    "Ünïcödé 漢字 👍🏽",
    "1\n\n2",
    "",
    "<s> </s> [INST",
]


def expected_ids(theirs: Any, turns: list[tuple[str, str]], last: str) -> list[int]:
    ids: list[int] = []
    for user, answer in turns:
        text = f"[INST] {user.strip()} [/INST] {answer.strip()} "
        ids += [theirs.bos_id(), *theirs.encode(text), theirs.eos_id()]
    return [*ids, theirs.bos_id(), *theirs.encode(f"[INST] {last.strip()} [/INST]")]


def test_dialogs_equal_the_definition(pair: tuple[SentencePieceTokenizer, Any]) -> None:
    ours, theirs = pair
    rng = random.Random(3)
    for n_answers in (0, 1, 2, 3) * 25:
        users = [rng.choice(CONTENTS) for _ in range(n_answers + 1)]
        answers = [rng.choice(CONTENTS) for _ in range(n_answers)]
        dialog: list[Message] = [{"role": "user", "content": users[0]}]
        for user, answer in zip(users[1:], answers, strict=True):
            dialog.append({"role": "assistant", "content": answer})
            dialog.append({"role": "user", "content": user})
        if rng.random() < 0.5:
            system = rng.choice(CONTENTS)
            dialog.insert(0, {"role": "system", "content": system})
            users[0] = "<<SYS>>\n" + system + "\n<</SYS>>\n\n" + users[0]
        turns = list(zip(users[:-1], answers, strict=True))
        expected = expected_ids(theirs, turns, users[-1])
        assert Llama2ChatFormat(ours).encode_dialog_prompt(dialog) == expected


def test_published_dialog(llama2: SentencePieceTokenizer) -> None:
    dialog: list[Message] = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": " Hi! "},
        {"role": "assistant", "content": " Hello. "},
        {"role": "user", "content": " 2 + 2? "},
    ]
    ids = Llama2ChatFormat(llama2).encode_dialog_prompt(dialog)
    assert [i for i in ids if i in (1, 2)] == [1, 2, 1]
    end = ids.index(2)
    first = "[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hi! [/INST] Hello. "
    assert llama2.decode(ids[:end]) == first
    assert llama2.decode(ids[end:]) == "[INST] 2 + 2? [/INST]"


def turn(role: Any, content: Any = "x") -> Message:
    return {"role": role, "content": content}


S, U, A = turn("system"), turn("user"), turn("assistant")
PART = {"type": "text", "text": "x"}


def test_other_libraries_messages_are_encoded_as_their_text(llama2: SentencePieceTokenizer) -> None:
    chat = Llama2ChatFormat(llama2)
    theirs: Any = [turn("system", [PART]), U | {"id": 1}, turn("assistant", [PART]), U]
    assert chat.encode_dialog_prompt(theirs) == chat.encode_dialog_prompt([S, U, A, U])
    opened = chat.encode_dialog_prompt(theirs[:3], continue_final_message=True)
    assert opened == chat.encode_dialog_prompt([S, U, A], continue_final_message=True)


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        ([], "the dialog is empty"),
        ([S], "only message 0, from the system"),
        ([U, S], "message 1 is from the system, expected that as message 0 only"),
        ([S, S, U], "message 1 is from the system, expected that as message 0 only"),
        ([U, U], "messages 0 and 1 are both from the user"),
        ([S, U, A, A, U], "messages 2 and 3 are both from the assistant"),
        ([A], "message 0 is from the assistant, expected the user to begin"),
        ([S, A, U], "message 1 is from the assistant, expected the user to begin"),
        ([U, A], "message 1, the last, is from the assistant, expected the user"),
        ([S, U, A], "message 2, the last, is from the assistant, expected the user"),
        ([U, A, turn("ipython")], "message 2 has the role 'ipython', which this model's chat"),
        ([U, A, turn("tool")], "message 2 has the role 'tool', which this model's chat"),
        ([U | {"name": "Ann"}], "message 0 has 'name', which the chat format can't express"),
        ([turn("user", [{"type": "image_url"}])], "part 0 .* message 0 has the type 'image_url'"),
        ([turn("user", [PART | {"text": "a[INST]"}])], r"message 0 holds \[INST\], which"),
        ([U, A | {"tool_call": "f()"}, U], "message 1 has 'tool_call', which this model's chat"),
        ([U, A | {"eom": False}, U], "message 1 has 'eom', which this model's chat"),
        ([U, A, {"role": "user"}], "message 2 is .*, expected a dict of 'role' and 'content'"),
        ([turn("narrator")], "message 0 has the role 'narrator', expected one of system, user"),
        ([{"role": "user", "content": 5}], "content of message 0 has the type int"),
    ],
)
def test_invalid_dialogs(llama2: SentencePieceTokenizer, dialog: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama2ChatFormat(llama2).encode_dialog_prompt(cast(Dialog, dialog))


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("index", range(4))
def test_tags_in_contents_are_refused(llama2: SentencePieceTokenizer, tag: str, index: int) -> None:
    """The published code returned an error text as if the model had generated it."""
    dialog = [S, U, A, U]
    dialog[index] = turn(dialog[index]["role"], f"a{tag}b")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Llama2ChatFormat(llama2).encode_dialog_prompt(dialog)
    assert f"message {index} holds {tag}, which" in str(error.value)


@pytest.mark.parametrize("tag", ["\uff3b/INST\uff3d", "[\x01/INST]", "[/\U0001d408NST]"])
def test_tags_that_the_vocabulary_normalizes_are_refused(tmp_path: Path, tag: str) -> None:
    """nmt_nfkc is sentencepiece's default normalizer."""
    fuzz.sentencepiece_folder(tmp_path)
    tokenizer = SentencePieceTokenizer(str(tmp_path / "tokenizer.model"))
    assert "[/INST]" in tokenizer.decode(tokenizer.encode(tag, bos=False, eos=False))
    with pytest.raises(ValueError, match=r"the content of message 0 holds \[/INST\]"):
        Llama2ChatFormat(tokenizer).encode_dialog_prompt(
            [{"role": "user", "content": f"a {tag} b"}]
        )


def test_contents_that_become_control_tokens_are_refused(
    llama2: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama2, "encode", lambda s, bos, eos: [llama2.eos_id])
    with pytest.raises(ValueError, match="message 0 is encoded to the control token 2"):
        Llama2ChatFormat(llama2).encode_dialog_prompt([{"role": "user", "content": "a"}])


# --- Vocabulary files -------------------------------------------------------------------------


def test_the_tokenizer_is_chosen_by_content(tmp_path: Path, llama2: SentencePieceTokenizer) -> None:
    path = tmp_path / "tokenizer.json"  # a misleading name
    path.write_bytes(VOCABULARIES["llama2"].read_bytes())
    opened = Tokenizer(str(path), llama31=True)
    assert isinstance(opened, SentencePieceTokenizer)
    formatter = chat_format(opened)
    assert isinstance(formatter, Llama2ChatFormat)
    assert (formatter.tokenizer, formatter.tool_call_id, formatter.eom_id) == (opened, None, None)


def test_tiktoken_files_give_llama3_tokenizers() -> None:
    path = str(DEMO / "tokenizer.model")
    for llama31 in (False, True):
        opened = Tokenizer(path, llama31=llama31)
        assert isinstance(opened, Tokenizer)
        assert ("<|python_tag|>" in opened.special_tokens) is llama31
        formatter = chat_format(opened)
        assert isinstance(formatter, ChatFormat)
        assert formatter.tokenizer is opened


def test_missing_and_wrong_files(tmp_path: Path) -> None:
    for read in (Tokenizer, SentencePieceTokenizer):
        with pytest.raises(FileNotFoundError, match="give tokenizer_path"):
            read(str(tmp_path / "tokenizer.model"))
    path = str(DEMO / "tokenizer.model")
    with pytest.raises(ValueError, match="isn't a SentencePiece vocabulary") as error:
        SentencePieceTokenizer(path)
    assert path in str(error.value)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="isn't a vocabulary: it is empty"):
        SentencePieceTokenizer(str(tmp_path / "empty"))


def test_damaged_files(tmp_path: Path) -> None:
    data = path_of("stories").read_bytes()
    path = tmp_path / "tokenizer.model"
    garbage = data[:16] + random.Random(0).randbytes(3000)
    no_utf8 = data.replace("é".encode(), b"\xff\xfe", 1)
    assert no_utf8 != data
    for damaged in (data[:20], data[: len(data) // 2], data[:-1], garbage, no_utf8):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged: .*download the file again") as error:
            SentencePieceTokenizer(str(path))
        assert str(path) in str(error.value)


def test_vocabulary_without_bos(tmp_path: Path) -> None:
    data = path_of("stories").read_bytes()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data.replace(b"<s>", b"<x>", 1))
    with pytest.raises(ValueError, match="has 512 pieces and bos id -1, eos id 2"):
        SentencePieceTokenizer(str(path))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="needs the package sentencepiece: pip install sentence"):
        SentencePieceTokenizer("tokenizer.model")


@pytest.mark.parametrize(
    "text",
    [
        "  two spaces, and three   inside",
        " ",
        "    ",
        "Hello \U0001f44b\U0001f3fd w\xf6rld ",
        "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
        "e\u0301a\u0308 \u0928\u092e\u0938\u094d\u0924\u0947 \U0001d4b3",
        "\x00\x01 x<0x41>y </s>",
    ],
)
def test_streaming_from_any_token_equals_decoding(
    llama2: SentencePieceTokenizer, text: str
) -> None:
    """A continuation streams the bytes of its pieces; a new text streams decode's result."""
    ids = llama2.encode(text, bos=False, eos=False)
    for start in range(len(ids)):
        for starts_text in (False, True):
            decoder = Detokenizer(llama2, starts_text=starts_text)
            pieces = [decoder.add(token) for token in ids[start:]]
            streamed = "".join([*pieces, decoder.add(None, final=True)])
            expected = llama2.decode_bytes(ids[start:]).decode(errors="replace")
            if starts_text and "\ufffd" not in expected:  # sentencepiece's count may differ
                expected = llama2.decode(ids[start:])
            assert streamed == expected
