from string import ascii_lowercase, ascii_uppercase

import pytest
import torch
from speech import make_processor

from asrlib.data.text import ctc_length, label_ids, normalise_text, unknown_characters


@pytest.mark.parametrize(
    ("letters", "text", "expected"),
    [
        (ascii_lowercase, "HELLO World", "hello world"),
        (ascii_uppercase, "hello World", "HELLO WORLD"),
        (ascii_lowercase + ascii_uppercase, "Hello", "Hello"),
        (ascii_lowercase, "  two\twords\n\u00a0\u2028again ", "two words again"),
        (ascii_uppercase, "groß", "GROSS"),  # one letter whose upper case is two
        (ascii_lowercase, "", ""),
    ],
)
def test_text_takes_the_case_of_the_vocabulary(tmp_path, letters, text, expected):
    processor = make_processor(tmp_path, letters)
    assert normalise_text(text, processor) == expected
    assert normalise_text(text, processor.tokenizer) == expected
    assert unknown_characters(expected, processor) == []


def test_what_does_not_fit_the_vocabulary_is_named(tmp_path):
    processor = make_processor(tmp_path, ascii_lowercase)
    text = normalise_text('A "naïve" <s>|🎉 שלום', processor)
    assert unknown_characters(text, processor) == sorted('"ï<>|🎉' + "שלום")


def test_a_space_needs_a_token_too(tmp_path):
    processor = make_processor(tmp_path, delimiter="")
    assert unknown_characters("a b", processor) == [" "]


def test_labels_spell_the_text(tmp_path):
    processor = make_processor(tmp_path)
    ids = label_ids("it's", processor)
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["i", "t", "'", "s"]
    assert processor.tokenizer.convert_ids_to_tokens(label_ids("a b", processor)) == ["a", "|", "b"]


@pytest.mark.parametrize("ids", [[1, 2], [1, 2, 3], [1, 1], [1, 1, 1, 2, 2], [3, 1, 3, 1]])
def test_ctc_length_is_where_the_loss_becomes_finite(ids):
    def loss(frames: int) -> torch.Tensor:
        return torch.nn.functional.ctc_loss(
            torch.zeros(frames, 1, 4).log_softmax(-1), torch.tensor([ids]), [frames], [len(ids)]
        )

    assert loss(ctc_length(ids)).isfinite()
    assert loss(ctc_length(ids) - 1).isinf()
